"""Linear attention in a graph, found by what it computes (`linear_fit.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..term import Term, rename
from .factors import Factor, Part
from .linear_fit import Fit, Fitter, X, is_known
from .match import is_role, is_whole
from .operand import Axes, Operand
from .ops import arguments, operation, value_of
from .sums import general_product
from .tensor import AT, LeftAlone, Opaque, Reader, axis, is_one
from .terms import names_in, reads_in, replaced, tidy


@dataclass
class LinearAttention:
    """Linear attention of a graph. node: what its output replaces. tensors: of q, k, v, with their roles in
    operands; maps: terms of an element x0, for q and k; out: roles of the output; sizes: by role. eps: None
    without a denominator. scale: of the output. inside: nodes that exist only when the original runs."""

    node: fx.Node
    tensors: tuple[fx.Node, ...]
    operands: tuple[Operand, ...]
    maps: tuple[Term, Term]
    out: tuple[Term, ...]
    axes: Axes
    sizes: dict[str, Any]
    causal: bool
    eps: float | None
    scale: float
    inside: set[fx.Node] = field(default_factory=set)


def find_linear(reader: Reader, graph: fx.Graph) -> Iterator[tuple[fx.Node, LinearAttention | str]]:
    """Every linear attention of a graph, or why it is left alone, with the node that stands for it."""
    nodes = list(graph.nodes)
    if sum(map(_is_sum, nodes)) < 2:
        return
    seen: set[fx.Node] = set()
    left: dict[fx.Node, str] = {}
    for node in reversed(nodes):
        did = operation(node)
        if node in seen or did is None or did.writes or not _may_be(node, did.name):
            continue
        finder = _Finder(reader)
        match = finder.match(node)
        if match is not None:
            seen |= match.inside
            left = {other: why for other, why in left.items() if node not in _above(other)}
            yield node, match
        elif finder.why and not any(node in _above(other) for other in left):
            left[node] = finder.why
    yield from left.items()


def _may_be(node: fx.Node, name: str) -> bool:
    value = value_of(node)
    floats = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 2
    return floats and (name in ("div", "mul") or general_product(node) is not None)


class _Finder(Fitter):
    """Takes a node apart until its pieces fit."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader = reader

    def match(self, node: fx.Node) -> LinearAttention | None:
        tensor = self.reader.of(node)
        names = [0 if is_one(n) else axis(d) for d, n in enumerate(tensor.shape)]
        term = tidy(tensor.at(list(names)))
        is_product = general_product(node) is not None
        ways = self._sum(node, names) if is_product else self.split(term) if isinstance(term, tuple) else ()
        for part in ways:
            if len(part.factors) == 3 and len(part.bound) == 2 and len(part.over) <= 1:
                left = [n for n in names if n != 0]
                try:
                    for fit in self.fits(part, left):
                        return self._attention(node, fit, left)
                except (LeftAlone, Opaque, ValueError) as why:  # taken apart another way, it may fit
                    self.why = str(why)
        return None

    def element(self, node: fx.Node, at: fx.Node, indices: Sequence[Term]) -> tuple[Term, Any]:
        tensor = self.reader.operand(node, at)
        places = tuple(0 if is_one(n) else index for n, index in zip(tensor.shape, indices, strict=True))
        return tidy(tensor.at(list(places))), (node, at, places)

    def is_sum(self, name: str) -> bool:
        return AT not in name and _is_sum(self.reader.leaves[name])

    def leaf(self, name: str, indices: Sequence[Term]) -> Iterator[Part]:
        if AT not in name:
            yield from self._sum(self.reader.leaves[name], indices)

    def _sum(self, leaf: fx.Node, indices: Sequence[Term]) -> Iterator[Part]:
        did = operation(leaf)
        if did is None or did.writes:
            return
        source, dim, keeps = arguments(leaf, "input", "dim", "keepdim")
        if did.name in ("sum", "cumsum"):
            dims = dim if isinstance(dim, (list, tuple)) else [dim]
            if len(dims) != 1 or not isinstance(dims[0], int):
                return
            shape = tuple(value_of(source).shape)
            d = dims[0] % len(shape)
            name, size = self.fresh(), shape[d]
            same_rank = did.name == "cumsum" or keeps
            places = [*indices[:d], name, *indices[d + 1 if same_rank else d :]]
            kept = (("le", name, indices[d]),) if did.name == "cumsum" else ()
            whole = Part(kept=kept, bound=((name, size),), inside=(leaf,))
            yield from (part.times(whole) for part in self.products([self.element(source, leaf, places)]))
            return
        product = general_product(leaf)
        if product is None:
            return
        operands, out, summed = product
        of: dict[str | None, Term] = dict(zip(out, indices, strict=True)) | {None: 0}
        of |= {label: self.fresh() for label in summed}
        whole = Part(bound=tuple((of[label], n) for label, n in summed.items()), inside=(leaf,))
        given = [self.element(node, leaf, [of[x] for x in labels]) for node, labels in operands]
        yield from (part.times(whole) for part in self.products(given))

    def is_worth_it(self, part: Part, q: Factor, k: Factor, v: Factor) -> bool:
        """Whether a product of three without a denominator is linear attention: q or k are features, and k
        and v, which share dimensions with q, are multiplied first."""
        shares = all(q.names & other.names - {name for name, _ in part.bound} for other in (k, v))
        first = any(
            all(self._makes(product, x) for x in (k, v)) and not self._makes(product, q)
            for product in part.inside[:-1]
        )
        return shares and first and any(map(self._is_feature, (q, k)))

    def _makes(self, product: fx.Node, factor: Factor) -> bool:
        node = self._node(factor)
        return node is not None and node in _above(product)

    def _node(self, factor: Factor) -> fx.Node | None:
        if factor.held is not None:
            return factor.held[0]
        reads = reads_in(factor.term)
        return self.reader.leaves[reads[0][1]] if reads else None

    def _is_feature(self, factor: Factor) -> bool:
        if not (isinstance(factor.term, tuple) and factor.term[0] == "readf"):
            return True
        did = operation(self.reader.leaves[factor.term[1]])
        return did is not None and did.name == "softmax"

    def _attention(
        self,
        node: fx.Node,
        fit: Fit,
        names: list[Any],
    ) -> LinearAttention:
        batch = [name for name in names if name not in fit.roles]
        roles = fit.roles | {name: f"a{i}" for i, name in enumerate(batch)}
        axes = Axes(tuple(f"a{i}" for i in range(len(batch))))
        shape = tuple(value_of(node).shape)
        sizes = {roles[axis(d)]: n for d, n in enumerate(shape) if axis(d) in roles}
        sizes |= {roles[name]: n for name, n in fit.bound}
        held = [self._tensor(f, roles, sizes, maps=f is not fit.factors[2]) for f in fit.factors]
        tensors, operands, maps = zip(*held, strict=True)
        out = tuple(roles.get(axis(d), 0) for d in range(len(shape)))
        return LinearAttention(
            node, tensors, operands, maps[:2], out, axes, sizes, fit.causal, fit.eps, fit.scale,
            set(fit.inside) - {node},
        )  # fmt: skip

    def _tensor(
        self, factor: Factor, roles: dict[str, str], sizes: dict[str, Any], *, maps: bool
    ) -> tuple[fx.Node, Operand, Term]:
        """(a tensor, its roles, a term of its elements), which a factor is. Raises LeftAlone."""
        reads = reads_in(factor.term)
        if len(reads) == 1 and (maps or factor.term == reads[0]):
            (read,) = reads
            places = tuple(rename(index, roles) for index in read[2:])
            base, term = self.reader.leaves[read[1]], replaced(factor.term, read, X)
            fits = read[0] == "readf" and all(map(is_role, places)) and names_in(term) <= {X}
            if fits and is_whole(base, places, sizes) and is_known(term):
                return self.reader.tensor_of(read[1]), Operand(places), term
        if factor.held is None:
            raise LeftAlone("its features are computed from several tensors")
        node, at, given = factor.held
        places = tuple(rename(index, roles) for index in given)
        if not all(map(is_role, places)) or not is_whole(node, places, sizes):
            raise LeftAlone("its features are used in part")
        self.reader.check(node, at)
        return node, Operand(places), X


def _is_sum(node: fx.Node) -> bool:
    did = operation(node)
    return did is not None and (did.name in ("sum", "cumsum") or general_product(node) is not None)


def _above(node: fx.Node) -> set[fx.Node]:
    above: set[fx.Node] = set()
    stack = [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in above:
                above.add(source)
                stack.append(source)
    return above
