"""Experts that multiply nothing, as a step of `frontend/moe/operator.py`: zeros, copies of x, constants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...ir.errors import InputError
from ..device import target_of
from ..plan import launched
from ..problem import ALIGN, _fill_names, is_aligned
from .form import MoeForm
from .layers import check_like, check_tensor
from .operator import Arguments, Made, call, learns

if TYPE_CHECKING:
    from ...passes.moe.light import LightSpec


class Light(NamedTuple):
    """How many experts there are that give zeros and copies, and of constants their vectors (C, H) and gates
    (C, 2, H)."""

    zeros: int = 0
    copies: int = 0
    vectors: Any = None
    gates: Any = None

    @property
    def count(self) -> int:
        return self.zeros + self.copies + (0 if self.vectors is None else self.vectors.shape[0])

    def check(self, x: Any) -> None:
        """Raise InputError unless these fit x."""
        check_tensor("experts.x", x, 2, "(T, H)")
        for name, value in (("zero_experts", self.zeros), ("copy_experts", self.copies)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise InputError(f"experts.{name}", "a number of experts, 0 or more", value)
        if self.gates is not None and self.vectors is None:
            raise InputError("experts.constant_gates", "constant_experts beside them", None)
        rows = 0 if self.vectors is None else self.vectors.shape[0]
        for name, tensor, shape in (
            ("constant_experts", self.vectors, (rows, x.shape[1])),
            ("constant_gates", self.gates, (rows, 2, x.shape[1])),
        ):
            if tensor is None:
                continue
            check_tensor(f"experts.{name}", tensor, len(shape), f"{shape}")
            check_like(f"experts.{name}", tensor, x)
            if tuple(tensor.shape) != shape or not rows:
                raise InputError(
                    f"experts.{name}", f"shape {shape}, of one expert or more", tuple(tensor.shape)
                )


def with_light(base: Tensor, x: Tensor, ids: Tensor, weights: Tensor, first: int, light: Light) -> Tensor:
    """What experts gave, and what those of `light` give, whose ids begin at `first`."""
    if not light.copies and light.vectors is None:
        return base
    tensors = {"base": base, "x": x, "ids": ids, "weights": weights}
    tensors |= {} if light.vectors is None else {"vectors": light.vectors}
    tensors |= {} if light.gates is None else {"gates": light.gates}
    facts = (("first", first), ("zeros", light.zeros), ("copies", light.copies))
    form = MoeForm("light", tuple(tensors), facts=facts, learns=learns([*tensors.values()]))
    return call(form, [*tensors.values()])[0]


class LightStep:
    """o [T, H]."""

    def made(self, call: Arguments) -> list[Made]:
        x = call.tensors["x"]
        return [Made("o", tuple(x.shape), x.dtype)]

    def evaluate(self, call: Arguments) -> list[Tensor]:
        if not call.tensors["ids"].numel():
            return [call.tensors["base"].clone()]
        values = _plain(call.tensors)
        spec = _facts(call, values)

        def make() -> Any:
            from ...passes.moe.light import compile_light

            return compile_light(_spec(spec))

        return list(launched(("light", spec), values, {}, self.made(call), make))

    def differentiate(
        self, call: Arguments, results: dict[str, Tensor], slopes: dict[str, Tensor], wanted: tuple[str, ...]
    ) -> dict[str, Tensor]:
        given, do = call.tensors, slopes["o"]
        x, weights = given["x"], given["weights"]
        if not given["ids"].numel():
            return {n: do if n == "base" else torch.zeros_like(given[n]) for n in wanted}
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        values = _plain({"do": do, **{n: t for n, t in given.items() if n != "base"}})
        found, spec = {"base": do.clone()}, _facts(call, values)
        made = [Made("dx", tuple(x.shape), x.dtype), Made("dweights", tuple(weights.shape), wide)]
        for name, part in (("mixed", "vectors"), ("slopes", "gates")):
            if part in given:
                made.append(Made(name, (x.shape[0], given[part].shape[0]), wide))

        def make() -> Any:
            from ...passes.moe.light import compile_light_gradient

            return compile_light_gradient(_spec(spec))

        names = [one.name for one in made]
        kernel = dict(zip(names, launched(("light_gradient", spec), values, {}, made, make), strict=True))
        found |= {"x": kernel["dx"], "weights": kernel["dweights"].to(weights.dtype)}
        if "vectors" in wanted:
            found["vectors"] = _weighed(kernel["mixed"], do.to(wide)).to(x.dtype)
        if "gates" in wanted:
            turned = _weighed(kernel["slopes"], x.to(wide)).to(x.dtype)
            found["gates"] = torch.stack((turned, -turned), 1)
        return found


def _weighed(weights: Tensor, rows: Tensor) -> Tensor:
    """Sums of rows (T, H) by weights (T, C), which leave out rows that weigh nothing, whatever they hold."""
    return weights.T @ torch.where((weights != 0).any(1, keepdim=True), rows, 0)


def _facts(call: Arguments, values: dict[str, Tensor]) -> tuple[Any, ...]:
    """The fields of a LightSpec. values: what its kernel is called with."""
    given, facts, names = call.tensors, call.facts, _fill_names()
    constants = given["vectors"].shape[0] if "vectors" in given else 0
    sizes = (facts["first"], facts["zeros"], facts["copies"], constants, "gates" in given)
    ids = "i64" if given["ids"].dtype == torch.int64 else "i32"
    dtypes = (names[given["x"].dtype], ids, names[given["weights"].dtype])
    x = given["x"]
    rows = [values[name] for name in ("base", "x", "do") if name in values]
    aligned = x.shape[1] * x.element_size() % ALIGN == 0 and all(map(is_aligned, rows))
    return (*sizes, given["ids"].shape[1], x.shape[1], *dtypes, target_of(x.device), aligned)


def _spec(facts: tuple[Any, ...]) -> LightSpec:
    from ...passes.moe.light import LightSpec

    return LightSpec(*facts)


def _plain(tensors: Any) -> dict[str, Tensor]:
    given = {name: t.detach() for name, t in tensors.items()}
    return {n: t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for n, t in given.items()}


STEP = LightStep()
