"""linear_build: a linear attention, and its gradients, as graphs of primitives.

    %fq = features %q {map}
    %fk = features %k {map}
    %num, %den = linear_values %fq, %fk, %v {order = 'forward', operands = ('x', 'f', 'g'), keeps = True}
    %o = normalise %num, %den {eps}

The gradients follow by one rule a primitive, as in passes/differentiate.py. A sum of products of three,
out_i = sum_j (x_i . f_j) g_j, is linear in each of them, and so its gradients are such sums again: that of x
over the same keys, those of f and g over the rows that a key gives to. The state that later rows begin with
is what its gradient begins with, from the other end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..ir.errors import UnsupportedError
from ..ir.graph import Extent, Graph, Op, Value
from .linear_spec import LinearSpec

REVERSED = {"all": "all", "forward": "backward", "backward": "forward"}
STATES = ("state", "sums")


def build_linear(spec: LinearSpec) -> Graph:
    """The unfused graph: inputs q, k, v (, state, sums); results o (, den) (, new_state, new_sums)."""
    wide, keys = spec.accumulator, "L" if spec.causal else "N"
    q = Value("q", spec.dtype, ("B", "Hq", "L", spec.qk_size))
    k = Value("k", spec.dtype, ("B", "Hk", keys, spec.qk_size))
    v = Value("v", spec.dtype, ("B", "Hk", keys, spec.v_size))
    rows = ("B", "Hq", "L")
    state, sums = ("B", "Hk", spec.features, spec.v_size), ("B", "Hk", spec.features)
    shapes = (state, sums) if spec.normalised else (state,)
    given = tuple(Value(n, wide, s) for n, s in zip(STATES, shapes, strict=False)) if spec.initial else ()
    final = (
        tuple(Value(f"new_{n}", wide, s) for n, s in zip(STATES, shapes, strict=False)) if spec.final else ()
    )
    den = (Value("den", wide, rows),) if spec.normalised else ()
    o = Value("o", spec.dtype, (*rows, spec.v_size))
    num = Value("num", wide, o.shape) if spec.normalised else o
    products = Op(
        "linear_values",
        ("fq", "fk", "v", *(g.name for g in given)),
        (num, *den, *final),
    ).with_attrs(
        operands=("x", "f", "g", *STATES[: len(given)]),
        order="forward" if spec.causal else "all",
        keeps=True if den else None,
        final=True if final else None,
        sums=True if spec.normalised else None,
        heads="Hk" if final else None,
    )
    ops = [
        Op("features", ("q",), (Value("fq", wide, (*rows, spec.features)),)).with_attrs(map=spec.q_map),
        Op("features", ("k",), (Value("fk", wide, (*k.shape[:3], spec.features)),)).with_attrs(
            map=spec.k_map
        ),
        products,
    ]
    if spec.normalised:
        ops.append(Op("normalise", ("num", "den"), (o,)).with_attrs(eps=float(spec.eps or 0.0)))
    kept = ("den",) if spec.keeps and spec.normalised else ()
    outputs = ("o", *kept, *(f.name for f in final))
    return Graph("linear_attention", (q, k, v, *given), tuple(ops), outputs)


# gradients ----------------------------------------------------------------------------------------------

Cotangents = dict[str, str]  # by the names of operands


@dataclass
class _Tape:
    """The gradient graph while it grows."""

    forward: Graph
    known: dict[str, Value]
    ops: list[Op] = field(default_factory=list)

    def emit(self, kind: str, inputs: Iterable[str], outputs: Iterable[Value], **attrs: object) -> str:
        self.ops.append(Op(kind, tuple(inputs), tuple(outputs)).with_attrs(**attrs))
        return self.ops[-1].output.name

    def gradient_of(self, name: str) -> Value:
        of = self.forward.values[name]
        return Value(f"d{name}", of.dtype, of.shape)

    def wide(self, name: str, shape: tuple[Extent, ...]) -> Value:
        return Value(name, self.forward.values["num" if "num" in self.forward.values else "fq"].dtype, shape)


def build_linear_gradients(spec: LinearSpec, wanted: Iterable[str]) -> Graph:
    """The graph of the gradients of `wanted` of q, k, v, state and sums.

    Its inputs are those of them that it reads of the forward's, o and den, do, and dnew_state and dnew_sums
    where spec.final."""
    wanted = tuple(wanted)
    forward = build_linear(spec)
    kept = [v for name in ("o", "den") if (v := forward.values.get(name)) is not None]
    given = ["o", *(name for name in forward.outputs if name.startswith("new_"))]
    incoming = [Value(f"d{name}", forward.values[name].dtype, forward.values[name].shape) for name in given]
    inputs = (*forward.inputs, *kept, *incoming)
    tape = _Tape(forward, {v.name: v for v in inputs})
    tape.ops = [op for op in forward.ops if op.kind == "features"]
    found = {name: f"d{name}" for name in given}
    for op in reversed(forward.ops):
        results = {v.name: found[v.name] for v in op.outputs if v.name in found}
        if not results:
            continue
        if op.kind not in RULES:
            raise UnsupportedError(f"{op.kind} has no gradient rule, and %{op.output.name} needs one")
        found |= RULES[op.kind](tape, op, results)
    outputs = tuple(found[name] for name in wanted)
    made = Graph("linear_attention_grad", inputs, tuple(tape.ops), outputs).without_dead()
    read = {i for op in made.ops for i in op.inputs}
    return Graph(made.name, tuple(v for v in inputs if v.name in read), made.ops, outputs)


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


RULES = {"normalise": _normalise, "features": _features, "linear_values": _linear_values}
"""For each primitive, what the gradients of its results make those of its operands."""
