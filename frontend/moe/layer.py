"""The sizes of a layer of experts and the layout of its matrices, whatever library they are from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ...ir.errors import InputError
from ...ir.quantized import Quantized
from ...runtime.knobs import WORKSPACE
from ..problem import ALIGN, is_aligned

MOST_EXPERTS = 1024  # as passes.moe.spec has it


def load_of(mean: float, device: Any) -> str:
    """What `ExpertsSpec.load` says of so many rows an expert."""
    return "few" if mean <= 16 else "some" if mean <= 64 and device.type != "cpu" else "many"


def is_handful(tokens: int, entries: int, experts: int) -> bool:
    """Whether entries are so few that they need no sorting: load 'one', where nothing else asks for it."""
    return tokens == 1 or 2 * entries <= experts


@dataclass(frozen=True)
class Layer:
    """The matrices of a layer and how they lie.

    transposed: [E, H, 2 I] and [E, I, H] in place of [E, 2 I, H] and [E, H, I]; gated: the first product has
    two halves, interleaved or one after the other. units: which dimension of each has stride 1, None: none.
    lora: the matrices of low-rank adapters by name, of `ranks`, 0: none. adapter_ids: where these are stacks
    of adapters, which of them a token takes (T,). trains: which experts learn (E,)."""

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
    adapter_ids: Any = None
    trains: Any = None

    @property
    def halves(self) -> str | None:
        return ("interleaved" if self.interleaved else "split") if self.gated else None

    @cached_property
    def matrices(self) -> dict[str, Any]:
        """The tensors that the matrices lie in, by the names that kernels give them."""
        found: dict[str, Any] = {}
        for name, matrix in (("gate_up", self.gate_up), ("down", self.down)):
            found |= matrix.tensors(name) if is_coded(matrix) else {name: matrix}
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

    @cached_property
    def choices(self) -> dict[str, Any]:
        """What tokens choose beside experts, by the names that kernels give it."""
        return {} if self.adapter_ids is None else {"adapter_ids": self.adapter_ids}

    @property
    def quantized(self) -> tuple[Any, Any]:
        """The fields of the Quantized that matrices are stored by, None: as they are."""
        up, down = (m.key if is_coded(m) else None for m in (self.gate_up, self.down))
        return up, down

    @property
    def columns(self) -> int:
        """Columns of the first product."""
        return self.inner * (2 if self.gated else 1)


def is_coded(matrix: Any) -> bool:
    """Whether a stack of matrices is a QuantizedWeight, codes that kernels decode."""
    return hasattr(matrix, "codes")


def layer_of_shapes(
    hidden: int,
    tensors: tuple[Any, Any, Any, Any],
    units: tuple[int | None, int | None],
    transposed: Any,
    interleaved: Any,
) -> Layer:
    """The layer that gate_up, down and their biases make, its layout read off their shapes.

    Raises InputError."""
    gate_up, down, gate_up_bias, down_bias = tensors
    if (gate_up_bias is None) != (down_bias is None):
        missing = "gate_up_bias" if gate_up_bias is None else "down_bias"
        raise InputError(f"experts.{missing}", "both biases or neither", None, "Pass zeros for the other")
    experts = gate_up.shape[0]
    if not 1 <= experts <= MOST_EXPERTS:
        raise InputError("experts.gate_up_proj", f"1 to {MOST_EXPERTS} experts", experts)
    if down.shape[0] != experts:
        raise InputError("experts.down_proj", f"{experts} experts, as gate_up_proj has", down.shape[0])
    flipped = is_transposed(hidden, gate_up.shape, down.shape, transposed)
    columns, inner = (gate_up.shape[2], down.shape[1]) if flipped else (gate_up.shape[1], down.shape[2])
    gated = columns == 2 * inner
    if not hidden or not inner:
        raise InputError("experts.gate_up_proj, down_proj", "H and I of 1 or more", shown(gate_up, down))
    for name, bias, size in (("gate_up_bias", gate_up_bias, columns), ("down_bias", down_bias, hidden)):
        if bias is not None and tuple(bias.shape) != (experts, size):
            raise InputError(f"experts.{name}", f"shape ({experts}, {size})", tuple(bias.shape))
    if interleaved and not gated:
        raise InputError("experts.interleaved", "matrices with a gate", shown(gate_up, down))
    return Layer(*tensors, experts, hidden, inner, gated, flipped, bool(interleaved), units)


def is_transposed(hidden: int, up: tuple[int, ...], down: tuple[int, ...], asked: Any) -> bool:
    """Whether shapes are [E, H, out], [E, I, H]; where they could be both, only if the caller says so."""
    plain = up[2] == down[1] == hidden and up[1] in (down[2], 2 * down[2])
    flipped = up[1] == down[2] == hidden and up[2] in (down[1], 2 * down[1])
    if asked is None and (plain or flipped):
        return not plain
    if asked is not None and (flipped if asked else plain):
        return bool(asked)
    other = "the other layout fits: leave out transposed=" if plain or flipped else ""
    wanted = {
        None: "[E, 2I, H] and [E, H, I], or transposed [E, H, 2I] and [E, I, H]",
        False: "[E, 2I, H] and [E, H, I]",
        True: "[E, H, 2I] and [E, I, H]",
    }[asked if asked is None else bool(asked)]
    wanted += ", I in place of 2I without a gate"
    got = f"{list(up)} and {list(down)}"
    raise InputError("experts.gate_up_proj, down_proj", f"{wanted}, with H = {hidden}", got, other)


def shown(*tensors: Any) -> str:
    return " and ".join(str(list(t.shape)) for t in tensors)


def unit_of(matrix: Any) -> int | None:
    """The dimension of a stack of matrices whose stride is 1; of codes None."""
    for d in (2, 1) if not is_coded(matrix) else ():
        if matrix.stride(d) == 1 or matrix.shape[d] == 1:
            return d
    return None


def is_layer_aligned(x: Any, layer: Layer) -> bool:
    """Whether x and the matrices, and their rows, start on multiples of 16 bytes."""
    if x.device.type == "cpu":
        return True
    size = x.element_size()
    rows = (layer.hidden * size) % 16 == 0 and (layer.inner * size) % 16 == 0
    pairs = list(zip((layer.gate_up, layer.down), layer.units, strict=True))
    dense = [(matrix, unit) for matrix, unit in pairs if not is_coded(matrix)]
    if not rows or any(unit is None for _, unit in dense):
        return False
    ordered = [matrix if unit == 2 else matrix.transpose(1, 2) for matrix, unit in dense]
    codes = [plane for matrix, _ in pairs if is_coded(matrix) for plane in matrix.codes]
    aligned = all(map(is_aligned, ordered)) and all(map(_as_rows_are, layer.lora.values()))
    return is_aligned(x) and aligned and all(c.data_ptr() % ALIGN == 0 for c in codes)


def _as_rows_are(adapter: Any) -> bool:
    """Whether matrices start on a multiple of 16 bytes, and their rows on what the size of one divides."""
    size = adapter.shape[-1] * adapter.element_size()
    unit = min(ALIGN, size & -size)
    steps = (adapter.stride(d) * adapter.element_size() for d in range(adapter.ndim - 1))
    return adapter.data_ptr() % ALIGN == 0 and all(step % unit == 0 for step in steps)


def decoded_once(layer: Layer, rows: float, dtype: str, target: str) -> tuple[bool, bool]:
    """Which matrices of codes are decoded before their product, in a call whose experts get so many rows on
    average: passes/moe/once.py says where that is faster, GOSSAMER_WORKSPACE how large they may be."""
    if not any(layer.quantized):
        return False, False
    from ...passes.moe.once import decodes_once

    def decoded(key: Any, matrix: Any) -> bool:
        if key is None or 2 * math.prod(matrix.shape) > WORKSPACE.get():
            return False
        return decodes_once(Quantized(*key), rows, dtype, target)

    up, down = layer.quantized
    return decoded(up, layer.gate_up), decoded(down, layer.down)
