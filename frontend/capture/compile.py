"""A captured graph with what is found in it replaced by calls, and without what nobody needs then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from ...ir.errors import GossamerError
from ..report import Compiled, Left
from ..term import TRUE, Term, constant
from ..trace.torch_functions import FUNCTIONS, METHODS
from .adapters import adapted_parts
from .attention import find_attention
from .create import CREATIONS
from .einsum import spell_out
from .expert_site import replace_experts
from .experts import find_experts
from .inline import is_whole, write_out
from .linear import find_linear
from .linear_site import replace_linear
from .match import Attention
from .memory import Memory
from .operand import memory_order
from .ops import Operation, arguments, operation, value_of
from .report import place
from .score import LOW, bind, split
from .site import Site, numbers_in, tensors_in
from .slots import symbols
from .tensor import LeftAlone, Opaque, Reader, size_term
from .terms import kind_of, reads_in, tidy
from .views import VIEWS
from .written import is_added

Find = Callable[[Reader, fx.Graph], Iterator[tuple[fx.Node, Any]]]
Replace = Callable[[fx.Graph, Reader, Any], None]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ZERO = constant(0.0)
_WRAPS = ("tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint")
_PRODUCTS = ("softmax", "matmul", "bmm", "mm", "einsum", "baddbmm", "scaled_dot_product_attention")
_SOFTMAX = ("sum", "amax", "max", "values", "logsumexp", "log_softmax")


def compile_graph(module: fx.GraphModule) -> tuple[fx.GraphModule, list[Compiled | Left]]:
    """The graph with everything that can be proven equal replaced, and what was found."""
    parts: list[Compiled | Left] = [*adapted_parts(module.graph), *_written_out(module.graph)]
    spell_out(module.graph)
    reader = Reader(module.graph)
    for kind, (find, replace) in KINDS.items():
        for node, match in list(find(reader, module.graph)):
            parts.append(_replaced(kind, replace, reader, node, match))
        if any(isinstance(part, Compiled) for part in parts):
            sweep(module.graph, reader.memory)
    if any(isinstance(part, Compiled) for part in parts):
        module.recompile()
    for body in _bodies(module):
        parts += compile_graph(body)[1]
    reason = getattr(module, "compile_subgraph_reason", None)
    if reason is not None and getattr(reason, "graph_break", False):
        parts.append(_broken(reason))
    return module, parts


def _bodies(module: fx.GraphModule) -> list[fx.GraphModule]:
    """The graphs within a graph that run as they are: those of activation checkpoints and the like."""
    names = [
        str(node.args[0].target)
        for node in module.graph.nodes
        if node.op == "call_function" and str(node.target) in _WRAPS and isinstance(node.args[0], fx.Node)
    ]
    return [getattr(module, name) for name in dict.fromkeys(names)]


def _written_out(graph: fx.Graph) -> Iterator[Left]:
    """Take apart operations that hold a whole attention; those that cannot be."""
    for node in [node for node in graph.nodes if is_whole(node)]:
        where = place([node])
        try:
            write_out(node)
        except LeftAlone as why:
            yield Left("attention", where, str(why))


def _replaced(kind: str, replace: Replace, reader: Reader, node: fx.Node, match: Any) -> Compiled | Left:
    where = place([node])
    if isinstance(match, str):
        return Left(kind, where, match)
    try:
        replace(node.graph, reader, match)
    except (LeftAlone, Opaque, GossamerError, ValueError) as why:
        return Left(kind, where, str(why))
    return Compiled(kind, where)


def _broken(reason: Any) -> Left:
    stack = getattr(reason, "user_stack", None) or []
    where = f"{stack[-1].filename}:{stack[-1].lineno}" if stack else "an unknown line"
    first = str(reason.reason).strip().splitlines()
    return Left("graph", where, f"the capture ends here: {first[0] if first else 'no reason given'}")


def replace_attention(graph: fx.Graph, reader: Reader, match: Attention) -> None:
    """Put a Site in the place of an attention. Raises LeftAlone or Opaque, and changes nothing then."""
    _check(match)
    sizes = {name: size_term(n) for name, n in match.sizes.items()}
    terms = (match.score, match.prob)
    tensors = tensors_in(*terms) + (() if match.sinks is None else (match.sinks,))
    numbers = numbers_in(*terms, *sizes.values())
    held = [reader.tensor_of(name) for name in tensors]
    _check_reads(match, reader)
    known = symbols(graph)
    missing = [name for name in numbers if name not in known]
    if missing:
        raise LeftAlone(f"a size ({missing[0]}) that is no input of the graph")
    value = value_of(match.node)
    _check_prob(match, reader)
    low = max(LOW, torch.finfo(value.dtype).min / 2)
    constants = frozenset(name for name, node in zip(tensors, held, strict=True) if _is_constant(node))
    order = memory_order(value)
    site = Site(
        match.operands, match.axes, match.out, order, sizes, match.score, match.prob, low, match.empty,
        numbers, tensors, constants, match.sinks, match.least,
    )  # fmt: skip
    with graph.inserting_before(match.node):
        given = (*match.tensors, *(known[name] for name in numbers), *held)
        call = graph.call_function(site, given)
    reader.memory.replace(match.node, call)


def _check(match: Attention) -> None:
    if value_of(match.node).requires_grad and any(value_of(x).requires_grad for x in match.tensors[:2]):
        inside = match.inside - match.aside
        inside = [value for node in inside if isinstance(value := value_of(node), torch.Tensor)]
        if not all(value.requires_grad for value in inside if value.is_floating_point()):
            raise LeftAlone("gradients stop inside it")
    values = [value_of(node) for node in match.tensors]
    dtypes = {v.dtype for v in values}
    if len(dtypes) > 1 or not dtypes <= set(FLOATS):
        raise LeftAlone(f"query, key and value have dtypes {', '.join(sorted(map(str, dtypes)))}")
    if value_of(match.node).dtype not in dtypes:
        raise LeftAlone("its result has another dtype than the query")


def _check_reads(match: Attention, reader: Reader) -> None:
    reads = reads_in(match.score) + reads_in(match.prob)
    nodes = [*match.tensors, *(reader.leaves[read[1]] for read in reads)]
    for term in (match.score, match.prob):
        if kind_of(term) != "float":
            raise LeftAlone("its scores are no floats")
    for read in reads:
        inner = {leaf for index in read[2:] for leaf in reads_in(index)}
        if any(leaf[0] == "readf" for leaf in inner):
            raise LeftAlone("a tensor is indexed by floats")
    for node in nodes:
        if node in match.inside:
            raise LeftAlone("its mask depends on its scores")


def _where_row_has_keys(prob: Any, reader: Reader) -> Term | None:
    """The mask of which `where(mask.any(-1, keepdim=True), prob, 0)` asks whether its row has a key."""
    wanted = {("prob", ZERO): "ne", (ZERO, "prob"): "eq"}
    if not isinstance(prob, tuple) or prob[0] != "where" or not isinstance(prob[1], tuple):
        return None
    op, *asked = prob[1]
    read: Any = asked[0] if op == wanted.get(prob[2:]) and asked[1] == 0 else None
    leaf = reader.leaves.get(read[1]) if isinstance(read, tuple) and read[0] == "read" else None
    if leaf is None or operation(leaf) != Operation("any"):
        return None
    source, dim, keeps = arguments(leaf, "input", "dim", "keepdim")
    rank = value_of(source).dim()
    if not isinstance(dim, int) or value_of(source).dtype != torch.bool or dim % rank != rank - 1:
        return None
    rows = list(read[2 : 1 + rank]) if keeps else list(read[2:])
    return tidy(reader.operand(source, leaf).at([*rows, "k"]))


def _adds(match: Attention) -> bool:
    """Whether gradients of rows without keys are NaN, as something is added to scores."""
    return value_of(match.node).requires_grad and is_added(match.score)


def _check_prob(match: Attention, reader: Reader) -> None:
    """Refuse probabilities that are changed where NaN, of rows without keys, might become something else."""
    if match.prob == "prob" or match.empty != "nan":
        return
    found = split(match.score, LOW)
    if found.mask == TRUE:
        return
    by_row = _where_row_has_keys(match.prob, reader)
    if by_row is not None and by_row == found.mask and not _adds(match):
        finite = any(fill.value >= match.least for fill in found.fills)
        match.prob, match.empty = ("where", found.mask, "prob", ZERO) if finite else "prob", "zero"
        return
    if match.prob in (
        ("where", found.mask, "prob", ZERO),
        ("where", tidy(("not", found.mask)), ZERO, "prob"),
    ):
        match.empty = "zero"
        return
    lengths = match.sizes["q"], match.sizes["k"]
    if all(isinstance(n, int) for n in lengths) and not numbers_in(found.mask) and not tensors_in(found.mask):
        bound = bind(match.score, {}, lengths, (LOW, match.least), "nan", plain=False)
        if bound.empty == "none":
            return
    raise LeftAlone("its probabilities are changed, and there may be rows without keys")


def _is_constant(node: fx.Node) -> bool:
    """Whether a tensor belongs to a module or to the surroundings of a program, and is no argument of it."""
    if node.op == "get_attr":
        return True
    source = getattr(node.meta.get("grapharg"), "source", None)
    while source is not None:
        if "NNModule" in type(source).__name__ or "ParamBuffer" in type(source).__name__:
            return True
        base = getattr(source, "base", None)
        if base is None:
            return type(source).__name__ == "GlobalSource" or getattr(
                source, "is_derefed_cell_contents", False
            )
        source = base
    return False


def sweep(graph: fx.Graph, memory: Memory) -> None:
    """Remove operations that nobody needs any more, writes to what nobody sees among them."""
    for node in reversed(list(graph.nodes)):
        did = operation(node)
        if did is None or node.users or did.name not in _PURE or node not in memory.group:
            continue
        if not did.writes or memory.is_last_word(node):
            graph.erase_node(node)
            del memory.group[node]


_PURE = frozenset(("any", "nan_to_num", *CREATIONS, *VIEWS, *FUNCTIONS, *METHODS, *_PRODUCTS, *_SOFTMAX))

# Kind -> (what finds it: nodes that stand for it, with a match or why it is left alone; what replaces it).
KINDS: dict[str, tuple[Find, Replace]] = {
    "linear attention": (find_linear, replace_linear),
    "attention": (find_attention, replace_attention),
    "experts": (find_experts, replace_experts),
}
