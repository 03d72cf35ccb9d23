"""fuse: sddmm, score_map, softmax and spmm in a row become one attention.

Before::

    %s = sddmm %q, %k {mask = m} ; %t = score_map %s {score = f} ; %p = softmax %t ; %o = spmm %p, %v

After::

    %o = attention %q, %k, %v {mask = m, score = f}

Leaves alone: chains whose scores or probabilities are used elsewhere or returned (SPLAT's three
kernels compute those).
"""

from __future__ import annotations

from ..ir.graph import Graph, Op


def fuse(graph: Graph) -> Graph:
    """Every fusible chain fused."""
    for spmm in graph.of_kind("spmm"):
        chain = _chain(graph, spmm)
        if chain is not None:
            graph = graph.replace_ops(chain, [_attention(*chain)])
    return graph


def _chain(graph: Graph, spmm: Op) -> tuple[Op, Op, Op, Op] | None:
    softmax = graph.producer(spmm.inputs[0])
    mapped = softmax and graph.producer(softmax.inputs[0])
    sddmm = mapped and graph.producer(mapped.inputs[0])
    if softmax is None or mapped is None or sddmm is None:
        return None
    if (softmax.kind, mapped.kind, sddmm.kind) != ("softmax", "score_map", "sddmm"):
        return None
    for op in (softmax, mapped, sddmm):
        name = op.output.name
        if len(graph.users(name)) != 1 or name in graph.outputs:
            return None
    return sddmm, mapped, softmax, spmm


def _attention(sddmm: Op, mapped: Op, softmax: Op, spmm: Op) -> Op:
    operands = (*sddmm.inputs[:2], spmm.inputs[1], *sddmm.inputs[2:], *mapped.inputs[1:])
    fused = Op("attention", operands, (spmm.output, *softmax.outputs[1:]), sddmm.attrs)
    return fused.with_attrs(score=mapped.attr("score"))
