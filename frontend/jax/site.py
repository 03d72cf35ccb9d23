"""One attention of a JAX program, when it runs: from the program's arrays to a kernel and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from ...ir.derivative import derivative
from ...ir.errors import UnsupportedError
from ...ir.expr import readf, real
from ..capture.score import LOW, Bound, bind
from ..mask import Mask
from ..score import ProbMod, ScoreMod
from ..term import Term, rewrite
from ..trace.tensor import dtype_name
from .attention import call_of
from .gradient import attend
from .match import Attention
from .program import Op, Program, Value, needed, run
from .roles import back
from .terms import LeftAlone, Reader


@dataclass(frozen=True)
class Site:
    """Calls a kernel in place of a part of a program. Raises LeftAlone where none computes the same."""

    program: Program
    reader: Reader
    found: Attention

    kind = "attention"

    @property
    def op(self) -> Op:
        """The product whose result it gives."""
        return self.found.op

    @property
    def hidden(self) -> dict[Value, str]:
        """What must not be used elsewhere."""
        return {self.found.softmax: "probabilities", self.found.scores: "scores"}

    @cached_property
    def bound(self) -> Bound:
        """The mask and the maps."""
        found = self.found
        lengths = (found.sizes["q"], found.sizes["k"])
        least = float(jnp.finfo(found.dtype).min)
        return bind(found.score, {}, lengths, (LOW, least), "nan", found.prob == "prob")

    @cached_property
    def inputs(self) -> tuple[Value, ...]:
        """Query, key, value, the arrays that mask and maps read, and what else the original reads."""
        found, names = self.found, (*self.bound.captures, *self.bound.score_captures, *self._prob[1])
        read = [found.query.value, found.key.value, found.value.value]
        read += [self.reader.leaves[name] for name in names]
        read = list(dict.fromkeys(read))
        result = found.op.outputs[0]
        stop: dict[Value, Sequence[Value]] = {value: () for value in read}
        others = [v for v in needed([result], stop) if v.maker is None and v.const is None]
        return tuple(dict.fromkeys([*read, *others]))

    @cached_property
    def _prob(self) -> tuple[Term, tuple[str, ...]]:
        names: list[str] = []

        def leaf(name: str) -> str:
            if not name.startswith("%"):
                return name
            if name not in names:
                names.append(name)
            return f"w{names.index(name)}"

        return rewrite(self.found.prob, leaf), tuple(names)

    def check(self) -> None:
        """Raises LeftAlone for what kernels do not take."""
        found = self.found
        dtypes = {operand.value.dtype for operand in (found.query, found.key, found.value)}
        if len(dtypes) != 1 or dtype_name(next(iter(dtypes))) not in ("f16", "bf16", "f32", "f64"):
            raise LeftAlone(f"query, key and value are of {', '.join(sorted(map(str, dtypes)))}")
        if any(not 1 <= math.prod(found.sizes[r] for r in own) <= 1024 for own in (("d",), found.own)):
            raise LeftAlone("its heads are larger than 1024")
        for value in self.inputs:
            if value.maker is None and value.op is not None:
                raise LeftAlone("it reads what a function with a derivative of its own computes inside")

    def __call__(self, read: Callable[[Value], Any]) -> Any:
        """The result, by a kernel. Gradients are by kernels too where what becomes of scores has derivatives
        by rule, else those of the original."""
        program, result, inputs = self.program, self.found.op.outputs[0], self.inputs
        arrays = [read(value) for value in inputs]

        def original(*arrays: Any) -> Any:
            known = dict(zip(inputs, arrays, strict=True))
            return run(program.ops, known, [result], {}, {}, acting=False)[0]

        def kernel(*arrays: Any) -> Any:
            out, lse = self._attend(dict(zip(inputs, arrays, strict=True)))
            if self.found.shifted:
                return out
            again = jax.checkpoint(original)
            branches = [lambda out, _: out, lambda _, arrays: again(*arrays)]
            return jax.lax.cond(_is_exact(lse, self.found.dtype), *branches, out, arrays)

        if self._has_derivatives(dict(zip(inputs, arrays, strict=True))):
            return kernel(*arrays)
        attention = jax.custom_jvp(kernel)
        attention.defjvp(lambda primals, tangents: jax.jvp(original, primals, tangents))
        return attention(*arrays)

    def _faces(self, known: Mapping[Value, Any]) -> tuple[Mask, ScoreMod | None, ProbMod | None]:
        found, bound = self.found, self.bound
        named = {name: known[held] for name, held in self.reader.leaves.items() if held in known}
        return (
            Mask(bound.mask, bound.values, *_held(bound.captures, named)),
            None if bound.score is None else ScoreMod(bound.score, (), *_held(bound.score_captures, named)),
            None if found.prob == "prob" else ProbMod(self._prob[0], (), *_held(self._prob[1], named)),
        )

    def _has_derivatives(self, known: Mapping[Value, Any]) -> bool:
        for face in self._faces(known)[1:]:
            if face is not None:
                expr = face.ir.expr
                try:
                    for x in (real(face.argument), *expr.atoms(readf)):
                        derivative(expr, x)
                except UnsupportedError:
                    return False
        return True

    def _attend(self, known: Mapping[Value, Any]) -> tuple[Any, Any]:
        """The result by a kernel, and the log of its sums of exponentials, (B, q_len, heads), where that is
        looked at."""
        found, bound = self.found, self.bound
        outer, sizes = found.outer or ("",), {**found.sizes, "": 1}  # without a batch of keys, B is 1
        axes = (*outer, *found.inner)
        query, key, value = (
            operand.arranged(known[operand.value], axes, row, own, sizes)
            for operand, axes, row, own in (
                (found.query, axes, "q", ("d",)),
                (found.key, outer, "k", ("d",)),
                (found.value, outer, "k", found.own),
            )
        )
        empty = bound.empty in ("nan", "mean")
        settings: dict[str, Any] = {"scale": bound.scale, "return_lse": empty or not found.shifted}
        call, operands = call_of((query, key, value), *self._faces(known), **settings)
        results: Any = attend(call.text, operands)
        out, lse = results[0], jnp.swapaxes(results[1], 1, 2) if len(results) > 1 else None
        if empty:
            out = _with_empty_rows(out, lse, value, bound.empty)
        result = found.op.outputs[0]
        return back(out, found.out, axes, found.own, sizes, result), lse


def _is_exact(lse: Any, dtype: Any) -> Any:
    """Whether sums of exponentials, of scores as they are, neither overflow nor underflow in a dtype."""
    limits = jnp.finfo(dtype)
    low, high = (math.log(float(n)) for n in (limits.tiny, limits.max))
    return ((lse > low + 1) & (lse < high - 1)).all()


def _held(
    names: tuple[str, ...], known: Mapping[str, Any]
) -> tuple[tuple[Any, ...], tuple[tuple[str, int], ...]]:
    arrays = tuple(known[name] for name in names)
    return arrays, tuple((dtype_name(x.dtype) or "", max(1, x.ndim)) for x in arrays)


def _with_empty_rows(out: Any, lse: Any, value: Any, empty: str) -> Any:
    """The output in which rows without pairs give what the original program gives them."""
    rows = jnp.isneginf(lse)[..., None]
    if empty == "nan":
        return jnp.where(rows, jnp.nan, out)
    mean = jnp.mean(value, 1, keepdims=True, dtype=lse.dtype).astype(out.dtype)
    return jnp.where(rows, jnp.repeat(mean, out.shape[2] // value.shape[2], 2), out)
