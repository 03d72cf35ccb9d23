"""Indented text and fresh names: what the emitters write into."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Lines:
    """Lines of a script under construction."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._indent = ""
        self._count = 0

    def line(self, text: str) -> None:
        self.lines.append(f"{self._indent}{text}" if text else "")

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """`head` and, indented, what is written inside. Names bound inside may be bound again after it."""
        self.line(head)
        indent, count = self._indent, self._count
        self._indent += "    "
        yield
        self._indent, self._count = indent, count

    def let(self, stem: str, text: str) -> str:
        """Bind an intermediate value, here and now, to a name of its own."""
        name = f"{stem}_{self._count}"
        self._count += 1
        self.line(f"{name}: T.let = {text}")
        return name

    def __str__(self) -> str:
        return "\n".join(self.lines) + "\n"
