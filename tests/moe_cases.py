"""Layers of experts for tests: tensors, what torch makes of them, and how far a result may be off."""

from dataclasses import dataclass, field, fields
from typing import Any

import torch

import gossamer

ULP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-53}


@dataclass(frozen=True, repr=False)
class Case:
    """A layer and a routing: sizes, layout, dtypes."""

    tokens: int = 9
    experts: int = 4
    top_k: int = 2
    hidden: int = 16
    inner: int = 12
    gated: bool = True
    transposed: bool = False
    interleaved: bool = False
    biased: bool = False
    dtype: Any = torch.float32
    ids_dtype: Any = torch.int64
    activation: Any = "swiglu"
    options: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """What differs from the defaults: the same in every process."""
        plain, told = Case(), {f.name: getattr(self, f.name) for f in fields(self)}
        told = {name: value for name, value in told.items() if value != getattr(plain, name)}
        return ", ".join(f"{n} {getattr(v, '__name__', v)}" for n, v in told.items()) or "plain"

    def layer(self, seed: int = 0) -> dict[str, Any]:
        """gate_up_proj, down_proj and the keywords of `experts`."""
        g = torch.Generator().manual_seed(seed)
        columns = self.inner * (2 if self.gated else 1)

        def made(*shape: int) -> torch.Tensor:
            return (torch.randn(shape, generator=g, dtype=torch.float64) / shape[-1] ** 0.5).to(self.dtype)

        up, down = made(self.experts, columns, self.hidden), made(self.experts, self.hidden, self.inner)
        if self.transposed:
            up, down = (w.transpose(1, 2).contiguous() for w in (up, down))
        found = {"gate_up_proj": up, "down_proj": down, "activation": self.activation} | self.options
        if self.interleaved:
            found["interleaved"] = True
        if self.biased:
            found |= {
                "gate_up_bias": made(self.experts, columns),
                "down_bias": made(self.experts, self.hidden),
            }
        return found

    def routing(self, seed: int = 0, lowest: int = 0, highest: int | None = None) -> tuple[Any, Any]:
        """ids and weights; ids may repeat within a token."""
        g = torch.Generator().manual_seed(seed + 1)
        top = self.experts if highest is None else highest
        ids = torch.randint(lowest, top, (self.tokens, self.top_k), generator=g)
        return ids.to(self.ids_dtype), torch.rand(self.tokens, self.top_k, generator=g)

    def x(self, seed: int = 0) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed + 2)
        return torch.randn(self.tokens, self.hidden, generator=g, dtype=torch.float64).to(self.dtype)


def activated(case: Case, h: torch.Tensor) -> torch.Tensor:
    """The activation by torch itself."""
    f = torch.nn.functional
    named = {
        "swiglu": f.silu,
        "geglu": f.gelu,
        "geglu_tanh": lambda v: f.gelu(v, approximate="tanh"),
        "reglu": f.relu,
        "silu": f.silu,
        "gelu": f.gelu,
        "relu": f.relu,
        "relu2": lambda v: f.relu(v) ** 2,
    }
    if case.gated:
        gate, up = (h[:, 0::2], h[:, 1::2]) if case.interleaved else h.chunk(2, -1)
        known = isinstance(case.activation, str)
        return named[case.activation](gate) * up if known else case.activation(gate, up)
    return named[case.activation](h) if isinstance(case.activation, str) else case.activation(h)


def plain(case: Case, x: Any, ids: Any, weights: Any, layer: dict[str, Any], dtype: Any) -> torch.Tensor:
    """The layer by torch, one expert after another, in a dtype."""
    out = torch.zeros(x.shape, dtype=dtype)
    x, weights = x.to(dtype), weights.to(dtype)
    for e in range(case.experts):
        tokens, place = torch.where(ids == e)
        up, down = (layer[name][e].to(dtype) for name in ("gate_up_proj", "down_proj"))
        up, down = (up, down) if case.transposed else (up.T, down.T)
        h = x[tokens] @ up
        if case.biased:
            h = h + layer["gate_up_bias"][e].to(dtype)
        y = activated(case, h) @ down
        if case.biased:
            y = y + layer["down_bias"][e].to(dtype)
        out.index_add_(0, tokens, y * weights[tokens, place, None])
    return out


def check(case: Case, seed: int = 0, *, ids: Any = None, weights: Any = None) -> torch.Tensor:
    """`experts` is as exact as plain torch: at most twice its error, and an ulp of the output's scale."""
    layer, x = case.layer(seed), case.x(seed)
    drawn = case.routing(seed, -1, case.experts + 1)
    ids = drawn[0] if ids is None else ids
    weights = drawn[1] if weights is None else weights
    found = gossamer.experts(x, ids, weights, **layer)
    assert found.shape == x.shape and found.dtype == x.dtype
    if not case.tokens:
        return found
    exact = plain(case, x, ids, weights, layer, torch.float64)
    error = (plain(case, x, ids, weights, layer, case.dtype).double() - exact).abs().max()
    allowed = 2 * error + ULP[case.dtype] * 2 * exact.abs().max()
    assert (found.double() - exact).abs().max() <= allowed
    return found
