"""progression: recognise a set of pairs as one term, and prove it.

A region is *regular* when the columns of every row are one arithmetic progression with a stride common
to all rows: first + stride * s, 0 <= s < count. With widths, when they are a box of such progressions
in the dimensions of the index space. Both are set equations, decided by isl for all rows and all values
of the parameters at once: the region equals its own hull of that form.

    >>> from ..ir.expr import to_text
    >>> points = isl.Set("{ [q, k] : 0 <= k <= q and (q - k) mod 4 = 0 }")
    >>> [line] = term(points).progressions
    >>> line.stride, to_text(line.offset), to_text(line.first), to_text(line.count)
    (4, 'q % 4', 'q % 4', 'q // 4 + 1')

Leaves alone: regions that are not regular; the answer is None.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import islpy as isl
import sympy

from ..ir.affine import IN, OUT, PARAM, SET, condition, flatten, locked, to_expr, to_pw_aff, to_sets
from ..ir.closed import size
from ..ir.errors import VerifyError
from ..ir.expr import Expr, all_of, floordiv, integer
from ..ir.formats import ACSR, Progression
from .delinearize import coordinates

UP, DOWN = isl.Map("{ [x] -> [y] : y >= x }"), isl.Map("{ [x] -> [y] : y <= x }")


@locked
def term(region: isl.Set, widths: Sequence[int] = ()) -> ACSR | None:
    """The region as one term, proven; None when it is not regular. region: a set over [q, k], q, k >= 0."""
    lines = regular(region, tuple(widths))
    return None if lines is None else build(region, tuple(widths), lines)


def regular(region: isl.Set, widths: tuple[int, ...]) -> list[isl.Set] | None:
    """One set a dimension whose product is the region, each a progression a row; None when there are none.

    They are sets over the one coordinate k (or k0, k1, ...), with the row coordinates as parameters.
    """
    if not widths:
        line = flatten(region, "k")
        return [line] if _regular_line(line) else None
    lifted = region.apply(unfolding(widths)).coalesce()
    rank = len(widths) + 1
    sides, product = [], isl.Set.universe(lifted.get_space())
    for d in range(rank):
        others = [f"k{e}" for e in range(rank) if e != d]
        side = lifted
        for name in others:
            side = side.project_out(SET, side.find_dim_by_name(SET, name), 1)
        side = side.coalesce()
        sides.append(side)
        at = rank + d
        wide = side.insert_dims(SET, rank, d).insert_dims(SET, at + 1, rank - 1 - d)
        product = product.intersect(wide.reset_tuple_id() if wide.has_tuple_id() else wide)
    if not product.is_equal(lifted):
        return None
    lines = [flatten(side, f"k{d}") for d, side in enumerate(sides)]
    return lines if all(map(_regular_line, lines)) else None


@functools.lru_cache(maxsize=64)
def unfolding(widths: tuple[int, ...]) -> isl.Map:
    """The map from [q, k] to [q0, q1, ..., k0, k1, ...] of the index space with these widths."""
    ranks = range(len(widths) + 1)
    names = [f"{x}{d}" for x in "qk" for d in ranks]
    linear = {x: f"{x}0" for x in "qk"}
    for d, w in enumerate(widths, 1):
        linear = {x: f"({w} * {text} + {x}{d})" for x, text in linear.items()}
    inside = [f"0 <= {x}{d} < {w}" for d, w in enumerate(widths, 1) for x in "qk"]
    equal = f"q = {linear['q']} and k = {linear['k']}"
    return isl.Map(f"{{ [q, k] -> [{', '.join(names)}] : {equal} and {' and '.join(inside)} }}")


def _regular_line(line: isl.Set) -> bool:
    """Whether the coordinates are one progression for all parameters, bounded above for all or for none."""
    if bounded(line) is None:
        return False
    hull = line.apply(UP).intersect(line.apply(DOWN))
    info = line.get_stride_info(0)
    if info.get_stride().to_python() > 1:
        hull = hull.intersect(_residue(line, info))
    return hull.is_equal(line)


def bounded(line: isl.Set) -> bool | None:
    """Whether the coordinates end, in every row (True) or in none (False); None when rows differ."""
    open_ended = [b for b in map(isl.Set.from_basic_set, line.get_basic_sets()) if not _has_max(b)]
    if not open_ended:
        return True
    rows = open_ended[0].params()
    for b in open_ended[1:]:
        rows = rows.union(b.params())
    return False if line.params().is_subset(rows) else None


def _has_max(line: isl.Set) -> bool:
    if not line.dim_has_upper_bound(SET, 0):
        return False
    try:
        line.dim_max(0)  # the syntactic answer overlooks coordinates that only a division bounds
    except isl.Error:
        return False
    return True


def _residue(line: isl.Set, info: isl.StrideInfo) -> isl.Set:
    """The coordinates congruent to the offset of a stride."""
    here = isl.Aff.var_on_domain(isl.LocalSpace.from_space(line.get_space()), SET, 0)
    zero = isl.Aff.zero_on_domain(isl.LocalSpace.from_space(line.get_space()))
    return isl.PwAff.from_aff(here.sub(info.get_offset()).mod_val(info.get_stride())).eq_set(
        isl.PwAff.from_aff(zero)
    )


def build(region: isl.Set, widths: tuple[int, ...], lines: list[isl.Set]) -> ACSR:
    """The closed form of a regular region. lines: what `regular` answered."""
    rows = region.project_out(SET, 1, 1).coalesce()
    known = isl.Set("{ [q] : q >= 0 }")
    progressions = tuple(_progression(line) for line in lines)
    return ACSR(widths, progressions, condition(rows.gist(known).coalesce()), str(as_map(region)))


def _progression(line: isl.Set) -> Progression:
    info = line.get_stride_info(0)
    stride = int(info.get_stride().to_python())
    known = _row_context(line)
    first = line.dim_min(0)
    offset = _closed(first.mod_val(isl.Val(stride)), known) if stride == 1 else _offset(info, first, known)
    if not bounded(line):
        return Progression(stride, offset, _closed(first, known), sympy.oo)
    steps = line.dim_max(0).sub(first).scale_down_val(isl.Val(stride)).floor()
    forms = [_closed(steps, known) + 1]
    last, low = _closed(line.dim_max(0), known), _closed(first, known)
    whole: Expr = floordiv(last - low, sympy.Integer(stride))
    forms.append(whole + 1)
    return Progression(stride, offset, low, min(forms, key=size))


def _offset(info: isl.StrideInfo, first: isl.PwAff, known: isl.Set) -> Expr:
    offset = isl.PwAff.from_aff(info.get_offset()).mod_val(info.get_stride()).project_domain_on_params()
    forms = [_closed(offset, known), _closed(first.mod_val(info.get_stride()), known)]
    return min(forms, key=size)


def _row_context(line: isl.Set) -> isl.Set:
    """What is known of the row coordinates: none is negative."""
    names = [line.get_dim_name(PARAM, i) for i in range(line.dim(PARAM))]
    names = [n for n in names if n[0] == "q" and n not in ("q_len",)]
    return isl.Set(f"[{', '.join(names)}] -> {{ : {' and '.join(f'{n} >= 0' for n in names) or 'true'} }}")


def _closed(function: isl.PwAff, known: isl.Set) -> Expr:
    return to_expr(function.coalesce().gist_params(known).coalesce())


def box(sides: list[isl.Set], widths: tuple[int, ...], region: isl.Map) -> ACSR | None:
    """The product of sides, sets over [q0, k0], [q1, k1], ..., as one term; None when a side is irregular.

    region: the map from q to k that the product is.
    """
    lines = [flatten(side, f"k{d}") for d, side in enumerate(sides)]
    if not all(map(_regular_line, lines)):
        return None
    progressions = tuple(map(_progression, lines))
    for d, (side, p) in enumerate(zip(sides, progressions, strict=True)):
        rows = side.project_out(SET, 1, 1).insert_dims(SET, 1, 1).set_dim_name(SET, 1, f"k{d}")
        inside = isl.Set(f"{{ [q{d}, k{d}] : q{d} >= 0 and k{d} >= 0 }}")
        if not _on(p, f"k{d}", (f"q{d}", f"k{d}"), inside).intersect(rows).is_equal(side):
            raise VerifyError(f"closed form differs from its side {side}: {p}")
    return ACSR(widths, progressions, _rows_of(sides, widths), str(region))


def _rows_of(sides: list[isl.Set], widths: tuple[int, ...]) -> Expr:
    """Which rows have the product of sides, as a condition on q."""
    rules = []
    for d, (side, forms) in enumerate(zip(sides, coordinates("q", widths), strict=True)):
        extent = "" if d == 0 else f" and q{d} < {widths[d - 1]}"
        rows = side.project_out(SET, 1, 1).gist(isl.Set(f"{{ [q{d}] : 0 <= q{d}{extent} }}")).coalesce()
        rules.append(condition(rows).xreplace({integer(f"q{d}"): forms[0]}))
    return all_of(rules)


def is_closed_form(found: ACSR, region: isl.Set) -> bool:
    """Whether a term's closed forms say exactly the region over [q, k], compared in the index space."""
    rank = len(found.progressions)
    keys = ["k"] if not found.widths else [f"k{d}" for d in range(rank)]
    dims = ("q", "k") if not found.widths else (*(f"q{d}" for d in range(rank)), *keys)
    points = isl.Set(f"{{ [{', '.join(dims)}] : {' and '.join(f'{x} >= 0' for x in dims)} }}")
    rows = to_sets(found.rows)[0]
    if found.widths:
        plane = isl.Set("{ [q, k] : q >= 0 and k >= 0 }").apply(unfolding(found.widths))
        points, rows = points.intersect(plane), rows.apply(unfolding(found.widths))
        region = region.apply(unfolding(found.widths))
    for key, p in zip(keys, found.progressions, strict=True):
        points = _on(p, key, dims, points)
    return points.intersect(rows).is_equal(region)


def _on(p: Progression, key: str, dims: tuple[str, ...], points: isl.Set) -> isl.Set:
    """The points over dims whose coordinate `key` is on a progression."""
    at, first, offset = (_function(e, dims) for e in (integer(key), p.first, p.offset))
    modulus, zero = isl.Val(p.stride), _function(sympy.Integer(0), dims)
    points = points.intersect(at.ge_set(first))
    if p.stride > 1:
        points = points.intersect(at.sub(offset).mod_val(modulus).eq_set(zero))
        points = points.intersect(first.sub(offset).mod_val(modulus).eq_set(zero))
    if p.count == sympy.oo:
        return points
    last = first.add(_function(p.count - 1, dims).scale_val(modulus))
    return points.intersect(at.le_set(last))


def _function(expr: Expr, dims: tuple[str, ...]) -> isl.PwAff:
    found = to_pw_aff(expr, dims)
    if found is None:
        raise VerifyError(f"a closed form has more pieces than a proof can follow: {expr}")
    return found


def as_map(region: isl.Set) -> isl.Map:
    """A set over [q, k] as a map [q] -> [k]."""
    return isl.Map.from_domain(region).move_dims(OUT, 0, IN, 1, 1)


def as_set(region: isl.Map) -> isl.Set:
    """A map [q] -> [k] as a set over [q, k]."""
    points = region.move_dims(IN, 1, OUT, 0, 1).domain()
    return points.set_dim_name(SET, 0, "q").set_dim_name(SET, 1, "k")
