"""decompose: a mask as a disjoint union of ACSR terms, proven by isl.

    >>> from ..ir.expr import to_text
    >>> from ..ir.mask import Mask
    >>> for t in decompose(Mask.parse("mask() { abs(q - k) < 64 or (q - k) % 64 == 0 }")):
    ...     [line] = t.progressions
    ...     print(line.stride, to_text(line.first), to_text(line.count), "rows", to_text(t.rows))
    1 max(0, q - 63) min(126, q + 63) + 1 rows true
    64 q + 64 inf rows true
    64 q % 64 q // 64 rows q >= 64

Terms are few: disjuncts of the predicate are tried as terms in every order (each less what came
before), what is not regular is taken apart by isl into basic sets, then by residues, and terms whose
union is a term again are merged. Disjointness, coverage and each closed form are then set equations that
isl decides; VerifyError says which one fails.

Leaves alone: what isl cannot hold. The terms of an opaque mask cover its affine bound `may`; a part
of which no few terms are found in good time is one `Remainder`, an exact region.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import islpy as isl
import sympy

from ..ir.affine import DIV, SET, QuotaExceeded, locked, quota, to_sets
from ..ir.errors import VerifyError
from ..ir.expr import Expr, to_text
from ..ir.formats import ACSR, Progression, Remainder
from ..ir.mask import Mask
from .delinearize import coarser, factors
from .delinearize import widths as widths_of
from .normalize import disjuncts
from .progression import as_map, as_set, box, build, is_closed_form, regular

MAX_TERMS = 24  # beyond this, walking terms costs more than walking the columns between them
MAX_ORDERS = 24
MAX_OPERATIONS = 500_000  # of isl: about 0.3 s, several times what the pattern library takes


Term = ACSR | Remainder


@functools.lru_cache(maxsize=1024)
@locked
def decompose(mask: Mask) -> tuple[Term, ...]:
    """Disjoint terms whose union is the affine bound of the mask: the mask itself when it is exact."""
    region, widths = as_set(mask.may), widths_of(mask)
    if region.is_empty():
        return ()
    whole = _as_box(mask, widths)
    if whole is not None:
        return (whole,)
    for attempt in (_split_best, _split_once):
        with suppress(QuotaExceeded), quota(MAX_OPERATIONS):
            pieces = attempt(mask, region, widths)
            prove(region, [p.points for p in pieces])
            return tuple(p.term() for p in pieces)
    return (Remainder(str(mask.may)),)


def _as_box(mask: Mask, widths: tuple[int, ...]) -> ACSR | None:
    """The whole mask as one box, straight from a predicate that takes all dimensions one by one."""
    for w in coarser(widths):
        rules = factors(mask.predicate, w)
        if rules is None or sympy.true in rules or not mask.exact:
            continue  # a dimension that is free may join its neighbour: a plain term is simpler then
        sides = []
        for d, rule in enumerate(rules):
            extent = f" and q{d} < {w[d - 1]} and k{d} < {w[d - 1]}" if d else ""
            inside = isl.Set(f"{{ [q{d}, k{d}] : 0 <= q{d} and 0 <= k{d}{extent} }}")
            sides.append(to_sets(rule, (f"q{d}", f"k{d}"))[0].intersect(inside).coalesce())
        found = box(sides, w, mask.may)
        if found is not None:
            return found
    return None


@dataclass(frozen=True)
class Piece:
    """A region, the widths in which it is regular, its lines (progression.regular; None: it is not)."""

    points: isl.Set
    widths: tuple[int, ...]
    lines: list[isl.Set] | None

    @property
    def stride(self) -> int:
        return max(int(line.get_stride_info(0).get_stride().to_python()) for line in self.lines or ())

    def term(self) -> Term:
        if self.lines is None:
            return Remainder(str(as_map(self.points)))
        found = build(self.points, self.widths, self.lines)
        if not is_closed_form(found, self.points):
            raise VerifyError(f"closed form differs from its region: {found}")
        return found


def prove(region: isl.Set, pieces: list[isl.Set]) -> None:
    """Check that the pieces are pairwise disjoint and that their union is the region, for all parameters."""
    for i, j in itertools.combinations(range(len(pieces)), 2):
        if not pieces[i].is_disjoint(pieces[j]):
            raise VerifyError(f"terms {i} and {j} overlap in {pieces[i].intersect(pieces[j])}")
    union = functools.reduce(isl.Set.union, pieces)
    if not union.is_equal(region):
        missing, extra = region.subtract(union), union.subtract(region)
        raise VerifyError(f"the terms are not the mask: they miss {missing} and add {extra}")


def _piece(points: isl.Set, widths: tuple[int, ...]) -> Piece | None:
    """The region as one term: plain if it can be, else a box."""
    for w in ((), *coarser(widths)):
        lines = regular(points, w)
        if lines is not None:
            return Piece(points, w, lines)
    return None


def _parts(mask: Mask) -> list[isl.Set]:
    """The disjuncts of the predicate as regions, without those that others hold."""
    quadrant = isl.Set("{ [q, k] : q >= 0 and k >= 0 }")
    found: list[isl.Set] = []
    for d in disjuncts(mask.predicate):
        part = to_sets(d)[0].intersect(quadrant).coalesce()
        if any(part.is_subset(f) for f in found):
            continue
        found = [f for f in found if not f.is_subset(part)] + [part]
    return [f for f in found if not f.is_empty()]


def _split_best(mask: Mask, region: isl.Set, widths: tuple[int, ...]) -> list[Piece]:
    """The fewest pieces that some order of the mask's parts gives."""
    whole = _piece(region, widths)
    if whole is not None:
        return [whole]
    parts = _parts(mask)
    best: list[Piece] = []
    for order in itertools.islice(_orders(parts, widths), MAX_ORDERS):
        pieces: list[Piece] = []
        left = region
        for part in order:
            limit = (_cost(best) - 1 if best else MAX_TERMS) - _cost(pieces)
            pieces += split(part.intersect(left).coalesce(), widths, limit)
            left = left.subtract(part).coalesce()
            if best and _cost(pieces) >= _cost(best):
                break
        else:
            best = pieces
        if _cost(best) <= len(parts):
            break
    return _merged(best, widths)


def _split_once(mask: Mask, region: isl.Set, widths: tuple[int, ...]) -> list[Piece]:
    """One piece a part, less what came before: a term where it happens to be one."""
    pieces, left = [], region
    for part in next(_orders(_parts(mask), widths)):
        here = part.intersect(left).coalesce()
        left = left.subtract(part).coalesce()
        if not here.is_empty():
            pieces.append(_piece(here, widths) or Piece(here, (), None))
    return pieces


def _cost(pieces: list[Piece]) -> int:
    """How many terms; a remainder counts as more than any number of them."""
    return sum(1 if p.lines is not None else MAX_TERMS for p in pieces)


def _orders(parts: list[isl.Set], widths: tuple[int, ...]) -> Iterator[tuple[isl.Set, ...]]:
    """Orders in which to take the parts, promising ones first: whole rows, whole columns, small strides."""

    def rank(part: isl.Set) -> tuple[bool, bool, int, int]:
        piece = _piece(part, widths)
        on_q, on_k = (part.involves_dims(SET, d, 1) and _depends(part, d) for d in (0, 1))
        return on_k, on_q, piece.stride if piece else 1 << 30, part.n_basic_set()

    return itertools.permutations(sorted(parts, key=rank))


def _depends(part: isl.Set, dim: int) -> bool:
    """Whether membership depends on a coordinate beyond its being non-negative."""
    names = ("q", "k")
    free = part.project_out(SET, dim, 1).insert_dims(SET, dim, 1).set_dim_name(SET, dim, names[dim])
    return not free.intersect(isl.Set("{ [q, k] : q >= 0 and k >= 0 }")).is_subset(part)


def split(points: isl.Set, widths: tuple[int, ...], limit: int = MAX_TERMS) -> list[Piece]:
    """A region as disjoint pieces, each regular where few (up to about the limit) suffice."""
    if points.is_empty():
        return []
    whole = _piece(points, widths)
    if whole is not None:
        return [whole]
    basics = [isl.Set.from_basic_set(b) for b in points.make_disjoint().coalesce().get_basic_sets()]
    if len(basics) > 1:
        pieces: list[Piece] = []
        left = points
        for b in basics:
            pieces += split(b.intersect(left).coalesce(), widths, limit)
            left = left.subtract(b).coalesce()
        return _merged(pieces, widths)
    return _by_residue(points, widths, limit) or [Piece(points, (), None)]


def _by_residue(points: isl.Set, widths: tuple[int, ...], limit: int) -> list[Piece]:
    """The region by residues of k, q - k or q + k: the form and modulus with the fewest classes."""
    best: list[Piece] = []
    for modulus, form in itertools.product(_moduli(points), ("q - k", "k", "q + k")):
        pieces: list[Piece] = []
        for residue in range(modulus):
            form_class = isl.Set(f"{{ [q, k] : ({form} - {residue}) mod {modulus} = 0 }}")
            here = points.intersect(form_class).coalesce()
            if here.is_empty():
                continue
            piece = _piece(here, widths)
            if piece is None or len(pieces) >= (len(best) - 1 if best else limit):
                break
            pieces.append(piece)
        else:
            best = pieces
    return best


def _moduli(points: isl.Set) -> list[int]:
    """Divisors that occur in a region, small enough to split by."""
    found: set[int] = set()
    for b in points.compute_divs().get_basic_sets():
        for i in range(b.dim(DIV)):
            found.add(int(b.get_div(i).get_denominator_val().to_python()))
    return sorted(m for m in found if 1 < m <= 128)


def _merged(pieces: list[Piece], widths: tuple[int, ...]) -> list[Piece]:
    """Pieces joined while some two of them make one term."""
    pieces = list(pieces)
    for i, j in itertools.combinations(range(len(pieces)), 2):
        a, b = pieces[i], pieces[j]
        if a.lines is None or b.lines is None:
            continue
        joined = _piece(a.points.union(b.points).coalesce(), widths)
        if joined is not None and joined.stride <= max(a.stride, b.stride):
            return _merged([*pieces[:i], joined, *pieces[i + 1 : j], *pieces[j + 1 :]], widths)
    return pieces


def describe(found: Term) -> str:
    """One line: stride, offset, first and count of each dimension."""
    if isinstance(found, Remainder):
        return f"remainder {found.region}"
    lines = " x ".join(map(_describe_line, found.progressions))
    shape = f" widths {found.widths}" if found.widths else ""
    rows = "" if found.rows == sympy.true else f", rows {to_text(found.rows)}"
    return f"acsr{shape} {lines}{rows}"


def _describe_line(line: Progression) -> str:
    parts: tuple[tuple[str, Expr], ...] = (
        ("offset", line.offset),
        ("first", line.first),
        ("count", line.count),
    )
    return f"(stride {line.stride}, " + ", ".join(f"{name} {to_text(e)}" for name, e in parts) + ")"
