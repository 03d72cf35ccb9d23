"""gradient: the gradients of a layer of experts as a graph of primitives.

Rows are the forward's, sorted by expert: no gradient needs anything larger than [rows, 2 I] or a matrix.

    %du = grouped_gemm %do, %down, %bounds, %tokens            what h gets, before the rows' weights
    %g  = grouped_gemm %x, %gate_up, %bounds, %tokens          recomputed, unless the forward kept it
    %dg, %hw, %dw = map_grad_rows %g, %du, %weights, %bounds
    %ddown = grouped_outer %do, %hw, %bounds, %tokens          the transposed ones where matrices are
    %dgate_up = grouped_outer %dg, %x, %bounds, %tokens
    %dxs = grouped_gemm %dg, %gate_up, %bounds
    %dx = combine %dxs, %place, %ones
    %dgate_up_bias = grouped_outer %ones_of_rows, %dg, %bounds
    %ddown_bias = grouped_outer %weights_of_rows, %do, %bounds, %tokens
    %dwb = grouped_gemm %do, %down_bias_as_matrix, %bounds, %tokens

That the weight of a row gets h . du, without y, is due to SonicMoE (Guo et al., 2025): y = down h, so
do . y = (do down) . h; with a bias of down, dwb is added.

Low-rank adapters add scale b a to a matrix: to every product by it, that of their own by way of `adds`; what
their matrices get goes through rows of their rank, [rows, rank]. Where tokens choose an adapter, so do rows.
"""

from __future__ import annotations

from collections.abc import Iterable

from ...ir.graph import Graph, Op, Value
from .build import chosen, lora_values, scaled, stored_as
from .spec import ExpertsSpec

LORA = ("gate_up_a", "gate_up_b", "down_a", "down_b")
WANTED = ("x", "gate_up", "down", "gate_up_bias", "down_bias", *LORA, "weights")


def build_gradients(spec: ExpertsSpec, wanted: Iterable[str]) -> Graph:
    """The graph of the gradients of the `wanted` inputs of a layer, where that of its result is known.

    Its inputs are those that it reads: x, do [T, H], tokens, bounds, place [T, top_k] (with top_k = 0 a list
    by token with starts), row weights [rows], ones, and g [rows, C] where spec.keeps."""
    absent = {
        name for name, rank in zip(LORA, (r for r in spec.ranks for _ in "ab"), strict=True) if not rank
    }
    wanted = frozenset(wanted) - absent
    wide, e, h, i, c = spec.accumulator, spec.experts, spec.hidden, spec.inner, spec.up_columns
    rows = "rows"

    def matrix(name: str, out: int, inner: int) -> Value:
        return Value(name, spec.dtype, (e, inner, out) if spec.transposed else (e, out, inner))

    up, down = matrix("gate_up", c, h), matrix("down", h, i)
    stored = [stored_as(m, q) for m, q in zip((up, down), spec.quantized, strict=True)]
    by_token = ("T", spec.top_k) if spec.top_k else (rows,)
    starts = [] if spec.top_k else [Value("starts", "i32", ("tokens_and_one",))]
    values = [
        Value("x", spec.dtype, ("T", h)),
        Value("do", spec.dtype, ("T", h)),
        Value("tokens", "i32", (rows,)),
        Value("bounds", "i32", (e + 1,)),
        Value("place", "i32", by_token),
        *starts,
        Value("row_weights", wide, (rows,)),
        Value("ones", wide, by_token),
        Value("g", spec.dtype, (rows, c)),
        *stored[0][0],
        Value("gate_up_bias", spec.dtype, (e, c)),
        *stored[1][0],
        Value("down_bias_matrix", spec.dtype, (e, 1, h)),
        Value("ones_of_rows", wide, (rows, 1)),
        Value("weights_of_rows", wide, (rows, 1)),
        *lora_values(spec),
        Value("trains", "i32", (e,)),
    ]
    ops: list[Op] = [op for _, made in stored for op in made]

    def gemm(
        out: Value, a: str, w: str, *more: str, by_rows: bool, unit: int | None = 2, **attrs: object
    ) -> None:
        facts = {**attrs, "transpose_b": by_rows, "unit": unit}
        op = Op("grouped_gemm", (a, w, "bounds", *more), (out,), _attrs(facts))
        ops.append(chosen(spec, op, "w" if w in LORA else "b" if attrs.get("adds") else None))

    def outer(out: str, shape: tuple[int, ...], a: str, b: str, gathers: str | None) -> None:
        operands = (a, b, "bounds", *(["tokens"] if gathers else []), *(["trains"] if spec.masked else []))
        attrs = {"gathers": gathers, "masked": spec.masked}
        if spec.adapters and out[1:] in LORA:
            made = Value(out, spec.dtype, ("adapters", *shape))
            operands, attrs = (*operands, "tokens", "adapter_ids"), {**attrs, "chooses": True}
        else:
            made = Value(out, spec.dtype, shape)
        ops.append(Op("grouped_outer", operands, (made,), _attrs(attrs)))

    def low(out: str, a: str, name: str, *, of: str, gathers: bool) -> None:
        """Rows by one of an adapter's matrices, times the scale."""
        rank = spec.ranks[name == "down"]
        more = ["tokens"] if gathers else []
        facts = {"expr": scaled(spec), "gathers": gathers}
        made = Value(out, spec.dtype, (rows, rank))
        gemm(made, a, f"{name}_{of}", *more, by_rows=of == "a", **facts)

    up_rank, down_rank = spec.ranks
    if wanted - {"down_bias"}:
        extra = ["low_do", "down_a"] if down_rank else []
        if down_rank:
            low("low_do", "do", "down", of="b", gathers=True)
        gemm(
            Value("du", spec.dtype, (rows, i)), "do", "down", "tokens", *extra,
            by_rows=spec.transposed, unit=spec.units[1], gathers=True, adds="columns" if extra else None,
        )  # fmt: skip
        again = not spec.keeps
        if up_rank and (again or "gate_up_b" in wanted):
            low("low_x", "x", "gate_up", of="a", gathers=True)
        if again:
            bias = ["gate_up_bias"] if spec.biased else []
            extra = ["low_x", "gate_up_b"] if up_rank else []
            gemm(
                Value("g_again", spec.dtype, (rows, c)), "x", "gate_up", "tokens", *extra, *bias,
                by_rows=not spec.transposed, unit=spec.units[0], gathers=True, biased=bool(bias),
                adds="rows" if extra else None,
            )  # fmt: skip
        kept = "g" if spec.keeps else "g_again"
        made = (
            Value("dg", spec.dtype, (rows, c)),
            Value("hw", spec.dtype, (rows, i)),
            Value("dw", wide, (rows,)),
        )
        attrs = _attrs({"expr": spec.activation, "halves": spec.halves})
        ops.append(Op("map_grad_rows", (kept, "du", "row_weights", "bounds"), made, attrs))
    if up_rank and wanted & {"x", "gate_up_a"}:
        low("low_dg", "dg", "gate_up", of="b", gathers=False)
    if "x" in wanted:
        extra = ["low_dg", "gate_up_a"] if up_rank else []
        gemm(
            Value("dxs", spec.dtype, (rows, h)), "dg", "gate_up", *extra,
            by_rows=spec.transposed, unit=spec.units[0], adds="columns" if extra else None,
        )  # fmt: skip
        rest = ("place", *(v.name for v in starts), "ones")
        ops.append(Op("combine", ("dxs", *rest), (Value("dx", spec.dtype, ("T", h)),)))
    if "gate_up" in wanted:
        swap = spec.transposed
        pair, gathered = (("x", "dg"), "a") if swap else (("dg", "x"), "b")
        outer("dgate_up", (e, h, c) if swap else (e, c, h), *pair, gathered)
    if "down" in wanted:
        swap = spec.transposed
        pair, gathered = (("hw", "do"), "b") if swap else (("do", "hw"), "a")
        outer("ddown", (e, i, h) if swap else (e, h, i), *pair, gathered)
    if "gate_up_a" in wanted:
        outer("dgate_up_a", (e, up_rank, h), "low_dg", "x", "b")
    if "gate_up_b" in wanted:
        outer("dgate_up_b", (e, c, up_rank), "dg", "low_x", None)
    if "down_a" in wanted:
        outer("ddown_a", (e, down_rank, i), "low_do", "hw", None)
    if "down_b" in wanted:
        low("low_hw", "hw", "down", of="a", gathers=False)
        outer("ddown_b", (e, h, down_rank), "do", "low_hw", "a")
    if "gate_up_bias" in wanted:
        outer("dgate_up_bias", (e, 1, c), "ones_of_rows", "dg", None)
    if "down_bias" in wanted:
        outer("ddown_bias", (e, 1, h), "weights_of_rows", "do", "b")
    if "weights" in wanted and spec.biased:
        gemm(Value("dwb", wide, (rows, 1)), "do", "down_bias_matrix", "tokens", by_rows=True, gathers=True)
    outputs = [f"d{name}" for name in WANTED if name in wanted and name != "weights"]
    outputs += ["dw"] if "weights" in wanted else []
    outputs += ["dwb"] if "weights" in wanted and spec.biased else []
    read = {name for op in ops for name in op.inputs}
    inputs = tuple(v for v in values if v.name in read)
    return Graph("experts_gradients", inputs, tuple(ops), tuple(outputs)).without_dead()


def _attrs(values: dict[str, object]) -> tuple[tuple[str, object], ...]:
    return tuple((name, value) for name, value in values.items() if value is not None and value is not False)
