"""Breaking long lines of emitted Python where a formatter would: at brackets, commas, then operators."""

from __future__ import annotations

WIDTH = 100
INDENT = "    "
_OPERATORS = (" | ", " & ", " + ", " * ")


def wrap(text: str, depth: int, tail: str = "") -> list[str]:
    """The lines of one statement or argument at an indentation depth, followed by tail.

    >>> condition = " & ".join(f"(b_col[None, :] < limit_{n})" for n in range(3))
    >>> print("\\n".join(wrap(f"b_S = tl.where({condition}, b_S, 0.0)", 0)))
    b_S = tl.where(
        (b_col[None, :] < limit_0) & (b_col[None, :] < limit_1) & (b_col[None, :] < limit_2),
        b_S,
        0.0,
    )
    """
    line = INDENT * depth + text + tail
    if len(line) <= WIDTH or text.startswith("#"):
        return [line]
    for operator in _OPERATORS if not _is_statement(text) else ():
        first, *rest = _split(text, operator)
        if rest:
            lines = wrap(first, depth)
            for n, part in enumerate(rest):
                lines += wrap(f"{operator.lstrip()}{part}", depth, tail if n == len(rest) - 1 else "")
            return lines
    start, end = _largest_bracket(text)
    inside = text[start + 1 : end]
    if start < 0 or not inside:
        return [line]
    parts = _split(inside, ", ")
    comma = "," if len(parts) > 1 or (text[start] == "(" and text[start - 1 : start].isidentifier()) else ""
    lines = [INDENT * depth + text[: start + 1]]
    for part in parts:
        lines += wrap(part, depth + 1, comma)
    return [*lines, INDENT * depth + text[end:] + tail]


def _is_statement(text: str) -> bool:
    return " = " in text.partition("(")[0] or text.endswith(":")


def _split(text: str, separator: str) -> list[str]:
    """The pieces between separators that stand outside every bracket."""
    pieces, level, start = [], 0, 0
    for n, char in enumerate(text):
        level += (char in "([{") - (char in ")]}")
        if level == 0 and n >= start and text.startswith(separator, n):
            pieces.append(text[start:n])
            start = n + len(separator)
    return [*pieces, text[start:]]


def _largest_bracket(text: str) -> tuple[int, int]:
    """The outermost brackets that hold the most text; (-1, -1) when there are none."""
    best, level, start = (-1, -1), 0, 0
    for n, char in enumerate(text):
        if char in "([{":
            start = n if level == 0 else start
            level += 1
        if char in ")]}":
            level -= 1
            if level == 0 and n - start > best[1] - best[0]:
                best = (start, n)
    return best
