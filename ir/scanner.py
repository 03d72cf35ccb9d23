"""Reading IR text: a cursor that knows words, punctuation, brackets and where it stands.

The parsers of the graph and kernel levels are recursive descent over it. Statements end at a
newline outside brackets; `#` starts a comment that runs to the end of the line. Expressions and
attribute values are cut out as text (`until`) and handed to their own parsers.
"""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Callable, Mapping
from typing import NoReturn, TypeVar

from .errors import ParseError
from .expr_text import parse as parse_expr
from .functions import DTYPES, FUNCTIONS, Expr, integer

T = TypeVar("T")
_WORD = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")
_INTEGER = re.compile(r"-?[0-9]+")
_SPACE = re.compile(r"[ \t]*")
_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_QUOTED = re.compile(r"'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\"")
_TOKEN = re.compile(
    r"[A-Za-z_0-9]+(?:\.[0-9]+)?"  # words and numbers
    r"|'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\""  # string literals
    r"|\.\.|[ \t\r]+|\n|."
)
_OPEN, _CLOSE = "([{", ")]}"
_JOINING = {"and", "or", "not"}

RESERVED = frozenset(
    {*keyword.kwlist, *DTYPES, *FUNCTIONS, "true", "false", "inf", "nan"}
    | {
        "kernel",
        "program",
        "intermediate",
        "text",
        "check",
        "grid",
        "axes",
        "lanes",
        "meta",
        "unit",
        "of",
        "live",
        "out",
        "inout",
    }
    | {"let", "tile", "load", "store", "dot", "over", "precision", "sum", "any", "cumsum", "graph"}
)
"""Words that no argument, axis, tile or scalar may be called."""


class Cursor:
    """A position in a text. Methods that read raise ParseError where the text does not fit."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    # where we are ------------------------------------------------------------------------------

    def place(self, at: int | None = None) -> tuple[int, int]:
        """1-based line and column of an offset (of the cursor unless given)."""
        before = self.text[: self.at if at is None else at]
        return before.count("\n") + 1, len(before) - before.rfind("\n")

    def fail(self, message: str, at: int | None = None) -> NoReturn:
        raise ParseError(message, *self.place(at))

    def shown(self) -> str:
        """What stands at the cursor, for messages."""
        if self.at >= len(self.text):
            return "the end of the text"
        rest = self.text[self.at :].split("\n", 1)[0]
        return repr(rest[:30]) if rest else "the end of the line"

    # space -------------------------------------------------------------------------------------

    def spaces(self) -> None:
        """Skip blanks within the line."""
        self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]

    def lines(self) -> None:
        """Skip blanks, line ends and comments."""
        self.at = _BLANK.match(self.text, self.at).end()  # type: ignore[union-attr]

    def end_statement(self) -> None:
        """Read the end of a line, comment included; the end of the text or a `}` ahead will do."""
        self.spaces()
        if self.at < len(self.text) and self.text[self.at] not in "\r\n#}":
            self.fail(f"expected the end of the statement; got {self.shown()}")
        self.lines()

    # pieces ------------------------------------------------------------------------------------

    def peek(self, token: str) -> bool:
        """Whether the token comes next; a word must end where the token ends."""
        end = self.at + len(token)
        runs_on = _WORD.match(token) and re.match(r"\w", self.text[end : end + 1])
        return self.text.startswith(token, self.at) and not runs_on

    def take(self, token: str) -> bool:
        """Read the token if it comes next (after blanks, which are skipped either way)."""
        self.spaces()
        if not self.peek(token):
            return False
        self.at += len(token)
        self.spaces()
        return True

    def expect(self, token: str, *, after_lines: bool = False) -> None:
        if after_lines:
            self.lines()
        if not self.take(token):
            self.fail(f"expected {token!r}; got {self.shown()}")

    def word(self, what: str = "a name") -> str:
        return self._match(_WORD, what)

    def integer(self, what: str = "an integer") -> int:
        return int(self._match(_INTEGER, what))

    def name(self, what: str) -> str:
        """A word that is free to be a name."""
        at = self.at
        word = self.word(what)
        if word in RESERVED:
            self.fail(f"expected {what}; {word!r} is a word of the language", at)
        return word

    def string(self, what: str) -> str:
        """The value of a string literal."""
        at = self.at
        source = self._match(_QUOTED, what)
        try:
            return str(ast.literal_eval(source))
        except (SyntaxError, ValueError) as error:
            self.fail(f"expected {what}; got {source} ({error})", at)

    def _match(self, pattern: re.Pattern[str], what: str) -> str:
        self.spaces()
        found = pattern.match(self.text, self.at)
        if found is None:
            self.fail(f"expected {what}; got {self.shown()}")
        self.at = found.end()
        self.spaces()
        return found.group()

    def one_of(self, words: Mapping[str, T] | tuple[str, ...], what: str) -> str:
        at = self.at
        word = self.word(what)
        if word not in words:
            self.fail(f"expected {what} ({', '.join(words)}); got {word!r}", at)
        return word

    # pieces that other parsers read ------------------------------------------------------------

    def until(self, *stops: str) -> tuple[str, int]:
        """(text, offset) up to a stop token, a line end or a comment outside brackets, or a closing bracket.

        `where` stops only after an operand: elsewhere it is the function `where(c, a, b)`.
        """
        self.spaces()
        start, depth, operand = self.at, 0, False
        while self.at < len(self.text):
            token = _TOKEN.match(self.text, self.at).group()  # type: ignore[union-attr]
            if depth == 0 and (token in ("\n", "#") or token in _CLOSE):
                break
            if depth == 0 and token in stops and (token != "where" or operand):
                break
            if token == "#":
                self.at = _BLANK.match(self.text, self.at).end()  # type: ignore[union-attr]
                continue
            depth += (token in _OPEN) - (token in _CLOSE)
            if not token.isspace():
                operand = (token[0].isalnum() or token[0] in "_'\")]}") and token not in _JOINING
            self.at += len(token)
        if depth > 0:
            self.fail("expected a closing bracket; got the end of the text", start)
        return self.text[start : self.at].rstrip(), start

    def expr(self, names: Mapping[str, Expr] | None, *stops: str) -> Expr:
        """An expression that ends where `until(*stops)` does. names: None takes every name for an integer."""
        text, start = self.until(*stops)
        if not text:
            self.fail(f"expected an expression; got {self.shown()}", start)
        line, column = self.place(start)
        text = " ".join(text.split()) if "\n" in text else text
        unknown = integer if names is None else None
        return parse_expr(text, names or {}, line=line, column=column, unknown=unknown)

    def items(self, open_: str, close: str, item: Callable[[], T]) -> tuple[T, ...]:
        """`( item, item, ... )`; items may stand on lines of their own."""
        self.expect(open_)
        self.lines()
        out: list[T] = []
        while not self.take(close):
            if out:
                self.expect(",")
                self.lines()
            out.append(item())
            self.lines()
        return tuple(out)
