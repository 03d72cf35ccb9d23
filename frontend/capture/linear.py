"""Linear attention in a graph, however its sums are ordered:

    out_i = sum over j, d of phi(q)[i, d] psi(k)[j, d] v[j], over the same sum without v plus eps, or over 1

Products, sums and running sums are taken apart until three tensors are left (`Sums` of `sums.py`
does so for counts); which of a graph's products are parts of it, and which make q, k or v, shows when the
pieces fit. So `phi(q) (phi(k)^T v)`, `(phi(q) phi(k)^T * tril) v` and running sums of `phi(k) v^T` are one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..term import FALSE, TRUE, Term, rename
from .factors import Factor, Part, Splitter, is_sum
from .match import is_role, is_whole
from .operand import Axes, Operand
from .ops import operation, value_of
from .sums import general_product
from .tensor import LeftAlone, Opaque, Reader, axis, is_one
from .terms import kind_of, linear, names_in, number, reads_in, replaced, tidy

X = "x0"


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
    if sum(map(is_sum, nodes)) < 2:
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


class _Finder(Splitter):
    """Takes a node apart until its pieces fit. why: why they do not."""

    why = ""
    total: Part

    def match(self, node: fx.Node) -> LinearAttention | None:
        tensor = self.reader.of(node)
        names = [0 if is_one(n) else axis(d) for d, n in enumerate(tensor.shape)]
        term = tidy(tensor.at(list(names)))
        is_product = general_product(node) is not None
        ways = self.leaf(node, names) if is_product else self.split(term) if isinstance(term, tuple) else ()
        for part in ways:
            if len(part.factors) == 3 and len(part.bound) == 2 and len(part.over) <= 1:
                try:
                    found = self._fit(node, part, [n for n in names if n != 0])
                except (LeftAlone, Opaque, ValueError) as why:  # taken apart another way, it may fit
                    self.why = str(why)
                    continue
                if found is not None:
                    return found
        return None

    def _fit(self, node: fx.Node, part: Part, names: list[Any]) -> LinearAttention | None:
        """The attention whose numerator, or result, a part is."""
        bound = {name for name, _ in part.bound}
        for q, k, v in itertools.permutations(part.factors):
            feature, key = (bound & a.names & b.names for a, b in ((q, k), (k, v)))
            columns = [n for n in names if n in v.names and n not in q.names | k.names]
            rows = [n for n in names if n in q.names and n not in k.names | v.names]
            if len(feature) == len(key) == 1 and feature != key and len(columns) == 1 and rows:
                if (feature & v.names) or (key & q.names):
                    continue
                (d,), (j,), (m,) = feature, key, columns
                causal = _causal(part.kept, j, rows)
                if causal is None:
                    self.why = "its mask is another than the causal one"
                    continue
                eps = self._denominator(part, q, k, d, j)
                if eps is False:
                    self.why = "its denominator is another sum than that of its scores and eps"
                    continue
                if not (part.over or part.kept or self._is_worth_it(part, q, k, v)):
                    continue
                roles = {causal or rows[-1]: "q", j: "k", d: "d", m: "e"}
                return self._attention(node, part, (q, k, v), roles, names, bool(causal), eps)
        return None

    def _is_worth_it(self, part: Part, q: Factor, k: Factor, v: Factor) -> bool:
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

    def _denominator(self, part: Part, q: Factor, k: Factor, d: str, j: str) -> Any:
        """eps of a part's denominator, None where it has none, False where that is another sum."""
        if not part.over:
            return None
        (over,) = part.over
        eps, total = 0.0, over
        if isinstance(over, tuple) and over[0] == "add":
            values = [number(p) for p in over[1:]]
            constant = next((n for n, value in enumerate(values) if value is not None), None)
            if constant is None:
                return False
            eps, total = float(values[constant] or 0), over[2 - constant]
        for way in self.parts(total):
            if len(way.factors) != 2 or len(way.bound) != 2 or way.over or not way.scale > 0:
                continue
            for names in itertools.permutations([name for name, _ in way.bound]):
                back = dict(zip(names, (d, j), strict=True))
                terms = [tidy(rename(f.term, back)) for f in way.factors]
                kept = {tidy(rename(c, back)) for c in way.kept}
                if sorted(map(repr, terms)) != sorted(repr(f.term) for f in (q, k)):
                    continue
                if _normal(kept) == _normal(part.kept) and eps >= 0:
                    self.total = way
                    return eps / way.scale
        return False

    def _attention(
        self,
        node: fx.Node,
        part: Part,
        factors: tuple[Factor, Factor, Factor],
        roles: dict[str, str],
        names: list[Any],
        causal: bool,
        eps: float | None,
    ) -> LinearAttention:
        batch = [name for name in names if name not in roles]
        roles = roles | {name: f"a{i}" for i, name in enumerate(batch)}
        axes = Axes(tuple(f"a{i}" for i in range(len(batch))))
        shape = tuple(value_of(node).shape)
        sizes = {roles[axis(d)]: n for d, n in enumerate(shape) if axis(d) in roles}
        sizes |= {roles[name]: n for name, n in part.bound}
        held = [self._tensor(f, roles, sizes, maps=f is not factors[2]) for f in factors]
        tensors, operands, maps = zip(*held, strict=True)
        scale, inside = part.scale, set(part.inside)
        if eps is not None:
            scale, inside = part.scale / self.total.scale, inside | set(self.total.inside)
        out = tuple(roles.get(axis(d), 0) for d in range(len(shape)))
        return LinearAttention(
            node, tensors, operands, maps[:2], out, axes, sizes, causal, eps, scale, inside - {node}
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
            if fits and is_whole(base, places, sizes) and _is_known(term):
                return self.reader.tensor_of(read[1]), Operand(places), term
        if factor.held is None:
            raise LeftAlone("its features are computed from several tensors")
        node, at, given = factor.held
        places = tuple(rename(index, roles) for index in given)
        if not all(map(is_role, places)) or not is_whole(node, places, sizes):
            raise LeftAlone("its features are used in part")
        self.reader.check(node, at)
        return node, Operand(places), X


def _above(node: fx.Node) -> set[fx.Node]:
    above: set[fx.Node] = set()
    stack = [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in above:
                above.add(source)
                stack.append(source)
    return above


def _is_known(term: Term) -> bool:
    """Whether kernels can compute a term of an element."""
    from ...ir.errors import GossamerError
    from ..term_expr import to_expr

    try:
        to_expr(term, frozenset((X,)))
    except (GossamerError, KeyError, TypeError, ValueError):
        return False
    return kind_of(replaced(term, X, "score")) == "float"


def _normal(kept: Any) -> set[Any]:
    """Conditions as differences that are at most 0."""
    found = set()
    for condition in kept:
        if condition == TRUE:
            continue
        if not isinstance(condition, tuple) or condition[0] not in ("le", "lt", "ge", "gt"):
            return {FALSE}
        op, a, b = condition
        below = linear(("sub", a, b) if op[0] == "l" else ("sub", b, a))
        if op[1] == "t":
            below[1] = below.get(1, 0) + 1
        found.add(frozenset((t, c) for t, c in below.items() if c))
    return found


def _causal(kept: tuple[Term, ...], j: str, rows: list[Any]) -> Any:
    """The index of rows i where conditions say j <= i, "" where there are none, None for others."""
    if not kept:
        return ""
    found = _normal(kept)
    return next((i for i in rows if found == {frozenset({(j, 1), (i, -1)})}), None)
