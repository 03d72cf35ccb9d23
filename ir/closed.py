"""Closed forms: isl functions and sets as expressions with `// % min max where`, exact."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import islpy as isl
import sympy
from sympy.logic.boolalg import Boolean

from .errors import UnsupportedError
from .expr import Expr, floordiv, floormod, integer, maximum, minimum, where
from .sets import DIV, IN, PARAM, SET, flatten, locked


@locked
def to_expr(function: isl.PwAff) -> Expr:
    """The closed form of a piecewise quasi-affine function, exact on its domain.

    Written as a minimum, a maximum or a clamp of its pieces where isl proves it, else with `where`.
    """
    parts: dict[Expr, _Part] = {}
    for points, aff in function.coalesce().get_pieces():
        value = _affine(aff)
        known = parts.get(value)
        domain = points if known is None else known[0].union(points)
        parts[value] = domain.coalesce(), isl.PwAff.from_aff(aff), value
    if not parts:
        return sympy.Integer(0)
    joined = _join_extremes(list(parts.values())) if len(parts) <= MAX_JOINED else list(parts.values())
    (rest, _, out), *others = reversed(joined)
    for points, _, value in others:
        rest = rest.union(points)
        out = where(condition(points.gist(rest).coalesce()), value, out)
    return out


MAX_JOINED = 8  # functions of more pieces are written with `where`
_Part = tuple[isl.Set, isl.PwAff, Expr]


def _join_extremes(parts: list[_Part]) -> list[_Part]:
    """Parts (domain, function, its form) joined while two of them are the extreme of their functions."""
    for i, j in itertools.combinations(range(len(parts)), 2):
        (here, f, f_), (there, g, g_) = parts[i], parts[j]
        for above, extreme, extreme_ in (
            (isl.PwAff.ge_set, isl.PwAff.max, maximum),
            (isl.PwAff.le_set, isl.PwAff.min, minimum),
        ):
            if here.is_subset(above(f, g)) and there.is_subset(above(g, f)):
                joined = here.union(there).coalesce(), extreme(f, g).coalesce(), extreme_(f_, g_)
                return _join_extremes([joined, *parts[:i], *parts[i + 1 : j], *parts[j + 1 :]])
    return parts


def _affine(aff: isl.Aff) -> Expr:
    """An isl affine form with floor divisions as an expression; `e - c * (e // c)` becomes `e % c`."""
    scale = int(aff.get_denominator_val().to_python())
    if scale != 1:  # fractions in an integer function cancel where it is defined
        return floordiv(_affine(aff.scale_val(isl.Val(scale))), sympy.Integer(scale))
    total: Expr = sympy.Integer(int(aff.get_constant_val().to_python()))
    for kind_ in (PARAM, IN):
        for i in range(aff.dim(kind_)):
            c = int(aff.get_coefficient_val(kind_, i).to_python())
            if c:
                total += c * integer(str(aff.get_dim_name(kind_, i)))
    for i in range(aff.dim(DIV)):
        c = int(aff.get_coefficient_val(DIV, i).to_python())
        if c:
            div = aff.get_div(i)
            m = int(div.get_denominator_val().to_python())
            inner = _affine(div.scale_val(isl.Val(m)))
            total = _add_division(total, c, inner, m)
    return total


def _add_division(total: Expr, c: int, inner: Expr, m: int) -> Expr:
    """total + c * (inner // m), with whole multiples of m taken out: 63 x // 64 is x + -x // 64."""
    small = whole = sympy.Integer(0)
    for factor, coefficient in inner.as_coefficients_dict().items():
        quotient, r = divmod(int(coefficient), m)
        if factor != 1 and 2 * r > m:
            quotient, r = quotient + 1, r - m
        small, whole = small + r * factor, whole + quotient * factor
    plain = total + c * (floordiv(small, sympy.Integer(m)) + whole)
    if c % m:
        return plain
    remainder = total + (c // m) * (small - floormod(small, sympy.Integer(m))) + c * whole
    return min(plain, remainder, key=size)


def size(expr: Expr) -> int:
    """How many nodes an expression has."""
    return sum(1 for _ in sympy.preorder_traversal(expr))


@locked
def condition(points: isl.Set) -> Expr:
    """The predicate of a set over the names of its dimensions and parameters, exact."""
    flat = flatten(points).params() if points.dim(SET) else points.params()
    if flat.is_empty():
        return sympy.false
    build = isl.AstBuild.from_context(isl.Set("{ : }"))
    found = _from_ast(build.expr_from_set(flat.coalesce()))
    return found if isinstance(found, Boolean) else sympy.Ne(found, 0)


_OP: Any = isl.ast_expr_op_type
_AST: dict[Any, Callable[..., Any]] = {
    _OP.and_: sympy.And,
    _OP.and_then: sympy.And,
    _OP.or_: sympy.Or,
    _OP.or_else: sympy.Or,
    _OP.max: lambda *a: functools.reduce(maximum, a),
    _OP.min: lambda *a: functools.reduce(minimum, a),
    _OP.minus: lambda a: -a,
    _OP.add: lambda a, b: a + b,
    _OP.sub: lambda a, b: a - b,
    _OP.mul: lambda a, b: a * b,
    _OP.div: floordiv,
    _OP.fdiv_q: floordiv,
    _OP.pdiv_q: floordiv,
    _OP.pdiv_r: floormod,
    _OP.zdiv_r: floormod,
    _OP.cond: where,
    _OP.select: where,
    **{
        op: functools.partial(relation, evaluate=False)  # sympy's search for signs takes a millisecond
        for op, relation in (
            (_OP.eq, sympy.Eq),
            (_OP.le, sympy.Le),
            (_OP.lt, sympy.Lt),
            (_OP.ge, sympy.Ge),
            (_OP.gt, sympy.Gt),
        )
    },
}


def _from_ast(node: isl.AstExpr) -> Expr:
    match node.get_type():
        case isl.ast_expr_type.int:
            return sympy.Integer(int(node.get_val().to_python()))
        case isl.ast_expr_type.id:
            return integer(node.get_id().get_name())
    args = [_from_ast(node.get_op_arg(i)) for i in range(node.get_op_n_arg())]
    op = node.get_op_type()
    if op in (_OP.and_, _OP.and_then, _OP.or_, _OP.or_else):
        args = [a if isinstance(a, Boolean) else sympy.Ne(a, 0) for a in args]
    return _AST[op](*args)


@locked
def bounds(points: isl.Set, dim: str) -> tuple[Expr, Expr, Expr]:
    """(lo, hi, domain): least and greatest value of one dimension in terms of everything else.

    `domain` is the exact condition under which there is a value; hi is `oo` when nothing bounds the
    dimension from above. { lo <= dim <= hi and domain } is the set itself if and only if
    `convex(points, dim)`. Raises UnsupportedError when the dimension has no least value, or has a
    greatest one for some points only.
    """
    flat = flatten(points, dim)
    if flat.is_empty():
        return sympy.Integer(0), sympy.Integer(-1), sympy.false
    if not flat.dim_has_lower_bound(SET, 0):
        raise UnsupportedError(f"bounds of {dim}: it has no least value in {points}")
    high: Expr = sympy.oo
    if flat.dim_has_any_upper_bound(SET, 0):
        if not flat.dim_has_upper_bound(SET, 0):
            raise UnsupportedError(
                f"bounds of {dim}: it is bounded above in parts of {points} only; split the set first"
            )
        high = to_expr(flat.dim_max(0))
    return to_expr(flat.dim_min(0)), high, condition(flat.params())
