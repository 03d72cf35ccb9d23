"""Experts in a graph whose rows are sorted by expert and multiplied by `grouped_mm`.

    order = argsort(ids.flatten());  tokens = order // k;  offs = cumsum(how many ids are e, for every e)
    rows = grouped_mm(f(grouped_mm(x[tokens], first, offs)), second, offs)
    out = zeros.index_add(0, tokens, rows * weights.flatten()[order][:, None])
    or    (rows[argsort(order)].view(T, k, H) * weights[:, :, None]).sum(1)

Row r is that of choice order[r], which is a permutation; it lies in the part of the expert that the choice is
of, as parts follow each other in the order of experts and are as long as experts are chosen often.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..term import Term
from .expert import Experts, first_argument, name_of, network, same_node
from .ops import arguments, operation, value_of
from .product import Product
from .sums import Sums
from .tensor import AT, LeftAlone, Reader, same_size
from .terms import divided, number, reads_in, replaced, tidy

MM = ("_grouped_mm", "grouped_mm")
ADDS = ("index_add", "scatter_add")
CASTS = ("to", "int", "long", "type", "contiguous")
TOKEN, COLUMN = "t", "h"


def grouped_product(node: fx.Node) -> Product | None:
    """A product of rows with the matrix of their group, (E, in, out); None for anything else."""
    did = operation(node)
    if did is None or did.name not in MM:
        return None
    source, matrix, offs, bias, dtype = arguments(node, "mat_a", "mat_b", "offs", "bias", "out_dtype")
    if not isinstance(offs, fx.Node) or bias is not None:
        return None
    rows, stack, out = map(value_of, (source, matrix, node))
    if (rows.dim(), stack.dim()) != (2, 3) or dtype not in (None, out.dtype) or out.dtype != rows.dtype:
        return None
    return Product(node, source, matrix, (0, 2, 1), stack.shape[2])


def sums_groups(reader: Reader, node: fx.Node) -> bool:
    """Whether a node adds up rows of grouped products by token."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.dim() != 2:
        return False
    if name_of(node) in ADDS:
        rows = arguments(node, "input", "dim", "index", "source" if name_of(node) == "index_add" else "src")[
            3
        ]
        return isinstance(rows, fx.Node) and _second(reader, reader.operand(rows, node).term) is not None
    if name_of(node) not in ("sum", "einsum", "matmul", "bmm"):
        return False
    try:
        factors = _factors(reader, node)
    except LeftAlone:
        return False
    return any(_second(reader, factor) is not None for factor in factors)


def _rows_name(add: fx.Node) -> str:
    return "source" if name_of(add) == "index_add" else "src"


def _second(reader: Reader, term: Term) -> Any:
    """The first read of a grouped product's rows in a term."""
    reads = (r for r in reads_in(term) if AT not in r[1])
    return next((r for r in reads if name_of(reader.leaves[r[1]]) in MM), None)


def _factors(reader: Reader, node: fx.Node) -> list[Term]:
    """What is summed over the choices of a token, at (t, h) and choice n: factors."""
    sums = Sums(reader)
    read = reader.leaf(node).at([TOKEN, COLUMN])
    parts = sums.expand(read)
    if len(parts) != 1 or len(parts[0].bound) != 1 or parts[0].scale != 1:
        return []
    return [tidy(replaced(f, parts[0].bound[0], "n")) for f in parts[0].factors]


def grouped(reader: Reader, node: fx.Node) -> Experts:
    """The experts whose rows a node adds up. Raises LeftAlone."""
    found = _added(reader, node) if name_of(node) in ADDS else _summed(reader, node)
    second, sort, weights, root = found
    net, given = network(reader, second, second.node, ("i0",), grouped_product)
    ids = same_node([_ids_of_parts(reader, p.node) for p in (*net.firsts, second)])
    count = value_of(ids).shape[1]
    if _sorted(reader, sort) is not ids:
        raise LeftAlone("its rows are not sorted by the ids that its parts are of")
    x = same_node(
        [_tokens(reader, rows, p.node, sort, count) for p, rows in zip(net.firsts, given, strict=True)]
    )
    if not all(same_size(value_of(n).shape[0], value_of(ids).shape[0]) for n in (x, node)):
        raise LeftAlone("its tokens are others than those of its ids")
    return Experts(node, root, x, ids, weights, [net], [weights])


Found = tuple[Product, fx.Node, fx.Node, fx.Node | None]  # second product, order, weights, root


def _added(reader: Reader, node: fx.Node) -> Found:
    """Rows that are added to those of their tokens in zeros."""
    did, memory = operation(node), reader.memory
    assert did is not None
    base, dim, index, rows, alpha = arguments(node, "input", "dim", "index", _rows_name(node), "alpha")
    if dim not in (0, -2) or alpha not in (None, 1):
        raise LeftAlone("rows are added along another dimension, or scaled")
    root = memory.group[node] if did.writes else None
    if root is not None and memory.writes[root] != [node]:
        raise LeftAlone("its result is written to elsewhere too")
    if number(reader.operand(base, node).term) != 0:
        raise LeftAlone("its rows are added to a tensor that is not zeros")
    term, tokens = tidy(reader.operand(rows, node).term), reader.operand(index, node).term
    reads = [r for r in reads_in(tokens) if r[0] == "read"]
    if len(reads) != 1 or reads[0][2:] != ("i0",):
        raise LeftAlone("its rows are not added to those of the choices that they are of")
    sort = reader.made(reads[0][1])
    product = _second(reader, term)
    weights = next((r for r in reads_in(term) if r[0] == "readf" and r != product), None)
    if product[2:] != ("i0", "i1") or weights is None or len(weights) != 4:
        raise LeftAlone("what it adds is no product of an expert's rows and weights")
    token, choice = divided(reads[0], _choices(reader, weights), {})
    if tokens != token:
        raise LeftAlone("its rows are not added to those of the choices that they are of")
    if weights[2:] != (token, choice) or term not in (("mul", product, weights), ("mul", weights, product)):
        raise LeftAlone("its rows are not scaled by the weights of the choices that they are of")
    return _product(reader, product), sort, reader.tensor_of(weights[1]), root


def _summed(reader: Reader, node: fx.Node) -> Found:
    """Rows in the order of choices, summed over those of a token."""
    factors = _factors(reader, node)
    product = next(f for f in factors if _second(reader, f) is not None)
    others = [f for f in factors if f is not product]
    if len(others) != 1 or not isinstance(others[0], tuple) or others[0][0] != "readf" or len(others[0]) != 4:
        raise LeftAlone("what it adds is no product of an expert's rows and weights")
    weights = others[0]
    count = _choices(reader, weights)
    place = tidy(("add", ("mul", count, TOKEN), "n")) if count != 1 else TOKEN
    back = product[2] if product[0] == "readf" and product[3:] == (COLUMN,) else None
    if not isinstance(back, tuple) or back[0] != "read" or back[2:] != (place,):
        raise LeftAlone("its rows are not put back into the order of the choices")
    sort = _argument_of_sort(reader, reader.made(back[1]))
    sort = None if sort is None else sort[0]
    if sort is None or _argument_of_sort(reader, sort) is None:
        raise LeftAlone("its rows are not put back into the order of the choices")
    there = ("read", f"%{sort.name}", back)  # the choice that a row is of, which was put back to its place
    expected = [(TOKEN, "n"), divided(there, count, {})] if count != 1 else [(TOKEN, 0), (there, 0)]
    if weights[2:] not in [tuple(e) for e in expected]:
        raise LeftAlone("its rows are not scaled by the weights of the choices that they are of")
    return _product(reader, product), sort, reader.tensor_of(weights[1]), None


def _choices(reader: Reader, weights: Any) -> int:
    """How many choices a token has."""
    count = value_of(reader.leaves[weights[1]]).shape[1]
    if not isinstance(count, int):
        raise LeftAlone("the number of its choices is known at run time only")
    return count


def _product(reader: Reader, read: Any) -> Product:
    product = grouped_product(reader.leaves[read[1]])
    if product is None:
        raise LeftAlone("its second product has a bias, or another dtype than its rows")
    return product


def _argument_of_sort(reader: Reader, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(what a node gives the ascending order of, the node that reads it)."""
    sort = node
    if name_of(node) in ("getitem", "indices"):
        sort = first_argument(node)
        if sort is None or name_of(sort) != "sort" or (name_of(node) == "getitem" and node.args[1] != 1):
            return None
    elif name_of(node) != "argsort":
        return None
    source, dim, descending = arguments(sort, "input", "dim", "descending")
    if (
        not isinstance(source, fx.Node)
        or value_of(source).dim() != 1
        or dim not in (None, 0, -1)
        or descending
    ):
        return None
    return source, sort


def _sorted(reader: Reader, order: fx.Node) -> fx.Node:
    """The ids (T, k) whose ascending order a node holds. Raises LeftAlone."""
    found = _argument_of_sort(reader, order)
    if found is None:
        raise LeftAlone("its rows are not in the order of their experts")
    return _flat(reader, reader.operand(*found).term)


def _flat(reader: Reader, term: Term) -> fx.Node:
    """The ids (T, k) that are read one after the other. Raises LeftAlone."""
    if isinstance(term, tuple) and term[0] == "cast":
        term = term[2]
    if isinstance(term, tuple) and term[0] == "read" and len(term) == 4:
        ids = reader.leaves[term[1]]
        count = value_of(ids).shape[1]
        places = ("i0", 0) if count == 1 else divided("i0", count, {}) if isinstance(count, int) else None
        if term[2:] == places:
            return reader.tensor_of(term[1])
    raise LeftAlone("its ids are not sorted, or counted, as they are")


def _tokens(reader: Reader, rows: fx.Node, at: fx.Node, order: fx.Node, count: int) -> fx.Node:
    """x, where rows are x[order // k]. Raises LeftAlone."""
    term = reader.operand(rows, at).term
    token = divided(("read", f"%{order.name}", "i0"), count, {})[0]
    if isinstance(term, tuple) and term[0] == "readf" and term[2:] == (token, "i1"):
        return reader.tensor_of(term[1])
    raise LeftAlone("its first product is not of the tokens of its choices")


# ---- where the parts of experts end ----


def _ids_of_parts(reader: Reader, product: fx.Node) -> fx.Node:
    """The ids (T, k) whose numbers by expert a product's offs add up. Raises LeftAlone."""
    _, matrix, offs = arguments(product, "mat_a", "mat_b", "offs")
    ends, exact = _behind_casts(reader, offs, product)
    if name_of(ends) != "cumsum" or not exact:
        raise LeftAlone("its offs are no running sum")
    counts, exact = _behind_casts(reader, arguments(ends, "input")[0], ends)
    found = _counted(reader, counts, value_of(matrix).shape[0]) if exact else None
    if found is None:
        raise LeftAlone("its offs do not count how often each expert is chosen")
    return _flat(reader, found)


def _behind_casts(reader: Reader, node: fx.Node, at: fx.Node) -> tuple[fx.Node, bool]:
    """(what casts are of, whether none of them rounds numbers of rows)."""
    exact = True
    while True:
        node, whole = reader.memory.current(node, at)
        exact &= whole and value_of(node).dtype in (torch.int32, torch.int64, torch.float32, torch.float64)
        source = first_argument(node)
        if name_of(node) not in CASTS or source is None:
            return node, exact
        node, at = source, node


def _counted(reader: Reader, node: fx.Node, experts: Any) -> Term | None:
    """Entry i0 of what is counted where it is e, for e from 0 to the number of experts, exclusive."""
    name = name_of(node)
    if not isinstance(experts, int) or not same_size(value_of(node).shape[0], experts):
        return None
    if name == "histc":
        source, bins, low, high = arguments(node, "input", "bins", "min", "max")
        exact = isinstance(source, fx.Node) and value_of(source).dtype not in (torch.float16, torch.bfloat16)
        known = exact and bins == experts and low == 0 and high in (experts - 1, experts)
        return reader.operand(source, node).term if known else None
    if name == "bincount":
        source, weights, least = arguments(node, "input", "weights", "minlength")
        return reader.operand(source, node).term if weights is None and least == experts else None
    return _compared(reader, node) if name == "sum" else None


def _compared(reader: Reader, node: fx.Node) -> Term | None:
    """Entry i0 of what is compared to every e, by `one_hot` or `==`, and counted by a sum."""
    source, dim = arguments(node, "input", "dim")
    if dim not in (0, (0,), [0]) or not isinstance(source, fx.Node) or value_of(source).dim() != 2:
        return None
    parts = Sums(reader).expand(reader.operand(source, node).term)
    if len(parts) != 1 or parts[0].bound or parts[0].scale != 1 or len(parts[0].factors) != 1:
        return None
    equal = parts[0].factors[0]
    sides = equal[1:] if isinstance(equal, tuple) and equal[0] == "eq" else ()
    return next((side for side in sides if "i1" in sides and side != "i1"), None)
