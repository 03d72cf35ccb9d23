"""build: an attention spec as the graph that the pipeline starts from, and back.

    %s = sddmm %q, %k, %p0 {mask = ..., ...}          scores where the mask holds
    %t = score_map %s, %scale {score = ...}           scale, then the user's score_mod
    %p, %lse = softmax %t, %sinks
    %w = prob_map %p, %t {prob = ...}                 the user's prob_mod, dropout
    %o = spmm %w, %v
    %column_sums = reduce %p {axis = 2, op = 'sum'}   what every key gets

Facts about the target and the tensors travel as attributes of sddmm, so that a graph's text is all a
kernel is made from.
"""

from __future__ import annotations

from dataclasses import replace

from ..ir.expr import integer
from ..ir.graph import Graph, Op, Value
from ..ir.score import ScoreMap
from ..ir.sequences import PLAIN
from .spec import AttentionSpec

# Attributes that say how, not what.
FACTS = (
    "aligned",
    "contiguous",
    "descriptors",
    "exact_sums",
    "few",
    "group",
    "monotone",
    "positive",
    "precision",
    "sequences",
    "target",
)
PAIRS = ("B", "Hq", "q_len", "kv_len")


def build(spec: AttentionSpec) -> Graph:
    """The unfused graph of a spec."""
    spec = _few_rows(spec.scaled.placed)
    mask, score, prob = spec.mask, spec.score_map, spec.prob_map
    assert score is not None
    wide = spec.accumulator
    q = Value("q", spec.dtype, ("B", "Hq", "q_len", spec.qk_size))
    k = Value("k", spec.dtype, ("B", "Hk", "kv_len", spec.qk_size))
    v = Value("v", spec.dtype, ("B", "Hk", "kv_len", spec.v_size))
    sinks = [Value("sinks", spec.sinks, ("Hq",))] if spec.sinks else []
    tensors = {t.name: Value(t.name, t.dtype, t.shape) for t in spec.capture_tensors}
    of_mask = [*(Value(name, "i64", ()) for name in mask.params), *(tensors[c.name] for c in mask.captures)]

    def of(map: ScoreMap) -> list[Value]:
        numbers = (Value(name, dtype, ()) for name, dtype in spec.params_of(map))
        return [*numbers, *(tensors[c.name] for c in map.captures)]

    facts = {
        "mask": mask,
        "aligned": spec.aligned,
        "contiguous": spec.contiguous,
        "monotone": tuple(sorted(spec.monotone)),
        "positive": spec.positive,
        "precision": spec.precision,
        "target": spec.target,
    }
    if spec.sequences != PLAIN:
        facts["sequences"] = spec.sequences
    facts |= {
        name: value
        for name, value, plain in (
            ("few", spec.few, 0),
            ("group", spec.group, 1),
            ("descriptors", spec.descriptors, True),
            ("exact_sums", spec.exact_sums, False),
        )
        if value != plain
    }
    rows = [Value(n, wide, PAIRS[:3]) for n, asked in _rows(spec) if asked]
    weights, made = Value("p", wide, PAIRS), []
    ops = [
        Op("sddmm", _names(q, k, *of_mask), (Value("s", wide, PAIRS),), tuple(facts.items())),
        Op("score_map", ("s", *_names(*of(score))), (Value("t", wide, PAIRS),), (("score", score),)),
        Op("softmax", ("t", *_names(*sinks)), (weights, *rows)),
    ]
    if prob is not None:
        weights = Value("w", wide, PAIRS)
        ops.append(Op("prob_map", ("p", "t", *_names(*of(prob))), (weights,), (("prob", prob),)))
    out = Value("o", spec.dtype, (*PAIRS[:3], spec.v_size))
    ops.append(Op("spmm", _names(weights, v), (out,)))
    if spec.return_column_sums:
        made = [Value("column_sums", wide, ("B", "Hq", "kv_len"))]
        ops.append(Op("reduce", ("p",), tuple(made), (("axis", 2), ("op", "sum"))))
    inputs = (q, k, v, *sinks, *of_mask, *(x for m in spec.maps for x in of(m)))
    return Graph("attention", inputs, tuple(ops), _names(out, *rows, *made))


def _few_rows(spec: AttentionSpec) -> AttentionSpec:
    """The spec with one head a tile where the mask differs by head, and with rows neither grouped nor split
    where they take more than one pass over the keys."""
    if spec.return_column_sums or not (spec.prob_map is None or spec.prob_map.is_linear):
        return replace(spec, few=0, group=1)
    return replace(spec, group=1) if integer("h") in spec.mask.predicate.free_symbols else spec


def _rows(spec: AttentionSpec) -> tuple[tuple[str, bool], ...]:
    return ("lse", spec.return_lse), ("max", spec.return_max)


def spec_of(graph: Graph, op: Op) -> AttentionSpec:
    """The spec of a fused operation; its score map holds the scale."""
    q = graph.values[op.inputs[0]]
    weighs = op.kind in ("attention", "weigh") or op.attr("given") is not None
    sinks_at = _sinks_at(op)
    own = {"attention": 1, "row_lse": 2 * bool(op.attr("apart"))}
    asked = len(op.outputs) - own[op.kind] if op.kind in own else 0
    return AttentionSpec(
        mask=op.attr("mask"),
        score_map=op.attr("score"),
        dtype=q.dtype,
        qk_size=int(q.shape[3]),
        v_size=int(graph.values[op.inputs[2]].shape[3] if weighs else q.shape[3]),
        contiguous=op.attr("contiguous"),
        return_lse=asked > 0,
        return_max=asked > 1,
        target=op.attr("target"),
        precision=op.attr("precision"),
        monotone=frozenset(op.attr("monotone")),
        positive=op.attr("positive"),
        sinks=None if sinks_at is None else graph.values[op.inputs[sinks_at]].dtype,
        prob_map=op.attr("prob"),
        sequences=op.attr("sequences", PLAIN),
        aligned=op.attr("aligned"),
        few=op.attr("few", 0),
        group=op.attr("group", 1),
        descriptors=op.attr("descriptors", True),
        exact_sums=op.attr("exact_sums", False),
    )


def _sinks_at(op: Op) -> int | None:
    """Where among its operands an operation has sinks, if it has any."""
    given = op.attr("given")
    if given is not None:
        return 3 + given.index("sinks") if "sinks" in given else None
    at = {"attention": 3, "row_lse": 2, "weigh": 5, "column_sums": 3}
    return at[op.kind] if op.attr("sinks") else None


def _names(*values: Value) -> tuple[str, ...]:
    return tuple(v.name for v in values)
