"""Products of a graph with one matrix, or with a stack of matrices, one an expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .contract import contraction
from .ops import arguments, operation, value_of


@dataclass(frozen=True)
class Product:
    """source times a matrix: rows of `source` by columns.

    order: how the matrix's dimensions become (out, in), or (E, out, in). bias: (out,) or None.
    places: which dimensions of the result are those of experts, tokens and columns; read: which dimensions of
    the source are those of experts and tokens, read_last: of what is summed. Empty without experts. tokens:
    which dimensions of the source are those of tokens."""

    node: fx.Node
    source: fx.Node
    matrix: fx.Node
    order: tuple[int, ...]
    columns: Any
    bias: fx.Node | None = None
    places: tuple[int, ...] = ()
    read: tuple[int, ...] = ()
    read_last: int = 1
    tokens: tuple[int, ...] = ()


def linear_product(node: fx.Node) -> Product | None:
    """`linear(x, matrix, bias)`, `x @ matrix`; None for anything else. x: (..., in)."""
    did = operation(node)
    value = value_of(node)
    if did is None or did.writes or not isinstance(value, torch.Tensor) or value.dim() < 2:
        return None
    if did.name == "linear":
        source, matrix, bias = arguments(node, "input", "weight", "bias")
        return Product(node, source, matrix, (0, 1), value.shape[-1], bias)
    if did.name in ("matmul", "mm"):
        source, matrix = arguments(node, "input", "other" if did.name == "matmul" else "mat2")
        if isinstance(matrix, fx.Node) and isinstance(source, fx.Node) and value_of(matrix).dim() == 2:
            return (
                Product(node, source, matrix, (1, 0), value.shape[-1]) if value_of(source).dim() > 1 else None
            )
    return None


def stacked_product(node: fx.Node) -> Product | None:
    """A product of tokens, or of every expert's rows, with every expert's matrix; None for anything else."""
    product = contraction(node)
    if product is None or len(product.out) < 3:
        return None
    for one in (0, 1):
        (source, labels), (matrix, its) = product.operand(one), product.operand(1 - one)
        if None in labels or None in its or len(its) != 3:
            continue
        inner = product.summed
        tokens = [x for x in product.out if x in labels and x not in its]
        shared = [x for x in its if x in product.out and x in labels]
        outs = [x for x in its if x != inner and x not in labels]
        if len(tokens) != len(product.out) - 2:
            continue
        if len(shared) == 1 and len(outs) == 1:
            expert, out = shared[0], outs[0]
        elif not shared and len(outs) == 2:
            expert, out = sorted(outs, key=its.index)  # matrices (E, ..): the experts come first
        else:
            continue
        if its.index(expert) != 0:
            continue
        order = tuple(its.index(x) for x in (expert, out, inner))
        places = tuple(product.out.index(x) for x in (expert, *tokens, out))
        rows = tuple(labels.index(x) for x in tokens)
        read = (labels.index(expert), *rows) if shared else ()
        columns = value_of(node).shape[places[-1]]
        return Product(node, source, matrix, order, columns, None, places, read, labels.index(inner), rows)
    return None
