"""JAX programs as flat lists of operations on values, and how they run.

`flatten` spells calls out: what a `jit` inside a program computes, and what a function of JAX's with a
derivative of its own computes, is read operation by operation. The latter still run as they are, so that
derivatives stay; other such functions, whose derivatives may be any, are not looked into.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

CALLS = ("jit", "pjit", "closed_call", "core_call")  # that are spelled out, and run so
OPAQUE_CALLS = ("custom_jvp_call", "custom_vjp_call")  # that run as they are; JAX's own are read
BODIES = ("scan", "while", "cond", "remat2", "checkpoint")  # whose bodies are programs of their own
MAPPED = "shard_map"  # so is that of each device


@dataclass(eq=False)
class Value:
    """One array of a program. op: the operation that tells what it is; maker: the one that computes it."""

    aval: Any
    op: Op | None = None
    maker: Op | None = None
    const: Any = None

    def __repr__(self) -> str:
        return f"Value({self.aval.str_short()})"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.aval.shape)

    @property
    def dtype(self) -> Any:
        return self.aval.dtype


@dataclass(eq=False)
class Op:
    """One operation. meaning: 'floor_divide' or 'remainder' for a call of that function of jax.numpy."""

    eqn: JaxprEqn
    inputs: list[Value]
    outputs: list[Value] = field(default_factory=list)
    meaning: str = ""

    def __repr__(self) -> str:
        return f"Op({self.name}: {self.inputs} -> {self.outputs})"

    @property
    def name(self) -> str:
        return self.meaning or self.eqn.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        return self.eqn.params


@dataclass(eq=False)
class Program:
    """ops: in order, those inside opaque calls too. inputs, outputs: of the whole. held: arrays that it reads
    from programs around it, which are traced."""

    inputs: list[Value]
    outputs: list[Value]
    ops: list[Op]
    held: dict[Value, Any]

    @property
    def makers(self) -> list[Op]:
        """The operations that run, in order."""
        return [op for op in self.ops if any(value.maker is op for value in op.outputs)]


def flatten(closed: ClosedJaxpr) -> Program:
    """The program of a jaxpr."""
    ops: list[Op] = []
    traced = [(var, x) for var, x in zip(closed.jaxpr.constvars, closed.consts, strict=True) if is_traced(x)]
    held = {var: Value(var.aval) for var, _ in traced}
    inputs = [Value(var.aval) for var in closed.jaxpr.invars]
    outputs = _inline(closed, inputs, ops, {}, held)
    return Program(inputs, outputs, ops, {held[var]: x for var, x in traced})


def is_traced(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)


def _inline(
    closed: ClosedJaxpr,
    inputs: Sequence[Value],
    ops: list[Op],
    known: dict[Any, list[Value]],
    held: Mapping[Any, Value] = MappingProxyType({}),
) -> list[Value]:
    """known: results by operation and operands, so that what is computed twice is one value. held: the values
    of constants that are none."""
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.invars, inputs, strict=True))
    values |= {var: Value(var.aval, const=c) for var, c in zip(jaxpr.constvars, closed.consts, strict=True)}
    values |= held

    def of(atom: Any) -> Value:
        return Value(atom.aval, const=atom.val) if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        given = [of(atom) for atom in eqn.invars]
        name, inner = eqn.primitive.name, _body(eqn)
        meaning = _meaning(eqn) if name in CALLS else ""
        if name in CALLS and inner is not None and not meaning:
            values |= zip(eqn.outvars, _inline(inner, given, ops, known), strict=True)
            continue
        key = _key(eqn, given)
        if key is not None and key in known:
            values |= zip(eqn.outvars, known[key], strict=True)
            continue
        op = Op(eqn, given, meaning=meaning)
        op.outputs = [Value(var.aval, op, op) for var in eqn.outvars]
        if name in OPAQUE_CALLS and inner is not None and _is_of_jax(inner):
            told: list[Op] = []
            for value, means in zip(op.outputs, _inline(inner, given, told, {}), strict=True):
                if means.op in told:
                    value.op = means.op
                    means.op.outputs = [value if v is means else v for v in means.op.outputs]
            for below in told:  # they are read only
                for value in below.outputs:
                    value.maker = op if value in op.outputs else None
            ops += told
        ops.append(op)
        if key is not None:
            known[key] = op.outputs
        values |= zip(eqn.outvars, op.outputs, strict=True)
    return [of(atom) for atom in jaxpr.outvars]


def _key(eqn: JaxprEqn, given: Sequence[Value]) -> Any:
    """What two operations with the same results share; None for one with effects or programs inside."""
    params = eqn.params.values()
    if eqn.effects or not all(map(_is_plain, params)):
        return None
    operands = []
    for value in given:
        scalar = value.const is not None and value.shape == ()
        operands.append((str(value.aval), np.asarray(value.const).tobytes()) if scalar else id(value))
    return eqn.primitive.name, str(eqn.params), tuple(operands)


def _is_plain(param: Any) -> bool:
    """Whether a parameter holds no program."""
    if isinstance(param, tuple):
        return all(map(_is_plain, param))
    return not isinstance(param, (ClosedJaxpr, Jaxpr)) and not callable(param)


def _body(eqn: JaxprEqn) -> ClosedJaxpr | None:
    for name in ("jaxpr", "call_jaxpr"):
        inner = eqn.params.get(name)
        if isinstance(inner, ClosedJaxpr):
            return inner
    return None


_JAX = os.path.join(os.path.dirname(jax.__file__), "")


def _is_of_jax(inner: ClosedJaxpr) -> bool:
    """Whether JAX defines a function with a derivative of its own, which is then that of its operations."""
    info = inner.jaxpr.debug_info
    return f" at {_JAX}" in (info.func_src_info or "")


# Functions of jax.numpy that are many operations, and one on indices.
_MEANINGS: dict[str, Callable[..., Any]] = {"floor_divide": jnp.floor_divide, "remainder": jnp.remainder}


def _meaning(eqn: JaxprEqn) -> str:
    """The name of a function of jax.numpy that a call runs: whatever it is called, its text is the same."""
    name, inner = str(eqn.params.get("name", "")), _body(eqn)
    if name not in _MEANINGS or inner is None:
        return ""
    avals: list[Any] = [v.aval for v in eqn.invars]
    shapes = tuple((tuple(a.shape), str(a.dtype), a.weak_type) for a in avals)
    return name if str(inner) == _text(name, shapes) else ""


@lru_cache(maxsize=256)
def _text(name: str, shapes: tuple[Any, ...]) -> str:
    """The text of the jaxpr inside the call that a function of jax.numpy makes."""
    given = [jax.ShapeDtypeStruct(shape, dtype, weak_type=weak) for shape, dtype, weak in shapes]
    made = jax.make_jaxpr(_MEANINGS[name])(*given)
    return str(_body(made.eqns[0])) if len(made.eqns) == 1 else ""


# running --------------------------------------------------------------------------------------------

Replacement = Callable[[Callable[[Value], Any]], Any]  # gives a value, from what reads other values


def needed(wanted: Iterable[Value], replaced: Mapping[Value, Sequence[Value]]) -> set[Value]:
    """Every value that computing some needs; `replaced` says what others are computed from instead."""
    found: set[Value] = set()
    stack = list(wanted)
    while stack:
        value = stack.pop()
        if value in found:
            continue
        found.add(value)
        if value in replaced:
            stack += replaced[value]
        elif value.maker is not None:
            stack += value.maker.inputs
    return found


def run(
    ops: Sequence[Op],
    known: dict[Value, Any],
    wanted: Sequence[Value],
    replaced: Mapping[Value, tuple[Sequence[Value], Replacement]],
    bodies: Mapping[Op, Callable[..., Sequence[Any]]],
    acting: bool = True,
) -> list[Any]:
    """The wanted values, from known ones. replaced: how others are computed, and from what. bodies: what runs
    in place of operations. acting: whether operations with effects run too."""
    inputs = {value: sources for value, (sources, _) in replaced.items()}
    effects = [op for op in ops if acting and op.eqn.effects]
    live = needed(
        [*wanted, *(value for op in effects for value in op.inputs)], inputs | {value: () for value in known}
    )

    def read(value: Value) -> Any:
        return known[value] if value.const is None or value in known else value.const

    for op in ops:
        missing = [v for v in op.outputs if v.maker is op and v in live and v not in known]
        for value in missing:
            if value in replaced:
                known[value] = replaced[value][1](read)
        if all(value in known for value in missing) and op not in effects:
            continue
        given = [read(value) for value in op.inputs]
        found = bodies[op](*given) if op in bodies else apply(op.eqn, op.params, given)
        for value, array in zip(op.outputs, found, strict=True):
            known.setdefault(value, array)
    return [read(value) for value in wanted]


def apply(eqn: JaxprEqn, params: dict[str, Any], inputs: Sequence[Any]) -> Sequence[Any]:
    """The results of one operation, as if its own line of the program ran it."""
    functions: Any = ()
    params = eqn.primitive.get_bind_params(params)
    if isinstance(params, tuple):  # of JAX before 0.10
        functions, params = params
    with at_line(eqn):
        found = eqn.primitive.bind(*functions, *inputs, **params)
    return found if eqn.primitive.multiple_results else [found]


@contextlib.contextmanager
def at_line(eqn: JaxprEqn) -> Iterator[None]:
    """Within it, operations stand where one of the program does."""
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=names), eqn.ctx.manager:
        yield
