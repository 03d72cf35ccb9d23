"""Attention that a program writes as a softmax between two products.

The pattern is one: a product whose one operand reads a softmax along the summed dimension, of a term that
reads a product along the same dimension. Everything between is a term (frontend/capture/tensor.py), so the
order of dimensions, where the scale stands and how the mask is written make no difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..term import Term, rename
from .contract import Contraction, Labels, contraction
from .match import Attention, check_whole, checked, is_role, shared
from .operand import Axes, Operand
from .ops import Operation, arguments, operation, value_of
from .softmax import softmax_of
from .tensor import AT, LeftAlone, Reader, axis, is_one
from .terms import names_in, reads_in, replaced, tidy


def weights_of(reader: Reader, product: Contraction) -> tuple[int, fx.Node] | None:
    """(which operand of a product holds probabilities, the softmax that they come from)."""
    for which in (0, 1):
        node, labels = product.operand(which)
        summed = axis(labels.index(product.summed))
        for read in reads_in(_without_nans(reader, reader.operand(node, product.node).term)[0]):
            softmax = reader.leaves[read[1]]
            found = None if AT in read[1] else softmax_of(softmax)
            if found is not None and len(read) > found[1] + 2 and summed in names_in(read[2 + found[1]]):
                return which, softmax
    return None


def written(reader: Reader, product: Contraction, which: int, softmax: fx.Node) -> Attention:
    """The attention written as a softmax between two products. Raises LeftAlone."""
    scores = _scores(reader, softmax)
    query, key, dot = scores.query, scores.key, scores.dot.node
    value, prob, out, zeroed = _weighed(reader, scores, product, which)
    inside = _between(reader, dot, softmax, "scores") | _between(
        reader, softmax, product.node, "probabilities"
    )
    parts = (
        (checked(reader, query[0], dot), query[1]),
        shared(reader, *key, dot, scores.sizes),
        shared(reader, *value, product.node, scores.sizes),
    )
    indices = scores.axes.in_indices(scores.sizes)
    score, prob = (tidy(rename(term, indices)) for term in (scores.term, prob))
    empty = "nan" if scores.sinks is None and not zeroed else "zero"
    if zeroed and value_of(softmax).requires_grad and is_added(score):
        raise LeftAlone("rows without keys, whose gradients are NaN, may be what nan_to_num changes")
    return Attention(
        product.node,
        (parts[0][0], parts[1][0], parts[2][0]),
        (parts[0][1], parts[1][1], parts[2][1]),
        out,
        scores.axes,
        scores.sizes,
        score,
        prob,
        empty=empty,
        inside={*inside, softmax, dot},
        aside=inside - _above(reader, scores.given) - {scores.given},
        least=torch.finfo(value_of(softmax).dtype).min,
        sinks=scores.sinks,
    )


@dataclass(frozen=True)
class _Scores:
    """What a softmax is taken of, by the roles of its dimensions: a term of `score`, the product dot. given:
    the node of that, without shifts by row. first: how many sinks stand before the scores."""

    softmax: fx.Node
    given: fx.Node
    first: int
    dot: Contraction
    query: tuple[fx.Node, Operand]
    key: tuple[fx.Node, Operand]
    roles: dict[str, str]
    axes: Axes
    sizes: dict[str, Any]
    term: Term
    sinks: str | None


def _scores(reader: Reader, softmax: fx.Node) -> _Scores:
    found = softmax_of(softmax)
    assert found is not None
    dim = found[1]
    given, behind, first = _exponents(*found)
    tensor = reader.operand(given, softmax)
    dot, read = _dot(reader, tensor.term, dim)
    queries, q_label, keys = _sides(dot, read, dim)
    row = read[2 + dot.out.index(q_label)]
    if not (row == 0 or isinstance(row, str)):
        raise LeftAlone("the rows of its scores are split")
    names = [axis(d) for d, n in enumerate(tensor.shape) if not is_one(n)]
    roles = {axis(dim): "k"} | ({} if row == 0 else {row: "q"})
    batch = [name for name in names if name not in roles]
    roles |= {name: f"a{i}" for i, name in enumerate(batch)}
    axes = Axes(tuple(f"a{i}" for i in range(len(batch))))
    size = value_of(queries[0]).shape[queries[1].index(dot.summed)]
    sizes = {"q": 1, "d": size} | {roles[name]: tensor.sizes[name] for name in names}
    of = {label: rename(index, roles) for label, index in zip(dot.out, read[2:], strict=True)}
    check_whole(dot.node, list(of.values()), sizes, "scores")
    of[dot.summed] = "d"
    query, key = (_operand(node, labels, of) for node, labels in (queries, keys))
    term = rename(replaced(tensor.term, read, "score"), roles)
    sinks = None if behind is None else _sinks_by_head(reader, behind, softmax, roles, axes)
    return _Scores(softmax, given, first, dot, query, key, roles, axes, sizes, term, sinks)


def _operand(node: fx.Node, labels: Labels, of: dict[str, Term]) -> tuple[fx.Node, Operand]:
    return node, Operand(tuple(0 if label is None else of[label] for label in labels))


def _weighed(
    reader: Reader, scores: _Scores, product: Contraction, which: int
) -> tuple[tuple[fx.Node, Operand], Term, tuple[Term, ...], bool]:
    """The values, what becomes of a probability, the roles of the result, whether NaN becomes 0."""
    weights, labels = product.operand(which)
    values, value_labels = product.operand(1 - which)
    held = reader.operand(weights, product.node)
    whole, zeroed = _without_nans(reader, held.term)
    inner = next(r for r in reads_in(whole) if reader.leaves[r[1]] is scores.softmax)
    places, d = list(inner[2:]), next(i for i, role in scores.roles.items() if role == "k")
    if scores.first:
        places[int(d[1:])] = tidy(("sub", places[int(d[1:])], scores.first))
    back = _inverse(tuple(places), scores.roles, len(held.shape))
    of = {label: back[d] for d, label in enumerate(labels) if label is not None}
    if of.get(product.summed) != "k":
        raise LeftAlone("its probabilities are not summed over the keys")
    own = [label for label in value_labels if label is not None and label not in of]
    if len(own) != 1 or any(of.get(label) == "q" for label in value_labels if label is not None):
        raise LeftAlone("its values depend on the query")
    check_whole(weights, back, scores.sizes, "probabilities")
    scores.sizes["e"] = value_of(values).shape[value_labels.index(own[0])]
    of[own[0]] = "e"
    prob = rename(replaced(whole, inner, "prob"), {axis(d): role for d, role in enumerate(back)})
    return _operand(values, value_labels, of), prob, tuple(of[label] for label in product.out), zeroed


def _without_nans(reader: Reader, term: Term) -> tuple[Term, bool]:
    """A term with a softmax in the place of `nan_to_num` of it, and whether there was one."""
    found = False
    for read in reads_in(term):
        leaf = reader.leaves[read[1]]
        if AT in read[1] or operation(leaf) != Operation("nan_to_num"):
            continue
        source, nan = arguments(leaf, "input", "nan")
        inner = reader.operand(source, leaf) if nan in (None, 0) else None
        if inner is None or not isinstance(inner.term, tuple) or inner.term[0] != "readf":
            continue
        if AT not in inner.term[1] and softmax_of(reader.leaves[inner.term[1]]) is not None:
            term, found = replaced(term, read, inner.at(list(read[2:]))), True
    return term, found


def is_added(score: Term) -> bool:
    """Whether something is added to scores, which may be -inf."""
    if not isinstance(score, tuple):
        return False
    adds = score[0] in ("add", "sub") and "score" in names_in(score)
    return adds or any(map(is_added, score[1:]))


def _exponents(node: fx.Node, dim: int) -> tuple[fx.Node, fx.Node | None, int]:
    """What a softmax is taken of, less a shift by row, which changes nothing: scores, sinks beside them, how
    many of these stand before the scores."""
    while (did := operation(node)) is not None and did == Operation("sub"):
        kept, shift = node.args
        if not isinstance(kept, fx.Node) or not isinstance(shift, fx.Node):
            break
        if not is_one(value_of(shift).shape[dim - value_of(kept).dim()]):
            break
        node = kept
    if did is None or did != Operation("cat"):
        return node, None, 0
    parts, along = arguments(node, "tensors", "dim")
    rank = value_of(node).dim()
    if len(parts) != 2 or (along or 0) % rank != dim:
        return node, None, 0
    first, last = (is_one(value_of(part).shape[dim]) for part in parts)
    if last:
        return parts[0], parts[1], 0
    return (parts[1], parts[0], 1) if first else (node, None, 0)


def _sinks_by_head(
    reader: Reader, sinks: fx.Node, softmax: fx.Node, roles: dict[str, str], axes: Axes
) -> Term:
    """The tensor of one sink a head. Raises LeftAlone."""
    term = rename(reader.operand(sinks, softmax).term, roles)
    if isinstance(term, tuple) and term[0] == "readf" and [t for t in term[2:] if t != 0] == [*axes.heads]:
        node = reader.leaves[term[1]]
        if value_of(node).dim() == 1:
            return term[1]
    raise LeftAlone("its sinks are not one number a head")


def _dot(reader: Reader, term: Term, dim: int) -> tuple[Contraction, Term]:
    """The product of queries and keys that a score reads, and the read."""
    reason = "no product of queries and keys"
    for read in reads_in(term):
        product = contraction(reader.leaves[read[1]])
        if product is None or axis(dim) not in read[2:]:
            continue
        if AT in read[1]:
            reason = "its scores are written in place before the softmax"
            continue
        if sum(r[1] == read[1] for r in reads_in(term)) > 1:
            reason = "its scores are used at other places of the row or the column too"
            continue
        if all(is_role(index) for index in read[2:]):
            return product, read
        reason = "its scores are rearranged in a way that mixes dimensions"
    raise LeftAlone(reason)


def _sides(dot: Contraction, read: Term, dim: int) -> tuple[Any, str, Any]:
    """The operand of queries, the label of its rows, and the operand of keys."""
    k_label = dot.out[read[2:].index(axis(dim))]
    sides = [dot.operand(0), dot.operand(1)]
    holding = [k_label in labels for _, labels in sides]
    if all(holding):
        raise LeftAlone("its scores are no product of queries and keys")
    keys, queries = (sides[0], sides[1]) if holding[0] else (sides[1], sides[0])
    rows = [label for label in dot.out if label in queries[1] and label not in keys[1]]
    if not rows:
        raise LeftAlone("its scores have no rows of queries")
    return queries, rows[-1], keys


def _inverse(indices: tuple[Term, ...], roles: dict[str, str], rank: int) -> list[Term]:
    """The role of each index of a tensor that reads another one, whose indices have roles, at `indices`."""
    found: list[Term] = [0] * rank
    outer: dict[str, tuple[str, int]] = {}
    inner: dict[str, str] = {}
    for d, index in enumerate(indices):
        role = roles.get(axis(d))
        if isinstance(index, str) and role is not None:
            found[int(index[1:])] = role
        elif (
            isinstance(index, tuple)
            and index[0] in ("floordiv", "mod")
            and role
            and isinstance(index[1], str)
        ):
            if index[0] == "floordiv":
                outer[index[1]] = role, index[2]
            else:
                inner[index[1]] = role
        elif index != 0 or role is not None:
            raise LeftAlone("its probabilities are rearranged in a way that mixes dimensions")
    for name, (role, size) in outer.items():
        found[int(name[1:])] = tidy(("add", ("mul", size, role), inner[name]))
    if len({r for r in found if r != 0}) + len(outer) < len({r for r in roles.values()}):
        raise LeftAlone("its probabilities are used in part")
    return found


def _between(reader: Reader, first: fx.Node, last: fx.Node, what: str) -> set[fx.Node]:
    """The nodes on the ways from one to another. Raises LeftAlone where something leaves these ways."""
    ways: set[fx.Node] = set()
    above = _above(reader, last, first)
    stack = [first]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user is last or _is_model(node, user):
                continue
            if user not in above:
                raise LeftAlone(f"its {what} are used elsewhere too ({user.name})")
            if user not in ways:
                ways.add(user)
                stack.append(user)
    return ways


def _above(reader: Reader, last: fx.Node, first: fx.Node | None = None) -> set[fx.Node]:
    """The nodes whose work a node sees, no further than the first."""
    above: set[fx.Node] = set()
    stack = [last]
    while stack:
        for source in reader.memory.sources(stack.pop()):
            if source not in above:
                above.add(source)
                if source is not first:
                    stack.append(source)
    return above


def _is_model(node: fx.Node, user: fx.Node) -> bool:
    """Whether a node only tells its user what dtype or shape to take on."""
    did = operation(user)
    if did is not None and did.name in ("zeros_like", "ones_like", "full_like", "empty_like"):
        return True
    return str(user.target) in ("type_as", "expand_as", "view_as", "reshape_as") and user.args[0] is not node
