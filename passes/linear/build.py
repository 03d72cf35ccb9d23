"""build: a linear attention, and its gradients, as graphs of primitives.

    %fq = features %q {map}
    %fk = features %k {map}
    %num, %den = linear_values %fq, %fk, %v {order = 'forward', operands = ('x', 'f', 'g'), keeps = True}
    %o = normalise %num, %den {eps}

where rows sum over the keys up to them, and where they sum over all keys

    %s, %z = linear_states %fk, %v {operands = ('f', 'g'), sums = True}
    %num, %den = read_values %fq, %s, %z {operands = ('x', 'state', 'sums'), keeps = True}

The gradients follow by one rule a primitive, as in passes/differentiate.py. A sum of products of three,
out_i = sum_j (x_i . f_j) g_j, is linear in each of them, and so its gradients are such sums again: that of x
over the same keys, those of f and g over the rows that a key gives to. The state that later rows begin with
is what its gradient begins with, from the other end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ...ir.errors import UnsupportedError
from ...ir.graph import Graph, Op, Value
from .spec import LinearSpec

REVERSED = {"forward": "backward", "backward": "forward"}
STATES = ("state", "sums")


def build_linear(spec: LinearSpec) -> Graph:
    """The unfused graph: inputs q, k, v (, state, sums); results o (, den) (, new_state, new_sums).

    What gradients read is among the results with spec.keeps: the denominators or, where rows sum over all
    keys, the state of these (key_state and key_sums, if it is no result by the names of spec.final)."""
    wide, keys = spec.accumulator, "L" if spec.causal else "N"
    q = Value("q", spec.dtype, ("B", "Hq", "L", spec.qk_size))
    k = Value("k", spec.dtype, ("B", "Hk", keys, spec.qk_size))
    v = Value("v", spec.dtype, ("B", "Hk", keys, spec.v_size))
    fq = Value("fq", wide, (*q.shape[:3], spec.features))
    fk = Value("fk", wide, (*k.shape[:3], spec.features))
    given = _states(spec, STATES) if spec.initial else ()
    states = _states(spec, ("new_state", "new_sums") if spec.final else ("key_state", "key_sums"))
    den = (Value("den", wide, q.shape[:3]),) if spec.normalised else ()
    o = Value("o", spec.dtype, (*q.shape[:3], spec.v_size))
    num = Value("num", wide, o.shape) if spec.normalised else o
    names = tuple(g.name for g in given)
    roles = STATES[: len(given)]
    sums, keeps = (True, True) if spec.normalised else (None, None)
    ops = [Op("features", ("k",), (fk,)).with_attrs(map=spec.k_map)]
    features = Op("features", ("q",), (fq,)).with_attrs(map=spec.q_map)
    if spec.causal:
        final = states if spec.final else ()
        products = Op("linear_values", ("fq", "fk", "v", *names), (num, *den, *final)).with_attrs(
            operands=("x", "f", "g", *roles), order="forward", keeps=keeps, sums=sums,
            final=True if final else None, heads="Hk" if final else None,
        )  # fmt: skip
        ops = [features, *ops, products]
    else:
        added = Op("linear_states", ("fk", "v", *names), states)
        read = Op("read_values", ("fq", *(s.name for s in states)), (num, *den))
        ops += [
            added.with_attrs(operands=("f", "g", *roles), heads="Hk", sums=sums),
            features,
            read.with_attrs(operands=("x", *STATES[: len(states)]), keeps=keeps),
        ]
    if spec.normalised:
        ops.append(Op("normalise", ("num", "den"), (o,)).with_attrs(eps=float(spec.eps or 0.0)))
    kept = den if spec.keeps and spec.causal else ()
    if spec.final or (spec.keeps and not spec.causal):
        kept += states
    return Graph("linear_attention", (q, k, v, *given), tuple(ops), ("o", *(v.name for v in kept)))


def _states(spec: LinearSpec, names: tuple[str, str]) -> tuple[Value, ...]:
    """A state and, where rows are normalised, its sums."""
    shape = ("B", "Hk", spec.features, spec.v_size)
    shapes = (shape, shape[:3]) if spec.normalised else (shape,)
    return tuple(Value(n, spec.accumulator, s) for n, s in zip(names, shapes, strict=False))


# gradients ----------------------------------------------------------------------------------------------

Cotangents = dict[str, str]  # by the names of operands


@dataclass
class _Tape:
    """The gradient graph while it grows."""

    forward: Graph
    ops: list[Op] = field(default_factory=list)
    found: Cotangents = field(default_factory=dict)

    def emit(self, kind: str, inputs: Iterable[str], outputs: Iterable[Value], **attrs: object) -> str:
        self.ops.append(Op(kind, tuple(inputs), tuple(outputs)).with_attrs(**attrs))
        return self.ops[-1].output.name

    def gradient_of(self, name: str) -> Value:
        of = self.forward.values[name]
        return Value(f"d{name}", of.dtype, of.shape)


def build_linear_gradients(spec: LinearSpec, wanted: Iterable[str]) -> Graph:
    """The graph of the gradients of `wanted` of q, k, v, state and sums.

    Where rows sum over all keys, what they read of the state is read again: o and den come from it.

    Its inputs are those that it reads of the forward's, of its results with `keeps`, do, and, where
    spec.final, dnew_state and dnew_sums."""
    wanted = tuple(wanted)
    forward = build_linear(replace(spec, keeps=True))
    given = ["o", *(name for name in forward.outputs if name.startswith("new_"))]
    kept = [
        forward.values[name] for name in forward.outputs if name != "o" or (spec.causal and spec.normalised)
    ]
    incoming = [Value(f"d{name}", forward.values[name].dtype, forward.values[name].shape) for name in given]
    inputs = (*forward.inputs, *kept, *incoming)
    again = ("features", *(() if spec.causal else ("read_values", "normalise")))
    tape = _Tape(forward, [op for op in forward.ops if op.kind in again])
    tape.found = {name: f"d{name}" for name in given}
    for op in reversed(forward.ops):
        results = {v.name: tape.found[v.name] for v in op.outputs if v.name in tape.found}
        if not results:
            continue
        if op.kind not in RULES:
            raise UnsupportedError(f"{op.kind} has no gradient rule, and %{op.output.name} needs one")
        tape.found |= RULES[op.kind](tape, op, results)
    outputs = tuple(tape.found[name] for name in wanted)
    made = Graph("linear_attention_grad", inputs, tuple(tape.ops), outputs).without_dead()
    read = {i for op in made.ops for i in op.inputs}
    made = replace(made, inputs=tuple(v for v in inputs if v.name in read))
    return made.renamed({tape.found[name]: f"d{name}" for name in wanted})


def _normalise(tape: _Tape, op: Op, grads: dict[str, str]) -> Cotangents:
    num, den = op.inputs
    made = (tape.gradient_of(num), tape.gradient_of(den))
    o = op.output.name
    tape.emit("normalise_grad", (grads[o], o, den), made, eps=op.attr("eps"))
    return {num: made[0].name, den: made[1].name}


def _features(tape: _Tape, op: Op, grads: dict[str, str]) -> Cotangents:
    (x,) = op.inputs
    made = tape.gradient_of(x)
    tape.emit("features_grad", (x, grads[op.output.name]), (made,), map=op.attr("map"))
    return {x: made.name}


def _linear_values(tape: _Tape, op: Op, grads: dict[str, str]) -> Cotangents:
    at = dict(zip(op.attr("operands"), op.inputs, strict=True))
    x, f, g = at["x"], at["f"], at["g"]
    sums, order = op.attr("sums"), op.attr("order")
    rows = grads[op.output.name]
    den = {"r": grads["den"]} if sums else {}
    begin = {role: at[role] for role in STATES if role in at}
    end = {role: grads[f"new_{role}"] for role in STATES if f"new_{role}" in grads}

    def emit(kind: str, named: dict[str, str], outputs: list[Value], **attrs: object) -> None:
        tape.emit(kind, named.values(), outputs, operands=tuple(named), sums=sums, **attrs)

    found = {name: tape.gradient_of(name) for name in (x, f, g, *begin.values())}
    forwards = {"y": rows, **den, "f": f, "g": g, **begin}
    emit("linear_features", forwards, [found[x]], order=order)
    column = {"c": grads["den"]} if sums else {}
    backwards = {"f": x, "g": rows, **column, **end}
    emit("linear_features", {"y": g, **backwards}, [found[f]], order=REVERSED[order])
    states = [found[name] for name in begin.values()]
    heads = "Hk" if states else None
    more = {"final": True if states else None, "heads": heads}
    emit("linear_values", {"x": f, **backwards}, [found[g], *states], order=REVERSED[order], **more)
    return {name: value.name for name, value in found.items()}


def _linear_states(tape: _Tape, op: Op, grads: dict[str, str]) -> Cotangents:
    at = dict(zip(op.attr("operands"), op.inputs, strict=True))
    states = dict(zip(STATES, (grads[v.name] for v in op.outputs), strict=False))
    found = {name: tape.gradient_of(name) for name in (at["f"], at["g"])}
    for kind, role, result in (("read_features", "y", "f"), ("read_values", "x", "g")):
        read = {role: at["g" if role == "y" else "f"], **states}
        if role == "x":
            read.pop("sums", None)
        tape.emit(kind, read.values(), [found[at[result]]], operands=tuple(read))
    made = {name: value.name for name, value in found.items()}
    return made | {at[role]: states[role] for role in STATES if role in at}


def _read_values(tape: _Tape, op: Op, grads: dict[str, str]) -> Cotangents:
    at = dict(zip(op.attr("operands"), op.inputs, strict=True))
    x, states = at["x"], {role: at[role] for role in STATES if role in at}
    rows, sums = grads[op.output.name], True if "sums" in at else None
    den = grads["den"] if sums else None
    found = {name: tape.gradient_of(name) for name in (x, *states.values())}
    read = {"y": rows, **({"r": den} if den else {}), **states}
    tape.emit("read_features", read.values(), [found[x]], operands=tuple(read))
    given = {"f": x, "g": rows, **({"c": den} if den else {})}
    for role, name in states.items():  # what is given to results that are returned as well
        if name in tape.found:
            given[role] = tape.found[name]
            found[name] = Value(f"{found[name].name}_all", found[name].dtype, found[name].shape)
    made = [found[name] for name in states.values()]
    tape.emit("linear_states", given.values(), made, operands=tuple(given), heads="Hk", sums=sums)
    return {name: value.name for name, value in found.items()}


RULES = {
    "normalise": _normalise,
    "features": _features,
    "linear_values": _linear_values,
    "linear_states": _linear_states,
    "read_values": _read_values,
}
"""For each primitive, what the gradients of its results make those of its operands."""
