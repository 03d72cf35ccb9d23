"""build: a layer of experts as the graph that its passes start from.

    %tokens, %bounds, %place = group %ids {experts = E}
    %xs = gather %x, %tokens
    %g = grouped_matmul %xs, %gate_up, %bounds {transpose_b = True}
    %a, %b = split %g {interleaved = False}
    %h = map %a, %b {expr = ...}                                        the activation
    %y = grouped_matmul %h, %down, %bounds {transpose_b = True}
    %o = combine %y, %place, %weights

With top_k = 0 the results of group are inputs, and place is a list by token with its starts.
"""

from __future__ import annotations

from dataclasses import replace

import sympy

from ...ir.expr import Expr, real
from ...ir.graph import Extent, Graph, Op, Value
from ...ir.quantized import PER_EXPERT, Quantized
from .spec import ExpertsSpec


def build_experts(spec: ExpertsSpec) -> Graph:
    """The unfused graph of a spec. Facts about the target travel as attributes of the products."""
    wide, e = spec.accumulator, spec.experts
    ids_dtype, weights_dtype = spec.routing

    def matrix(name: str, out: int, inner: int) -> Value:
        return Value(name, spec.dtype, (e, inner, out) if spec.transposed else (e, out, inner))

    def product(a: str, w: Value, added: list[str], bias: list[Value], out: Value, unit: int | None) -> Op:
        facts = {"transpose_b": not spec.transposed, "unit": unit, "adds": "rows" if added else None}
        operands = (a, w.name, "bounds", *added, *(b.name for b in bias))
        return chosen(spec, Op("grouped_matmul", operands, (out,), _attrs(facts)), "b" if added else None)

    x = Value("x", spec.dtype, ("T", spec.hidden))
    up, down = matrix("gate_up", spec.up_columns, spec.hidden), matrix("down", spec.hidden, spec.inner)
    columns = (("gate_up_bias", spec.up_columns), ("down_bias", spec.hidden))
    biases = [[Value(n, spec.dtype, (e, size))] if spec.biased else [] for n, size in columns]
    tokens, bounds = Value("tokens", "i32", ("rows",)), Value("bounds", "i32", (e + 1,))
    ops: list[Op] = []
    if spec.top_k:
        pairs = ("T", spec.top_k)
        ids, place = Value("ids", ids_dtype, pairs), Value("place", "i32", pairs)
        routing, rest = ([tokens, bounds, place] if spec.routed else [ids]), ["place"]
        if not spec.routed:
            attrs = _attrs({"experts": e, "single": spec.single})
            ops.append(Op("group", ("ids",), (tokens, bounds, place), attrs))
        weights = Value("weights", weights_dtype, pairs)
    else:
        place, starts = Value("place", "i32", ("rows",)), Value("starts", "i32", ("bounds_of_tokens",))
        routing, rest = [tokens, bounds, place, starts], ["place", "starts"]
        weights = Value("weights", weights_dtype, ("rows",))
    first = Value("g", spec.dtype if spec.keeps else wide, ("rows", spec.up_columns))
    halves = [Value(n, wide, ("rows", spec.inner)) for n in ("a", "b")]
    h = Value("h", spec.dtype, ("rows", spec.inner))
    y = Value("y", spec.dtype, ("rows", spec.hidden))
    o = Value("o", spec.dtype, ("T", spec.hidden))
    stored = [stored_as(matrix, q) for matrix, q in zip((up, down), spec.quantized, strict=True)]
    ops += [op for _, made in stored for op in made]
    lora = lora_values(spec)
    ops += [*lora_rows(spec, "gate_up", "x", gathers=True)] if spec.ranks[0] else []
    ops += [
        Op("gather", ("x", "tokens"), (Value("xs", spec.dtype, ("rows", spec.hidden)),)),
        product("xs", up, added(spec, "gate_up"), biases[0], first, spec.units[0]),
    ]
    if spec.halves:
        ops.append(Op("split", ("g",), tuple(halves), _attrs({"interleaved": spec.halves == "interleaved"})))
    activated = ("a", "b") if spec.halves else ("g",)
    ops += [
        Op("map", activated, (h,), _attrs({"expr": spec.activation})),
        *(lora_rows(spec, "down", "h", gathers=False) if spec.ranks[1] else []),
        product("h", down, added(spec, "down"), biases[1], y, spec.units[1]),
        Op("combine", ("y", *rest, "weights"), (o,)),
    ]
    inputs = (x, *routing, weights, *stored[0][0], *biases[0], *stored[1][0], *biases[1], *lora)
    return Graph("experts", inputs, tuple(ops), ("o", "g") if spec.keeps else ("o",))


def stored_as(matrix: Value, q: Quantized | None) -> tuple[list[Value], list[Op]]:
    """The inputs that stand for matrices, and the operation that makes the matrices of codes."""
    if q is None:
        return [matrix], []
    e, n, _ = matrix.shape
    names = codes_names(matrix.name, q)
    planes = [
        Value(name, "u8", (e, n, q.row_bytes(number))) for number, name in enumerate(names[: len(q.read)])
    ]
    scale = "u8" if q.scale == "e8m0" else q.scale
    found = [*planes, Value(f"{matrix.name}_scales", scale, (e, n, q.groups))]
    if q.zero is not None:
        found.append(Value(f"{matrix.name}_zeros", q.zero, (e, n, q.groups)))
    if q.bits == PER_EXPERT:
        found.append(Value(f"{matrix.name}_bits", "i32", (e,)))
    operands = tuple(v.name for v in found)
    return found, [Op("dequantize", operands, (matrix,), (("format", q),))]


def codes_names(name: str, q: Quantized) -> list[str]:
    """What planes of codes, scales, zero points and widths of matrices are called."""
    planes = [f"{name}_codes{number or ''}" for number in range(len(q.read))]
    more = [f"{name}_zeros"] if q.zero is not None else []
    return [*planes, f"{name}_scales", *more, *([f"{name}_bits"] if q.bits == PER_EXPERT else [])]


def lora_values(spec: ExpertsSpec) -> list[Value]:
    """The matrices of low-rank adapters: a [E, rank, in] and b [E, out, rank] in any layout, or a stack of
    these, and which of them tokens take."""
    e: tuple[Extent, ...] = ("adapters", spec.experts) if spec.adapters else (spec.experts,)
    found = []
    sizes = (("gate_up", spec.hidden, spec.up_columns), ("down", spec.inner, spec.hidden))
    for (name, inner, out), rank in zip(sizes, spec.ranks, strict=True):
        if rank:
            found.append(Value(f"{name}_a", spec.dtype, (*e, rank, inner)))
            found.append(Value(f"{name}_b", spec.dtype, (*e, out, rank)))
    return [*found, *([Value("adapter_ids", spec.adapters, ("T",))] if spec.adapters else [])]


def chosen(spec: ExpertsSpec, op: Op, which: str | None) -> Op:
    """A product of which rows choose among adapters, if `which` of its matrices is one: see ir/ragged.py."""
    if which is None or not spec.adapters:
        return op
    return replace(op, inputs=(*op.inputs, "tokens", "adapter_ids")).with_attrs(chooses=which)


def lora_rows(spec: ExpertsSpec, name: str, source: str, *, gathers: bool) -> list[Op]:
    """`name`_t [rows, rank]: rows of a source by a, times the scale."""
    rank, size = (spec.ranks[0], spec.hidden) if name == "gate_up" else (spec.ranks[1], spec.inner)
    rows = Value(f"{name}_s", spec.accumulator, ("rows", rank))
    ops = []
    if gathers:
        ops.append(Op("gather", (source, "tokens"), (Value(f"{name}_xs", spec.dtype, ("rows", size)),)))
        source = f"{name}_xs"
    facts = {"transpose_b": True, "unit": 2}
    product = Op("grouped_matmul", (source, f"{name}_a", "bounds"), (rows,), _attrs(facts))
    return [
        *ops,
        chosen(spec, product, "w"),
        Op(
            "map",
            (rows.name,),
            (Value(f"{name}_t", spec.dtype, ("rows", rank)),),
            _attrs({"expr": scaled(spec)}),
        ),
    ]


def added(spec: ExpertsSpec, name: str) -> list[str]:
    """What a product has added: the operands of `adds`."""
    return [f"{name}_t", f"{name}_b"] if spec.ranks[name == "down"] else []


def scaled(spec: ExpertsSpec) -> Expr:
    return real("x0") * sympy.Float(spec.lora_scale)


def build_groups(spec: ExpertsSpec) -> Graph:
    """The graph of routing alone: which rows each expert gets."""
    graph = build_experts(spec)
    (op,) = graph.of_kind("group")
    kept = tuple(v for v in graph.inputs if v.name == "ids")
    return Graph("groups", kept, (op,), tuple(v.name for v in op.outputs))


def _attrs(values: dict[str, object]) -> tuple[tuple[str, object], ...]:
    return tuple((name, value) for name, value in values.items() if value is not None and value is not False)
