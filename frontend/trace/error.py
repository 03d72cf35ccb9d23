"""Errors of tracing: what went wrong, at the user's own line, and what to write instead."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType, TracebackType

from ...ir.errors import TraceError

_HERE = str(Path(__file__).parent) + os.sep
_LIBRARIES = ("torch", "numpy", "jax")


def trace_error(message: str, fix: str = "") -> TraceError:
    """A TraceError that points at the line of the user's function that is being captured."""
    return TraceError(_at(_first_user_line(_stack(sys._getframe(1))), message, fix))


def wrapped(error: Exception, role: str, code: CodeType | None) -> TraceError:
    """An exception that the user's function raised while it was captured, as a TraceError at its line."""
    place = _first_user_line(_raised(error.__traceback__))
    if place is None and code is not None:
        place = (code.co_filename, code.co_firstlineno, None)
    said = f"{type(error).__name__}: {error}"
    fix = (
        "It is called once, with stand-ins for the indices: use Python and torch operators on them, "
        "and index captured tensors by them"
    )
    return TraceError(_at(place, f"{role} raised {said}", fix))


def at_definition(code: CodeType | None, message: str, fix: str = "") -> TraceError:
    """A TraceError about a whole function, pointing at the line that defines it."""
    place = None if code is None else (code.co_filename, code.co_firstlineno, None)
    return TraceError(_at(place, message, fix))


Place = tuple[str, int, tuple[int, int] | None]  # file, line, columns of the expression


def _at(place: Place | None, message: str, fix: str) -> str:
    text = message + (f". {fix}" if fix else "")
    if place is None:
        return text
    file, line, columns = place
    source = linecache.getline(file, line).rstrip()
    shown = source.lstrip()
    if not shown:
        return f"{file}:{line}: {text}"
    quoted = f"    {shown}"
    if columns is not None:
        indent = len(source.encode()) - len(shown.encode())
        first, last = (max(c - indent, 0) for c in columns)
        quoted += f"\n    {' ' * first}{'^' * max(last - first, 1)}"
    return f"{file}:{line}: {text}\n{quoted}"


def _stack(frame: FrameType | None) -> Iterator[tuple[FrameType, int, int]]:
    while frame is not None:
        yield frame, frame.f_lineno, frame.f_lasti
        frame = frame.f_back


def _raised(traceback: TracebackType | None) -> Iterator[tuple[FrameType, int, int]]:
    """Frames of a traceback, innermost first."""
    frames = []
    while traceback is not None:
        frames.append((traceback.tb_frame, traceback.tb_lineno, traceback.tb_lasti))
        traceback = traceback.tb_next
    yield from reversed(frames)


def _first_user_line(frames: Iterator[tuple[FrameType, int, int]]) -> Place | None:
    for frame, line, instruction in frames:
        code = frame.f_code
        if not _is_ours(code.co_filename):
            return code.co_filename, line, _columns(code, instruction, line)
    return None


def _is_ours(file: str) -> bool:
    """Whether a file belongs to the tracer or to a library through which the user's function called it."""
    if file.startswith("<frozen") or file.startswith(_HERE):
        return True
    loaded = (getattr(sys.modules.get(name), "__file__", None) for name in _LIBRARIES)
    return any(at is not None and file.startswith(str(Path(at).parent)) for at in loaded)


def _columns(code: CodeType, instruction: int, line: int) -> tuple[int, int] | None:
    """Where on its line the expression stands that was being evaluated."""
    for i, (start, end, first, last) in enumerate(code.co_positions()):
        if i == instruction // 2:
            on_one_line = start == end == line and first is not None and last is not None
            return (first, last) if on_one_line else None  # type: ignore[return-value]
    return None
