"""Rules of the operations over ragged groups (see ir/ragged.py); `graph_verify` calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import sympy

from . import expr as E
from .graph import Extent, Value
from .quantized import ELEMENTS, NESTED, PER_EXPERT, SCALES, ZEROS, Quantized
from .ragged import ADDS, CHOOSES, HALVES

if TYPE_CHECKING:
    from .graph_verify import Checker

Shape = tuple[Extent, ...]


def _count(c: Checker, *counts: int) -> None:
    if len(c.operands) not in counts:
        c.fail("operands", f"expected {' or '.join(map(str, counts))}; got {len(c.operands)}")


def _integers(c: Checker, *places: int) -> None:
    for value in (c.operands[p] for p in places):
        if value.dtype not in ("i32", "i64"):
            c.fail("type", f"%{value.name}: expected i32 or i64; got {value.dtype}")


def _group(c: Checker) -> tuple[Shape, ...]:
    (ids,) = c.shapes(1, (2,))
    _count(c, 1)
    _integers(c, 0)
    return ("rows",), (c.attr("experts", int) + 1,), ids


def _gather(c: Checker) -> tuple[Shape, ...]:
    x, tokens = c.shapes(2, (2, 1))
    _count(c, 2)
    _integers(c, 1)
    return ((tokens[0], x[1]),)


def _matrices(c: Checker, q: Quantized, operands: tuple[Value, ...]) -> tuple[Extent, ...]:
    """The shape [E, N, K] of what planes, scales, zero points and widths stand for."""
    if q.element not in ELEMENTS or q.scale not in SCALES:
        c.fail("attrs", f"expected an element of {ELEMENTS} and scales of {SCALES}; got {q}")
    if q.planes not in (*NESTED, (8,), (4,), (2,)) or q.bits not in (PER_EXPERT, *q.planes):
        c.fail("attrs", f"expected planes of 8, 4 or 2 bits, or {NESTED}, and bits among them; got {q}")
    if q.columns < 1 or q.group < 1:
        c.fail("attrs", f"expected at least one column, and one a group; got {q}")
    if q.zero is not None and (q.zero not in ZEROS or q.element != "int" or len(q.planes) > 1):
        c.fail("attrs", f"expected zero points of {ZEROS}, of integers that are not nested; got {q}")
    if len(operands) != q.operands:
        c.fail("operands", f"expected {q.operands} of quantised matrices; got {len(operands)}")
    first = operands[0].shape
    rows = [(*first[:2], q.row_bytes(n)) for n in range(len(q.read))]
    rows += [(*first[:2], q.groups)] * (1 + (q.zero is not None))
    for value, shape in zip(operands, [*rows, (first[0],)], strict=False):
        c.same(f"shape of %{value.name}", value.shape, shape)
    return (*first[:2], q.columns)


def _dequantize(c: Checker) -> tuple[Shape, ...]:
    operands = c.operands
    if c.attr("used", bool, needed=False):
        *operands, bounds = operands
        c.same("number of bounds, one more than groups", bounds.shape, (int(operands[0].shape[0]) + 1,))
    return (_matrices(c, c.attr("format", Quantized), tuple(operands)),)


def _operands(c: Checker, count: int, ranks: tuple[int, ...]) -> list[Shape]:
    """The shapes of so many operands; codes count as the matrices that they stand for."""
    q = c.attr("quantized", Quantized, needed=False)
    if q is None:
        _count(c, count)
        return c.shapes(count, ranks)
    _count(c, count + q.operands - 1)
    shapes = c.shapes(count, ranks)
    shapes[1] = _matrices(c, q, (c.operands[1], *c.operands[count:]))
    return shapes


def _product(c: Checker, a: Shape, w: Shape, bounds: Shape) -> Extent:
    """The number of columns of a by the matrices w."""
    columns = _columns(c, a, w)
    if isinstance(w[0], int):
        c.same("number of bounds, one more than groups", bounds[0], w[0] + 1)
    return columns


def _columns(c: Checker, a: Shape, w: Shape) -> Extent:
    inner, columns = (w[2], w[1]) if c.attr("transpose_b", bool, needed=False) else (w[1], w[2])
    c.same("summed extent", a[1], inner)
    return columns


def _bias(c: Checker, bias: Shape, w: Shape, columns: Extent) -> None:
    c.same("number of groups", bias[0], w[0])
    c.same("number of columns", bias[1], columns)


def _chooses(c: Checker, options: tuple[str, ...] = CHOOSES) -> str | None:
    """Which matrices rows choose among, where they do."""
    chooses: str | None = c.attr("chooses", str, needed=False)
    if chooses is not None and chooses not in options:
        c.fail("attrs", f"chooses: expected one of {', '.join(options)}; got {chooses!r}")
    if chooses == "b" and c.attr("adds", str, needed=False) is None:
        c.fail("attrs", "chooses: 'b' is what `adds` has added; got no adds")
    return chooses


def _chosen(c: Checker, rows: Extent, first: int) -> None:
    """The operands from `first` on: tokens of rows, and the choices of these."""
    tokens, choice = (value.shape for value in c.operands[first : first + 2])
    _integers(c, first, first + 1)
    if len(tokens) != 1 or len(choice) != 1:
        c.fail("type", f"expected tokens and a choice of 1 dimension; got {tokens} and {choice}")
    c.same("number of rows", tokens[0], rows)


def _added(c: Checker, w: Shape, columns: Extent, operands: list[Shape]) -> list[Shape]:
    """The operands behind those that `adds` announces."""
    adds = c.attr("adds", str, needed=False)
    if adds is None:
        return operands
    if adds not in ADDS:
        c.fail("attrs", f"adds: expected one of {', '.join(ADDS)}; got {adds!r}")
    t, b, *rest = operands
    b = b[-3:]
    inner, across = (b[2], b[1]) if adds == "rows" else (b[1], b[2])
    c.same("number of groups", b[0], w[0])
    c.same("summed extent", t[1], inner)
    c.same("number of columns", across, columns)
    return rest


def _grouped_matmul(c: Checker) -> tuple[Shape, ...]:
    chooses = _chooses(c)
    added = (2, 3 + (chooses == "b")) if c.attr("adds", str, needed=False) else ()
    count = 3 + len(added)
    plain = len(c.operands) - 2 * bool(chooses)
    if plain not in (count, count + 1):
        _count(c, *(n + 2 * bool(chooses) for n in (count, count + 1)))
    a, w, bounds, *rest = c.shapes(plain, (2, 3 + (chooses == "w"), 1, *added, 2))
    _integers(c, 2)
    w = w[-3:]
    columns = _product(c, a, w, bounds)
    bias = _added(c, w, columns, rest)
    if chooses:
        _chosen(c, a[0], plain)
    for one in bias:
        _bias(c, one, w, columns)
    return ((a[0], columns),)


def _split(c: Checker) -> tuple[Shape, ...]:
    (x,) = c.shapes(1)
    _count(c, 1)
    c.attr("interleaved", bool, needed=False)
    half = (*x[:-1], _half(c, x[-1]))
    return half, half


def _half(c: Checker, extent: Extent) -> int:
    if not isinstance(extent, int) or extent % 2:
        c.fail("type", f"expected an even number of columns; got {extent}")
    return extent // 2


def _combine(c: Checker) -> tuple[Shape, ...]:
    _count(c, 3, 4)
    ragged = len(c.operands) == 4
    y, place, *rest = c.shapes(len(c.operands), (2, 1, 1, 1) if ragged else (2, 2, 2))
    _integers(c, 1, *([2] if ragged else []))
    if ragged:
        c.same("number of rows", place[0], y[0])
        c.same("number of weights", rest[1][0], y[0])
        return (("T", y[1]),)
    c.same("number of tokens", place[0], rest[0][0])
    c.same("top_k", place[1], rest[0][1])
    return ((place[0], y[1]),)


def _grouped_gemm(c: Checker) -> tuple[Shape, ...]:
    gathers, biased = (bool(c.attr(name, bool, needed=False)) for name in ("gathers", "biased"))
    chooses = _chooses(c)
    added = [2, 3 + (chooses == "b")] if c.attr("adds", str, needed=False) else []
    ranks = (2, 3 + (chooses == "w"), 1, *([1] if gathers else []), *added, *([2] if biased else []))
    ranks += (1, 1) if chooses else ()
    a, w, bounds, *rest = _operands(c, len(ranks), ranks)
    w = w[-3:]
    columns = _product(c, a, w, bounds)
    rows = rest[0][0] if gathers else a[0]
    if chooses:
        _chosen(c, rows, len(ranks) - 2)
        rest = rest[:-2]
    _added(c, w, columns, rest[gathers:])
    if biased:
        _bias(c, rest[-1], w, columns)
    halves, expr = c.attr("halves", str, needed=False), c.attr("expr", sympy.Basic, needed=False)
    if halves is not None:
        if halves not in HALVES:
            c.fail("attrs", f"halves: expected one of {', '.join(HALVES)}; got {halves!r}")
        columns = _half(c, columns)
    names = {"x0", "x1"} if halves else {"x0"}
    if expr is not None and not {s.name for s in E.symbols(expr)} <= names:
        c.fail("attrs", f"expr: expected one of {', '.join(sorted(names))}; got {E.to_text(expr)}")
    kept = w[1] if c.attr("transpose_b", bool, needed=False) else w[2]
    return (rows, columns), (rows, kept)


def _grouped_outer(c: Checker) -> tuple[Shape, ...]:
    gathers = c.attr("gathers", str, needed=False)
    masked, chooses = (bool(c.attr(name, bool, needed=False)) for name in ("masked", "chooses"))
    plain = 3 + bool(gathers) + masked
    _count(c, plain + 2 * chooses)
    a, b, bounds, *tokens = c.shapes(len(c.operands), (2, 2, 1, 1, 1, 1, 1))
    _integers(c, *range(2, len(c.operands)))
    if not gathers:
        c.same("number of rows", a[0], b[0])
    elif gathers not in ("a", "b"):
        c.fail("attrs", f"gathers: expected 'a' or 'b'; got {gathers!r}")
    else:
        c.same("number of rows", (b if gathers == "a" else a)[0], tokens[0][0])
    if not isinstance(bounds[0], int):
        c.fail("type", f"expected a number of bounds; got {bounds[0]}")
    made = (bounds[0] - 1, a[1], b[1])
    if not chooses:
        return (made,)
    _chosen(c, b[0] if gathers == "a" else a[0], plain)
    return ((c.op.output.shape[0], *made),)  # as many choices as there are results


def _map_grad_rows(c: Checker) -> tuple[Shape, ...]:
    g, dh, weights, _ = c.shapes(4, (2, 2, 1, 1))
    _count(c, 4)
    _integers(c, 3)
    c.attr("expr", sympy.Basic)
    half = _half(c, g[1]) if c.attr("halves", str, needed=False) else g[1]
    c.same("number of columns", half, dh[1])
    c.same("number of rows", g[0], dh[0])
    c.same("number of weights", weights[0], dh[0])
    return g, dh, weights


def _entry(c: Checker, first: tuple[int, ...]) -> tuple[list[Shape], Extent]:
    """The shapes of the first operands of an operation on entries, and its columns."""
    biased, adds = bool(c.attr("biased", bool, needed=False)), c.attr("adds", str, needed=False)
    chooses = _chooses(c, ("b",)) is not None
    ranks = (
        *first,
        *([2] if biased else []),
        *([3 + chooses] * 2 if adds else []),
        *([1] if chooses else []),
    )
    a, w, *rest = _operands(c, len(ranks), ranks)
    _integers(c, 2, *([len(ranks) - 1] if chooses else []))
    columns, more = _columns(c, a, w), rest[len(first) - 2 :]
    if biased:
        _bias(c, more.pop(0), w, columns)
    if adds:
        c.attr("low", sympy.Basic)
        low, b = (shape[-3:] for shape in more[:2])
        c.same("number of groups", low[0], w[0])
        c.same("summed extent", a[1], low[2])
        _added(c, w, columns, [(a[0], low[1]), b])
    return [a, w, *rest], columns


def _entry_gemm(c: Checker) -> tuple[Shape, ...]:
    (a, _, ids, *_), columns = _entry(c, (2, 3, 2))
    c.same("number of tokens", a[0], ids[0])
    return (("rows", _half(c, columns) if c.attr("halves", str, needed=False) else columns),)


def _entry_combine(c: Checker) -> tuple[Shape, ...]:
    (_, _, ids, weights, *_), columns = _entry(c, (2, 3, 2, 2))
    c.same("number of tokens", ids[0], weights[0])
    c.same("top_k", ids[1], weights[1])
    return ((ids[0], columns),)


SHAPES: dict[str, Callable[[Checker], tuple[Shape, ...]]] = {
    "group": _group,
    "dequantize": _dequantize,
    "gather": _gather,
    "grouped_matmul": _grouped_matmul,
    "split": _split,
    "combine": _combine,
    "grouped_gemm": _grouped_gemm,
    "grouped_outer": _grouped_outer,
    "map_grad_rows": _map_grad_rows,
    "entry_gemm": _entry_gemm,
    "entry_combine": _entry_combine,
}
