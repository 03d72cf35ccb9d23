"""Tile programs for tests of the Kernel IR and of every backend: their text, inputs, NumPy meaning."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gossamer.ir.kernel import Kernel
from gossamer.ir.kernel_text import parse

FOLDER = Path(__file__).parent / "programs"
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A program with inputs (tensors of role in, and scalars) and what it must return for them."""

    name: str
    kernel: Kernel
    inputs: dict[str, np.ndarray | float]
    expected: Arrays


def load(name: str) -> Kernel:
    """The kernel of programs/<name>.kir."""
    return parse((FOLDER / f"{name}.kir").read_text())


def cases() -> list[Case]:
    """Every program, at sizes that no tile divides."""
    return [Case(name, load(name), *make(np.random.default_rng(0))) for name, make in PROGRAMS.items()]


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def _gemm(rng: np.random.Generator) -> tuple[dict, Arrays]:
    a, b = _normal(rng, 37, 50), _normal(rng, 45, 50)
    return {"a": a, "b": b}, {"c": a @ b.T}


def _layer_norm(rng: np.random.Generator) -> tuple[dict, Arrays]:
    x, weight, bias = _normal(rng, 21, 96), _normal(rng, 96), _normal(rng, 96)
    y = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5) * weight + bias
    return {"x": x, "weight": weight, "bias": bias, "eps": 1e-5}, {"y": y}


def _squared_relu(rng: np.random.Generator) -> tuple[dict, Arrays]:
    q, k, v = _normal(rng, 2, 3, 37, 32), _normal(rng, 2, 3, 45, 32), _normal(rng, 2, 3, 45, 32)
    scores = np.maximum(q @ k.swapaxes(2, 3) * np.float32(0.2), 0) ** 2
    o = np.where(np.arange(45) <= np.arange(37)[:, None], scores, 0) @ v
    return {"q": q, "k": k, "v": v, "scale": 0.2}, {"o": o}


def _window(rng: np.random.Generator) -> tuple[dict, Arrays]:
    q, k, v = _normal(rng, 2, 4, 61, 40), _normal(rng, 2, 2, 45, 40), _normal(rng, 2, 2, 45, 24)
    scores = q.astype(float) @ k.repeat(2, 1).swapaxes(2, 3) * 0.16
    attends = np.abs(np.arange(61)[:, None] - np.arange(45)) <= 9
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = np.where(attends, scores, -np.inf)
        peak = np.max(scores, 3, keepdims=True, initial=-1e30)
        weights = np.exp(scores - peak)
        total = weights.sum(3, keepdims=True)
        lse = np.where(total > 0, np.log(total) + peak, -np.inf)[..., 0]
    o = weights / np.where(total == 0, 1, total) @ v.repeat(2, 1)
    return {"q": q, "k": k, "v": v, "p0": 9, "scale": 0.16}, {"o": o, "lse": lse}


def _compact(rng: np.random.Generator) -> tuple[dict, Arrays]:
    x = rng.integers(-3, 4, (7, 45), dtype=np.int32)
    kept = np.zeros_like(x)
    for row, out in zip(x, kept, strict=True):
        out[: (row > 0).sum()] = row[row > 0]
    return {"x": x}, {"kept": kept, "counts": (x > 0).sum(1).astype(np.int32)}


PROGRAMS: dict[str, Callable[[np.random.Generator], tuple[dict, Arrays]]] = {
    "compact": _compact,
    "gemm": _gemm,
    "layer_norm": _layer_norm,
    "squared_relu": _squared_relu,
    "window_attention": _window,
}
