"""The primitive `gossamer_attention` of JAX: its types, its batching, and its lowering to each platform."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from ..ir.errors import MissingDependencyError, UnsupportedError

try:
    import jax
    import jax.numpy as jnp
    from jax.extend.core import Primitive
    from jax.interpreters import batching, mlir
except ImportError:
    raise MissingDependencyError("jax", "jax", "gossamer.jax") from None

from . import jax_cpu
from .jax_call import Call

attention_p = Primitive("gossamer_attention")
attention_p.multiple_results = True
"""Operands as `Call.operands` names them. Parameter: call, the text of a Call. Results: the output in the
call's layout and, if it asks for it, the LSE (B, N, T)."""


def shapes_of(call: Call, operands: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the results for operands of these shapes and dtypes."""
    q, v = operands[0], operands[2]
    results = [jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype)]
    if call.lse:
        rows = (q.shape[0], q.shape[2], q.shape[1]) if call.layout == "BTNH" else q.shape[:3]
        wide = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
        results.append(jax.ShapeDtypeStruct(rows, wide))
    return results


# types ----------------------------------------------------------------------------------------------


def _types(*avals: Any, call: str) -> Sequence[Any]:
    """Result types: those of a computation in which every number depends on every operand."""

    def like(*operands: Any) -> list[Any]:
        total = sum((jnp.sum(x != 0, dtype=jnp.int32) for x in operands), jnp.int32(0))
        shapes = shapes_of(Call.parse(call), operands)
        return [jnp.broadcast_to(total.astype(s.dtype), s.shape) for s in shapes]

    return jax.make_jaxpr(like)(*avals).out_avals


attention_p.def_abstract_eval(_types)


@partial(jax.jit, static_argnames="call")
def _compiled(*operands: Any, call: str) -> Any:
    return attention_p.bind(*operands, call=call)


attention_p.def_impl(_compiled)


# lowering -------------------------------------------------------------------------------------------


def _on_cpu(*operands: Any, call: str) -> Any:
    parsed = Call.parse(call)
    results = shapes_of(parsed, operands)
    jax_cpu.compile_early(parsed, operands, results)
    return jax.ffi.ffi_call(jax_cpu.register(), results)(jax_cpu.encoded(call), *operands)


def _elsewhere(ctx: Any, *operands: Any, call: str) -> Any:
    platforms = ", ".join(ctx.platforms or ctx.module_context.platforms)
    raise UnsupportedError(
        f"gossamer.jax.attention on {platforms} is not built yet. Compile the program for the CPU, or pass "
        "the arrays to gossamer.attention as torch tensors, through DLPack"
    )


mlir.register_lowering(attention_p, mlir.lower_fun(_on_cpu, multiple_results=True), platform="cpu")
mlir.register_lowering(attention_p, _elsewhere)


# batching -------------------------------------------------------------------------------------------


def _batched(args: Sequence[Any], dims: Sequence[int | None], *, call: str) -> Any:
    """Calls side by side as one call: their sequences are numbered one call after the other."""
    parsed = Call.parse(call)
    args = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(args, dims, strict=True)]
    own = {name: d is not None for name, d in zip(parsed.operands, dims, strict=True)}
    if own.get("sinks"):
        return _one_by_one(args, list(own.values()), call)
    given = dict(zip(parsed.operands, args, strict=True))
    calls = next(x.shape[0] for name, x in given.items() if own[name])
    batch = given["q"].shape[own["q"]]

    def folded(name: str) -> Any:
        x = given[name]
        if not own[name]:
            x = jnp.broadcast_to(x, (calls, *x.shape))
        if x.shape[1] != batch:  # one sequence of keys for all queries
            x = jnp.broadcast_to(x, (calls, batch, *x.shape[2:]))
        return x.reshape(calls * batch, *x.shape[2:])

    shared = not (own["k"] or own["v"]) and given["k"].shape[0] == 1
    arrays: dict[str, bool] = {}
    for name, x in given.items():
        if name in ("q", "q_offsets", "kv_lens") or (name in ("k", "v") and not shared):
            given[name] = folded(name)
        elif own[name]:
            source = dict(parsed.sources)[name[0]]
            arrays[name] = source.along(name) and x.shape[1] == batch
            if arrays[name]:
                given[name] = x.reshape(-1, *x.shape[2:])
    text = parsed.folded(max(1, batch), arrays).text
    found = attention_p.bind(*given.values(), call=text)
    return [x.reshape(calls, batch, *x.shape[1:]) for x in found], [0] * len(found)


def _one_by_one(args: Sequence[Any], own: Sequence[bool], call: str) -> Any:
    """Kernels take one set of sinks: calls with sinks of their own run one after the other."""

    def run(mine: Sequence[Any]) -> Any:
        left = iter(mine)
        operands = [next(left) if batched else x for x, batched in zip(args, own, strict=True)]
        return attention_p.bind(*operands, call=call)

    found = jax.lax.map(run, [x for x, batched in zip(args, own, strict=True) if batched])
    return found, [0] * len(found)


batching.primitive_batchers[attention_p] = _batched
