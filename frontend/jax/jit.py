"""`gossamer.jax.jit`: JAX programs with the attention and the experts inside them compiled.

A program is traced to a jaxpr, once for each kind of arguments; attention and experts in it are found by what
they compute (`match.py`, `match_experts.py`) and replaced by kernels; all else runs as it is.
What cannot be proven equal is left alone, and the report says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial, update_wrapper, wraps
from types import MethodType
from typing import Any

import jax
import jax.core
from jax.extend.core import ClosedJaxpr, Jaxpr

from ...ir.errors import GossamerError, InputError
from ..report import Compiled, Left, Report
from . import match_experts as jax_match_experts
from . import match_linear as jax_match_linear
from .differentiated import changing
from .expert_site import ExpertSite
from .linear_site import LinearSite
from .match import find, where_of
from .program import BODIES, MAPPED, Op, Program, Replacement, Value, apply, at_line, flatten, needed, run
from .site import Site
from .terms import LeftAlone, Reader


def jit(
    function: Callable[..., Any] | None = None,
    **options: Any,
) -> Any:
    """`jax.jit` of a function, with the attention and experts inside it computed by gossamer's kernels.

    function: any that `jax.jit` takes; without it, the result is a decorator. options: those of `jax.jit`, as
    static_argnames, donate_argnums, in_shardings. Found are `jax.nn.dot_product_attention` and the softmax
    between two products that programs write themselves, linear attention, and layers of experts by
    `jax.lax.ragged_dot`, by one_hot and by GShard's slots, in the bodies of scans, loops, branches and
    `shard_map` too. A mask that is computed from indices becomes one in closed form; arrays that masks and
    biases read stay operands.
    Where a mask of large negative numbers leaves a row without pairs, the row is what the original gives.
    Gradients come from kernels too, those that the function takes inside as well (`jax.grad`, `jax.vjp`);
    forward-mode ones are refused, and inside they are the original's, as gradients of gradients are. On
    platforms without kernels nothing is replaced.

    The result has `report()`: what was compiled and what was left, and why, in the program traced last.
    Raises InputError for what is no function."""
    if function is None:
        return partial(jit, **options)
    if not callable(function):
        raise InputError("jax.jit", "a function", type(function).__name__)
    return Jitted(function, options)


class Jitted:
    """A function whose attention is compiled; see `jit`."""

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        update_wrapper(self, function)
        self._function = function
        self._parts: list[Compiled | Left] = []

        @wraps(function)
        def traced(*args: Any, **kwargs: Any) -> Any:
            return self._run(*args, **kwargs)

        self._jitted = jax.jit(traced, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._jitted(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else MethodType(self, instance)

    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        """As for `jax.jit`."""
        return self._jitted.eval_shape(*args, **kwargs)

    def clear_cache(self) -> None:
        """As for `jax.jit`."""
        self._jitted.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """As for `jax.jit`."""
        return self._jitted.lower(*args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """As for `jax.jit`."""
        return self._jitted.trace(*args, **kwargs)

    def report(self) -> Report:
        """What became of the attention in the program that was traced last, at a first call of its kind."""
        compiled = tuple(part for part in self._parts if isinstance(part, Compiled))
        return Report(compiled, tuple(part for part in self._parts if isinstance(part, Left)))

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        parts: list[Compiled | Left] = []
        inner: list[Compiled | Left] = []  # of what it differentiates

        def function(*args: Any, **kwargs: Any) -> Any:
            with changing(partial(replaced, note=inner.append)):
                return self._function(*args, **kwargs)

        found = replaced(function, parts.append)(*args, **kwargs)
        # What was left in a function is still there, with its gradient.
        told = {(part.kind, part.where) for part in inner if isinstance(part, Left)}
        parts = [part for part in parts if isinstance(part, Compiled) or (part.kind, part.where) not in told]
        self._parts = [*inner, *parts]
        return found


Note = Callable[[Compiled | Left], None]


def replaced(function: Callable[..., Any], note: Note) -> Callable[..., Any]:
    """The function with its attention replaced, for arguments that are traced. note: takes every part of the
    report."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        traced = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.core.Tracer)]
        result: list[Any] = []

        def flat(*arrays: Any) -> Any:
            given = list(leaves)
            for i, array in zip(traced, arrays, strict=True):
                given[i] = array
            given_args, given_kwargs = jax.tree.unflatten(tree, given)
            out, structure = jax.tree.flatten(function(*given_args, **given_kwargs))
            computed = [i for i, leaf in enumerate(out) if isinstance(leaf, jax.core.Tracer)]
            result[:] = [structure, dict(enumerate(out)), computed]
            return [out[i] for i in computed]

        arrays = [leaves[i] for i in traced]
        closed = jax.make_jaxpr(flat)(*arrays)
        structure, out, computed = result
        out |= zip(computed, compiled(closed, note)(*arrays), strict=True)
        return jax.tree.unflatten(structure, out.values())

    return run


def compiled(closed: ClosedJaxpr, note: Note) -> Callable[..., list[Any]]:
    """The program of a jaxpr with its attention replaced. note: takes every part of the report."""
    program = flatten(closed)
    sites = _sites(program, note)
    bodies: dict[Op, Callable[..., Sequence[Any]]] = {}
    for op in program.makers:
        if op.name in BODIES and (changed := _bodies(op, note)):
            bodies[op] = partial(_apply, op, op.params | changed)
        elif op.name == MAPPED:
            bodies[op] = partial(_mapped, op, note)
    kernels: dict[Value, tuple[Sequence[Value], Replacement]] = {
        value: (site.inputs, site) for value, site in sites.items()
    }

    def call(*arrays: Any) -> list[Any]:
        known = program.held | dict(zip(program.inputs, arrays, strict=True))
        return run(program.ops, known, program.outputs, kernels, bodies)

    return call


def _apply(op: Op, params: dict[str, Any], *arrays: Any) -> Sequence[Any]:
    return apply(op.eqn, params, arrays)


def _mapped(op: Op, note: Note, *arrays: Any) -> Sequence[Any]:
    """A `shard_map` whose program has its attention replaced: that of one device, whose axes are known while
    it is traced alone."""

    def one(*parts: Any) -> tuple[Any, ...]:
        return tuple(compiled(ClosedJaxpr(op.params["jaxpr"], ()), note)(*parts))

    params = {name: op.params[name] for name in ("mesh", "in_specs", "out_specs", "check_vma")}
    with at_line(op.eqn):
        return jax.shard_map(one, **params, axis_names=op.params["newly_manual_axes"])(*arrays)  # type: ignore[call-arg]


def _bodies(op: Op, note: Note) -> dict[str, Any]:
    """The parameters of an operation that are programs, with their attention replaced."""

    def changed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(changed, value)) if any(map(_is_program, value)) else value
        if not _is_program(value):
            return value
        closed = value if isinstance(value, ClosedJaxpr) else ClosedJaxpr(value, ())
        parts: list[Compiled | Left] = []
        body = compiled(closed, parts.append)
        new = (
            jax.make_jaxpr(body)(*closed.in_avals) if any(isinstance(p, Compiled) for p in parts) else closed
        )
        if new.consts and not isinstance(value, ClosedJaxpr):
            why = "it is recomputed in the backward pass, and reads constants"
            parts[:] = [Left(part.kind, part.where, why) for part in parts]
            new = closed
        for part in parts:
            note(part)
        if new is closed:
            return value
        return new if isinstance(value, ClosedJaxpr) else new.jaxpr

    return {name: new for name, value in op.params.items() if (new := changed(value)) is not value}


def _is_program(value: Any) -> bool:
    return isinstance(value, (ClosedJaxpr, Jaxpr))


def _sites(program: Program, note: Note) -> dict[Value, Any]:
    """The attention and the experts that kernels compute, by the value that each gives."""
    reader = Reader()
    sites: dict[Value, Any] = {}
    left: list[tuple[str, Op, str]] = []
    for op, found in find(reader, program):
        site = found if isinstance(found, str) else Site(program, reader, found)
        reason = site if isinstance(site, str) else _add(site, sites)
        left += [("attention", op, reason)] if reason is not None else []
    for dot, found in jax_match_experts.find(reader, program):
        site = ExpertSite(program, reader, dot, found)
        reason = found if isinstance(found, str) and found != "ragged_dot" else _add(site, sites)
        if reason is not None and dot.groups is not None and found != "ragged_dot":
            site = replace(site, found="ragged_dot")
            reason = _add(site, sites)
        if reason is not None:
            left.append((site.kind if site.found == "ragged_dot" else "experts", dot.op, reason))
    taken = {*sites, *(value for site in sites.values() for value in site.hidden)}
    for op, found in jax_match_linear.find(reader, program):
        if not isinstance(found, str) and taken & {op.outputs[0], *found.inside, *LinearSite(found).inputs}:
            continue  # a product behind another part is not one of features
        site = found if isinstance(found, str) else LinearSite(found)
        reason = site if isinstance(site, str) else _add(site, sites)
        if reason is not None:
            left.append((LinearSite.kind, op, reason))
        elif not isinstance(site, str):  # softmaxes may be features
            parts = [op, *(value.op for value in site.hidden)]
            left = [part for part in left if part[0] != "attention" or part[1] not in parts]
    left += _without_shared(program, sites)
    for value, site in sites.items():
        assert value.op is not None
        note(Compiled(site.kind, where_of(value.op)))
    for kind, op, reason in left:
        note(Left(kind, where_of(op), reason))
    return sites


def _add(site: Any, sites: dict[Value, Any]) -> str | None:
    """Why a part is left alone, else its site is added."""
    if jax.default_backend() not in ("cpu", "gpu", "cuda"):
        return f"kernels for {jax.default_backend()} are not reachable from JAX yet"
    try:
        site.check()
        sites[site.op.outputs[0]] = site
    except (LeftAlone, GossamerError) as reason:
        return str(reason)
    return None


def _without_shared(program: Program, sites: dict[Value, Any]) -> list[tuple[str, Op, str]]:
    """Takes out sites whose inner results something else needs: nothing is computed twice. Those that nothing
    needs any more, because they are inside of others, go too."""
    left = []
    while True:
        sources: Mapping[Value, Sequence[Value]] = {value: site.inputs for value, site in sites.items()}
        acting = [value for op in program.ops if op.eqn.effects for value in op.inputs]
        live = needed([*program.outputs, *acting], sources)
        for value, site in sites.items():
            shared = next((what for inner, what in site.hidden.items() if inner in live), None)
            if shared is not None:
                left.append((site.kind, site.op, f"its {shared} are used elsewhere too"))
                del sites[value]
                break
        else:
            for value in [value for value in sites if value not in live]:
                del sites[value]
            return left
