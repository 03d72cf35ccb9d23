"""The checked inputs of one attention of a JAX program, as memory without a library."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...ir.errors import InputError
from ...runtime.strided import Strided
from ..mask import Mask
from ..placement import NAMES, Placement
from ..problem import Problem
from ..reads import check_reads
from ..score import ProbMod, ScoreMod
from ..softmax import PLAIN, Softmax
from ..trace.tensor import dtype_name
from .call import Call, Source

FLOATS = ("f16", "bf16", "f32", "f64")


class StridedProblem(Problem):
    """A `Problem` whose tensors are `Strided`, (B, heads, length, size)."""

    def _check_tensors(self) -> None:
        self.dtype = self.query.dtype

    def check_integers(self, where: str, tensor: Any) -> None:
        name = tensor.dtype if isinstance(tensor, Strided) else dtype_name(tensor.dtype)
        if name not in ("i32", "i64"):
            raise InputError(where, "an array of int32 or int64", tensor.dtype)


def heads_first(tensor: Strided, layout: str) -> Strided:
    """Query, key, value or output as kernels index it: (B, heads, length, size)."""
    return tensor.permute(0, 2, 1, 3) if layout == "BTNH" else tensor


class Bound:
    """A call with its operands: everything that finding and running its kernel takes.

    operands: by name, as `Call.operands` has them. Raises InputError for shapes that do not fit."""

    def __init__(self, call: Call, operands: Mapping[str, Strided]) -> None:
        self.call = call
        query, key, value = (heads_first(operands[name], call.layout) for name in ("q", "k", "v"))
        self.problem = StridedProblem(query, key, value, True, paged=call.paged)
        offset = operands.get("q_offsets", call.q_offset)
        where: dict[str, Any] = {keyword: operands.get(name) for keyword, name in NAMES.items()}
        self.placed = Placement.of(self.problem, offset, **where)
        self.arrays = {name: tensor for name, tensor in operands.items() if name[1:].isdecimal()}
        self.mask = self._with_arrays("c", call.mask, Mask)
        self.score = call.score and self._with_arrays("t", call.score, ScoreMod)
        self.prob = call.prob and self._with_arrays("w", call.prob, ProbMod)
        sinks = operands.get("sinks")
        self.softmax = PLAIN
        if sinks is not None or self.prob is not None:
            self.softmax = Softmax(sinks, None if sinks is None else sinks.dtype, self.prob)  # type: ignore[arg-type]

    def _with_arrays(self, letter: str, source: Source, face: Any) -> Any:
        tensors = (self.arrays[f"{letter}{i}"] for i in range(len(source.signature)))
        return source.bound(face, tuple(map(_readable, tensors)))

    @property
    def known(self) -> bool:
        """Whether its operands have addresses: it is being run, and not compiled."""
        return bool(self.problem.query.address) or any(a.address for a in self.arrays.values())

    @property
    def waits(self) -> bool:
        """Whether only contents that are not known yet tell which kernel it is: on a CPU, of ids that may be
        sorted."""
        return bool(self.mask.segments) and not self.known and self.problem.device.type == "cpu"

    @property
    def gradient_shapes(self) -> dict[str, tuple[int, ...]]:
        """What kernels of gradients store for query, key and value, as they lie in memory."""
        problem = self.problem
        keys = (problem.batch, *problem.key.shape[1:3])
        shapes = {"dq": problem.query.shape, "dk": (*keys, problem.qk_size), "dv": (*keys, problem.v_size)}
        by_rows = self.call.layout == "BTNH"
        return {n: (s[0], s[2], s[1], s[3]) if by_rows else tuple(s) for n, s in shapes.items()}

    @property
    def extra(self) -> tuple[str, ...]:
        """What kernels compute beside the output."""
        return ("lse",) if self.call.lse else ()

    def values(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """What kernels are called with, by name. results: o, and lse if it is asked for."""
        problem, scale = self.problem, self.call.scale
        values: dict[str, Any] = {
            "q": problem.query,
            "k": problem.key,
            "v": problem.value,
            "scale": 1 / math.sqrt(problem.qk_size) if scale is None else scale,
            **self.placed.values,
            **results,
        }
        if self.softmax.sinks is not None:
            values["sinks"] = self.softmax.sinks
        for stem, source in (("p", self.mask), ("s", self.score), ("x", self.prob)):
            if source is not None:
                values |= {f"{stem}{i}": number for i, number in enumerate(source.values)}
        return values | {n: a.view("u8") if a.dtype == "bool" else a for n, a in self.arrays.items()}

    def check(self) -> None:
        """Check what arrays hold. Raises InputError."""
        self.placed.check_values(self.problem)
        check_reads(self.problem, self.placed, self.mask, self.score, self.prob)


def _readable(tensor: Strided) -> Any:
    """A captured array as masks look at it: NumPy's where that is its memory."""
    return tensor if tensor.dtype == "bf16" or not tensor.address else np.asarray(tensor)
