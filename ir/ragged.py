"""Ragged groups: rows sorted by the group (the expert) they belong to, with explicit bounds.

The operations of the graph IR over them; none holds anything of size T x E.

    group           ids [T, K] -> tokens [rows], bounds [E + 1], place [T, K]. Rows are the entries of ids,
                    sorted by group and, within one, by their order in ids. tokens: the first index of each
                    row's entry; bounds[e] .. bounds[e + 1] are the rows of group e; place: the row of each
                    entry, -1 where its id is not in 0 .. E - 1 (such entries are dropped)
    gather          x [T, H], tokens [rows] -> [rows, H]: the rows of x that tokens names
    grouped_matmul  a [rows, K] x w [E, K, N], bounds [E + 1] (, bias [E, N]) -> [rows, N]: each group's rows
                    by the matrix of the group; transpose_b: w is [E, N, K]. `adds`: before a bias come
                    t [rows, R] and b, whose product is added: 'rows': b is [E, N, R]; 'columns': [E, R, N].
                    `chooses`, 'w' or 'b': there are several of these matrices for each group, [A, E, ..], and
                    last come tokens [rows] and choice [T]: row i takes matrix choice[tokens[i]] of its group,
                    and nothing where that is not in 0 .. A - 1
    dequantize      planes of codes, scales (, zero points) (, widths [E]) -> [E, N, K]: the matrices they
                    stand for, by the Quantized `format` (ir/quantized.py). `used`: bounds follow, and only
                    the matrices of groups that have rows are made; others hold anything
    split           [.., 2 N] -> two [.., N]: its halves, or, if `interleaved`, even and odd columns
    combine         y [rows, H], place [T, K], weights [T, K] -> [T, H]: for each token the weighted sum of
    its
                    rows, in the order of K. With place [rows], starts [T + 1] and weights [rows] for the last
                    two, token t has the rows place[starts[t]] .. place[starts[t + 1] - 1]; weights are those
                    of rows

    grouped_outer   a [rows, M], b [rows, N], bounds (, tokens) -> [E, M, N]: for each group the sum over its
    rows
                    of a's row times b's. `gathers`: 'a' or 'b', of which tokens names the rows, or None.
                    `masked`: then comes trains [E] of ones and zeros; where it is zero, so is the result.
                    `chooses`: last come tokens [rows] and choice [T], and there is a result for each choice
                    and group, [A, E, M, N]: the sum over those rows of the group that chose so
    map_grad_rows   g [rows, C], dh [rows, N], weights [rows], bounds -> dg [rows, C], hw [rows, N], dw
    [rows]: of
                    h = `expr` of the `halves` of g, as in grouped_gemm, where rows are weighted behind it:
                    the gradient of g, h times its row's weight, and the gradient of the weight, sum of h * dh

What fuse makes of gather, grouped_matmul, split and map:

    grouped_gemm    a, w, bounds (, tokens) (, t, b) (, bias) (, tokens, choice) -> [rows, N]. `gathers`,
                    `adds`, `biased`, `chooses`: which operands follow;
                    `halves`: None, 'split' or 'interleaved'; `expr`: over x0 (and x1, the second half).
                    A second result is what `expr` was taken of, [rows, C], kept for gradients

Where grouped_gemm and those below have `quantized`, a Quantized, w is the first plane of its codes, and what
else belongs to the matrices (planes, scales, widths) follows all other operands.

What passes/moe/direct.py makes of all of it, where entries are few; rows are entries, in the order of ids:

    entry_gemm      a [T, K], w, ids [T, k] (, bias) -> [rows, N], as grouped_gemm
    entry_combine   h [rows, K], w, ids [T, k], weights [T, k] (, bias) -> [T, N]: grouped_gemm, combine

Both take what `adds` 'rows' has added with the matrix that makes t: after a bias come c and b, t being `low`
(an expression over x0) of the product of a row by c, [E, R, K]; with `chooses` these are [A, E, ..], and the
choice [T] follows.

Rows at or beyond bounds[E] belong to nobody: nothing reads them, and the interpreter makes them zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .graph import Op

HALVES = ("split", "interleaved")
ADDS = ("rows", "columns")
CHOOSES = ("w", "b")


@dataclass(frozen=True)
class Tiling:
    """How a grouped_gemm runs: tiles of `rows` rows by `cols` columns (of each half, where there are two).

    inner: how much of the summed axis a step takes. resident: a program loads all of a row tile once and
    walks over all columns (CPUs); else it takes one column tile. wide: column tiles that start side by side,
    before the next row tile. blocked: intermediates are stored a row tile after another, rows innermost.
    rest: row tiles with no more rows than this are computed as tiles of so many; 0: all are of `rows`.
    meta: backend hints.

    Of quantised matrices: `inner` counts columns of a slice. unroll: how many of these steps a turn of the
    loop takes. scales: what scales are multiplied with: 'codes', 'products' of one step, or 'sums', where a
    row has one scale. ahead: scales of steps are loaded a turn before they are used. turned: tiles have
    columns before rows, so that decoded tiles are what the tensor cores take from registers. An entry_gemm or
    entry_combine that has a tiling takes a step of each row by chunks, which lanes add up by themselves."""

    rows: int
    cols: int
    inner: int
    resident: bool = False
    wide: int = 1
    blocked: bool = False
    rest: int = 0
    meta: tuple[tuple[str, int], ...] = ()
    unroll: int = 1
    scales: str = "codes"
    turned: bool = False
    ahead: bool = False


def storage_of(op: Op) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The operands of an operation, of quantised matrices the first plane alone, and all that these have."""
    quantized: Any = op.attr("quantized")
    if quantized is None:
        return op.inputs, (op.inputs[1],)
    end = len(op.inputs) - quantized.operands + 1
    return op.inputs[:end], (op.inputs[1], *op.inputs[end:])
