"""What became of a captured program: the parts that are compiled, and those that are left, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Compiled:
    """A part that gossamer computes. kind: "attention" or "experts". where: file:line of the user's program.
    detail: what else there is to say, such as the adapter that computes it."""

    kind: str
    where: str
    detail: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, ("compiled", self.kind, "at", self.where, self.detail)))


@dataclass(frozen=True)
class Left:
    """A part that is left to the framework, and why."""

    kind: str
    where: str
    why: str

    def __str__(self) -> str:
        return f"left {self.kind} at {self.where}: {self.why}"


@dataclass(frozen=True)
class Report:
    """compiled, left: the parts, in the order of the program. Its text has one line for each.

    A program that was captured anew, for other shapes or types, reports the last capture of each piece."""

    compiled: tuple[Compiled, ...] = ()
    left: tuple[Left, ...] = ()

    def __str__(self) -> str:
        lines = [str(part) for part in (*self.compiled, *self.left)]
        return "\n".join(lines) or "nothing captured that gossamer compiles"
