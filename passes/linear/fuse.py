"""fuse: features, quotients and their gradients become part of the products that use them.

Before::

    %fq = features %q {map = m} ; %fk = features %k {map = m}
    %num, %den = linear_values %fq, %fk, %v {keeps = True} ; %o = normalise %num, %den {eps = e}

After::

    %o, %den = linear_values %q, %k, %v {x_map = m, f_map = m, eps = e, keeps = True}

and of gradients, %dq = features_grad %q, %dfq, where linear_features makes %dfq, is one linear_features with
an operand `of`; %dnum = %do / %den is divided where it is loaded. What rows read of states likewise.

Leaves alone: what is used by other operations or returned.
"""

from __future__ import annotations

from dataclasses import replace

from ...ir.graph import Graph, Op

PRODUCTS = ("linear_values", "linear_features", "linear_states", "read_values", "read_features")


def fuse_linear(graph: Graph) -> Graph:
    """Every operation fused that can be."""
    graph = graph.map_ops(lambda op: _with_features(graph, op)).without_dead()
    for op in graph.of_kind("normalise"):
        graph = _with_quotient(graph, op)
    for op in graph.of_kind("features_grad"):
        graph = _with_gradient(graph, op)
    for op in graph.of_kind("normalise_grad"):
        graph = _with_divisor(graph, op)
    return graph.without_dead()


def _with_features(graph: Graph, op: Op) -> Op | None:
    if op.kind not in PRODUCTS:
        return None
    inputs, maps = list(op.inputs), {}
    for n, (role, name) in enumerate(zip(op.attr("operands"), op.inputs, strict=True)):
        made = graph.producer(name)
        if role in ("x", "f") and made is not None and made.kind == "features":
            inputs[n] = made.inputs[0]
            by = made.attr("map")
            maps[f"{role}_map"] = None if by.is_identity else by
    return replace(op.with_attrs(**maps), inputs=tuple(inputs)) if maps else None


def _with_quotient(graph: Graph, op: Op) -> Graph:
    num, den = op.inputs
    made = graph.producer(num)
    if made is None or made.kind not in ("linear_values", "read_values"):
        return graph
    if graph.users(num) != (op,) or num in graph.outputs:
        return graph
    if made.outputs[1:2] != (graph.values[den],) or not made.attr("keeps"):
        return graph
    kept = den in graph.outputs or graph.users(den) != (op,)
    rest = made.outputs[1:] if kept else made.outputs[2:]
    fused = replace(made, outputs=(op.output, *rest))
    fused = fused.with_attrs(eps=op.attr("eps"), keeps=True if kept else None)
    return graph.replace_ops((made, op), (fused,))


def _with_gradient(graph: Graph, op: Op) -> Graph:
    of, df = op.inputs
    made = graph.producer(df)
    if made is None or made.kind not in ("linear_features", "read_features"):
        return graph
    if graph.users(df) != (op,) or df in graph.outputs:
        return graph
    fused = replace(made, inputs=(*made.inputs, of), outputs=op.outputs)
    fused = fused.with_attrs(operands=(*made.attr("operands"), "of"), out_map=op.attr("map"))
    return graph.replace_ops((made, op), (fused,))


def _with_divisor(graph: Graph, op: Op) -> Graph:
    """A gradient of numerators that products alone read, and not by its values twice."""
    do, _, den = op.inputs
    if len(op.outputs) < 2 or op.output.name in graph.outputs:
        return graph
    name = op.output.name
    users = graph.users(name)
    places = {
        id(u): [r for r, i in zip(u.attr("operands"), u.inputs, strict=True) if i == name]
        for u in users
        if u.kind in PRODUCTS
    }
    if any(len(places.get(id(u), ())) != 1 for u in users):
        return graph

    def rule(user: Op) -> Op | None:
        if user == op:
            return replace(op, outputs=op.outputs[1:])
        if name not in user.inputs:
            return None
        (role,) = places[id(user)]
        inputs = tuple(do if i == name else i for i in user.inputs)
        operands = (*user.attr("operands"), "over")
        divided = user.with_attrs(operands=operands, divides=role, eps=op.attr("eps"))
        return replace(divided, inputs=(*inputs, den))

    return graph.map_ops(rule)
