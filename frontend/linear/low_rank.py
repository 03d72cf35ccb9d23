"""`gossamer.flurka`: low-rank keys and values before linear attention, its products in the cheapest order."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ...ir.errors import InputError
from ...ir.graph import Graph, Op, Value
from ...runtime.driver import driver
from ..moe.layers import FLOATS, check_tensor
from ..operators.rules import wants_gradient
from ..pure import pure
from .attention import check, check_backend, linear_attention
from .form import rows_of, settings_of
from .launch import Kernels, Recalled, recall
from .low_rank_launch import Layer, Products, Step, by_head
from .operator import watched

Weights = dict[str, torch.Tensor]
DEFAULTS: dict[str, Any] = {"key_map": None, "normalize": True, "eps": 1e-6, "backend": "auto"}


def flurka(
    x: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor,
    proj_k: torch.Tensor,
    proj_v: torch.Tensor | None = None,
    *,
    heads: int,
    feature_map: Any = "elu",
    **options: Any,
) -> torch.Tensor:
    """Fused low-rank and kernel attention (Gupta, Yuan, Narayanan, 2023), from the input of the layer.

    Keys and values are projected along the sequence, K' = E K and V' = F V, as in Linformer, and what is left
    of them goes through linear attention: phi(Q) (phi(K')^T V') over its row sums. E (X W) is (E X) W: the
    order of these products is the one with the fewest operations, counted over keys and values together (see
    `flurka_orders`).

    Args:
        x: (B, S, C), any float dtype, on a CPU or a CUDA GPU.
        w_q, w_k, w_v: (C, heads * D), (C, heads * D), (C, heads * Dv): q = x @ w_q, so the transposed weights
            of torch.nn.Linear.
        proj_k: E, (R, S), or (heads, R, S) for one by head. proj_v: F likewise; default: E.
        heads: number of heads.
        feature_map: phi. The paper's three variants are "relu" (Performer's relu(x) + 1e-3), "elu" (linear
            transformers' elu(x) + 1) and `feature_maps.random_fourier` (RFA).
        options: of `linear_attention`: eps, normalize, key_map, backend.

    Returns (B, S, heads * Dv), before the layer's output projection. Gradients flow to everything. Not
    causal: every row of E sees all of the sequence. Raises InputError, and what `linear_attention` raises.
    """
    tensors = {"x": x, "w_q": w_q, "w_k": w_k, "w_v": w_v, "proj_k": proj_k}
    if proj_v is not None:
        tensors["proj_v"] = proj_v
    if options.keys() - DEFAULTS.keys():
        raise InputError("flurka", "options eps, normalize, key_map and backend", ", ".join(options))
    asked, given = DEFAULTS | options, tuple(tensors.values())
    settings = settings_of(feature_map, asked["key_map"], normalize=asked["normalize"], eps=asked["eps"])
    apart = watched(given) or settings.prepares or _is_autocast(x)
    known = Recalled() if apart else recall(settings, given, "flurka", heads, type(heads), asked["backend"])
    if known.kernels is not None:
        return known.kernels(given)
    _check(tensors, heads)
    sizes = tuple((name, 1 if name == "B" else int(n)) for name, n in _sizes(tensors, heads))
    steps = _steps(sizes)  # every order takes as many operations for each batch
    if any(tensor.dim() == 3 for tensor in given[4:]):
        rows, apart = by_head(steps, tensors, heads), True
    else:
        products = Products(steps, tuple(tensors), heads)
        rows = products.rows(products.run(tensors))
    q, k, v = rows
    if apart or asked["backend"] == "reference" or any(0 in tensor.shape for tensor in given):
        return linear_attention(q, k, v, feature_map, **options).transpose(1, 2).flatten(2)
    check(q, k, v, causal=False, enable_gqa=False)
    check_backend(q, asked["backend"])
    rows_of(q, k, settings)
    layer = Layer(products, Kernels(settings, rows, learns=wants_gradient(given), heads=heads))
    if known.key is not None:
        driver().plans.put(known.key, layer)
    return layer(given)


def flurka_orders(
    x: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor,
    proj_k: torch.Tensor,
    proj_v: torch.Tensor | None = None,
    *,
    heads: int,
) -> str:
    """The orders in which `flurka` may compute its products for these tensors, cheapest first, as text."""
    from ...passes.reassociate import explain

    tensors = {"x": x, "w_q": w_q, "w_k": w_k, "w_v": w_v, "proj_k": proj_k}
    if proj_v is not None:
        tensors["proj_v"] = proj_v
    _check(tensors, heads)
    graph, sizes = _graph(_sizes(tensors, heads))
    return explain(graph, sizes=sizes)


def _check(tensors: Weights, heads: Any) -> None:
    x = tensors["x"]
    check_tensor("flurka.x", x, 3, "(batch, length, channels)")
    if x.dtype not in FLOATS:
        raise InputError("flurka.x", "float16, bfloat16, float32 or float64", x.dtype)
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise InputError("flurka.heads", "a number of heads, at least 1", repr(heads))
    for name, tensor in tensors.items():
        where = f"flurka.{name}"
        if name.startswith("w_"):
            check_tensor(where, tensor, 2, "(channels, heads * size)")
            if tensor.shape[0] != x.shape[2]:
                raise InputError(where, f"{x.shape[2]} rows, the channels of x", tensor.shape[0])
            if tensor.shape[1] % heads:
                raise InputError(where, f"columns that {heads} heads share equally", tensor.shape[1])
        elif name.startswith("proj"):
            rank = 3 if isinstance(tensor, torch.Tensor) and tensor.dim() == 3 else 2
            check_tensor(where, tensor, rank, "(rank, length) or (heads, rank, length)")
            if tensor.shape[-1] != x.shape[1] or (rank == 3 and tensor.shape[0] != heads):
                expected = f"(rank, {x.shape[1]}) or ({heads}, rank, {x.shape[1]})"
                raise InputError(where, expected, tuple(tensor.shape))
        if tensor.dtype != x.dtype:
            raise InputError(where, f"x's dtype {x.dtype}", tensor.dtype, "Cast one of them")
        if tensor.device != x.device:
            raise InputError(where, f"a tensor on {x.device}, as x is", tensor.device)
    low = tensors.get("proj_v", tensors["proj_k"])
    if low.shape[-2] != tensors["proj_k"].shape[-2]:
        raise InputError("flurka.proj_v", f"rank {tensors['proj_k'].shape[-2]}, as proj_k has", low.shape[-2])


def _is_autocast(x: Any) -> bool:
    """Whether torch's products may give another dtype than that of x."""
    return isinstance(x, torch.Tensor) and torch.is_autocast_enabled(x.device.type)


# the order of products --------------------------------------------------------------------------------


def _sizes(tensors: Weights, heads: int) -> tuple[tuple[str, int], ...]:
    """Everything that an order depends on."""
    x, e = tensors["x"], tensors["proj_k"]
    f = tensors.get("proj_v")
    return (
        ("B", x.shape[0]), ("S", x.shape[1]), ("C", x.shape[2]), ("H", heads), ("R", e.shape[-2]),
        ("D", tensors["w_k"].shape[1] // heads), ("Dv", tensors["w_v"].shape[1] // heads),
        ("He", e.shape[0] if e.dim() == 3 else 1),
        ("Hf", 0 if f is None else f.shape[0] if f.dim() == 3 else 1),
    )  # fmt: skip


def _graph(sizes: tuple[tuple[str, int], ...]) -> tuple[Graph, dict[str, int]]:
    """The products as they are written: E (X Wk) and F (X Wv)."""
    known = dict(sizes)

    def heads(name: str) -> int | str:
        return 1 if known[name] == 1 else "H"

    low = "proj_v" if known["Hf"] else "proj_k"
    inputs = [
        Value("x", "f32", ("B", 1, "S", "C")),
        Value("w_k", "f32", ("H", "C", "D")),
        Value("w_v", "f32", ("H", "C", "Dv")),
        Value("proj_k", "f32", (heads("He"), "R", "S")),
    ]
    if known["Hf"]:
        inputs.append(Value("proj_v", "f32", (heads("Hf"), "R", "S")))
    ops = [
        Op("matmul", ("x", "w_k"), (Value("k", "f32", ("B", "H", "S", "D")),)),
        Op("matmul", ("proj_k", "k"), (Value("k_low", "f32", ("B", "H", "R", "D")),)),
        Op("matmul", ("x", "w_v"), (Value("v", "f32", ("B", "H", "S", "Dv")),)),
        Op("matmul", (low, "v"), (Value("v_low", "f32", ("B", "H", "R", "Dv")),)),
    ]
    return Graph("low_rank", tuple(inputs), tuple(ops), ("k_low", "v_low")), known


@pure
def _steps(sizes: tuple[tuple[str, int], ...]) -> tuple[Step, ...]:
    return _ordered(sizes)


@lru_cache(maxsize=256)
def _ordered(sizes: tuple[tuple[str, int], ...]) -> tuple[Step, ...]:
    from ...passes.reassociate import reassociate

    graph, known = _graph(sizes)
    ordered = reassociate(graph, sizes=known)
    return (("x", "w_q", "q"), *((*op.inputs, op.output.name) for op in ordered.ops))  # type: ignore[arg-type]
