"""Layers of quantised experts for tests below the frontend: specs, and values of their graphs' inputs."""

import numpy as np
from sympy import sympify

from gossamer.ir.evaluate import evaluate, round_to
from gossamer.ir.expr import integer, real, sigmoid
from gossamer.ir.quantized import Quantized, e4m3
from gossamer.passes.moe.build import build_experts
from gossamer.passes.moe.spec import ExpertsSpec

SWIGLU = real("x0") * sigmoid(real("x0")) * real("x1")
E, I, T, TOP = 3, 16, 9, 2  # noqa: E741
FORMATS = {
    "int8": ("int", (8,), "f32"),
    "int4": ("int", (4,), "bf16"),
    "int2": ("int", (2,), "f16"),
    "fp8": ("e4m3", (8,), "f32"),
    "mxfp4": ("e2m1", (4,), "e8m0"),
    "nested": ("int", (2, 4, 8), "f32"),
    "int8 zeros": ("int", (8,), "f16", "bf16"),
    "int4 zeros": ("int", (4,), "bf16", "u8"),
    "int2 zeros": ("int", (2,), "f32", "f32"),
}


def stored(format, columns, group, bits=0):
    element, planes, scale, *zero = FORMATS[format]
    bits = bits if len(planes) > 1 else 0
    return Quantized(element, planes, columns, min(group, columns), scale, bits, *zero)


def spec_of(format, group=8, hidden=24, inner=I, bits=0, **more):
    pair = tuple(stored(format, k, group, bits) for k in (hidden, inner))
    return ExpertsSpec(E, TOP, hidden, inner, SWIGLU, quantized=pair, **({"aligned": False} | more))


def arguments(spec, tokens=T, seed=0):
    """Values of a graph's inputs, codes and all."""
    rng, sizes = np.random.default_rng(seed), {"T": tokens, "rows": tokens * TOP}
    found = {}
    for value in build_experts(spec).inputs:
        shape = [sizes.get(n, n) for n in value.shape]
        found[value.name] = rng.standard_normal(shape).astype(np.float32)
    for name, q in zip(("gate_up", "down"), spec.quantized, strict=True):
        rows = 2 * spec.inner if name == "gate_up" else spec.hidden
        for n in range(len(q.read)):
            code = rng.integers(0, 256, (E, rows, q.row_bytes(n))).astype(np.uint8)
            whole = q.element == "e4m3"
            found[f"{name}_codes{n or ''}"] = np.where(whole & (code & 127 == 127), 0, code).astype(np.uint8)
        if q.scale == "e8m0":
            found[f"{name}_scales"] = rng.integers(122, 126, (E, rows, q.groups)).astype(np.uint8)
        else:
            found[f"{name}_scales"] = round_to(rng.random((E, rows, q.groups)) / 16, q.scale)
        if q.zero is not None:  # some that are not integers, unless they have to be
            zeros = rng.random((E, rows, q.groups)) * (1 << q.planes[-1])
            found[f"{name}_zeros"] = zeros.astype(np.uint8) if q.zero == "u8" else round_to(zeros, q.zero)
        found[f"{name}_bits"] = rng.choice(q.planes, E).astype(np.int32)
    found["ids"] = rng.integers(-1, E + 1, (tokens, TOP))
    found["weights"] = rng.random((tokens, TOP)).astype(np.float32)
    return {v.name: found[v.name] for v in build_experts(spec).inputs}


def for_kernels(given, spec):
    """The arguments of kernels: entries in a row, an output to fill, codes of dtypes that the target has."""
    found = given | {name: given[name].reshape(-1) for name in ("ids", "weights")}
    for name, q in zip(("gate_up", "down"), spec.quantized, strict=True):
        if q.element == "e4m3" and not spec.is_cpu:
            found[f"{name}_codes"] = e4m3(given[f"{name}_codes"]).astype(np.float32)
    return found | {"o": np.full_like(given["x"], np.nan)}


def on_triton(program, given, tokens):
    """All tensors of a program after its kernels have run on Triton's interpreter."""
    import torch

    from gossamer.codegen.triton import emit
    from gossamer.runtime.triton_interpreter import run_interpreted

    values = {k: torch.from_numpy(v.copy()) for k, v in given.items()}
    sizes = {"entries": tokens * TOP, "T": tokens}
    for t in program.intermediates:
        shape = [int(evaluate(integer(n) if isinstance(n, str) else sympify(n), sizes)) for n in t.shape]
        whole = t.dtype == "i32"
        values[t.name] = torch.full(
            shape, -7 if whole else np.nan, dtype=torch.int32 if whole else torch.float32
        )
    for kernel in program.kernels:
        run_interpreted(emit(kernel), {a.name: values[a.name] for a in kernel.args})
    return values
