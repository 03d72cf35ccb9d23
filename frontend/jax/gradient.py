"""The primitive `gossamer_attention_gradient` of JAX, and the custom_vjp that asks for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import batching

from ...ir.errors import UnsupportedError
from ..executables import SLOTS
from . import cpu as jax_cpu
from .call import Call, GradientCall
from .partition import Division, division_of
from .primitive import attention_p, define, fold, leading, one_by_one

gradient_p = Primitive("gossamer_attention_gradient")
"""Operands as `GradientCall.operands` names them. Parameter: call, the text of a GradientCall. Results: the
wanted gradients; of key and value with the query's batch, of sinks (B, N, T), of captured arrays several
copies (SLOTS, size) whose sum it is."""


def _shapes(text: str, operands: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    asked = GradientCall.parse(text)
    given = dict(zip(asked.operands, operands, strict=True))
    q, wide = given["q"], given["lse"].dtype
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {"q": (q.shape, q.dtype)}
    shapes |= {name: ((q.shape[0], *given[name].shape[1:]), q.dtype) for name in ("k", "v")}
    shapes["sinks"] = given["lse"].shape, wide
    sizes = {name: ((SLOTS, max(1, math.prod(x.shape))), wide) for name, x in given.items()}
    return [jax.ShapeDtypeStruct(*(shapes.get(name) or sizes[name])) for name in asked.wanted]


def _division(text: str, operands: Sequence[Any], results: Sequence[Any]) -> Division | None:
    asked = GradientCall.parse(text)
    given = dict(zip(asked.operands, operands, strict=True))
    made = {f"d{name}": x for name, x in zip(asked.wanted, results, strict=True)}
    return division_of(asked.call, given, made)


define(gradient_p, _shapes, jax_cpu.GRADIENT, _division)


def _batched(args: Sequence[Any], dims: Sequence[int | None], *, call: str) -> Any:
    asked, args = GradientCall.parse(call), leading(args, dims)
    own = {name: d is not None for name, d in zip(asked.operands, dims, strict=True)}
    if own.get("sinks") or asked.call.packed or asked.call.paged:
        return one_by_one(gradient_p, args, list(own.values()), call)
    captured = [name for name in asked.wanted if name[1:].isdecimal()]
    given = {name: x for name, x in zip(asked.operands, args, strict=True) if name != "sinks"}
    folded, calls, batch = fold(asked.call, given, own, captured)
    if asked.call.sinks:
        given["sinks"] = args[asked.operands.index("sinks")]
    text = replace(asked, call=folded).text
    found = gradient_p.bind(*(given[name] for name in asked.operands), call=text)
    results = [
        jnp.moveaxis(x.reshape(SLOTS, calls, -1), 1, 0)
        if name in captured
        else x.reshape(calls, batch, *x.shape[1:])
        for name, x in zip(asked.wanted, found, strict=True)
    ]
    return results, [0] * len(results)


batching.primitive_batchers[gradient_p] = _batched


# what JAX asks --------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(call: str, operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """The results of a call, (out) or (out, lse), with the gradients of kernels."""
    return tuple(attention_p.bind(*operands, call=call))


@jax.tree_util.register_pytree_node_class
class _Names(tuple):
    """Names, which are no arrays."""

    def tree_flatten(self) -> tuple[tuple[()], tuple[str, ...]]:
        return (), tuple(self)

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], children: Any) -> _Names:
        return cls(names)


def _forward(call: str, operands: tuple[Any, ...]) -> Any:
    parsed = Call.parse(call)
    arrays = tuple(x.value for x in operands)
    wanted = _Names(
        name
        for name, x in zip(parsed.operands, operands, strict=True)
        if x.perturbed and jnp.issubdtype(x.value.dtype, jnp.floating) and name[0] != "c"
    )
    if wanted and parsed.paged:
        raise UnsupportedError(
            "attention: pages of keys have no gradient. Pass query, key and value through "
            "jax.lax.stop_gradient"
        )
    out, lse = attention_p.bind(*arrays, call=replace(parsed, lse=True).text)
    return (out, lse) if parsed.lse else (out,), (arrays, out, lse, wanted)


def _backward(call: str, saved: Any, cotangents: tuple[Any, ...]) -> Any:
    arrays, out, lse, wanted = saved
    parsed = Call.parse(call)
    given = dict(zip(parsed.operands, arrays, strict=True))
    do, *dlse = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    found: dict[str, Any] = {}
    if wanted and (do is not None or dlse not in ([], [None])):
        do = jnp.zeros_like(out) if do is None else do
        dlse = [x for x in dlse if x is not None]
        asked = GradientCall(parsed, tuple(sorted(wanted)), bool(dlse))
        results = gradient_p.bind(*arrays, out, lse, do, *dlse, call=asked.text)
        found = {n: _of(n, given[n], x) for n, x in zip(asked.wanted, results, strict=True)}
    return (tuple(found.get(name) for name in parsed.operands),)


def _of(name: str, operand: Any, result: Any) -> Any:
    """The gradient of an operand from what kernels store for it."""
    if name == "sinks":
        result = result.sum((0, 2))
    elif name[1:].isdecimal():
        result = result.sum(0)[: operand.size].reshape(operand.shape)
    elif name in ("k", "v") and operand.shape[0] != result.shape[0]:
        result = result.sum(0, keepdims=True)
    return result.astype(operand.dtype)


attend.defvjp(_forward, _backward, symbolic_zeros=True)
