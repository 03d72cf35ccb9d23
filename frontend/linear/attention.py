"""`gossamer.linear_attention`: attention whose scores are products of features, on torch tensors.

The hot path touches keys only, as that of `gossamer.experts` does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...ir.errors import InputError, MissingDependencyError
from ..moe.layers import FLOATS, check_tensor
from .form import Settings, check_shapes, rows_of, settings_of
from .launch import Recalled, attend, recall
from .operator import call as traced
from .operator import watched

try:
    import torch
except ImportError:
    raise MissingDependencyError("torch", "torch", "gossamer.linear_attention") from None

BACKENDS = {"auto": ("cpu", "cuda"), "tvm": ("cpu",), "triton": ("cuda",), "reference": ("cpu", "cuda")}


def linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    feature_map: Any = "elu",
    *,
    causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
    key_map: Any = None,
    initial_state: Any = None,
    return_state: bool = False,
    enable_gqa: bool = False,
    backend: str = "auto",
) -> Any:
    """Linear attention: o_i = sum_j (phi(q_i) . phi(k_j)) v_j / (sum_j phi(q_i) . phi(k_j) + eps).

    Sums over keys are done before queries read them, so time and memory grow with the length, not its square
    (Katharopoulos et al., 2020). With `causal`, row i sums over keys 0 to i: sequences are walked in chunks,
    and only states of [features, value size] pass from one to the next.

    Args:
        query: (B, Hq, L, D), float16, bfloat16, float32 or float64, on a CPU or a CUDA GPU.
        key: (B, Hk, N, D). With `causal` N is L.
        value: (B, Hk, N, Dv).
        feature_map: phi: "elu" (elu(x) + 1), "relu" (relu(x) + 1e-3), "exp", "identity"; a map of
            `gossamer.feature_maps`; or a function of an element x, which is traced as a score_mod is, and may
            give a tuple of features.
        normalize: whether to divide by the sum of the scores. eps: is added to it.
        key_map: phi of keys, where it is another one.
        initial_state: what `return_state` gave for the tokens before: (state, sums), or the state alone
            without `normalize`. Use it with `causal`.
        return_state: also return the state behind the last key: (state, sums), with state (B, Hk, F, Dv) the
            sum of phi(k_j) v_j^T and sums (B, Hk, F) that of phi(k_j), F features, in float32 (float64 for
            float64); without `normalize` the state alone.
        enable_gqa: allow fewer key heads than query heads.
        backend: "auto" (CPU: "tvm", GPU: "triton"), either by name, or "reference" (float64, all pairs).

    Returns:
        (B, Hq, L, Dv) in the query's dtype, and the state if asked for. Sums are float32 (float64 for
        float64). Gradients flow to query, key, value, the initial state, and to what a map's preparation
        reads; they recompute everything but the output and its denominators.

    Raises:
        InputError: a shape, dtype, device or value is wrong. TraceError: a feature map cannot be captured.
        UnsupportedError: something that is not built yet.
    """
    given = initial_state if isinstance(initial_state, tuple | list) else (initial_state,)
    states = () if initial_state is None else tuple(given)
    settings = settings_of(
        feature_map,
        key_map,
        causal=causal,
        normalize=normalize,
        eps=eps,
        initial=bool(states),
        final=return_state,
    )
    tensors, options = (query, key, value, *states), (bool(enable_gqa), backend, type(initial_state))
    apart = watched(tensors) or settings.prepares
    known = Recalled() if apart else recall(settings, tensors, options)
    if known.kernels is None:
        if not torch.compiler.is_compiling():  # else the operator does
            check(query, key, value, causal=settings.causal, enable_gqa=enable_gqa)
            check_backend(query, backend)
        rows = rows_of(query, key, settings)
        _check_states(initial_state, rows[1], value, len(settings.k_map.parts), normalize)
        tensors = (*rows, value, *states)
    found = _run(tensors, settings, known if not apart else None, options)
    if not return_state:
        return found[0]
    return found[0], (found[1:] if normalize else found[1])


def _run(
    tensors: tuple[Any, ...], settings: Settings, known: Recalled | None, options: tuple[Any, ...]
) -> tuple[Any, ...]:
    """(out, *new states). tensors: prepared rows of q and k, v, states. known: of them, if these are the
    caller's own."""
    enable_gqa, backend, _ = options
    if known is not None and known.kernels is not None:
        return known.kernels(tensors)
    if backend == "reference":
        return reference(tensors, settings)
    if watched(tensors):
        return traced(tensors, settings, enable_gqa)
    if any(0 in tensor.shape for tensor in tensors[:3]):
        return reference(tensors, settings)
    known = known or recall(settings, tensors, options)
    return known.kernels(tensors) if known.kernels is not None else attend(tensors, settings, known.key)


def check(q: Any, k: Any, v: Any, *, causal: bool, enable_gqa: bool) -> None:
    """Raise InputError for tensors that do not fit each other."""
    where = "linear_attention"
    for name, tensor in (("query", q), ("key", k), ("value", v)):
        check_tensor(f"{where}.{name}", tensor, 4, "(batch, heads, length, size)")
        if tensor.dtype not in FLOATS:
            raise InputError(f"{where}.{name}", "float16, bfloat16, float32 or float64", tensor.dtype)
        if tensor.dtype != q.dtype:
            raise InputError(
                f"{where}.{name}", f"the query's dtype {q.dtype}", tensor.dtype, "Cast one of them"
            )
        if tensor.device != q.device:
            raise InputError(f"{where}.{name}", f"a tensor on {q.device}, as the query is", tensor.device)
    check_shapes(q, k, v, causal=causal, enable_gqa=enable_gqa)


def check_backend(q: Any, backend: Any) -> None:
    """Raise InputError unless a backend serves tensors where the query is."""
    where = "linear_attention"
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise InputError(f"{where}.backend", f"one of {', '.join(BACKENDS)}", repr(backend))
    if q.device.type not in BACKENDS[backend]:
        kinds = " or ".join(BACKENDS[backend])
        raise InputError(f"{where}.backend", f"{kinds} tensors for {backend!r}", q.device, 'Pass "auto"')


def _check_states(given: Any, k: Any, v: Any, parts: int, normalize: bool) -> None:
    if given is None:
        return
    where = "linear_attention.initial_state"
    tensors = given if normalize else (given,)
    if not isinstance(tensors, tuple | list) or len(tensors) != (2 if normalize else 1):
        expected = "(state, sums)" if normalize else "a state, without normalize"
        raise InputError(where, expected, type(given).__name__)
    state = (*k.shape[:2], parts * k.shape[3], v.shape[3])
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    for tensor, shape in zip(tensors, (state, state[:3]), strict=False):
        check_tensor(where, tensor, len(shape), str(shape))
        if tuple(tensor.shape) != shape or tensor.dtype != wide or tensor.device != v.device:
            got = f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            raise InputError(where, f"{shape} of {wide} on {v.device}", got)


# the formula ------------------------------------------------------------------------------------------


def reference(tensors: tuple[Any, ...], settings: Settings) -> tuple[Any, ...]:
    """The formula over all pairs in float64, differentiable: (out, *new states), rounded at the end."""
    return plain(tensors, settings, torch.float64)


def plain(tensors: tuple[Any, ...], settings: Settings, dtype: Any) -> tuple[Any, ...]:
    """The formula over all pairs by torch in some dtype. tensors: prepared rows of q and k, v, states."""
    q, k, v, *states = tensors
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    repeat = q.shape[1] // max(1, k.shape[1])
    features = [replace(m, prepare=None)(x.to(dtype)) for m, x in ((settings.q_map, q), (settings.k_map, k))]
    fq, fk, values = features[0], features[1], v.to(dtype)
    spread = [t.repeat_interleave(repeat, 1) for t in (fk, values)]
    scores = fq @ spread[0].transpose(-1, -2)
    if settings.causal:
        scores = scores.tril()
    num, den = scores @ spread[1], scores.sum(-1, keepdim=True)
    if states:
        num = num + fq @ states[0].to(dtype).repeat_interleave(repeat, 1)
    if states[1:]:
        den = den + fq @ states[1].to(dtype).repeat_interleave(repeat, 1)[..., None]
    out = num if settings.eps is None else num / (den + settings.eps)
    found = [out.to(v.dtype)]
    if settings.final:
        new = [fk.transpose(-1, -2) @ values, *([] if settings.eps is None else [fk.sum(2)])]
        found += [
            (n if not states else n + s.to(dtype)).to(wide) for n, s in zip(new, states or new, strict=True)
        ]
    return tuple(found)
