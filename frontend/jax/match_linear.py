"""Linear attention in a JAX program, found by what it computes (frontend/capture/linear_fit.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..capture.factors import Factor, Part
from ..capture.linear_fit import Fit, Fitter, X, is_known
from ..capture.terms import names_in, reads_in, replaced, tidy
from ..term import Term, rename
from .dot import dot_of
from .program import Op, Program, Value, needed
from .roles import Operand
from .terms import MOVES, LeftAlone, Reader


@dataclass(frozen=True)
class LinearAttention:
    """Linear attention of a program.

    op: whose result it gives. operands: query, key and value. maps: terms of an element x0, for query and
    key. axes: of the batch. out: the roles of the result. sizes: by role. eps: None without a denominator.
    scale: of the output. inside: the sums that only the original computes."""

    op: Op
    operands: tuple[Operand, Operand, Operand]
    maps: tuple[Term, Term]
    axes: tuple[str, ...]
    out: tuple[str, ...]
    sizes: dict[str, int]
    causal: bool
    eps: float | None
    scale: float
    inside: tuple[Value, ...]

    @property
    def is_smaller(self) -> bool:
        """Whether states are smaller than scores: else three matrices are multiplied in another order."""
        return self.sizes["d"] * self.sizes["e"] < self.sizes["q"] * self.sizes["k"]


def find(reader: Reader, program: Program) -> Iterator[tuple[Op, LinearAttention | str]]:
    """Every linear attention of a program, or why it is left alone, with the operation that stands for it."""
    seen: set[Op] = set()
    left: list[tuple[Op, str]] = []
    for op in reversed(_candidates(program)):
        if op in seen or not _may_be(op):
            continue
        finder = _Finder(reader)
        found = finder.match(op)
        if found is not None:
            seen |= {value.op for value in needed([op.outputs[0]], {}) & set(found.inside) if value.op}
            yield op, found
        elif finder.why:
            left.append((op, finder.why))
    yield from left


def _may_be(op: Op) -> bool:
    result = op.outputs[0] if op.outputs else None
    if result is None or result.maker is not op or len(result.shape) < 2 or result.dtype.kind in "biuc":
        return False
    return op.name in ("div", "mul") or dot_of(op) is not None


def _is_sum(op: Op) -> bool:
    if op.outputs and op.outputs[0].dtype.kind in "biuc":
        return False
    if op.name == "reduce_sum":
        return len(op.params["axes"]) == 1
    if op.name == "cumsum":
        return not op.params["reverse"]
    dot = dot_of(op)
    return dot is not None and dot.groups is None


@dataclass(frozen=True)
class _Chain:
    """What a value is made of by products, sums and what only moves elements. sums: how many of them one
    after the other. batched: whether one has a batch. marked: whether something there is a mask, a running
    sum, a denominator that is a sum, or a product with a batch of another."""

    sums: int = 0
    batched: bool = False
    marked: bool = False


_PASSING = {*MOVES, "split", "mul", "div", "add", "select_n", "convert_element_type"}


def _candidates(program: Program) -> list[Op]:
    """The operations that may be linear attention: few programs are taken apart further."""
    chains: dict[Value, _Chain] = {}
    fixed: set[Value] = set()  # what depends on no input
    found = []
    for op in program.ops:
        given = [chains.get(value, _Chain()) for value in op.inputs]
        held = [value.const is not None or value in fixed for value in op.inputs]
        if all(held):
            fixed.update(op.outputs)
        elif _is_sum(op) or op.name in _PASSING:
            chain = _chain(op, given, held)
            chains |= dict.fromkeys(op.outputs, chain)
            if chain.sums > 1 and chain.marked:
                found.append(op)
    return found


def _chain(op: Op, given: Sequence[_Chain], fixed: Sequence[bool]) -> _Chain:
    """fixed: which operands depend on no input."""
    sums, batched = max(c.sums for c in given), any(c.batched for c in given)
    marked = any(c.marked for c in given) or op.name in ("cumsum", "select_n")
    if op.name == "mul":
        marked |= any(f and value.shape for f, value in zip(fixed, op.inputs, strict=True))
    if op.name == "div":
        marked |= given[1].sums > 1
    if not _is_sum(op):
        return _Chain(sums, batched, marked)
    dot = dot_of(op)
    here = dot is not None and any(label[0] == "b" for label in dot.out)
    return _Chain(sums + 1, batched or here, marked or (here and batched))


class _Finder(Fitter):
    """Takes the result of an operation apart until its pieces fit."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader = reader

    def match(self, op: Op) -> LinearAttention | None:
        result = op.outputs[0]
        names: list[Any] = [0 if n == 1 else f"i{d}" for d, n in enumerate(result.shape)]
        try:
            term = tidy(self.reader.of(result).at(names))
        except LeftAlone:
            return None
        ways = self._sum(op, names) if _is_sum(op) else self.split(term) if isinstance(term, tuple) else ()
        for part in ways:
            if len(part.factors) == 3 and len(part.bound) == 2 and len(part.over) <= 1:
                left = [n for n in names if n != 0]
                try:
                    for fit in self.fits(part, left):
                        found = self._attention(op, fit, left)
                        if found.is_smaller or fit.causal or fit.eps is not None:
                            return found
                except (LeftAlone, ValueError) as why:  # taken apart another way, it may fit
                    self.why = str(why)
                if self.why and not self._resembles(part):
                    self.why = ""
        return None

    def _resembles(self, part: Part) -> bool:
        """Whether a part that does not fit is one of scores all the same: it has a mask of indices, or is
        over a sum of products."""
        mask = [c[0] for c in part.kept if isinstance(c, tuple)]
        ways = (way for total in part.over for way in self.parts(total))
        return (mask != [] and set(mask) <= {"le", "lt", "ge", "gt"}) or any(
            len(way.factors) == len(way.bound) == 2 for way in ways
        )

    def element(self, value: Value, indices: Sequence[Term]) -> tuple[Term, Any]:
        places = tuple(0 if n == 1 else index for n, index in zip(value.shape, indices, strict=True))
        return tidy(self.reader.of(value).at(places)), (value, places)

    def is_sum(self, name: str) -> bool:
        op = self.reader.leaves[name].op
        return op is not None and _is_sum(op)

    def leaf(self, name: str, indices: Sequence[Term]) -> Iterator[Part]:
        op = self.reader.leaves[name].op
        if op is not None and _is_sum(op):
            yield from self._sum(op, indices)

    def _sum(self, op: Op, indices: Sequence[Term]) -> Iterator[Part]:
        dot = dot_of(op)
        if dot is None:
            [source], runs = op.inputs, op.name == "cumsum"
            d = op.params["axis"] if runs else int(op.params["axes"][0])
            of: dict[str, Term] = {"x0": self.fresh()}
            kept = (("le", of["x0"], indices[d]),) if runs else ()
            places = [*indices[:d], of["x0"], *indices[d + runs :]]
            sizes, given = {"x0": source.shape[d]}, [(source, places)]
        else:
            of = dict(zip(dot.out, indices, strict=True)) | {x: self.fresh() for x in dot.summed}
            held = list(zip(dot.operands, dot.labels, strict=True))
            sizes = {x: v.shape[own.index(x)] for v, own in held for x in own if x in dot.summed}
            kept, given = (), [(value, [of[x] for x in own]) for value, own in held]
        bound = tuple((str(of[x]), n) for x, n in sizes.items())
        whole = Part(kept=kept, bound=bound, inside=(op,))
        yield from (part.times(whole) for part in self.products([self.element(*g) for g in given]))

    def is_worth_it(self, part: Part, q: Factor, k: Factor, v: Factor) -> bool:
        """Whether q or k are features, and k and v, which share dimensions with q, are multiplied first."""
        shares = all(q.names & other.names - {name for name, _ in part.bound} for other in (k, v))
        above = [needed(product.inputs, {}) for product in part.inside[:-1]]
        first = any(self._value(k) in a and self._value(v) in a and self._value(q) not in a for a in above)
        return shares and first and any(map(self._is_feature, (q, k)))

    def _value(self, factor: Factor) -> Value | None:
        if factor.held is not None:
            return factor.held[0]
        reads = reads_in(factor.term)
        return self.reader.leaves[reads[0][1]] if reads else None

    def _is_feature(self, factor: Factor) -> bool:
        return not (isinstance(factor.term, tuple) and factor.term[0] == "readf")

    def _attention(self, op: Op, fit: Fit, names: list[Any]) -> LinearAttention:
        batch = [name for name in names if name not in fit.roles]
        roles = fit.roles | {name: f"a{i}" for i, name in enumerate(batch)}
        shape = op.outputs[0].shape
        sizes = {roles[f"i{d}"]: n for d, n in enumerate(shape) if f"i{d}" in roles}
        sizes |= {roles[name]: n for name, n in fit.bound}
        held = [self._array(f, roles, sizes, maps=f is not fit.factors[2]) for f in fit.factors]
        operands, maps = zip(*held, strict=True)
        axes = tuple(f"a{i}" for i in range(len(batch)))
        out = tuple(roles.get(f"i{d}", "") for d in range(len(shape)))
        sums = dict.fromkeys(value for inner in fit.inside if inner is not op for value in inner.outputs)
        settings = fit.causal, fit.eps, fit.scale, tuple(sums)
        return LinearAttention(op, operands, maps[:2], axes, out, sizes, *settings)

    def _array(
        self, factor: Factor, roles: dict[str, str], sizes: dict[str, int], *, maps: bool
    ) -> tuple[Operand, Term]:
        """(an array and its roles, a term of its elements), which a factor is. Raises LeftAlone."""
        reads = reads_in(factor.term)
        if len(reads) == 1 and (maps or factor.term == reads[0]):
            (read,) = reads
            base, term = self.reader.leaves[read[1]], replaced(factor.term, read, X)
            places = _roles(base, read[2:], roles, sizes)
            if read[0] == "readf" and places is not None and names_in(term) <= {X} and is_known(term):
                return Operand(base, places), term
        if factor.held is None:
            raise LeftAlone("its features are computed from several arrays")
        value, indices = factor.held
        places = _roles(value, indices, roles, sizes)
        if places is None:
            raise LeftAlone("its features are used in part")
        return Operand(value, places), X


def _roles(
    value: Value, indices: Sequence[Term], roles: dict[str, str], sizes: dict[str, int]
) -> tuple[str, ...] | None:
    """The role of each dimension of an array that is read at these indices; None unless all of it is."""
    names = [rename(index, roles) if index != 0 else "" for index in indices[: len(value.shape)]]
    found = tuple(name for name in names if isinstance(name, str))
    own = [name for name in found if name]
    whole = all(n == sizes.get(role, 1) for n, role in zip(value.shape, found, strict=False))
    return found if whole and len(found) == len(value.shape) and len(own) == len(set(own)) else None
