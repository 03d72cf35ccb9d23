"""Attention in a JAX program, found by what it computes: a softmax between two products.

The product with the values reads a softmax along the dimension that it sums; the softmax is of a term that
reads a product along the same dimension. Everything between is a term (frontend/jax/terms.py), so the order
of dimensions, where the scale stands and how the mask is written make no difference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jax.extend import source_info_util

from ..capture.terms import divided, names_in, reads_in, replaced, tidy
from ..term import COMPARISONS, Term, constant, rename
from .program import Op, Program, Value
from .roles import Operand
from .terms import Array, LeftAlone, Reader


@dataclass(frozen=True)
class Softmax:
    """given: what it is of. axis: along which. result: its values. shifted: whether the maximum is taken off
    before exponentials are."""

    given: Value
    axis: int
    result: Value
    shifted: bool = True


@dataclass(frozen=True)
class Product:
    """result[out] = sum over "x" of left[labels[0]] * right[labels[1]]."""

    operands: tuple[Value, Value]
    labels: tuple[tuple[str, ...], tuple[str, ...]]
    out: tuple[str, ...]
    op: Op

    def size(self, label: str) -> int:
        value, labels = next(p for p in zip(self.operands, self.labels, strict=True) if label in p[1])
        return value.shape[labels.index(label)]


@dataclass(frozen=True)
class Attention:
    """One attention of a program.

    op: the product whose result it replaces; out: the roles of that. softmax, scores: what must not be used
    elsewhere. outer: the batch axes of keys, from outside in, the first of which is B; inner: those of
    queries alone, which share keys. own: the dimensions that values alone have. sizes: by role. score, prob:
    terms over b, h, q, k, score, prob and the names of leaves. dtype: the softmax's. shifted: as `Softmax`
    has it."""

    op: Op
    out: tuple[str, ...]
    softmax: Value
    scores: Value
    query: Operand
    key: Operand
    value: Operand
    outer: tuple[str, ...]
    inner: tuple[str, ...]
    own: tuple[str, ...]
    sizes: Mapping[str, int]
    score: Term
    prob: Term
    dtype: Any
    shifted: bool


def find(reader: Reader, program: Program) -> Iterator[tuple[Op, Attention | str]]:
    """Every attention of a program, or why it is left alone, with the operation that stands for it."""
    softmaxes = {found.result: found for op in program.ops if (found := softmax_of(reader, op)) is not None}
    for value in softmaxes:
        reader.hold(value)
    taken: set[Value] = set()
    for op in program.ops:
        product = product_of(op)
        if product is None:
            continue
        weights = _weights(reader, product, softmaxes)
        if weights is not None:
            taken.add(weights[1].result)
            try:
                yield op, _matched(reader, product, *weights)
            except (LeftAlone, ValueError) as reason:
                yield op, str(reason)
    for value, softmax in softmaxes.items():
        if value not in taken and _reads_product(reader, softmax):
            assert value.op is not None
            yield value.op, "its probabilities are not summed over the keys with values"


def _reads_product(reader: Reader, softmax: Softmax) -> bool:
    try:
        term = reader.of(softmax.given).term
    except LeftAlone:
        return False
    leaves = (reader.leaves[read[1]].op for read in reads_in(term))
    products = (product_of(op) for op in leaves if op is not None)
    # One without a batch, whose result nothing weighs, is that of a router or a classifier.
    return any(product is not None and "b0" in product.out for product in products)


# softmax --------------------------------------------------------------------------------------------


def softmax_of(reader: Reader, op: Op) -> Softmax | None:
    """exp(x - max x), or exp(x), over the sum of that, whose result an operation gives."""
    if op.name != "div" or op.outputs[0].maker is None:
        return None
    weights = _plain(op.inputs[0])
    if weights.op is None or weights.op.name != "exp":
        return None
    axis = _reduced(reader, op.inputs[1], "reduce_sum", weights)
    if axis is None:
        return None
    shifted = _plain(weights.op.inputs[0])
    if shifted.op is not None and shifted.op.name == "sub":
        given, shift = shifted.op.inputs
        if _reduced(reader, shift, "reduce_max", given) == axis:
            return Softmax(given, axis, op.outputs[0])
    return Softmax(weights.op.inputs[0], axis, op.outputs[0], shifted=False)


_SAME = ("convert_element_type", "stop_gradient", "copy", "copy_p", "reduce_precision", "pvary", "pcast")


def _plain(value: Value) -> Value:
    """The array that conversions of floats are made of."""
    while value.op is not None and value.op.name in _SAME and value.op.inputs[0].dtype.kind not in "biu":
        value = value.op.inputs[0]
    return value


_LOWEST = constant(-math.inf)


def _reduced(reader: Reader, value: Value, name: str, of: Value) -> int | None:
    """The axis of `of` whose elements a reduction takes that `value` holds, at every place of that axis."""
    try:
        term, whole = reader.of(value).term, reader.of(of)
    except LeftAlone:
        return None
    if name == "reduce_max" and isinstance(term, tuple) and term[0] == "stop_gradient":
        term = term[1]  # as softmax is written: what is subtracted from all scores of a row has no slope
    reads = reads_in(term)
    if len(reads) != 1:
        return None
    read, leaf = reads[0], reader.leaves[reads[0][1]].op
    started = ("max", _LOWEST, read), ("max", read, _LOWEST)  # the maximum of nothing is -inf
    if term != read and not (name == "reduce_max" and term in started):
        return None
    if leaf is None or leaf.name != name or len(leaf.params["axes"]) != 1:
        return None
    given, axis = reader.of(leaf.inputs[0]), int(leaf.params["axes"][0])
    others = list(read[2:]) if len(given.shape) > 1 else []
    for d, n in enumerate(whole.shape):
        indices = [*others[:axis], f"i{d}" if n != 1 else 0, *others[axis:]]
        fits = n == given.shape[axis] and f"i{d}" not in others
        if fits and tidy(given.at(indices)) == whole.term:
            return d
    return None


# products -------------------------------------------------------------------------------------------


def product_of(op: Op) -> Product | None:
    """The product of two arrays over one dimension, whose result an operation gives."""
    if op.name != "dot_general" or op.outputs[0].dtype.kind in "biuc":
        return None
    (contracted, batched) = op.params["dimension_numbers"]
    if len(contracted[0]) != 1:
        return None
    labels: list[tuple[str, ...]] = []
    batch = {side: {int(d): f"b{n}" for n, d in enumerate(batched[side])} for side in (0, 1)}
    for side, letter in ((0, "l"), (1, "r")):
        given = batch[side] | {int(contracted[side][0]): "x"}
        labels.append(tuple(given.get(d, f"{letter}{d}") for d in range(len(op.inputs[side].shape))))
    free = [label for own in labels for label in own if label[0] in "lr"]
    out = (*(f"b{n}" for n in range(len(batched[0]))), *free)
    return Product((op.inputs[0], op.inputs[1]), (labels[0], labels[1]), out, op)


def _weights(
    reader: Reader, product: Product, softmaxes: Mapping[Value, Softmax]
) -> tuple[int, Softmax, Term] | None:
    """(which operand of a product holds probabilities, their softmax, how it is read)."""
    for which in (0, 1):
        summed = f"i{product.labels[which].index('x')}"
        try:
            term = reader.of(product.operands[which]).term
        except LeftAlone:
            continue
        for read in reads_in(term):
            softmax = softmaxes.get(reader.leaves[read[1]])
            if softmax is not None and len(read) > softmax.axis + 2:
                index = read[2 + softmax.axis]
                if summed in names_in(index) or product.size("x") == 1:
                    return which, softmax, read
    return None


# roles ----------------------------------------------------------------------------------------------


def _matched(reader: Reader, product: Product, which: int, softmax: Softmax, inner: Term) -> Attention:
    """The attention around a softmax. Raises LeftAlone."""
    scores = reader.of(softmax.given)
    dot, read = _dot(reader, scores, softmax.axis)
    side = _side_of_keys(dot, read, softmax.axis)
    index_of = dict(zip(dot.out, read[2:], strict=True))
    at_k = next(label for label, index in index_of.items() if index == f"i{softmax.axis}")
    shared = [x for x in dot.labels[1 - side] if x[0] == "b"]
    rows = [x for x in dot.labels[1 - side] if x[0] in "lr"]
    if any(x[0] in "lr" and x != at_k and dot.size(x) != 1 for x in dot.labels[side]):
        raise LeftAlone("its keys have two lengths")
    at_q = _rows(dot, rows, index_of, tidy(replaced(scores.term, read, 0)), f"i{softmax.axis}")
    groups = [x for x in rows if x != at_q]
    role_of = {at_k: "k", "x": "d"} | ({} if at_q is None else {at_q: "q"})
    role_of |= {label: f"a{n}" for n, label in enumerate((*shared, *groups))}
    sizes = {role: dot.size(label) for label, role in role_of.items()} | ({} if at_q else {"q": 1})
    outer, inner_axes = (tuple(role_of[x] for x in part) for part in (shared, groups))
    names = {index: role_of[label] for label, index in index_of.items() if index != 0 and label in role_of}
    missing = [name for name, n in scores.sizes.items() if n != 1 and name not in names]
    if missing:
        raise LeftAlone("its scores are those of several products of queries and keys")
    query, key = (_operand(dot, s, role_of) for s in (1 - side, side))
    weights, of_weights = _weights_roles(reader, product, which, inner, names)
    value, out, own = _values(product, which, of_weights, sizes, set(outer))
    if len(outer) > 1:
        bases = [_repeated(reader, operand, outer[-1]) for operand in (key, value)]
        if bases[0].shared == bases[1].shared:
            key, value = bases
    indices = _indices(outer, inner_axes, sizes)
    score = rename(replaced(scores.term, read, "score"), {n: indices.get(r, r) for n, r in names.items()})
    prob = rename(weights, {n: indices.get(r, r) for n, r in of_weights.items()})
    return Attention(
        product.op,
        out,
        softmax.result,
        dot.op.outputs[0],
        query,
        key,
        value,
        outer,
        inner_axes,
        own,
        sizes,
        tidy(score),
        tidy(prob),
        softmax.given.dtype,
        softmax.shifted,
    )


def _dot(reader: Reader, scores: Array, axis: int) -> tuple[Product, Term]:
    """The product of queries and keys that a score reads, and the read."""
    reason = "no product of queries and keys"
    reads = reads_in(scores.term)
    for read in reads:
        op = reader.leaves[read[1]].op
        product = None if op is None else product_of(op)
        if product is None or f"i{axis}" not in read[2:]:
            continue
        if sum(r[1] == read[1] for r in reads) > 1:
            reason = "its scores are used at other places of the row or the column too"
        elif all(index == 0 or isinstance(index, str) for index in read[2:]):
            return product, read
        else:
            reason = "its scores are rearranged in a way that mixes dimensions"
    raise LeftAlone(reason)


def _side_of_keys(dot: Product, read: Term, axis: int) -> int:
    label = dot.out[read[2:].index(f"i{axis}")]
    if label[0] == "b":
        raise LeftAlone("its scores are no product of queries and keys")
    return 0 if label in dot.labels[0] else 1


def _rows(
    dot: Product, rows: list[str], index_of: Mapping[str, Term], around: Term, column: str
) -> str | None:
    """The dimension of queries: one that conditions on the keys look at, or else the longest."""
    beside: set[str] = set()

    def visit(term: Term) -> None:
        looks = isinstance(term, tuple) and term[0] in (*COMPARISONS, "readf")
        if looks and column in names_in(term):
            beside.update(names_in(term))
        for part in term[1:] if isinstance(term, tuple) and term[0] != "f" else ():
            visit(part)

    visit(around)
    if not rows:
        return None
    return max(rows, key=lambda x: (index_of[x] in beside, dot.size(x)))


def _operand(dot: Product, side: int, role_of: Mapping[str, str]) -> Operand:
    """The other dimensions of keys have size 1 and no role."""
    return Operand(dot.operands[side], tuple(role_of.get(x, "") for x in dot.labels[side]))


def _repeated(reader: Reader, operand: Operand, axis: str) -> Operand:
    """The array whose places along a batch axis an operand repeats, each so many times; else the operand."""
    try:
        held = reader.of(operand.value)
    except LeftAlone:
        return operand
    term = held.term
    if not isinstance(term, tuple) or term[0] != "readf" or axis not in operand.roles:
        return operand
    base, place = reader.leaves[term[1]], operand.roles.index(axis)
    roles, shared = [], 1
    for index, n in zip(term[2:], base.shape, strict=True):
        if isinstance(index, str):
            role = operand.roles[int(index[1:])]
            whole = held.sizes[index] == n
        elif isinstance(index, tuple) and index[:2] == ("floordiv", f"i{place}"):
            role, shared = axis, index[2]
            whole = isinstance(shared, int) and n * shared == held.shape[place]
        else:
            role, whole = "", index == 0 and n == 1
        if not whole:
            return operand
        roles.append(role)
    kept = sorted(role for role in roles if role) == sorted(role for role in operand.roles if role)
    return Operand(base, tuple(roles), shared) if kept and shared > 1 else operand


def _weights_roles(
    reader: Reader, product: Product, which: int, inner: Term, names: Mapping[str, str]
) -> tuple[Term, dict[str, str]]:
    """The term of the probabilities as the values meet them, and the role of each of their indices."""
    held = reader.of(product.operands[which])
    found: dict[str, str] = {}
    for d, index in enumerate(inner[2:]):
        role = names.get(f"i{d}")
        if isinstance(index, str) and role is not None:
            found[index] = role
        elif index != 0 or role is not None:
            raise LeftAlone("its probabilities are rearranged in a way that mixes dimensions")
    if len(found) != len(names):
        raise LeftAlone("its probabilities are used in part")
    if any(n != 1 and name not in found for name, n in held.sizes.items()):
        raise LeftAlone("its probabilities are repeated")
    return replaced(held.term, inner, "prob"), found


def _values(
    product: Product, which: int, roles: Mapping[str, str], sizes: dict[str, int], outer: set[str]
) -> tuple[Operand, tuple[str, ...], tuple[str, ...]]:
    """The values, the roles of the result, and those that values alone have, whose sizes it adds."""
    of_label = {label: roles.get(f"i{d}", "") for d, label in enumerate(product.labels[which])}
    if of_label["x"] not in ("k", "") or (of_label["x"] == "" and sizes["k"] != 1):
        raise LeftAlone("its probabilities are not summed over the keys")
    of_label["x"] = "k"
    alone = [x for x in product.labels[1 - which] if x not in of_label]
    own = tuple(f"e{n}" for n in range(len(alone)))
    of_label |= zip(alone, own, strict=True)
    sizes |= zip(own, map(product.size, alone), strict=True)
    held = tuple(of_label[x] for x in product.labels[1 - which])
    if any(role not in outer | {"k", *own, ""} for role in held):
        raise LeftAlone("its values depend on the query or on a head that shares keys")
    return Operand(product.operands[1 - which], held), tuple(of_label[x] for x in product.out), own


def _indices(outer: tuple[str, ...], inner: tuple[str, ...], sizes: Mapping[str, int]) -> dict[str, Term]:
    """The batch axes as terms of b and h."""
    found: dict[str, Term] = {outer[0]: "b"} if outer else {}
    heads = (*outer[1:], *inner)
    rest: Term = "h"
    for name in reversed(heads[1:]):
        rest, found[name] = divided(rest, sizes[name], {})
    return found | ({heads[0]: rest} if heads else {})


def where_of(op: Any) -> str:
    """file:line of the user's program that an operation comes from."""
    found = re.match(r"(.*?):(\d+)", source_info_util.summarize(op.eqn.source_info))
    return f"{found[1]}:{found[2]}" if found else "an unknown line"
