"""Closed forms: isl functions and sets as expressions with `// % min max where`, exact."""

from __future__ import annotations

import functools
from collections.abc import Callable

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
    function = function.coalesce()
    pieces = [(s, isl.PwAff.from_aff(a)) for s, a in function.get_pieces()]
    if not pieces:
        return sympy.Integer(0)
    values = [_affine(a) for _, a in function.get_pieces()]
    if len(pieces) == 1:
        return values[0]
    domain = function.domain()
    whole = [a for _, a in pieces]
    forms = [(functools.reduce(f, whole), functools.reduce(g, values)) for f, g in _EXTREMES]
    if len(pieces) == 3:
        for i, j, k in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):
            for (inner, inner_), (outer, outer_) in (_EXTREMES, _EXTREMES[::-1]):
                forms.append(
                    (
                        outer(inner(whole[i], whole[j]), whole[k]),
                        outer_(inner_(values[i], values[j]), values[k]),
                    )
                )
    for candidate, form in forms:
        if candidate.intersect_domain(domain).is_equal(function):
            return form
    out = values[-1]
    rest = functools.reduce(isl.Set.union, [s for s, _ in pieces])
    for (points, _), value in zip(pieces[:-1][::-1], values[:-1][::-1], strict=True):
        out = where(condition(points.gist(rest)), value, out)
    return out


_EXTREMES = ((isl.PwAff.max, maximum), (isl.PwAff.min, minimum))


def _affine(aff: isl.Aff) -> Expr:
    """An isl affine form with floor divisions as an expression; `e - c * (e // c)` becomes `e % c`."""
    scale = int(aff.get_denominator_val().to_python())
    if scale != 1:
        raise UnsupportedError(f"a rational affine form has no integer expression: {aff}")
    total: Expr = sympy.Integer(int(aff.get_constant_val().to_python()))
    for kind_ in (PARAM, IN):
        for i in range(aff.dim(kind_)):
            c = int(aff.get_coefficient_val(kind_, i).to_python())
            if c:
                total += c * integer(aff.get_dim_name(kind_, i))
    for i in range(aff.dim(DIV)):
        c = int(aff.get_coefficient_val(DIV, i).to_python())
        if c:
            div = aff.get_div(i)
            m = int(div.get_denominator_val().to_python())
            inner = _affine(div.scale_val(isl.Val(m)))
            total = _add_division(total, c, inner, m)
    return total


def _add_division(total: Expr, c: int, inner: Expr, m: int) -> Expr:
    constant, variable = inner.as_coeff_Add()
    inner = variable + int(constant) % m
    plain = total + c * (floordiv(inner, sympy.Integer(m)) + int(constant) // m)
    if c % m:
        return plain
    remainder = total + (c // m) * (inner - floormod(inner, sympy.Integer(m)) + (int(constant) // m) * m)
    size = [sum(1 for _ in sympy.preorder_traversal(e)) for e in (plain, remainder)]
    return remainder if size[1] < size[0] else plain


@locked
def condition(points: isl.Set) -> Expr:
    """The predicate of a set over the names of its dimensions and parameters, exact."""
    flat = flatten(points).params() if points.dim(SET) else points.params()
    if flat.is_empty():
        return sympy.false
    build = isl.AstBuild.from_context(isl.Set("{ : }"))
    return _from_ast(build.expr_from_set(flat.coalesce()))


_OP = isl.ast_expr_op_type
_AST: dict[int, Callable[..., Expr]] = {
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
    _OP.eq: sympy.Eq,
    _OP.le: sympy.Le,
    _OP.lt: sympy.Lt,
    _OP.ge: sympy.Ge,
    _OP.gt: sympy.Gt,
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
