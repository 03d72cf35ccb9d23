"""join: operations that read the same rows become one, where a program can hold what they need.

Before::

    %o, %den = read_values %q, %s, %z {eps} ; %dden = normalise_grad %do, %o, %den
    %dq = read_features %do, %dden, %s, %z, %q, %den ; %ds, %dz = linear_states %q, %do, %dden, %den

After::

    %dq, %ds, %dz = read_gradients %q, %do, %s, %z {eps}

since do . o is phi(q) . (s do) over the denominator, which what dq needs holds already: a row is read once,
and neither outputs nor denominators are kept. And %dk, %dv of keys and values, which read_features and
read_values make of the same rows, are one give_gradients.

Leaves alone: states that do not fit a program's registers, and, on a CPU, keys beside values, whose sums run
along different lanes.
"""

from __future__ import annotations

from ...ir.graph import Graph, Op
from .schedule import Tile
from .spec import LinearSpec


def join_linear(graph: Graph, spec: LinearSpec) -> Graph:
    """Every operation joined that can be."""
    for op in graph.of_kind("linear_states"):
        graph = _with_rows(graph, op, spec)
    for op in graph.of_kind("read_features"):
        graph = _with_values(graph, op, spec)
    return graph.without_dead()


def roles(op: Op) -> dict[str, str]:
    """Operands by role."""
    return dict(zip(op.attr("operands"), op.inputs, strict=True))


def _joined(kind: str, named: dict[str, str | None], outputs: tuple, **attrs: object) -> Op:
    given = {role: name for role, name in named.items() if name is not None}
    op = Op(kind, tuple(given.values()), outputs)
    return op.with_attrs(operands=tuple(given), **attrs)


def _with_rows(graph: Graph, states: Op, spec: LinearSpec) -> Graph:
    """The state that rows leave, by the operation that makes their gradients."""
    gives = roles(states)
    for rows in graph.of_kind("read_features"):
        reads = roles(rows)
        same = gives["f"], gives["g"], gives.get("c"), gives.get("over"), _map(states.attr("f_map"))
        if same != (
            reads.get("of"),
            reads["y"],
            reads.get("r"),
            reads.get("over"),
            _map(rows.attr("out_map")),
        ):
            continue
        eps = None
        if "r" in reads:
            eps = _quotient(graph, reads, rows.attr("out_map"))
            if eps is None:
                continue
        named = {
            "x": gives["f"], "y": gives["g"], "state": reads["state"], "sums": reads.get("sums"),
            "begin": gives.get("state"), "begin_sums": gives.get("sums"),
        }  # fmt: skip
        made = _joined(
            "read_gradients",
            named,
            (*rows.outputs, *states.outputs),
            eps=eps,
            x_map=_map(rows.attr("out_map")),
        )
        if Tile(made, spec).chunks() is not None:
            return graph.replace_ops((rows, states), (made,))
    return graph


def _quotient(graph: Graph, reads: dict[str, str], by: object) -> float | None:
    """The eps of the quotient whose gradients rows get, if the same state gives it."""
    back = graph.producer(reads["r"])
    if back is None or back.kind != "normalise_grad" or back.inputs[0] != reads["y"]:
        return None
    made = graph.producer(back.inputs[1])
    if made is None or made.kind != "read_values" or [v.name for v in made.outputs] != list(back.inputs[1:]):
        return None
    known = roles(made)
    same = [known["x"], known["state"], known.get("sums"), _map(made.attr("x_map")), made.attr("eps")]
    wanted = [reads["of"], reads["state"], reads.get("sums"), _map(by), back.attr("eps")]
    return back.attr("eps") if same == wanted and back.inputs[2] == reads.get("over") else None


def _with_values(graph: Graph, rows: Op, spec: LinearSpec) -> Graph:
    """The gradients of what gave to a state: of its features, and of its values."""
    if spec.is_cpu:
        return graph
    reads = roles(rows)
    for values in graph.of_kind("read_values"):
        other = roles(values)
        same = other["state"] == reads["state"] and not values.attr("keeps") and values.attr("eps") is None
        if not same or other["x"] != reads.get("of") or "r" in reads or "over" in reads or "sums" in other:
            continue
        if _map(values.attr("x_map")) != _map(rows.attr("out_map")):
            continue
        named = {"f": other["x"], "g": reads["y"], "state": reads["state"], "sums": reads.get("sums")}
        outputs = (*rows.outputs, *values.outputs)
        made = _joined("give_gradients", named, outputs, f_map=_map(rows.attr("out_map")))
        if Tile(made, spec).chunks() is not None:
            return graph.replace_ops((rows, values), (made,))
    return graph


def _map(by: object) -> object:
    """A feature map, or None for the identity."""
    return None if by is None or by.is_identity else by  # type: ignore[attr-defined]
