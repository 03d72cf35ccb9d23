"""Sorting entries by expert as a step of `frontend/moe_operator.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .device import target_of
from .moe_operator import Arguments, Made
from .plan import launched

SINGLE = 512  # entries that one program sorts


class Groups:
    """ids [T, k] -> tokens [T k], bounds [E + 1], place [T, k], as ir/ragged.py defines them."""

    def made(self, call: Arguments) -> list[Made]:
        ids, experts = call.tensors["ids"], call.integers["experts"]
        return [
            Made("tokens", (ids.shape[0] * ids.shape[1],), torch.int32),
            Made("bounds", (experts + 1,), torch.int32),
            Made("place", tuple(ids.shape), torch.int32),
        ]

    def evaluate(self, call: Arguments) -> list[Tensor]:
        ids, experts, made = call.tensors["ids"], call.integers["experts"], self.made(call)
        if not ids.numel():
            return [ids.new_zeros(one.shape, dtype=one.dtype) for one in made]
        entries, top_k = ids.numel(), ids.shape[1]
        dtype = "i64" if ids.dtype == torch.int64 else "i32"
        facts = (experts, top_k, dtype, entries <= SINGLE, target_of(ids.device))

        def make() -> Any:
            from ..ir.expr import real
            from ..passes.moe_pipeline import compile_groups
            from ..passes.moe_spec import ExpertsSpec

            sizes = (experts, top_k, 1, 1, real("x0"), None)
            rest = {"routing": (dtype, "f32"), "single": facts[3], "target": facts[4]}
            return compile_groups(ExpertsSpec(*sizes, **rest))

        flat = [*made[:2], Made("place", (entries,), torch.int32)]
        found = launched(("groups", facts), {"ids": ids.detach().reshape(-1).contiguous()}, {}, flat, make)
        return [*found[:2], found[2].view(ids.shape)]

    def differentiate(self, *_: Any) -> dict[str, Tensor]:
        raise AssertionError("integers have no gradient")


STEP = Groups()
