"""Experts that choose tokens, as a step of `frontend/moe/operator.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..plan import launched
from .operator import Arguments, Made
from .router_form import spec_of
from .router_step import cosine_gradients, facts_of, plain, wide


class ExpertChoice:
    """scores [T, E], tokens [E capacity], bounds [E + 1], place [T, E] (, scored [T, E])."""

    def made(self, call: Arguments) -> list[Made]:
        logits, vectors = call.tensors["logits"], call.tensors.get("vectors")
        tokens, experts = logits.shape[0], logits.shape[1] if vectors is None else vectors.shape[0]
        capacity, table = call.integers["capacity"], (tokens, experts)
        found = [
            Made("scores", table, wide(logits)),
            Made("tokens", (experts * capacity,), torch.int32),
            Made("bounds", (experts + 1,), torch.int32),
            Made("place", table, torch.int32),
        ]
        return found if vectors is None else [*found, Made("scored", table, wide(logits))]

    def evaluate(self, call: Arguments) -> list[Tensor]:
        made, values = self.made(call), plain(call.tensors)
        if not values["logits"].shape[0]:
            return [values["logits"].new_zeros(one.shape, dtype=one.dtype) for one in made]
        facts = facts_of(call)

        def make() -> Any:
            from ...passes.moe.expert_choice import compile_expert_choice

            return compile_expert_choice(spec_of(facts))

        return list(launched(("expert_choice", facts), values, call.integers, made, make))

    def differentiate(
        self, call: Arguments, results: dict[str, Tensor], slopes: dict[str, Tensor], wanted: tuple[str, ...]
    ) -> dict[str, Tensor]:
        logits, facts = results.get("scored", call.tensors["logits"]), facts_of(call)
        slope = torch.zeros_like(logits)
        if "scores" in slopes and logits.shape[0]:

            def make() -> Any:
                from ...passes.moe.router_gradient import compile_router_gradient

                return compile_router_gradient(spec_of(facts), by_expert=True)

            values = plain({"logits": logits, "dscores": slopes["scores"]})
            made = [Made("dlogits", tuple(logits.shape), logits.dtype)]
            (slope,) = launched(("expert_choice_gradient", facts), values, {}, made, make)
        if "vectors" not in call.tensors:
            return {"logits": slope}
        return cosine_gradients(call.tensors, logits, slope + slopes.get("scored", 0))


STEP = ExpertChoice()
