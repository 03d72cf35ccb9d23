"""One layer of experts of a JAX program, when it runs: from the program's arrays to kernels and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import sympy

from ...ir.expr import real
from ..moe.layer import MOST_EXPERTS
from ..term_expr import to_expr
from ..trace.tensor import dtype_name
from .dot import Dot, dot_of, plain
from .experts import bounds_of
from .layer import Sizes, grouped, layer
from .match_dense import Dense
from .match_experts import Network
from .problem import FLOATS
from .program import Op, Program, Value, needed, run
from .terms import LeftAlone, Reader

Read = Callable[[Value], Any]
MOVED = ("transpose", "reshape", "squeeze", "broadcast_in_dim", "copy", "stop_gradient")


@dataclass(frozen=True)
class ExpertSite:
    """Calls kernels in place of a part of a program. Raises LeftAlone where none computes the same.

    op: that whose result it gives. found: what it is."""

    program: Program
    reader: Reader
    dot: Dot
    found: Any

    @property
    def op(self) -> Op:
        return self.dot.op

    @property
    def kind(self) -> str:
        return "ragged_dot" if isinstance(self.found, str) else "experts"

    @cached_property
    def network(self) -> Network | None:
        found = self.found.network if isinstance(self.found, Dense) else self.found
        return found if isinstance(found, Network) else None

    @property
    def hidden(self) -> dict[Value, str]:
        """What must not be used elsewhere."""
        if self.network is None:
            return {}
        found = {self.network.first.op.outputs[0]: "first products"}
        dense = isinstance(self.found, Dense)
        return found | ({self.network.second.op.outputs[0]: "experts' outputs"} if dense else {})

    @cached_property
    def slots(self) -> Slots | None:
        """How rows come into slots, where a dispatch matrix puts them there."""
        network = self.network
        sorted_rows = network is None or network.first.groups is not None or isinstance(self.found, Dense)
        return None if sorted_rows or network is None else _slots(self.reader, network)

    @cached_property
    def inputs(self) -> tuple[Value, ...]:
        """The arrays that kernels read, and what else the original reads where that may run."""
        if self.network is None:
            return tuple(self.dot.op.inputs[:3])
        read = [matrix for matrix, _ in self.network.matrices]
        if isinstance(self.found, Dense):
            read += [self.network.given[0], self.found.ids[0], self.found.weights[0]]
        elif self.slots is not None:
            read += [self.slots.dispatch[0], self.slots.rows[0]]
        else:
            assert self.network.first.groups is not None
            read += [self.network.given[0], self.network.first.groups]
        return tuple(dict.fromkeys(read))

    @property
    def _products(self) -> list[Value]:
        """The arrays of its products by experts."""
        if self.network is None:
            return list(self.dot.operands)
        rows = self.network.given[0] if self.slots is None else self.slots.rows[0]
        return [rows, *(matrix for matrix, _ in self.network.matrices)]

    def check(self) -> None:
        """Raises LeftAlone for what kernels do not take."""
        for value in self.inputs:
            if value.maker is None and value.op is not None:
                raise LeftAlone("it reads what a function with a derivative of its own computes inside")
        floats = {value.dtype for value in self._products}
        if len(floats) != 1 or dtype_name(next(iter(floats))) not in FLOATS:
            raise LeftAlone(f"its arrays are of {', '.join(sorted(map(str, floats)))}")
        if self.network is None:
            if not 1 <= self.dot.operands[1].shape[0] <= MOST_EXPERTS:
                raise LeftAlone(f"it has more than {MOST_EXPERTS} groups, or none")
            return
        sizes = [dict(zip(roles, m.shape, strict=True)) for m, roles in self.network.matrices]
        if sizes[0]["in"] != sizes[1]["out"]:
            raise LeftAlone("its experts give rows of another size than they take")
        if not 1 <= sizes[0]["e"] <= MOST_EXPERTS:
            raise LeftAlone(f"it has more than {MOST_EXPERTS} experts, or none")
        if self.slots is not None:
            expr: Any = to_expr(self.network.term, frozenset(("x0", "x1")))
            if sympy.sympify(expr).xreplace({real(n): sympy.Integer(0) for n in ("x0", "x1")}).evalf() != 0:
                raise LeftAlone("its activation of an empty slot is not zero")

    def __call__(self, read: Read) -> Any:
        network = self.network
        if network is None:
            lhs, rhs, sizes = map(read, self.dot.op.inputs[:3])
            flipped = self.dot.labels[1].index("x0") == 2
            return grouped(flipped, lhs, rhs, bounds_of(sizes, lhs.shape[0]))
        if isinstance(self.found, Dense):
            return self._dense(read, self.found, network)
        if self.slots is not None:
            return self._guarded(read, self.slots, network)
        assert network.first.groups is not None
        x = read(network.given[0])
        out = self._rows(read, x, bounds_of(read(network.first.groups), x.shape[0]))
        return out.astype(self.op.outputs[0].dtype)

    def _layer(self, read: Read, network: Network) -> tuple[str, dict[str, Any]]:
        """The layer's sizes as text, and its matrices."""
        flipped = network.matrices[0][1] == ("e", "in", "out")
        order = ("e", "in", "out") if flipped else ("e", "out", "in")
        up, down = (_arranged(read(matrix), roles, order) for matrix, roles in network.matrices)
        hidden, inner = (m.shape[1 if flipped else 2] for m in (up, down))
        gated, interleaved = network.halves is not None, network.halves == "interleaved"
        sizes = Sizes(up.shape[0], hidden, inner, gated, flipped, interleaved, False, network.term)
        return sizes.text, {"gate_up": up, "down": down}

    def _rows(self, read: Read, x: Any, bounds: Any) -> Any:
        """Rows (rows, H) that are sorted by expert through their experts; zeros behind the last."""
        assert self.network is not None
        text, matrices = self._layer(read, self.network)
        number = jnp.arange(x.shape[0], dtype=jnp.int32)
        place = jnp.where(number < bounds[-1], number, -1)[:, None]
        given = {"x": x, "weights": jnp.ones((x.shape[0], 1), jnp.float32), "tokens": number}
        return layer(text, {**given, "bounds": bounds, "place": place, **matrices})

    def _dense(self, read: Read, found: Dense, network: Network) -> Any:
        rows = network.rows
        text, matrices = self._layer(read, network)
        x = _arranged(read(network.given[0]), network.given[1], (*rows, "in"))
        shape = x.shape[:-1]
        ids, weights = (
            _arranged(read(value), roles, (*rows, *(["k"] if "k" in roles else [])))
            for value, roles in (found.ids, found.weights)
        )
        ids, weights = (a.reshape(math.prod(shape), -1) for a in (ids, weights))
        if dtype_name(ids.dtype) not in ("i32", "i64"):
            ids = ids.astype(jnp.int32)
        given = {"x": x.reshape(-1, x.shape[-1]), "ids": ids, "weights": weights}
        out: Any = layer(text, {**given, **matrices})
        result = self.op.outputs[0]
        return _arranged(out.reshape(x.shape), (*rows, "out"), found.out).astype(result.dtype)

    def _guarded(self, read: Read, slots: Slots, network: Network) -> Any:
        """What slots hold, of the tokens that are in them; the original where one holds several."""
        program, result = self.program, self.op.outputs[0]
        stop: dict[Value, Sequence[Value]] = {value: () for value in self.inputs}
        others = [v for v in needed([result], stop) if v.maker is None and v.const is None]
        inputs = tuple(dict.fromkeys([*self.inputs, *others]))
        dispatch = _arranged(read(slots.dispatch[0]), slots.dispatch[1], slots.order)
        groups, slot = (math.prod(slots.sizes[x] for x in part) for part in (slots.groups, slots.slots))
        tokens, experts = slots.sizes["s"], slots.sizes["e"]
        whole = dispatch.reshape(groups, tokens, experts, slot)
        used = whole != 0
        count = used.sum(1, dtype=jnp.int32)
        fits = ((whole == 1) | ~used).all() & (count <= 1).all()

        def ours(arrays: Mapping[Value, Any]) -> Any:
            x = _arranged(arrays[slots.rows[0]], slots.rows[1], (*slots.groups, "s", "in"))
            token = jnp.argmax(used, 1) + tokens * jnp.arange(groups)[:, None, None]
            filled, token = (a.swapaxes(0, 1).reshape(-1) for a in (count > 0, token))
            each = filled.reshape(experts, -1).sum(1)
            at = jnp.cumsum(filled) - 1
            chosen = jnp.zeros(filled.size, jnp.int32)
            chosen = chosen.at[jnp.where(filled, at, filled.size)].set(token.astype(jnp.int32), mode="drop")
            rows = x.reshape(-1, x.shape[-1])[chosen]
            found = self._rows(arrays.__getitem__, rows, bounds_of(each, filled.size))
            found = jnp.where(filled[:, None], found[jnp.maximum(at, 0)], 0)
            order = ("e", *slots.groups, *slots.slots, "out")
            sizes = [slots.sizes[x] if x in slots.sizes else found.shape[-1] for x in order]
            return _arranged(found.reshape(sizes), order, slots.out).astype(result.dtype)

        def original(arrays: Mapping[Value, Any]) -> Any:
            return run(program.ops, dict(arrays), [result], {}, {}, acting=False)[0]

        arrays = [read(value) for value in inputs]
        branches = [
            lambda given, branch=branch: branch(dict(zip(inputs, given, strict=True)))
            for branch in (ours, original)
        ]
        return jax.lax.cond(fits, *branches, arrays)


@dataclass(frozen=True)
class Slots:
    """Rows put into slots: out[g, e, c] = sum over s of dispatch[g, s, e, c] rows[g, s].

    dispatch, rows: arrays and the roles of their dimensions: "s", "e", "in", and labels of groups and slots.
    order: (groups, s, e, slots), sizes: by role. out: the roles of the network's result."""

    dispatch: tuple[Value, tuple[str, ...]]
    rows: tuple[Value, tuple[str, ...]]
    groups: tuple[str, ...]
    slots: tuple[str, ...]
    sizes: Mapping[str, int]
    out: tuple[str, ...]

    @property
    def order(self) -> tuple[str, ...]:
        return (*self.groups, "s", "e", *self.slots)


def _slots(reader: Reader, network: Network) -> Slots:
    """Raises LeftAlone."""
    given, roles = network.given
    read = plain(reader, given)
    dot = None if read is None else dot_of(read[0].op)
    if read is None or dot is None or dot.groups is not None or len(dot.summed) != 1:
        raise LeftAlone("its rows are put into slots by no product with a dispatch matrix")
    role_of = {dot.out[at]: role for at, role in zip(read[1], roles, strict=True)} | {dot.summed[0]: "s"}
    named = [tuple(role_of[x] for x in own) for own in dot.labels]
    side = next((s for s in (0, 1) if "in" in named[s]), 0)
    groups = tuple(role_of[x] for x in dot.out if x[0] == "b")
    slots = tuple(x for x in network.rows if x not in groups)
    if "e" in named[side] or set(named[side]) != {"in", "s", *groups} or "e" in groups:
        raise LeftAlone("its rows are put into slots by no product with a dispatch matrix")
    dispatch = dot.operands[1 - side]
    if not _is_whole(dispatch):
        raise LeftAlone("its dispatch matrix is made of no conditions, and may have a gradient")
    shapes = zip((*dispatch.shape, *dot.operands[side].shape), (*named[1 - side], *named[side]), strict=True)
    sizes = {role: n for n, role in shapes if role != "in"}
    expert = next(x for x in network.second.out if x[0] == "b")
    rest = {expert: "e"} | {x: x for x in network.rows}
    out = tuple(rest.get(x, "out") for x in network.second.out)
    return Slots((dispatch, named[1 - side]), (dot.operands[side], named[side]), groups, slots, sizes, out)


def _is_whole(value: Value) -> bool:
    """Whether a float is converted from integers or conditions, so that no gradient flows to it."""
    while value.op is not None:
        if value.op.name == "convert_element_type" and value.op.inputs[0].dtype.kind in "biu":
            return True
        if value.op.name not in (*MOVED, "convert_element_type"):
            return False
        value = value.op.inputs[0]
    return False


def _arranged(array: Any, roles: Sequence[str], order: Sequence[str]) -> Any:
    """The array with its dimensions in an order; those of size 1 without a role are left out."""
    array = jnp.squeeze(array, tuple(d for d, role in enumerate(roles) if not role))
    named = [role for role in roles if role]
    return jnp.transpose(array, [named.index(role) for role in order])
