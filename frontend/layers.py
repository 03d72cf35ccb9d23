"""The checked inputs of one layer of experts: sizes, and the layout of its matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ..ir.errors import InputError, MissingDependencyError
from ..ir.quantized import Quantized
from ..runtime.knobs import WORKSPACE
from .layer import is_transposed, shown, unit_of
from .problem import ALIGN, is_aligned
from .quantized import QuantizedWeight

try:
    import torch
except ImportError:
    raise MissingDependencyError("torch", "torch", "gossamer.experts") from None

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LORA = ("gate_up_a", "gate_up_b", "down_a", "down_b")
MOST_EXPERTS = 1024  # as passes.moe_spec has it


@dataclass(frozen=True)
class Layer:
    """The matrices of a layer and how they lie.

    transposed: [E, H, 2 I] and [E, I, H] in place of [E, 2 I, H] and [E, H, I]; gated: the first product has
    two halves, interleaved or one after the other. units: which dimension of each has stride 1, None: none.
    lora: the matrices of low-rank adapters by name, of `ranks`, 0: none. trains: which experts learn (E,)."""

    gate_up: Any
    down: Any
    gate_up_bias: Any
    down_bias: Any
    experts: int
    hidden: int
    inner: int
    gated: bool
    transposed: bool
    interleaved: bool
    units: tuple[int | None, int | None]
    lora: dict[str, Any] = field(default_factory=dict)
    ranks: tuple[int, int] = (0, 0)
    lora_scale: float = 1.0
    trains: Any = None

    @property
    def halves(self) -> str | None:
        return ("interleaved" if self.interleaved else "split") if self.gated else None

    @cached_property
    def matrices(self) -> dict[str, Any]:
        """The tensors that the matrices lie in, by the names that kernels give them."""
        found: dict[str, Any] = {}
        for name, matrix in (("gate_up", self.gate_up), ("down", self.down)):
            found |= {name: matrix} if isinstance(matrix, torch.Tensor) else matrix.tensors(name)
        return found

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """The tensors that there are, by the names that kernels give them."""
        biases = {"gate_up_bias": self.gate_up_bias, "down_bias": self.down_bias}
        return (
            self.matrices
            | {name: tensor for name, tensor in biases.items() if tensor is not None}
            | self.lora
        )

    @property
    def quantized(self) -> tuple[Any, Any]:
        """The fields of the Quantized that matrices are stored by, None: as they are."""
        up, down = (None if isinstance(m, torch.Tensor) else m.key for m in (self.gate_up, self.down))
        return up, down

    def adapted(self, x: Any, lora: dict[str, Any], scale: float) -> Layer:
        """The layer with low-rank adapters: gate_up_a (E, r, H), gate_up_b (E, 2 I, r), down_a (E, r, I) and
        down_b (E, H, r), two of them or all. Raises InputError."""
        ranks = []
        sizes = {"gate_up": (self.hidden, self.inner * (1 + self.gated)), "down": (self.inner, self.hidden)}
        for name, (inner, out) in sizes.items():
            a, b = lora.get(f"{name}_a"), lora.get(f"{name}_b")
            rank = a.shape[1] if isinstance(a, torch.Tensor) and a.dim() == 3 else 0
            ranks.append(rank)
            if a is None and b is None:
                continue
            for letter, given, shape in (("a", a, (rank, inner)), ("b", b, (out, rank))):
                where = f"experts.{name}_lora[{'ab'.index(letter)}]"
                matrix: Any = given
                check_tensor(where, matrix, 3, "(experts, rank, in) and (experts, out, rank)")
                check_like(where, matrix, x)
                wanted = (self.experts, *shape)
                if tuple(matrix.shape) != wanted or not rank:
                    raise InputError(where, f"shape {wanted}, of rank 1 or more", tuple(matrix.shape))
        dense = {name: t if t.stride(2) == 1 else t.contiguous() for name, t in lora.items()}
        return replace(self, lora=dense, ranks=(ranks[0], ranks[1]), lora_scale=float(scale))


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
    if (gate_up_bias is None) != (down_bias is None):
        missing = "gate_up_bias" if gate_up_bias is None else "down_bias"
        raise InputError(f"experts.{missing}", "both biases or neither", None, "Pass zeros for the other")
    if x.dtype not in FLOATS:
        raise InputError("experts.x", "float16, bfloat16, float32 or float64", x.dtype)
    hidden, experts = x.shape[1], gate_up.shape[0]
    if not 1 <= experts <= MOST_EXPERTS:
        raise InputError("experts.gate_up_proj", f"1 to {MOST_EXPERTS} experts", experts)
    if down.shape[0] != experts:
        raise InputError("experts.down_proj", f"{experts} experts, as gate_up_proj has", down.shape[0])
    flipped = is_transposed(hidden, gate_up.shape, down.shape, transposed)
    if flipped and not all(isinstance(m, torch.Tensor) for m in (gate_up, down)):
        got = shown(gate_up, down)
        raise InputError("experts.gate_up_proj, down_proj", "quantised matrices (experts, out, in)", got)
    columns, inner = (gate_up.shape[2], down.shape[1]) if flipped else (gate_up.shape[1], down.shape[2])
    gated = columns == 2 * inner
    if not hidden or not inner:
        raise InputError("experts.gate_up_proj, down_proj", "H and I of 1 or more", shown(gate_up, down))
    for name, bias, size in (("gate_up_bias", gate_up_bias, columns), ("down_bias", down_bias, hidden)):
        if bias is not None and tuple(bias.shape) != (experts, size):
            raise InputError(f"experts.{name}", f"shape ({experts}, {size})", tuple(bias.shape))
    if interleaved and not gated:
        raise InputError("experts.interleaved", "matrices with a gate", shown(gate_up, down))
    units = (_unit(gate_up), _unit(down))
    biases = (_rows(gate_up_bias), _rows(down_bias))
    return Layer(gate_up, down, *biases, experts, hidden, inner, gated, flipped, bool(interleaved), units)


def decoded_once(layer: Layer, rows: float, dtype: str, target: str) -> tuple[bool, bool]:
    """Which matrices of codes are decoded before their product, in a call whose experts get so many rows on
    average: passes/moe_once.py says where that is faster, GOSSAMER_WORKSPACE how large they may be."""
    if not any(layer.quantized):
        return False, False
    from ..passes.moe_once import decodes_once

    def decoded(key: Any, matrix: Any) -> bool:
        if key is None or 2 * math.prod(matrix.shape) > WORKSPACE.get():
            return False
        return decodes_once(Quantized(*key), rows, dtype, target)

    up, down = layer.quantized
    return decoded(up, layer.gate_up), decoded(down, layer.down)


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
    return layer.adapted(tensors["x"], lora, lora_scale) if lora else layer


def _unit(matrix: Any) -> int | None:
    """The dimension of a stack of matrices whose stride is 1; of codes None."""
    return unit_of(matrix) if isinstance(matrix, torch.Tensor) else None


def _rows(bias: Any) -> Any:
    return bias if bias is None or bias.stride(1) == 1 else bias.contiguous()


def is_layer_aligned(x: Any, layer: Layer) -> bool:
    """Whether x and the matrices, and their rows, start on multiples of 16 bytes."""
    if x.device.type == "cpu":
        return True
    size = x.element_size()
    rows = (layer.hidden * size) % 16 == 0 and (layer.inner * size) % 16 == 0
    pairs = list(zip((layer.gate_up, layer.down), layer.units, strict=True))
    dense = [(matrix, unit) for matrix, unit in pairs if isinstance(matrix, torch.Tensor)]
    if not rows or any(unit is None for _, unit in dense):
        return False
    ordered = [matrix if unit == 2 else matrix.transpose(1, 2) for matrix, unit in dense]
    codes = [plane for matrix, _ in pairs if isinstance(matrix, QuantizedWeight) for plane in matrix.codes]
    return is_aligned(x) and all(map(is_aligned, ordered)) and all(c.data_ptr() % ALIGN == 0 for c in codes)


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
