"""The checked inputs of one layer of experts, as torch tensors."""

from __future__ import annotations

from typing import Any

from ..ir.errors import InputError, MissingDependencyError, UnsupportedError
from .layer import Layer, layer_of_shapes, unit_of
from .problem import _fill_names

try:
    import torch
except ImportError:
    raise MissingDependencyError("torch", "torch", "gossamer.experts") from None


def layer_of(
    x: Any, gate_up: Any, down: Any, gate_up_bias: Any, down_bias: Any, transposed: Any, interleaved: Any
) -> Layer:
    """The layer that tensors make, its layout read off their shapes. Raises InputError, UnsupportedError."""
    check_tensor("experts.x", x, 2, "(tokens, hidden)")
    for name, tensor in (("gate_up_proj", gate_up), ("down_proj", down)):
        check_tensor(f"experts.{name}", tensor, 3, "(experts, out, in) or (experts, in, out)")
        check_like(f"experts.{name}", tensor, x)
    for name, tensor in (("gate_up_bias", gate_up_bias), ("down_bias", down_bias)):
        if tensor is not None:
            check_tensor(f"experts.{name}", tensor, 2, "(experts, out)")
            check_like(f"experts.{name}", tensor, x)
    units = (unit_of(gate_up), unit_of(down))
    tensors = (gate_up, down, _rows(gate_up_bias), _rows(down_bias))
    return layer_of_shapes(x.shape[1], tensors, units, transposed, interleaved)


def _rows(bias: Any) -> Any:
    return bias if bias is None or bias.stride(1) == 1 else bias.contiguous()


def check_tensor(where: str, tensor: Any, rank: int, meaning: str) -> None:
    """Raise InputError or UnsupportedError unless a kernel can take a tensor."""
    from torch._C._functorch import is_functorch_wrapped_tensor as is_transformed
    from torch._subclasses.fake_tensor import FakeTensor

    if not isinstance(tensor, torch.Tensor):
        raise InputError(where, "a torch.Tensor", type(tensor).__name__)
    if isinstance(tensor, FakeTensor) or torch.compiler.is_compiling():
        raise UnsupportedError(
            f"{where}: inside torch.compile or torch.export is not built yet. "
            "Wrap the call in a function decorated with torch.compiler.disable"
        )
    if is_transformed(tensor):
        raise UnsupportedError(f"{where} is inside torch.func.vmap, jvp or the like, which are not built yet")
    if tensor.dim() != rank:
        raise InputError(where, f"{rank} dimensions {meaning}", f"{tensor.dim()}: {tuple(tensor.shape)}")
    if tensor.device.type not in ("cpu", "cuda"):
        raise InputError(where, "a tensor on the CPU or a CUDA GPU", tensor.device)
    if tensor.layout != torch.strided:
        raise InputError(where, "a strided tensor", tensor.layout, "Call .to_dense()")


def check_like(where: str, tensor: Any, x: Any) -> None:
    """Raise InputError unless a tensor has x's dtype and device."""
    if x.dtype not in _fill_names():
        raise InputError("experts.x", "float16, bfloat16, float32 or float64", x.dtype)
    if tensor.dtype != x.dtype:
        raise InputError(where, f"x's dtype {x.dtype}", tensor.dtype, "Cast one of them")
    if tensor.device != x.device:
        raise InputError(where, f"a tensor on {x.device}, as x is", tensor.device)


def check_routing(
    where: tuple[str, str], ids: Any, weights: Any, tokens: int, experts: int, *, validate: bool
) -> None:
    """Raise InputError unless ids and weights say which experts each of so many tokens takes."""
    check_tensor(where[0], ids, 2, "(tokens, top_k)")
    check_tensor(where[1], weights, 2, "(tokens, top_k)")
    if ids.dtype not in (torch.int32, torch.int64):
        raise InputError(where[0], "int32 or int64", ids.dtype)
    if weights.dtype not in _fill_names():
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
