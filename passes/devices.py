"""Machines that the cost model knows: published GPUs, and this machine's CPU, measured.

GPU rates are dense (no structured sparsity) and, where the vendor's peak is the only number, peaks
that no kernel reaches. f32 is IEEE arithmetic outside the tensor cores, as our kernels use it.
Exponentials: 16 a clock and multiprocessor (CUDA programming guide, throughput of native arithmetic)
at boost clock. Tile and launch overheads of GPUs are estimates, not measurements.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from time import perf_counter

import numpy as np

from ..ir.errors import InputError
from .machine import Chip, Device

T = 1e12
KIB = 1024

# Limits of a multiprocessor: CUDA programming guide, technical specifications per compute capability.
# Elementwise rates: f32 lanes at boost clock. L2 bandwidth: fitted on the H100, elsewhere an estimate from
# the bytes a clock that the vendor's white paper gives.

# Matrix products in bf16 and a copy within the device: measured. f32 and f64: NVIDIA H100 SXM data sheet.
# Exponentials: FlashAttention-3 (arXiv:2407.08608).
H100 = Device(
    "H100",
    (("bf16", 790 * T), ("f16", 790 * T), ("tf32", 395 * T), ("f32", 67 * T), ("f64", 67 * T)),
    bandwidth=3.0e12, exps=3.9e12, workers=132, tile=0.2e-6, launch=4e-6,
    source="bf16 and copy measured; the rest from NVIDIA's data sheet",
    chip=Chip(228 * KIB, 227 * KIB, warps=64, programs=32, alu=29.6e12, l2=9.8e12, warp_groups=True),
)  # fmt: skip
# NVIDIA A100 80GB SXM data sheet (June 2021): 312, 19.5 and 19.5 (tensor core) TFLOP/s, 2039 GB/s, 1.41 GHz.
A100 = Device(
    "A100",
    (("bf16", 312 * T), ("f16", 312 * T), ("tf32", 156 * T), ("f32", 19.5 * T), ("f64", 19.5 * T)),
    bandwidth=2.039e12, exps=2.4e12, workers=108, tile=0.25e-6, launch=5e-6,
    source="NVIDIA A100 data sheet",
    chip=Chip(164 * KIB, 163 * KIB, warps=64, programs=32, alu=9.7e12, l2=5.1e12),
)  # fmt: skip
# NVIDIA L4 data sheet: 242 TFLOP/s with sparsity, so 121; 30.3 f32; 300 GB/s. f64 is 1/64 of f32 (Ada).
L4 = Device(
    "L4",
    (("bf16", 121 * T), ("f16", 121 * T), ("tf32", 60 * T), ("f32", 30.3 * T), ("f64", 0.47 * T)),
    bandwidth=0.3e12, exps=1.9e12, workers=58, tile=0.3e-6, launch=5e-6,
    source="NVIDIA L4 data sheet",
    chip=Chip(100 * KIB, 99 * KIB, warps=48, programs=24, alu=15.1e12, l2=1.8e12),
)  # fmt: skip
# NVIDIA Ada GPU architecture white paper, appendix A: 165.2 with fp32 accumulation, 82.6, 1.29; 1008 GB/s.
RTX4090 = Device(
    "RTX 4090",
    (("bf16", 165.2 * T), ("f16", 165.2 * T), ("tf32", 82.6 * T), ("f32", 82.6 * T), ("f64", 1.29 * T)),
    bandwidth=1.008e12, exps=5.2e12, workers=128, tile=0.2e-6, launch=4e-6,
    source="NVIDIA Ada architecture white paper",
    chip=Chip(100 * KIB, 99 * KIB, warps=48, programs=24, alu=41.3e12, l2=5.0e12),
)  # fmt: skip
# NVIDIA GA102 white paper, appendix A (RTX 3090): 71 with fp32 accumulation, 35.6, 936 GB/s; 1.7 GHz.
RTX3090 = Device(
    "RTX 3090",
    (("bf16", 71 * T), ("f16", 71 * T), ("tf32", 35.6 * T), ("f32", 35.6 * T), ("f64", 0.56 * T)),
    bandwidth=0.936e12, exps=2.2e12, workers=82, tile=0.3e-6, launch=5e-6,
    source="NVIDIA GA102 white paper",
    chip=Chip(100 * KIB, 99 * KIB, warps=48, programs=16, alu=17.8e12, l2=2.5e12),
)  # fmt: skip
# NVIDIA RTX Blackwell white paper, appendix A (RTX 5090): 209.5 with fp32 accumulation, 104.8, 1792 GB/s.
RTX5090 = Device(
    "RTX 5090",
    (("bf16", 209.5 * T), ("f16", 209.5 * T), ("tf32", 104.8 * T), ("f32", 104.8 * T), ("f64", 1.64 * T)),
    bandwidth=1.792e12, exps=6.5e12, workers=170, tile=0.2e-6, launch=4e-6,
    source="NVIDIA RTX Blackwell white paper",
    chip=Chip(100 * KIB, 99 * KIB, warps=48, programs=24, alu=52.4e12, l2=7.0e12),
)  # fmt: skip
# AMD Instinct MI300X data sheet: 1307.4, 163.4 (vector f32, matrix f64) TFLOP/s, 5.3 TB/s, 304 units.
MI300X = Device(
    "MI300X",
    (("bf16", 1307.4 * T), ("f16", 1307.4 * T), ("f32", 163.4 * T), ("f64", 163.4 * T)),
    bandwidth=5.3e12, exps=10.2e12, workers=304, tile=0.3e-6, launch=6e-6,
    source="AMD MI300X data sheet",
)  # fmt: skip

GPUS = {
    "h100": H100,
    "a100": A100,
    "l4": L4,
    "rtx3090": RTX3090,
    "rtx4090": RTX4090,
    "rtx5090": RTX5090,
    "mi300x": MI300X,
}
_BY_TARGET = {
    "cuda:sm_80": A100,
    "cuda:sm_86": RTX3090,
    "cuda:sm_89": L4,
    "cuda:sm_90": H100,
    "cuda:sm_90a": H100,
    "cuda:sm_120": RTX5090,
    "hip:gfx942": MI300X,
}

# From two AVX-512 cores at rest: 5.4 G exponentials a second where matrix products reach 215 GFLOP/s in f32,
# and what then remains of the time of a window of 256 keys at a length of 2048.
CPU_EXP_FLOPS, CPU_TILE, CPU_LAUNCH = 40, 0.25e-6, 30e-6


def device(name: str) -> Device:
    """A device by name: 'cpu' (this machine, measured at the first call), or one of `GPUS`.

    Raises InputError listing the names."""
    key = name.lower().replace(" ", "").replace("-", "")
    if key == "cpu":
        return measured_cpu()
    if key not in GPUS:
        raise InputError("device", f"one of cpu, {', '.join(GPUS)}", repr(name))
    return GPUS[key]


def device_of(target: str) -> Device | None:
    """The device that a compilation target most likely means; None where none is described."""
    return measured_cpu() if target.partition(":")[0] == "cpu" else _BY_TARGET.get(target)


def has_copy_engine(target: str) -> bool:
    """Whether kernels for a target may load through tensor descriptors (TMA)."""
    kind, _, rest = target.partition(":")
    return kind == "cuda" and int(re.sub(r"\D", "", rest)) >= 90


def cpu(f32: float, f64: float, bandwidth: float, workers: int) -> Device:
    """A CPU of the given matrix-product rates, copy bandwidth and cores. f16 and bf16 compute in f32."""
    rates = (("f32", f32), ("f64", f64), ("f16", f32), ("bf16", f32))
    return Device("CPU", rates, bandwidth, f32 / CPU_EXP_FLOPS, workers, CPU_TILE, CPU_LAUNCH, "given")


@cache
def measured_cpu() -> Device:
    """This machine: NumPy's matrix products and a copy by as many threads as there are cores, about 0.4 s."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = cpu(_matmul_rate(np.float32), _matmul_rate(np.float64), _copy_rate(cores), cores)
    return Device(**{**vars(found), "source": "measured"})


def _matmul_rate(dtype: type, n: int = 1024, repeats: int = 6) -> float:
    a, b = np.ones((n, n), dtype), np.ones((n, n), dtype)
    out = a @ b
    return 2 * n**3 / min(_seconds(lambda: np.matmul(a, b, out=out)) for _ in range(repeats))


def _copy_rate(threads: int, total: int = 1 << 27, repeats: int = 4) -> float:
    """Bytes read and written a second, on arrays that no cache holds."""
    source, target = np.ones(total // 8), np.empty(total // 8)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:

        def copy() -> None:
            list(pool.map(lambda part: np.copyto(*part), parts))

        copy()
        return 2 * total / min(_seconds(copy) for _ in range(repeats))


def _seconds(run: object) -> float:
    start = perf_counter()
    run()  # type: ignore[operator]
    return perf_counter() - start
