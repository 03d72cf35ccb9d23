"""Feature maps of linear attention: what `gossamer.linear_attention` makes of the rows of q and k.

A map is computed element by element within the kernels, from rows that torch or JAX may prepare beforehand
(by a projection, which is cast to their dtype, with gradients):

    elu()                    elu(x) + 1                       Katharopoulos et al., 2020
    relu(eps)                relu(x) + eps                    Performer-ReLU (Choromanski et al., 2021)
    identity()               x itself
    exp()                    exp(x)
    positive(projection)     exp(w . x - |x|^2 / 2)           Performer: exp(q . k), in expectation
    random_fourier(projection)  sin and cos of w . x / |x|    RFA (Peng et al., 2021): the Gaussian kernel
    hedgehog(weight, bias)   softmax of [W x, -W x]           Hedgehog (Zhang et al., 2024): trained
    hashing(projection)      which side of planes x lies on   EcoFormer (Liu et al., 2022): codes that agree

`trace(function)` captures any function of an element, or one that gives several features of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...ir.errors import InputError, MissingDependencyError, TraceError
from ..captured import as_numpy, is_array
from ..moe.activation import baked
from ..pure import pure
from ..term import Term, constant
from ..trace.captures import lift_root
from ..trace.function import run_traced, trace_activation

if TYPE_CHECKING:
    import torch

X = "x0"
MOST_PARTS = 8


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """A captured feature map. parts: terms of an element x0, one for each group of features. softmax: all
    features of a row are normalised together. prepare: what is made of rows (..., D) first,
    tensors of torch or arrays of JAX, or None."""

    parts: tuple[Term, ...]
    softmax: bool = False
    prepare: Callable[[Any], Any] | None = None

    @property
    def key(self) -> tuple[tuple[Term, ...], bool]:
        """What kernels depend on."""
        return self.parts, self.softmax

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The features (..., P * D') of rows (..., D), by torch in x's dtype: what kernels compute."""
        import torch

        from ..moe.reference import evaluate_term

        rows = x if self.prepare is None else self.prepare(x)
        parts = [evaluate_term(part, {X: rows}).expand_as(rows) for part in self.parts]
        found = torch.cat(parts, -1)
        return found.softmax(-1) if self.softmax else found


def trace(function: Callable[..., Any]) -> FeatureMap:
    """The map of a function of an element x, which gives a feature or a tuple of them.

    Raises TraceError, or UnsupportedError for one that reads tensors: prepare such rows beforehand."""
    if not callable(function):
        raise InputError("feature_map", "a function", repr(function))
    count = 1

    def run(at: int) -> Callable[..., Any]:
        def pick(trace: Any, x: Any) -> Any:
            nonlocal count
            made = lift_root(trace, function)(x)
            if not isinstance(made, tuple | list):
                return made
            count = len(made)
            return made[at] if made else None

        return pick

    parts = [baked(run_traced(run(0), "plain activation"))]
    if not 1 <= count <= MOST_PARTS:
        raise InputError("feature_map", f"1 to {MOST_PARTS} features of an element", count)
    parts += [baked(run_traced(run(at), "plain activation")) for at in range(1, count)]
    return FeatureMap(tuple(parts))


def elu() -> FeatureMap:
    """elu(x) + 1, which is positive."""
    return NAMED["elu"]


def relu(eps: float = 1e-3) -> FeatureMap:
    """relu(x) + eps."""
    return FeatureMap((_relu(float(eps)),))


def identity() -> FeatureMap:
    return NAMED["identity"]


def exp() -> FeatureMap:
    return NAMED["exp"]


def positive(projection: Any) -> FeatureMap:
    """Positive random features of the exponential kernel, exp(q . k): exp(w . x - |x|^2 / 2) / sqrt(R).

    projection: (D, R) or (H, D, R), columns w drawn from a standard normal distribution (orthogonal blocks
    have less variance), of q's and k's dtype. Scale q and k by D ** -0.25 for softmax's kernel."""
    _check(projection)
    scale = projection.shape[-1] ** -0.5

    def prepare(x: Any) -> Any:
        return x @ _beside(projection, x) - 0.5 * (x * x).sum(-1)[..., None]

    return FeatureMap((("mul", constant(scale), ("exp", X)),), prepare=prepare)


def random_fourier(projection: Any) -> FeatureMap:
    """Random Fourier features of normalised rows: [sin(w . x / |x|), cos(w . x / |x|)] / sqrt(R).

    projection: as for `positive`. Products of features may be negative, and so may denominators be."""
    _check(projection)
    scale = constant(projection.shape[-1] ** -0.5)

    def prepare(x: Any) -> Any:
        return _unit(x) @ _beside(projection, x)

    return FeatureMap((("mul", scale, ("sin", X)), ("mul", scale, ("cos", X))), prepare=prepare)


def hedgehog(weight: Any, bias: Any = None) -> FeatureMap:
    """Hedgehog's trained features: softmax over all of [W x + b, -(W x + b)].

    weight: (D, R) or (H, D, R); bias: (R,) or (H, 1, R). Gradients flow to both."""
    _check(weight)

    def prepare(x: Any) -> Any:
        rows = x @ _beside(weight, x)
        return rows if bias is None else rows + _beside(bias, x)

    return FeatureMap((X, ("neg", X)), softmax=True, prepare=prepare)


def hashing(projection: Any) -> FeatureMap:
    """Hash codes: for each plane w of a projection (D, R) or (H, D, R) one of two features is 1, by the sign
    of w . x. The product of two codes is the number of planes on whose same side both rows lie. They have no
    gradients."""
    _check(projection)
    side = ("where", ("lt", X, constant(0.0)), constant(0.0), constant(1.0))
    other = ("where", ("lt", X, constant(0.0)), constant(1.0), constant(0.0))
    return FeatureMap((side, other), prepare=lambda x: x @ _beside(projection, x))


def orthogonal_projection(
    size: int, features: int, *, heads: int | None = None, seed: int = 0, dtype: Any = None
) -> torch.Tensor:
    """A projection (size, features), or (heads, size, features), in blocks of orthogonal columns whose norms
    are those of standard normal vectors (Choromanski et al., 2021, section 3.3)."""
    try:
        import torch
    except ImportError:
        raise MissingDependencyError("torch", "torch", "feature_maps.orthogonal_projection") from None
    generator = torch.Generator().manual_seed(seed)
    count = -(-features // size)
    shape = (heads or 1, count, size, size)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    q = q * torch.diagonal(r, dim1=-2, dim2=-1).sign()[..., None, :]  # else directions are not uniform
    blocks = q.transpose(1, 2).reshape(shape[0], size, count * size)[..., :features]
    norms = torch.randn((shape[0], features, size), generator=generator, dtype=torch.float64).norm(dim=-1)
    made = (blocks * norms[:, None]).to(dtype or torch.get_default_dtype())
    return made if heads else made[0]


def of(given: Any, where: str) -> FeatureMap:
    """The map that an argument stands for: a FeatureMap, a name or a function."""
    if isinstance(given, FeatureMap):
        return given
    if isinstance(given, str):
        if given not in NAMED:
            raise InputError(where, f"a function, a FeatureMap or one of {', '.join(NAMED)}", repr(given))
        return NAMED[given]
    if not callable(given):
        raise InputError(where, f"a function, a FeatureMap or one of {', '.join(NAMED)}", repr(given))
    return FeatureMap(_parts_of(given))


@pure
def _parts_of(function: Callable[..., Any]) -> tuple[Term, ...]:
    try:
        return (baked(trace_activation(function, gated=False)),)
    except TraceError:  # a tuple of features, or what `trace` says better
        return trace(function).parts


def _relu(eps: float) -> Term:
    return ("add", ("max", X, constant(0.0)), constant(eps))


def _check(projection: Any) -> None:
    if not is_array(projection) or len(projection.shape) not in (2, 3):
        got = tuple(projection.shape) if is_array(projection) else type(projection).__name__
        raise InputError("feature_maps projection", "a tensor (D, R) or (heads, D, R)", got)


def _beside(weight: Any, rows: Any) -> Any:
    """A weight in the dtype of rows, and of their library."""
    if hasattr(rows, "to"):
        return weight.to(rows.dtype)
    import jax
    import jax.numpy as jnp

    return jnp.asarray(weight if isinstance(weight, jax.Array) else as_numpy(weight)).astype(rows.dtype)


def _unit(rows: Any) -> Any:
    """Rows of length 1; zeros stay."""
    if hasattr(rows, "to"):
        import torch

        return torch.nn.functional.normalize(rows, dim=-1)
    import jax.numpy as jnp

    wide = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
    return (wide / jnp.sqrt(jnp.maximum((wide * wide).sum(-1), 1e-24))[..., None]).astype(rows.dtype)


_ELU = ("where", ("lt", constant(0.0), X), ("add", X, constant(1.0)), ("exp", ("min", X, constant(0.0))))
NAMED = {
    "elu": FeatureMap((_ELU,)),
    "relu": FeatureMap((_relu(1e-3),)),
    "identity": FeatureMap((X,)),
    "exp": FeatureMap((("exp", X),)),
}
