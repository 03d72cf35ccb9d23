"""Reports of programs captured as graphs of torch: where their parts stand, capture by capture."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..report import Compiled, Left, Report


@dataclass
class Findings:
    """What was found in the pieces that a program was captured in, by piece. waiting: what was found in the
    one that is being captured."""

    pieces: dict[Any, list[Compiled | Left]] = field(default_factory=dict)
    waiting: dict[Any, Left] = field(default_factory=dict)

    def leave(self, module: Any, kind: str, where: str, why: str) -> None:
        """Note that a module of the piece which is being captured is left alone."""
        self.waiting[id(module), kind] = Left(kind, where, why)

    def add(self, piece: Any, parts: list[Compiled | Left]) -> None:
        """Note the parts of a piece that has been captured."""
        self.pieces[piece] = [*self.waiting.values(), *parts]
        self.waiting = {}

    def report(self) -> Report:
        """The parts found so far. The program is captured when it is first called."""
        parts = [part for piece in self.pieces.values() for part in piece]
        return Report(
            tuple(p for p in parts if isinstance(p, Compiled)), tuple(p for p in parts if isinstance(p, Left))
        )


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_ROOTS = tuple(str(folder) + os.sep for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))
_LIBRARY = re.compile(r"[\\/]transformers[\\/]integrations[\\/]")


def place(nodes: Any) -> str:
    """file:line of the innermost line of the user's program that made one of these nodes."""
    for node in nodes:
        found = list(frames(node))
        if found:
            return innermost(found)
        modules = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        if modules:  # a line of torch's own, which captures leave out
            return "module " + re.sub(r"^L\['\w+'\]\.?", "", modules[-1])
    return "an unknown line"


def innermost(found: list[tuple[str, int]]) -> str:
    """file:line of the last line that is no library's, which passes calls on; else of the last one."""
    own = [f for f in found if not f[0].startswith(_ROOTS) and not _LIBRARY.search(f[0])] or found
    return f"{own[-1][0]}:{own[-1][1]}" if own else "an unknown line"


def frames(node: fx.Node) -> Iterator[tuple[str, int]]:
    """The files and lines that a node was captured from, from outside in."""
    for match in _FRAME.finditer(node.meta.get("stack_trace") or ""):
        yield match["file"], int(match["line"])
