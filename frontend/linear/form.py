"""What one linear attention asks for besides its tensors, and its kernels, for tensors of any library."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...ir.errors import InputError
from ...runtime.driver import get_or_compile
from ...runtime.knobs import NUM_THREADS
from ..device import precision_of, target_of
from ..moe.layer_kernels import dtype_of
from ..problem import is_aligned
from .feature_maps import FeatureMap, of

if TYPE_CHECKING:
    from ...ir.kernel import Program
    from ...runtime.driver import Executable

CPU_ROWS, GPU_ROWS = 32, (128, 64)  # of a chunk, else and if causal, as passes/linear/schedule.py has them
PROGRAMS = 528  # that fill a GPU: four for each of its multiprocessors
LEAST = 4  # chunks of a segment at least
WIDEST = 1024
DTYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64"}


@dataclass(frozen=True)
class Settings:
    """What a call asks for, besides its tensors."""

    q_map: FeatureMap
    k_map: FeatureMap
    causal: bool
    eps: float | None
    initial: bool
    final: bool

    @property
    def key(self) -> tuple[Any, ...]:
        return self.q_map.key, self.k_map.key, self.causal, self.eps, self.initial, self.final

    @property
    def prepares(self) -> bool:
        """Whether torch makes something of rows before kernels read them."""
        return self.q_map.prepare is not None or self.k_map.prepare is not None

    @property
    def states(self) -> tuple[str, ...]:
        """What the state of all keys is called among results."""
        names = ("new_state", "new_sums") if self.final else ("key_state", "key_sums")
        return names if self.eps is not None else names[:1]

    @property
    def kept(self) -> tuple[str, ...]:
        """The results that gradients read."""
        if not self.causal:
            return self.states
        return ("o", "den") if self.eps is not None else ()

    def results(self, *, keeps: bool) -> tuple[str, ...]:
        """What kernels give; `keeps`: for gradients too."""
        kept = self.kept if keeps else ()
        den = ("den",) if "den" in kept else ()
        return ("o", *den, *(self.states if self.final or self.states[0] in kept else ()))

    def given(self, name: str) -> bool:
        """Whether a result is the caller's."""
        return name == "o" or name.startswith("new_")


NAMES: tuple[str, ...] = ("q", "k", "v", "state", "sums")
GRADIENTS: tuple[str, ...] = ("do", "dnew_state", "dnew_sums")
KEPT: tuple[str, ...] = ("o", "den", "key_state", "key_sums", "new_state", "new_sums")
ALL_NAMES = (*NAMES, *KEPT, *GRADIENTS)


def shapes_of(
    values: Mapping[str, Any], settings: Settings, *, keeps: bool
) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of every result. values: tensors of any library by name."""
    q, k, v = (values[name] for name in ("q", "k", "v"))
    dtype = dtype_of(q)
    wide = "f64" if dtype == "f64" else "f32"
    state = (*k.shape[:2], k.shape[3] * len(settings.k_map.parts), v.shape[3])
    shapes = {"o": (*q.shape[:3], v.shape[3]), "den": tuple(q.shape[:3])}
    shapes |= dict(zip(settings.states, (state, state[:3]), strict=False))
    names = settings.results(keeps=keeps)
    return [(name, shapes[name], dtype if name == "o" else wide) for name in names]


def settings_of(
    feature_map: Any,
    key_map: Any,
    *,
    causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
    initial: bool = False,
    final: bool = False,
) -> Settings:
    """The options of a call that kernels depend on. Raises InputError, TraceError and UnsupportedError."""
    if not isinstance(eps, int | float) or not eps >= 0:
        raise InputError("linear_attention.eps", "a number of at least 0", repr(eps))
    q_map = of(feature_map, "linear_attention.feature_map")
    k_map = q_map if key_map is None else of(key_map, "linear_attention.key_map")
    if len(q_map.parts) != len(k_map.parts):
        counts = f"{len(q_map.parts)} and {len(k_map.parts)}"
        raise InputError("linear_attention.key_map", "as many features of an element as feature_map", counts)
    return Settings(q_map, k_map, bool(causal), float(eps) if normalize else None, initial, bool(final))


def rows_of(query: Any, key: Any, settings: Settings) -> tuple[Any, Any]:
    """The rows that kernels read of query and key, as maps prepare them. Raises InputError."""
    q_map, k_map = settings.q_map, settings.k_map
    rows_q = query if q_map.prepare is None else q_map.prepare(query)
    rows_k = key if k_map.prepare is None else k_map.prepare(key)
    for name, rows, tensor in (("feature_map", rows_q, query), ("key_map", rows_k, key)):
        if rows.shape[:3] != tensor.shape[:3] or rows.dtype != tensor.dtype:
            expected = f"rows {tuple(tensor.shape[:3])} of {tensor.dtype}"
            raise InputError(f"linear_attention.{name}", expected, f"{tuple(rows.shape)} of {rows.dtype}")
    if rows_q.shape[3] != rows_k.shape[3] or not 1 <= rows_q.shape[3] <= WIDEST:
        expected = f"rows of one size for q and k, 1 to {WIDEST}"
        raise InputError("linear_attention.key", expected, f"{rows_q.shape[3]} and {rows_k.shape[3]}")
    return rows_q, rows_k


def check_shapes(q: Any, k: Any, v: Any, *, causal: bool, enable_gqa: bool) -> None:
    """Raise InputError unless (B, heads, length, size) of query, key and value fit each other."""
    where = "linear_attention"
    if v.shape[:3] != k.shape[:3]:
        raise InputError(f"{where}.value", f"{tuple(k.shape[:3])} + (Dv,), as key has", tuple(v.shape))
    if not v.shape[3] <= WIDEST:
        raise InputError(f"{where}.value", f"a size of at most {WIDEST}", v.shape[3])
    if q.shape[0] != k.shape[0]:
        raise InputError(f"{where}.key", f"batch {q.shape[0]}, as the query has", k.shape[0])
    if q.shape[3] != k.shape[3]:
        raise InputError(f"{where}.key", f"size {q.shape[3]}, as the query has", k.shape[3])
    heads, of = q.shape[1], k.shape[1]
    if heads != of and not enable_gqa:
        raise InputError(
            f"{where}.key", f"{heads} heads, as the query has", of, "Pass enable_gqa=True to share key heads"
        )
    if heads != of and (of == 0 or heads % of):
        raise InputError(f"{where}.key", f"a number of heads that divides the query's {heads}", of)
    if causal and q.shape[2] != k.shape[2]:
        raise InputError(
            f"{where}.key", f"length {q.shape[2]}, as the query has, with causal=True", k.shape[2]
        )


def linear_executable(
    values: Mapping[str, Any], settings: Settings, keeps: bool, wanted: tuple[str, ...]
) -> tuple[Executable, dict[str, int]]:
    """The kernels of a linear attention, or of gradients of `wanted` inputs, and the sizes that they take.

    values: the tensors by the kernels' names, rows contiguous. keeps: for gradients too."""
    q, k, v = (values[name] for name in ("q", "k", "v"))
    target, dtype = target_of(q.device), dtype_of(q)
    split = _splits(k, settings.causal)
    spans = {"span_L": _span(q, settings.causal, split), "span_N": _span(k, settings.causal, split)}
    facts = {
        "dtype": dtype,
        "qk_size": q.shape[3],
        "v_size": v.shape[3],
        "causal": settings.causal,
        "eps": settings.eps,
        "initial": settings.initial,
        "final": settings.final,
        "keeps": keeps,
        "grouped": q.shape[1] != k.shape[1],
        "split": split,
        "aligned": q.device.type == "cpu" or all(is_aligned(t) for t in values.values() if len(t.shape) == 4),
        "precision": precision_of(q.device, dtype),
    }

    def make() -> Program:
        from ...ir.linear import FeatureMap as Features
        from ...passes.linear.pipeline import compile_linear, compile_linear_gradients
        from ...passes.linear.spec import LinearSpec
        from ..term_expr import to_expr

        maps = []
        for one in (settings.q_map, settings.k_map):
            parts = tuple(to_expr(part, frozenset(("x0",))) for part in one.parts)
            maps.append(Features(parts, one.softmax))
        spec = LinearSpec(*maps, target=target, **facts)
        return compile_linear_gradients(spec, wanted) if wanted else compile_linear(spec)

    quick = ("linear", settings.q_map.key, settings.k_map.key, wanted, tuple(facts.items()))
    return get_or_compile(quick, make, target), spans


def _programs(rows: Any) -> int:
    """How many programs keep the device of a tensor busy."""
    if rows.device.type != "cpu":
        return PROGRAMS
    return NUM_THREADS.get() or os.cpu_count() or 1


def _chunks(rows: Any, causal: bool) -> int:
    return -(-rows.shape[2] // (CPU_ROWS if rows.device.type == "cpu" else GPU_ROWS[causal]))


def _splits(keys: Any, causal: bool) -> bool:
    """Whether keys are cut into segments: not where heads alone fill the device, or there are few keys."""
    heads = keys.shape[0] * keys.shape[1]
    return 2 * heads < _programs(keys) and _chunks(keys, causal) >= 2 * LEAST


def _span(rows: Any, causal: bool, split: bool) -> int:
    """Chunks of a segment of queries or keys."""
    cpu = rows.device.type == "cpu"
    fair = -(-_chunks(rows, causal) * rows.shape[0] * rows.shape[1] // _programs(rows))
    return max(LEAST if split else 1, fair if split or not cpu else -(-fair // 4))
