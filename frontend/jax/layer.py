"""A layer of experts, a product by groups and a router in JAX, with gradients by kernels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ..term import Term
from .call import _tuples
from .gradient import _Names
from .kernels import call

GROUPED = ("tokens", "bounds", "place")  # in the place of ids


@dataclass(frozen=True)
class Sizes:
    """A layer, arrays aside. term: of the activation. recompute: the first product, for gradients."""

    experts: int
    hidden: int
    inner: int
    gated: bool
    transposed: bool
    interleaved: bool
    biased: bool
    term: Term
    recompute: bool = False

    @property
    def text(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(text: str) -> Sizes:
        return Sizes(**{name: _tuples(value) for name, value in json.loads(text).items()})

    def facts(self, top_k: int, routed: bool, keeps: bool, wanted: tuple[str, ...] = ()) -> tuple[Any, ...]:
        """As the kernels' finder takes them."""
        shape = (self.experts, self.hidden, self.inner, self.gated, self.transposed, self.interleaved)
        return (*shape, self.biased, top_k, self.term, routed, keeps, wanted)


def groups(ids: Any, experts: int) -> dict[str, Any]:
    """tokens (T k,), bounds (E + 1,) and place (T, k) of ids (T, k), as ir/ragged.py defines them."""
    rows = ids.size
    shapes = {"tokens": ((rows,), jnp.int32), "bounds": ((experts + 1,), jnp.int32)}
    shapes["place"] = (rows,), jnp.int32
    if not rows:
        return {n: jnp.zeros(ids.shape if n == "place" else s[0], s[1]) for n, s in shapes.items()}
    found = call("groups", {"ids": ids.reshape(-1)}, shapes, (experts, ids.shape[1]))
    return found | {"place": found["place"].reshape(ids.shape)}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def layer(sizes: str, operands: dict[str, Any]) -> Any:
    """The sum of experts of every token, (T, H).

    operands: x, weights (T, k), gate_up, down and biases, and either ids (T, k) or the rows sorted by expert,
    tokens, bounds and place; each row is then at one place."""
    return _forward(Sizes.parse(sizes), operands)["o"]


def _forward(sizes: Sizes, operands: Mapping[str, Any], *, keeps: bool = False) -> dict[str, Any]:
    x, weights = operands["x"], operands["weights"]
    if not x.shape[0] or not weights.size:
        return {"o": jnp.zeros_like(x)}
    flat = ("weights", "ids", "place")
    given = {name: a.reshape(-1) if name in flat else a for name, a in operands.items()}
    results = {"o": (x.shape, x.dtype)}
    if keeps:
        results["g"] = (weights.size, sizes.inner * (2 if sizes.gated else 1)), x.dtype
    routed = "ids" not in operands
    return call("experts", given, results, sizes.facts(weights.shape[1], routed, keeps))


def _layer_forward(text: str, operands: dict[str, Any]) -> Any:
    sizes, arrays = Sizes.parse(text), {name: x.value for name, x in operands.items()}
    floats = (n for n, x in operands.items() if x.perturbed and jnp.issubdtype(x.value.dtype, jnp.floating))
    wanted = _Names(sorted(floats))
    if "ids" in arrays:
        ids = arrays.pop("ids")
        arrays |= groups(ids, sizes.experts)
    found = _forward(sizes, arrays, keeps=not sizes.recompute)
    return found["o"], (arrays, found.get("g"), _Names(operands), wanted)


def _layer_backward(text: str, saved: Any, do: Any) -> Any:
    arrays, g, names, wanted = saved
    found: dict[str, Any] = {}
    if wanted and not isinstance(do, SymbolicZero):
        if arrays["weights"].size:
            found = _gradients(Sizes.parse(text), arrays, g, do, tuple(wanted))
        else:
            found = {name: jnp.zeros_like(arrays[name]) for name in wanted}
    return ({name: found.get(name) for name in names},)


layer.defvjp(_layer_forward, _layer_backward, symbolic_zeros=True)


def _gradients(
    sizes: Sizes, arrays: dict[str, Any], g: Any, do: Any, wanted: tuple[str, ...]
) -> dict[str, Any]:
    """The gradients of the wanted operands by name; see passes/moe/gradient.py."""
    x, weights, place = arrays["x"], arrays["weights"], arrays["place"]
    rows = weights.size
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    at = jnp.where(place < 0, rows, place).reshape(-1)
    by_row = jnp.zeros(rows + 1, wide).at[at].set(weights.astype(wide).reshape(-1))[:-1]
    given = {"x": x, "do": do, "row_weights": by_row, "gate_up": arrays["gate_up"], "down": arrays["down"]}
    given |= {name: arrays[name].reshape(-1) for name in GROUPED}
    given |= {"g": g} if g is not None else {}
    if g is None and sizes.biased:
        given["gate_up_bias"] = arrays["gate_up_bias"]
    if "x" in wanted:
        given["ones"] = jnp.ones(rows, wide)
    if "gate_up_bias" in wanted:
        given["ones_of_rows"] = jnp.ones((rows, 1), wide)
    if "down_bias" in wanted:
        given["weights_of_rows"] = by_row.reshape(rows, 1)
    if "weights" in wanted and sizes.biased:
        given["down_bias_matrix"] = arrays["down_bias"][:, None]
    bias_shapes = {
        n: (sizes.experts, 1, arrays[n].shape[1]) for n in ("gate_up_bias", "down_bias") if n in arrays
    }
    results: dict[str, Any] = {
        f"d{name}": (bias_shapes.get(name, arrays[name].shape), x.dtype)
        for name in wanted
        if name != "weights"
    }
    if "weights" in wanted:
        results["dw"] = (rows,), wide
        results |= {"dwb": ((rows, 1), wide)} if sizes.biased else {}
    facts = sizes.facts(weights.shape[1], True, g is not None, wanted)
    made = call("gradients", given, results, facts)
    found = {name: made[f"d{name}"] for name in wanted if name != "weights"}
    found |= {name: found[name][:, 0] for name in bias_shapes.keys() & found.keys()}
    if "weights" in wanted:
        dw = made["dw"] + made["dwb"][:, 0] if sizes.biased else made["dw"]
        found["weights"] = jnp.where(place < 0, 0, dw[jnp.maximum(place, 0)]).astype(weights.dtype)
    return found


# products by groups ---------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped(flipped: bool, lhs: Any, rhs: Any, bounds: Any) -> Any:
    """(rows, N): each group's rows of lhs (rows, K) by its matrix of rhs (G, K, N); (G, N, K) if flipped.

    bounds: (G + 1,) int32, where each group begins. Rows behind the last are zeros."""
    rows, columns = lhs.shape[0], rhs.shape[1 if flipped else 2]
    if not lhs.size or not columns:
        return jnp.zeros((rows, columns), lhs.dtype)
    given, result = {"a": lhs, "w": rhs, "bounds": bounds}, {"o": ((rows, columns), lhs.dtype)}
    out = call("product", given, result, (flipped,))["o"]
    return jnp.where((jnp.arange(rows) < bounds[-1])[:, None], out, 0)


def _grouped_forward(flipped: bool, lhs: Any, rhs: Any, bounds: Any) -> Any:
    asked = _Names(name for name, x in (("lhs", lhs), ("rhs", rhs)) if x.perturbed)
    arrays = (lhs.value, rhs.value, bounds.value)
    return grouped(flipped, *arrays), (*arrays, asked)


def _grouped_backward(flipped: bool, saved: Any, do: Any) -> Any:
    lhs, rhs, bounds, asked = saved
    if isinstance(do, SymbolicZero):
        return None, None, None
    dl = grouped(not flipped, do, rhs, bounds) if "lhs" in asked else None
    dr = None
    if "rhs" in asked:
        a, b = (do, lhs) if flipped else (lhs, do)
        dr = jnp.zeros_like(rhs)
        if rhs.size and lhs.shape[0]:
            dr = call("outer", {"a": a, "b": b, "bounds": bounds}, {"o": (rhs.shape, rhs.dtype)})["o"]
    return dl, dr, None


grouped.defvjp(_grouped_forward, _grouped_backward, symbolic_zeros=True)
