"""The primitive `gossamer_kernels` of JAX: one program of kernels, of experts or of linear attention."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching

from ...runtime.driver import get_or_compile
from ...runtime.strided import Strided
from ..device import target_of
from ..linear import form as linear_form
from ..linear.feature_maps import FeatureMap
from ..linear.form import Settings, linear_executable
from ..moe import layer_kernels
from ..moe.layer import Layer, load_of
from ..moe.router_form import facts_of, spec_of
from .call import _tuples
from .cpu import Target
from .primitive import define, leading, one_by_one
from .problem import heads_first

kernels_p = Primitive("gossamer_kernels")
"""Operands as `Kernels.operands` names them. Parameter: call, the text of a Kernels. Results: its results."""

Result = tuple[str, tuple[int, ...], str]  # name, shape, dtype


@dataclass(frozen=True)
class Kernels:
    """One program of kernels, arrays aside. what: one of FOUND. facts: what its kernels depend on beside the
    arrays' shapes and dtypes. numbers: by name, that kernels take."""

    what: str
    operands: tuple[str, ...]
    results: tuple[Result, ...]
    facts: tuple[Any, ...] = ()
    numbers: tuple[tuple[str, float], ...] = ()

    @property
    def text(self) -> str:
        """JSON; the same for the same program."""
        return json.dumps([self.what, self.operands, self.results, self.facts, self.numbers])

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(text: str) -> Kernels:
        return Kernels(*_tuples(json.loads(text)))


def call(
    what: str,
    operands: Mapping[str, Any],
    results: Mapping[str, tuple[tuple[int, ...], Any]],
    facts: tuple[Any, ...] = (),
    **numbers: float,
) -> dict[str, Any]:
    """The results of a program by name. results: shape and dtype of each."""
    told = tuple((name, tuple(shape), jnp.dtype(dtype).name) for name, (shape, dtype) in results.items())
    kernels = Kernels(what, tuple(operands), told, facts, tuple(numbers.items()))
    found: Any = kernels_p.bind(*operands.values(), call=kernels.text)
    return dict(zip(results, found, strict=True))


def _shapes(text: str, operands: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in Kernels.parse(text).results]


# which kernels --------------------------------------------------------------------------------------


def _layer(kernels: Kernels, values: dict[str, Any]) -> Any:
    *sizes, biased, top_k, term, routed, keeps, wanted = kernels.facts
    bias = True if biased else None
    layer = Layer(values["gate_up"], values["down"], bias, bias, *sizes, units=(2, 2))
    return layer_kernels.layer_executable(kernels.what, values, layer, (top_k, term, routed, keeps), wanted)


def _groups(kernels: Kernels, values: dict[str, Any]) -> Any:
    experts, top_k = kernels.facts
    return layer_kernels.groups_executable(experts, top_k, values["ids"])


def _product(kernels: Kernels, values: dict[str, Any]) -> Any:
    """facts: whether w is given as its transpose."""
    a, w = values["a"], values["w"]
    if kernels.facts[0]:
        values["w"] = w.permute(0, 2, 1)
    groups, *sizes = values["w"].shape
    load = load_of(a.shape[0] / groups, a.device)
    aligned = all(map(layer_kernels.are_rows_aligned, (a, w, values["o"])))
    unit = 1 if kernels.facts[0] else 2
    options: dict[str, Any] = dict(biased=False, outer=False, aligned=aligned)
    return layer_kernels.product_executable(a, (groups, *sizes), unit, load, **options)


def _outer(kernels: Kernels, values: dict[str, Any]) -> Any:
    a, b = values["a"], values["b"]
    aligned = all(map(layer_kernels.are_rows_aligned, (a, b)))
    sizes = (values["o"].shape[0], a.shape[1], b.shape[1])
    return layer_kernels.product_executable(a, sizes, 2, "many", biased=False, outer=True, aligned=aligned)


def _router(kernels: Kernels, values: dict[str, Any]) -> Any:
    """facts: what was asked for, by name."""
    from ...passes.moe.router import compile_router

    facts = facts_of(dict(kernels.facts), values, "chosen" in values)
    target = target_of(values["logits"].device)
    return get_or_compile(("router", facts), lambda: compile_router(spec_of(facts)), target)


def _linear(kernels: Kernels, values: dict[str, Any]) -> Any:
    layout, q_map, k_map, *options, keeps, wanted = kernels.facts
    settings = Settings(FeatureMap(*q_map), FeatureMap(*k_map), *options)
    for name in ("q", "k", "v", "o", "do", "dq", "dk", "dv"):
        if name in values:
            values[name] = heads_first(values[name], layout)
    executable, sizes = linear_executable(values, settings, keeps, wanted)
    values |= sizes
    return executable


FOUND: dict[str, Callable[[Kernels, dict[str, Any]], Any]] = {
    "experts": _layer,
    "gradients": _layer,
    "groups": _groups,
    "product": _product,
    "outer": _outer,
    "router": _router,
    "linear": _linear,
    "linear gradients": _linear,
}


def _prepare(text: str, memory: Sequence[Strided]) -> tuple[Any, dict[str, Any]]:
    kernels = Kernels.parse(text)
    names = (*kernels.operands, *(name for name, *_ in kernels.results))
    values: dict[str, Any] = dict(zip(names, memory, strict=True))
    executable = FOUND[kernels.what](kernels, values)
    return executable, values | dict(kernels.numbers)


KERNELS = Target("gossamer_kernels_cpu", _prepare)
define(kernels_p, _shapes, KERNELS)


# batching -------------------------------------------------------------------------------------------

# What has a row for each token or each sequence, so that calls side by side are one call of more of them.
_BY_ROW = {"experts": ("x", "ids", "weights"), "router": ("logits", "token_ids", "group_logits", "request")}
_BY_ROW |= dict.fromkeys(("linear", "linear gradients"), linear_form.ALL_NAMES)


def _batched(args: Sequence[Any], dims: Sequence[int | None], *, call: str) -> Any:
    kernels, args = Kernels.parse(call), leading(args, dims)
    own = {name: d is not None for name, d in zip(kernels.operands, dims, strict=True)}
    if not _folds(kernels, own):
        return one_by_one(kernels_p, args, list(own.values()), call)
    calls = next(x.shape[0] for name, x in zip(kernels.operands, args, strict=True) if own[name])
    given = []
    for name, x in zip(kernels.operands, args, strict=True):
        if name in _BY_ROW[kernels.what]:
            x = x if own[name] else jnp.broadcast_to(x, (calls, *x.shape))
            x = x.reshape(-1, *x.shape[2:])
        given.append(x)
    results = tuple((name, (calls * shape[0], *shape[1:]), dtype) for name, shape, dtype in kernels.results)
    found: Any = kernels_p.bind(*given, call=replace(kernels, results=results).text)
    return [x.reshape(calls, -1, *x.shape[1:]) for x in found], [0] * len(found)


def _folds(kernels: Kernels, own: Mapping[str, bool]) -> bool:
    """Whether calls side by side are one: some routers count tokens from the first."""
    by_row = _BY_ROW.get(kernels.what, ())
    if any(own[name] and name not in by_row for name in own):
        return False
    if kernels.what == "router":
        facts = dict(kernels.facts)
        return "limited" not in facts and (facts["scoring"] != "random" or "token_ids" in own)
    return kernels.what in ("linear", "linear gradients") or (kernels.what == "experts" and "ids" in own)


batching.primitive_batchers[kernels_p] = _batched
