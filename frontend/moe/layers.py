"""The checked inputs of one layer of experts of torch: its matrices, biases, adapters and ids."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...ir.errors import InputError, MissingDependencyError
from .layer import Layer, layer_of_shapes, shown, unit_of
from .quantized import QuantizedWeight

try:
    import torch
except ImportError:
    raise MissingDependencyError("torch", "torch", "gossamer.experts") from None

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LORA = ("gate_up_a", "gate_up_b", "down_a", "down_b")


def adapted(layer: Layer, x: Any, lora: dict[str, Any], scale: float, adapter_ids: Any) -> Layer:
    """A layer with low-rank adapters: gate_up_a (E, r, H), gate_up_b (E, 2 I, r), down_a (E, r, I) and
    down_b (E, H, r), two of them or all; or, with ids of tokens (T,), stacks (A, E, ..) of these.

    Raises InputError."""
    ranks = []
    sizes = {"gate_up": (layer.hidden, layer.inner * (1 + layer.gated)), "down": (layer.inner, layer.hidden)}
    stacked = adapter_ids is not None
    many: Any = next((t.shape[:1] for t in lora.values() if stacked and isinstance(t, torch.Tensor)), ())
    meaning = "(experts, rank, in) and (experts, out, rank)"
    for name, (inner, out) in sizes.items():
        a, b = lora.get(f"{name}_a"), lora.get(f"{name}_b")
        rank = a.shape[-2] if isinstance(a, torch.Tensor) and a.dim() == 3 + stacked else 0
        ranks.append(rank)
        if a is None and b is None:
            continue
        for letter, given, shape in (("a", a, (rank, inner)), ("b", b, (out, rank))):
            where = f"experts.{name}_lora[{'ab'.index(letter)}]"
            matrix: Any = given
            if not stacked and isinstance(matrix, torch.Tensor) and matrix.dim() == 4:
                fix = "Pass adapter_ids=, the adapter of each token"
                raise InputError(where, f"3 dimensions {meaning}", f"4: {tuple(matrix.shape)}", fix)
            check_tensor(where, matrix, 3 + stacked, f"(adapters, ..) of {meaning}" if stacked else meaning)
            check_like(where, matrix, x)
            wanted = (*many, layer.experts, *shape)
            if tuple(matrix.shape) != wanted or not rank:
                raise InputError(where, f"shape {wanted}, of rank 1 or more", tuple(matrix.shape))
    if stacked and not many[0]:
        raise InputError("experts.adapter_ids", "a stack of at least one adapter", 0)
    dense = {name: t if t.stride(-1) == 1 else t.contiguous() for name, t in lora.items()}
    found = replace(layer, lora=dense, ranks=(ranks[0], ranks[1]), lora_scale=float(scale))
    return replace(found, adapter_ids=_by_token(adapter_ids, x)) if stacked else found


def _by_token(ids: Any, x: Any) -> Any:
    """An id for each token, in a row. Raises InputError."""
    where = "experts.adapter_ids"
    check_tensor(where, ids, 1, "(tokens,)")
    if ids.dtype not in (torch.int32, torch.int64):
        raise InputError(where, "int32 or int64", ids.dtype)
    if ids.shape[0] != x.shape[0]:
        raise InputError(where, f"{x.shape[0]} tokens, as x has", ids.shape[0])
    if ids.device != x.device:
        raise InputError(where, f"a tensor on {x.device}, as x is", ids.device)
    return ids.contiguous()


def check_adapter_ids(layer: Layer) -> None:
    """Raise InputError for ids of adapters that there are not; waits for the device."""
    if layer.adapter_ids is None or not layer.adapter_ids.numel():
        return
    many = next(iter(layer.lora.values())).shape[0]
    low, high = (int(v) for v in layer.adapter_ids.aminmax())
    if low < -1 or high >= many:
        got = low if low < -1 else high
        raise InputError("experts.adapter_ids", f"ids from 0 to {many - 1}, or -1 for none", got)


def layer_of(
    x: Any, gate_up: Any, down: Any, gate_up_bias: Any, down_bias: Any, transposed: Any, interleaved: Any
) -> Layer:
    """The layer that tensors make, its layout read off their shapes. Raises InputError, UnsupportedError."""
    check_tensor("experts.x", x, 2, "(tokens, hidden)")
    for name, tensor in (("gate_up_proj", gate_up), ("down_proj", down)):
        if isinstance(tensor, QuantizedWeight):
            tensor.check(f"experts.{name}", x)
            continue
        check_tensor(f"experts.{name}", tensor, 3, "(experts, out, in) or (experts, in, out)")
        check_like(f"experts.{name}", tensor, x)
    for name, tensor in (("gate_up_bias", gate_up_bias), ("down_bias", down_bias)):
        if tensor is not None:
            check_tensor(f"experts.{name}", tensor, 2, "(experts, out)")
            check_like(f"experts.{name}", tensor, x)
    if x.dtype not in FLOATS:
        raise InputError("experts.x", "float16, bfloat16, float32 or float64", x.dtype)
    tensors = (gate_up, down, _rows(gate_up_bias), _rows(down_bias))
    layer = layer_of_shapes(x.shape[1], tensors, (unit_of(gate_up), unit_of(down)), transposed, interleaved)
    if layer.transposed and any(layer.quantized):
        got = shown(gate_up, down)
        raise InputError("experts.gate_up_proj, down_proj", "quantised matrices (experts, out, in)", got)
    return layer


def layer_by_name(tensors: dict[str, Any], transposed: Any, interleaved: Any, lora_scale: float) -> Layer:
    """The layer that tensors make, by the kernels' names for them. Raises as `layer_of` does."""
    biases = tensors.get("gate_up_bias"), tensors.get("down_bias")
    layer = layer_of(tensors["x"], tensors["gate_up"], tensors["down"], *biases, transposed, interleaved)
    lora = {name: tensors[name] for name in LORA if name in tensors}
    trains = tensors.get("trains")
    if trains is not None:
        check_tensor("experts.trainable", trains, 1, "(experts,)")
        if trains.dtype != torch.bool or tuple(trains.shape) != (layer.experts,):
            got = f"{trains.dtype} of shape {tuple(trains.shape)}"
            raise InputError("experts.trainable", f"torch.bool of shape ({layer.experts},)", got)
        if trains.device != tensors["x"].device:
            raise InputError("experts.trainable", "a tensor where x is", trains.device)
        layer = replace(layer, trains=trains)
    ids = tensors.get("adapter_ids")
    if ids is not None and not lora:
        raise InputError("experts.adapter_ids", "gate_up_lora or down_lora beside them", None)
    return adapted(layer, tensors["x"], lora, lora_scale, ids) if lora else layer


def _rows(bias: Any) -> Any:
    return bias if bias is None or bias.stride(1) == 1 else bias.contiguous()


def check_tensor(where: str, tensor: Any, rank: int, meaning: str) -> None:
    """Raise InputError or UnsupportedError unless a kernel can take a tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise InputError(where, "a torch.Tensor", type(tensor).__name__)
    if tensor.dim() != rank:
        raise InputError(where, f"{rank} dimensions {meaning}", f"{tensor.dim()}: {tuple(tensor.shape)}")
    if tensor.device.type not in ("cpu", "cuda"):
        raise InputError(where, "a tensor on the CPU or a CUDA GPU", tensor.device)
    if tensor.layout != torch.strided:
        raise InputError(where, "a strided tensor", tensor.layout, "Call .to_dense()")


def check_like(where: str, tensor: Any, x: Any, name: str = "x") -> None:
    """Raise InputError unless a tensor has x's dtype and device. name: what x is called."""
    if x.dtype not in FLOATS:
        raise InputError("experts.x", "float16, bfloat16, float32 or float64", x.dtype)
    if tensor.dtype != x.dtype:
        raise InputError(where, f"{name}'s dtype {x.dtype}", tensor.dtype, "Cast one of them")
    if tensor.device != x.device:
        raise InputError(where, f"a tensor on {x.device}, as {name} is", tensor.device)


def check_routing(
    where: tuple[str, str], ids: Any, weights: Any, tokens: int, experts: int, *, validate: bool
) -> None:
    """Raise InputError unless ids and weights say which experts each of so many tokens takes."""
    check_tensor(where[0], ids, 2, "(tokens, top_k)")
    check_tensor(where[1], weights, 2, "(tokens, top_k)")
    if ids.dtype not in (torch.int32, torch.int64):
        raise InputError(where[0], "int32 or int64", ids.dtype)
    if weights.dtype not in FLOATS:
        raise InputError(where[1], "float16, bfloat16, float32 or float64", weights.dtype)
    if ids.shape[0] != tokens:
        raise InputError(where[0], f"{tokens} tokens, as x has", ids.shape[0])
    if weights.shape != ids.shape:
        raise InputError(where[1], f"the shape of the ids {tuple(ids.shape)}", tuple(weights.shape))
    if validate and ids.numel():
        low, high = (int(v) for v in ids.aminmax())
        if low < -1 or high > experts:
            got = low if low < -1 else high
            raise InputError(where[0], f"ids from 0 to {experts - 1}, or -1 or {experts} for none", got)
