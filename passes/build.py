"""build: an attention spec as the graph that the pipeline starts from, and back.

    %s = sddmm %q, %k, %p0 {mask = ..., ...}          scores where the mask holds
    %t = score_map %s, %scale {score = ...}           scale, then the user's score_mod
    %p, %lse = softmax %t
    %o = spmm %p, %v

Facts about the target and the tensors travel as attributes of sddmm, so that a graph's text is all a
kernel is made from.
"""

from __future__ import annotations

from ..ir.graph import Graph, Op, Value
from .spec import AttentionSpec

FACTS = ("contiguous", "monotone", "positive", "precision", "target")  # attributes that say how, not what


def build(spec: AttentionSpec) -> Graph:
    """The unfused graph of a spec."""
    spec = spec.scaled
    mask, score = spec.mask, spec.score_map
    assert score is not None
    wide = spec.accumulator
    q = Value("q", spec.dtype, ("B", "Hq", "q_len", spec.qk_size))
    k = Value("k", spec.dtype, ("B", "Hk", "kv_len", spec.qk_size))
    v = Value("v", spec.dtype, ("B", "Hk", "kv_len", spec.v_size))
    integers = [Value(name, "i64", ()) for name in mask.params]
    numbers = [Value(name, dtype, ()) for name, dtype in spec.score_params]
    tensors = {t.name: Value(t.name, t.dtype, t.shape) for t in spec.capture_tensors}
    of_mask = [tensors[c.name] for c in mask.captures]
    of_score = [tensors[c.name] for c in score.captures]
    pairs = ("B", "Hq", "q_len", "kv_len")
    facts = {
        "mask": mask,
        "contiguous": spec.contiguous,
        "monotone": tuple(sorted(spec.monotone)),
        "positive": spec.positive,
        "precision": spec.precision,
        "target": spec.target,
    }
    scores = Op("sddmm", _names(q, k, *integers, *of_mask), (Value("s", wide, pairs),), tuple(facts.items()))
    mapped = Op(
        "score_map", ("s", *_names(*numbers, *of_score)), (Value("t", wide, pairs),), (("score", score),)
    )
    lse = (Value("lse", spec.lse_dtype, pairs[:3]),) if spec.return_lse else ()
    peak = (Value("max", spec.lse_dtype, pairs[:3]),) if spec.return_max else ()
    weights = Op("softmax", ("t",), (Value("p", wide, pairs), *lse, *peak))
    out = Op("spmm", ("p", "v"), (Value("o", spec.dtype, (*pairs[:3], spec.v_size)),))
    inputs = (q, k, v, *integers, *of_mask, *numbers, *of_score)
    returned = _names(out.output, *lse, *peak)
    return Graph("attention", inputs, (scores, mapped, weights, out), returned)


def spec_of(graph: Graph, op: Op) -> AttentionSpec:
    """The spec of a fused attention; its score map holds the scale."""
    q, v = graph.values[op.inputs[0]], graph.values[op.inputs[2]]
    return AttentionSpec(
        mask=op.attr("mask"),
        score_map=op.attr("score"),
        dtype=q.dtype,
        qk_size=int(q.shape[3]),
        v_size=int(v.shape[3]),
        contiguous=op.attr("contiguous"),
        return_lse=len(op.outputs) > 1,
        return_max=len(op.outputs) > 2,
        target=op.attr("target"),
        precision=op.attr("precision"),
        monotone=frozenset(op.attr("monotone")),
        positive=op.attr("positive"),
    )


def _names(*values: Value) -> tuple[str, ...]:
    return tuple(v.name for v in values)
