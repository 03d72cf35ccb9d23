"""The primitive `gossamer_attention` of JAX: its types, its batching, and its lowering to each platform."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from ...ir.errors import MissingDependencyError, UnsupportedError

try:
    import jax
    import jax.numpy as jnp
    from jax.extend.core import Primitive
    from jax.interpreters import ad, batching, mlir
except ImportError:
    raise MissingDependencyError("jax", "jax", "gossamer.jax") from None

from . import cpu as jax_cpu
from . import gpu as jax_gpu
from .call import Call
from .cpu import Target
from .partition import Division, are_several, divided, division_of, knows_devices

Shapes = Callable[[Sequence[Any]], list[Any]]

attention_p = Primitive("gossamer_attention")
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


def types_like(avals: Sequence[Any], shapes: Shapes) -> Sequence[Any]:
    """Result types: those of a computation in which every number depends on every operand."""

    def like(*operands: Any) -> list[Any]:
        total = sum((jnp.sum(x != 0, dtype=jnp.int32) for x in operands), jnp.int32(0))
        return [jnp.broadcast_to(total.astype(s.dtype), s.shape) for s in shapes(operands)]

    return jax.make_jaxpr(like)(*avals).out_avals


# lowering -------------------------------------------------------------------------------------------


def define(
    primitive: Primitive,
    shapes: Callable[[str, Sequence[Any]], list[Any]],
    target: Target,
    division: Callable[[str, Sequence[Any], Sequence[Any]], Division | None] = lambda *_: None,
) -> None:
    """Types, eager calls and lowerings of a primitive whose parameter `call` is a text.

    shapes: of the results, from the text and the operands. target: what finds its kernels, and runs them on a
    CPU. division: how XLA divides a call among devices, from the text, operands and results."""

    @partial(jax.jit, static_argnames="call")
    def compiled(*operands: Any, call: str) -> Any:
        return primitive.bind(*operands, call=call)

    def eagerly(*operands: Any, call: str) -> Any:
        with jax.disable_jit(False):  # kernels are operations of XLA's programs alone
            return compiled(*operands, call=call)

    def handled(call: str) -> Callable[..., Any]:
        def run(text: Any, *operands: Any) -> Any:
            results = shapes(call, operands)
            target.compile_early(call, operands, results)
            return jax.ffi.ffi_call(target.register(), results)(text, *operands)

        return run

    def on_cpu(*operands: Any, call: str) -> Any:
        return handled(call)(jax_cpu.encoded(call), *operands)

    def on_cpus(*operands: Any, call: str) -> Any:
        found, run = division(call, operands, shapes(call, operands)), handled(call)
        run = run if found is None else divided(run, found)
        return run(jax_cpu.encoded(call), *operands)

    def cpu_rule(ctx: Any, *operands: Any, call: str) -> Any:
        several = are_several(ctx.module_context.axis_context)
        run = mlir.lower_fun(on_cpus if several else on_cpu, multiple_results=True)
        return run(ctx, *operands, call=call)

    def on_gpu(*operands: Any, call: str) -> Any:
        return jax_gpu.run(target.prepare, call, operands, shapes(call, operands))

    def refused(*operands: Any, **options: Any) -> Any:
        raise UnsupportedError(
            f"{primitive.name}: forward-mode gradients and gradients of gradients are not built. "
            "Pass the arrays through jax.lax.stop_gradient"
        )

    knows_devices(primitive)
    primitive.multiple_results = True
    primitive.def_impl(eagerly)
    primitive.def_abstract_eval(lambda *avals, call: types_like(avals, partial(shapes, call)))
    mlir.register_lowering(primitive, cpu_rule, platform="cpu")
    mlir.register_lowering(primitive, mlir.lower_fun(on_gpu, multiple_results=True), platform="cuda")
    mlir.register_lowering(primitive, _elsewhere)
    ad.primitive_jvps[primitive] = refused


def _elsewhere(ctx: Any, *operands: Any, call: str) -> Any:
    platforms = ", ".join(ctx.platforms or ctx.module_context.platforms)
    raise UnsupportedError(
        f"gossamer.jax on {platforms} is not built. Compile the program for the CPU or for CUDA"
    )


def _division(text: str, operands: Sequence[Any], results: Sequence[Any]) -> Division | None:
    call = Call.parse(text)
    named = zip(("o", "lse"), results, strict=False)
    return division_of(call, dict(zip(call.operands, operands, strict=True)), dict(named))


define(
    attention_p,
    lambda call, operands: shapes_of(Call.parse(call), operands),
    jax_cpu.ATTENTION,
    _division,
)


# batching -------------------------------------------------------------------------------------------


def leading(args: Sequence[Any], dims: Sequence[int | None]) -> list[Any]:
    """The operands with the mapped axis first, where they have one."""
    return [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(args, dims, strict=True)]


def fold(
    call: Call, given: dict[str, Any], own: dict[str, bool], each: Collection[str] = ()
) -> tuple[Call, int, int]:
    """Calls side by side as one call: (that call, how many they were, the batch of each).

    given: operands by name, which become those of the one call. own: whether each has a leading axis of
    calls. each: captured arrays that every call is to have its own of."""
    calls = next(x.shape[0] for name, x in given.items() if own[name])
    batch = given["q"].shape[own["q"]]

    def spread(name: str) -> Any:
        return given[name] if own[name] else jnp.broadcast_to(given[name], (calls, *given[name].shape))

    shared = not (own["k"] or own["v"]) and given["k"].shape[0] == 1
    arrays: dict[str, bool] = {}
    for name in given:
        if name[1:].isdecimal():
            if own[name] or name in each:
                given[name] = x = spread(name)
                arrays[name] = dict(call.sources)[name[0]].along(name) and x.shape[1] == batch
                if arrays[name]:
                    given[name] = x.reshape(-1, *x.shape[2:])
        elif name not in ("k", "v") or not shared:
            x = spread(name)
            if x.shape[1] != batch:  # one sequence of keys for all queries
                x = jnp.broadcast_to(x, (calls, batch, *x.shape[2:]))
            given[name] = x.reshape(calls * batch, *x.shape[2:])
    return call.folded(max(1, batch), arrays), calls, batch


def _batched(args: Sequence[Any], dims: Sequence[int | None], *, call: str) -> Any:
    parsed, args = Call.parse(call), leading(args, dims)
    own = {name: d is not None for name, d in zip(parsed.operands, dims, strict=True)}
    if own.get("sinks") or parsed.packed or parsed.paged:
        return one_by_one(attention_p, args, list(own.values()), call)
    # Sinks are no part of a sequence.
    given = {name: x for name, x in zip(parsed.operands, args, strict=True) if name != "sinks"}
    folded, calls, batch = fold(parsed, given, own)
    if parsed.sinks:
        given["sinks"] = args[parsed.operands.index("sinks")]
    found = attention_p.bind(*(given[name] for name in parsed.operands), call=folded.text)
    return [x.reshape(calls, batch, *x.shape[1:]) for x in found], [0] * len(found)


def one_by_one(primitive: Primitive, args: Sequence[Any], own: Sequence[bool], call: str) -> Any:
    """Calls that are not one call of more sequences, as kernels take one set of sinks: they run one after the
    other."""

    def run(mine: Sequence[Any]) -> Any:
        left = iter(mine)
        operands = [next(left) if batched else x for x, batched in zip(args, own, strict=True)]
        return primitive.bind(*operands, call=call)

    found = jax.lax.map(run, [x for x, batched in zip(args, own, strict=True) if batched])
    return found, [0] * len(found)


batching.primitive_batchers[attention_p] = _batched
