"""`gossamer.jax.attention`: one fused sparse attention in a JAX program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from ...ir.errors import InputError, MissingDependencyError

try:
    import jax
    import jax.core
    import jax.numpy as jnp
except ImportError:
    raise MissingDependencyError("jax", "jax", "gossamer.jax") from None

from ...runtime.strided import Strided
from ..captured import as_numpy, is_array
from ..mask import Mask
from ..placement import NAMES
from ..problem import as_integer
from ..score import ProbMod, ScoreMod
from ..trace.tensor import dtype_name
from .call import Call, Source
from .gradient import attend
from .problem import FLOATS, Bound

HELD = {"q_offsets", *NAMES.values()}
"""Operands whose contents say where sequences are."""
LAYOUTS = {"BTNH": "(batch, length, heads, size)", "BNTH": "(batch, heads, length, size)"}


def attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: Any = None,
    score_mod: Callable[..., Any] | None = None,
    prob_mod: Callable[..., Any] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    sinks: Any = None,
    q_offset: Any = None,
    kv_lens: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_kv: Any = None,
    block_table: Any = None,
    layout: str = "BTNH",
) -> Any:
    """Softmax attention over the pairs of a mask: softmax(scale * q k^T, where mask) v.

    In any JAX program for a CPU or an NVIDIA GPU: as it is, or under jit, vmap (which becomes the kernel's
    batch), grad and shard_map. Lengths, batch and heads are arguments of the kernel: another shape makes XLA
    compile again, and no new kernel.

    Args:
        query: (B, T, N, H), as `jax.nn.dot_product_attention` has it: float16, bfloat16, float32 or float64.
            Without a batch, (T, N, H), so are the others and the results.
        key: (B, S, K, H), same dtype; N a multiple of K; a batch of 1 serves all queries.
        value: (B, S, K, Hv).
        mask: a Mask, a `mask_mod(b, h, q_idx, kv_idx)`, a boolean array broadcastable to (B, N, T, S), or
            None (every pair). True means attend; h is the query head. Arrays that it captures may be JAX's
            (traced ones too), NumPy's or torch's on a CPU; a traced number is captured as an array.
            Python integers are arguments of the kernel.
        score_mod: `score_mod(score, b, h, q_idx, kv_idx)`, applied to scale * q k^T; captures as a mask.
        prob_mod: `prob_mod(prob, b, h, q_idx, kv_idx)`, applied to the probabilities; not normalised again.
        scale: a number, default 1 / sqrt(H).
        return_lse: also return the natural log of the sum of exponentials of the scores.
        sinks: (N,) floats: one more score for each query head, which has no value.
        q_offset: the position of the first query of each sequence, an integer or an integer array (B,).
        kv_lens: (B,) integers: the keys of each sequence; what lies behind them is never read.
        cu_seqlens_q, cu_seqlens_kv: (B + 1,) integers, the bounds of sequences packed one after the other:
            query is (1, total, N, H), key and value are (1, total, K, H), and so are the results. Indices
            count from the start of a sequence; b is its number. Queries behind the last have no keys.
        block_table: (B, max_pages) integers: key and value are caches of pages (pages, page_size, K, H), and
            key k of sequence b is row k % page_size of page block_table[b, k // page_size]. Needs kv_lens.
            Pages have no gradients.
        layout: "BTNH", or "BNTH" for (B, N, T, H), (B, K, S, H) and (B, K, S, Hv).

    Returns:
        (B, T, N, Hv) in the query's dtype and layout; with return_lse also (B, T, N), or (B, N, T) for
        "BNTH", float32 (float64 for float64). Rows without any pair are zeros with an LSE of -inf.

    Raises:
        InputError: a shape, dtype or value is wrong. UnsupportedError: a platform other than these, a
        forward-mode gradient or a gradient of a gradient, a function without a derivative rule.
        TraceError: a function cannot be captured. What only contents tell (an index out of a captured
        array) is raised by JAX when the program runs on a CPU, as jax.errors.JaxRuntimeError.
    """
    arrays, single = checked(query, key, value, layout, paged=block_table is not None)
    where = {"q_bounds": cu_seqlens_q, "kv_bounds": cu_seqlens_kv, "block_table": block_table}
    if where["q_bounds"] is None and block_table is None:
        _check_mask(mask, arrays, layout)
    faces = Mask.of(mask), ScoreMod.of(score_mod), ProbMod.of(prob_mod)
    options: dict[str, Any] = dict(
        scale=scale, return_lse=return_lse, sinks=sinks, q_offset=q_offset, where={"kv_lens": kv_lens} | where
    )
    call, operands = call_of(arrays, *faces, **options, layout=layout)
    found: Any = attend(call.text, operands)
    if return_lse and layout == "BTNH":
        found = found[0], jnp.swapaxes(found[1], 1, 2)
    results = tuple(x[0] for x in found) if single else tuple(found)
    return results if return_lse else results[0]


# arguments ------------------------------------------------------------------------------------------


def call_of(
    arrays: tuple[Any, ...],
    mask: Mask,
    score: ScoreMod | None = None,
    prob: ProbMod | None = None,
    *,
    scale: Any = None,
    return_lse: bool = False,
    sinks: Any = None,
    q_offset: Any = None,
    where: Mapping[str, Any] = MappingProxyType({}),
    layout: str = "BTNH",
) -> tuple[Call, tuple[Any, ...]]:
    """The call of checked query, key and value, and its operands in order. Raises InputError.

    where: the arrays that say where sequences are, by the kernels' names, or None."""
    heads = arrays[0].shape[2 if layout == "BTNH" else 1]
    operands: dict[str, Any] = dict(zip(("q", "k", "v"), arrays, strict=True))
    if sinks is not None:
        operands["sinks"] = _sinks(sinks, heads)
    if is_array(q_offset) and (len(q_offset.shape) or _is_traced(q_offset)):
        operands["q_offsets"], q_offset = jnp.atleast_1d(jnp.asarray(q_offset)), None
    operands |= {name: jnp.asarray(x) for name, x in where.items() if x is not None}
    maps = [f if f is None else _source(f, c, operands) for f, c in ((score, "t"), (prob, "w"))]
    given = (name in operands for name in ("sinks", "q_offsets", "kv_lens"))
    packed = "q" * ("q_bounds" in operands) + "k" * ("kv_bounds" in operands)
    settings = (
        _scale(scale), layout, _offset(q_offset), *given, bool(return_lse), packed, "block_table" in operands
    )  # fmt: skip
    call = Call(_source(mask, "c", operands), *maps, *settings)  # type: ignore[arg-type]
    _check(call, operands)
    return call, tuple(operands[name] for name in call.operands)


def _source(face: Any, letter: str, operands: dict[str, Any]) -> Source:
    """The structure of a mask or map, whose captured arrays are added to the operands."""
    signature = []
    for i, tensor in enumerate(face.tensors):
        operands[f"{letter}{i}"] = array = _captured(tensor)
        signature.append((dtype_name(array.dtype) or "", array.ndim))
    return Source(face.key[1], face.values, tuple(signature))


def _captured(tensor: Any) -> Any:
    """A captured array as an operand. Raises InputError for integers that JAX would cut off."""
    array = tensor if isinstance(tensor, jax.Array) else as_numpy(tensor)
    if isinstance(array, np.ndarray) and array.dtype == np.int64 and not jax.config.read("jax_enable_x64"):
        cut = array.astype(np.int32)
        if (cut != array).any():
            fix = "Set jax_enable_x64"
            raise InputError("attention: a captured array", "int64 within 32 bits", array.dtype, fix)
    return jnp.atleast_1d(jnp.asarray(array))


def _scale(scale: Any) -> float | None:
    if scale is None:
        return None
    if _is_traced(scale):
        fix = "Multiply the query by it, or each score in a score_mod"
        raise InputError("attention.scale", "a number", "a traced array", fix)
    try:
        return float(scale)
    except (TypeError, ValueError):
        raise InputError("attention.scale", "a number", repr(scale)) from None


def _offset(q_offset: Any) -> int:
    position = 0 if q_offset is None else as_integer(q_offset)
    if position is None:
        raise InputError("attention.q_offset", "an integer, or an integer array (B,)", repr(q_offset))
    return position


def _sinks(sinks: Any, heads: int) -> Any:
    array = jnp.asarray(sinks)
    if dtype_name(array.dtype) not in FLOATS:
        raise InputError("attention.sinks", "float16, bfloat16, float32 or float64", array.dtype)
    if array.shape != (heads,):
        raise InputError("attention.sinks", f"shape ({heads},): one number a query head", array.shape)
    return array


def _is_traced(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)


def checked(
    query: Any, key: Any, value: Any, layout: str, *, paged: bool = False, who: str = "attention"
) -> tuple[tuple[Any, ...], bool]:
    """The arrays with a batch, and whether they came without. who: the function that was given them."""
    if layout not in LAYOUTS:
        raise InputError(f"{who}.layout", " or ".join(LAYOUTS), repr(layout))
    arrays = tuple(jnp.asarray(x) for x in (query, key, value))
    q, k, v = arrays
    for name, x in zip(("query", "key", "value"), arrays, strict=True):
        where, wanted = f"{who}.{name}", LAYOUTS[layout]
        if x.ndim not in (3, 4) or x.ndim != q.ndim:
            raise InputError(where, f"4 dimensions {wanted}, or 3 without the batch, as query", x.shape)
        if dtype_name(x.dtype) not in FLOATS:
            raise InputError(where, "float16, bfloat16, float32 or float64", x.dtype)
        if x.dtype != q.dtype:
            raise InputError(where, f"the query's dtype {q.dtype}", x.dtype, "Cast one of them")
        if not 1 <= x.shape[-1] <= 1024:
            raise InputError(where, "a head size from 1 to 1024", x.shape[-1])
    if k.shape[:-1] != v.shape[:-1]:
        raise InputError(f"{who}.value", f"{k.shape[:-1]} + (size,), as key has", v.shape)
    if k.shape[-1] != q.shape[-1]:
        raise InputError(f"{who}.key", f"the query's head size {q.shape[-1]}", k.shape[-1])
    if paged and q.ndim != 4:
        raise InputError(f"{who}.query", "a batch, beside block_table", q.shape)
    if q.ndim == 4 and not paged and k.shape[0] not in (1, q.shape[0]):
        raise InputError(f"{who}.key", f"batch {q.shape[0]} (the query's) or 1", k.shape[0])
    place = -2 if layout == "BTNH" else -3
    if k.shape[place] == 0 or q.shape[place] % k.shape[place]:
        expected = (
            f"a number of heads that divides the query's {q.shape[place]}; arrays are {LAYOUTS[layout]}"
        )
        raise InputError(f"{who}.key", expected, k.shape[place])
    single = q.ndim == 3
    return tuple(x[None] for x in arrays) if single else arrays, single


def _check_mask(mask: Any, arrays: tuple[Any, ...], layout: str) -> None:
    """Raise InputError unless a mask that is an array broadcasts to the scores."""
    if is_array(mask) and not isinstance(mask, Mask):
        (batch, *q), (_, *k) = (x.shape for x in arrays[:2])
        length, heads = (0, 1) if layout == "BTNH" else (1, 0)
        wanted, got = (batch, q[heads], q[length], k[length]), tuple(mask.shape)
        if not all(n in (1, m) for n, m in zip(reversed(got), reversed(wanted), strict=False)):
            raise InputError("attention.mask", f"an array broadcastable to {wanted}", f"shape {got}")


def _check(call: Call, operands: dict[str, Any]) -> None:
    """Check shapes against each other, and contents of lengths and offsets where they are known.

    Raises InputError."""
    known = {name: np.asarray(x) for name, x in operands.items() if name in HELD and not _is_traced(x)}
    described = {
        name: Strided(
            known[name].ctypes.data if name in known else 0, x.shape, dtype_name(x.dtype) or str(x.dtype)
        )
        for name, x in operands.items()
    }
    bound = Bound(call, described)
    if known.keys() == operands.keys() & HELD:
        bound.placed.check_values(bound.problem)
