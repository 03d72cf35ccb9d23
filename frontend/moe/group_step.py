"""Sorting entries by expert as a step of `frontend/moe/operator.py`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..plan import launched
from .layer_kernels import groups_facts, groups_program
from .operator import Arguments, Made


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
        entries = ids.detach().reshape(-1).contiguous()
        facts = groups_facts(experts, ids.shape[1], entries)
        flat = [*made[:2], Made("place", (ids.numel(),), torch.int32)]
        found = launched(("groups", facts), {"ids": entries}, {}, flat, partial(groups_program, facts))
        return [*found[:2], found[2].view(ids.shape)]

    def differentiate(self, *_: Any) -> dict[str, Tensor]:
        raise AssertionError("integers have no gradient")


STEP = Groups()
