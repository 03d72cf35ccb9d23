"""fuse: a product by groups takes in the gather before it and the map behind it.

Before::

    %xs = gather %x, %tokens ; %g = grouped_matmul %xs, %w, %bounds, %bias
    %a, %b = split %g ; %h = map %a, %b {expr = f}

After::

    %h = grouped_gemm %x, %w, %bounds, %tokens, %bias {biased = True, expr = f, gathers = True, halves =
    'split'}

Before::  %w = dequantize %codes, %scales {format = q} ; %y = grouped_gemm %h, %w, %bounds
After::   %y = grouped_gemm %h, %codes, %bounds, %scales {quantized = q}

A product that is returned too, as gradients want it, becomes a second result.

Leaves alone: what is used elsewhere or returned; maps of other values too.
"""

from __future__ import annotations

from dataclasses import replace

from ...ir.graph import Graph, Op, Value


def fuse_experts(graph: Graph) -> Graph:
    """Every product by groups as a grouped_gemm, with what fits into it."""
    for op in graph.of_kind("grouped_matmul"):
        gather = _before(graph, op)
        behind = _behind(graph, op)
        kept = op.outputs if behind and op.output.name in graph.outputs else ()
        graph = graph.replace_ops([*gather, op, *behind], [_fused(op, gather, behind, kept)])
    return graph.map_ops(lambda op: _decoding(graph, op)).without_dead()


def _decoding(graph: Graph, op: Op) -> Op | None:
    """A product of dequantised matrices, taking their codes: every product decodes what it reads itself."""
    made = graph.producer(op.inputs[1]) if op.kind == "grouped_gemm" else None
    if made is None or made.kind != "dequantize":
        return None
    first, *more = made.inputs
    fused = replace(op, inputs=(op.inputs[0], first, *op.inputs[2:], *more))
    return fused.with_attrs(quantized=made.attr("format"), unit=None)


def _only(graph: Graph, name: str) -> Op | None:
    """The one operation that uses a value, where nothing else does."""
    users = graph.users(name)
    return users[0] if len(users) == 1 and name not in graph.outputs else None


def _before(graph: Graph, op: Op) -> list[Op]:
    made = graph.producer(op.inputs[0])
    if made is None or made.kind != "gather" or _only(graph, made.output.name) is None:
        return []
    return [made]


def _behind(graph: Graph, op: Op) -> list[Op]:
    users = graph.users(op.output.name)
    user = users[0] if len(users) == 1 else None
    if user is not None and user.kind == "split":
        names = tuple(v.name for v in user.outputs)
        maps = [_only(graph, name) for name in names]
        found = maps[0]
        if found is None or found is not maps[1] or found.kind != "map" or found.inputs != names:
            return []
        return [user, found]
    return [user] if user is not None and user.kind == "map" and len(user.inputs) == 1 else []


def _fused(op: Op, gather: list[Op], behind: list[Op], kept: tuple[Value, ...]) -> Op:
    a, w, bounds, *rest = op.inputs
    rest, choice = (rest[:-2], rest[-2:]) if op.attr("chooses") else (rest, [])
    many = 2 if op.attr("adds") else 0
    added, bias = rest[:many], rest[many:]
    operands = [a, w, bounds]
    attrs = dict(op.attrs)
    if gather:
        operands[0] = gather[0].inputs[0]
        operands.append(gather[0].inputs[1])
        attrs["gathers"] = True
    if bias:
        attrs["biased"] = True
    for one in behind:
        if one.kind == "split":
            attrs["halves"] = "interleaved" if one.attr("interleaved") else "split"
        else:
            attrs["expr"] = one.attr("expr")
    last = behind[-1] if behind else op
    return replace(
        op,
        kind="grouped_gemm",
        inputs=(*operands, *added, *bias, *choice),
        outputs=(*last.outputs, *kept),
        attrs=tuple(attrs.items()),
    )
