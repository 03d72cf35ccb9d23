"""The CPU backend: Kernel IR spelled as TVMScript text. It decides nothing but registers and vectors.

The function takes what `tvm_signature.signature` lists, addresses and numbers, and checks nothing: whoever
calls it does. Then come `worker, workers, p_ws`: it runs the cells worker, worker + workers, ... of the
flattened grid (first dimension fastest) in a workspace of `workspace_bytes(kernel)` bytes that starts on a
cache line. Each worker has its own.

A tile is `b_<name>`, a coordinate `i_<axis>`, a register block `r_<tile>`.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import lru_cache

from ..ir.kernel import Compute, Dot, For, If, Kernel, Let, Load, Reduce, Scan, Stmt, Store
from .tvm_context import LIVE, Context
from .tvm_layout import BYTES, LINE, TENSOR_DTYPES, Tile
from .tvm_memory import load, store
from .tvm_names import safe
from .tvm_signature import signature, stride_name
from .tvm_text import Lines
from .tvm_tiles import compute, dot, reduce, scan


def emit(kernel: Kernel) -> str:
    """The kernel as TVMScript. Deterministic: equal kernels give equal text.

    Raises UnsupportedError for a dtype or a function that CPUs lack."""
    return _emit(kernel)[0]


def workspace_bytes(kernel: Kernel) -> int:
    """Bytes of scratch memory that one worker needs."""
    return _emit(kernel)[1]


@lru_cache(maxsize=8)
def _emit(kernel: Kernel) -> tuple[str, int]:
    ctx = Context(kernel)
    with ctx.out.block(""):
        _cells(ctx)
    head = Lines()
    for line in (kernel.name, *kernel.comment):
        head.line(f"# {line}")
    head.line("@T.prim_func")
    with head.block(f"def {safe(kernel.name)}({_parameters(kernel)}):"):
        head.line(f'T.func_attr({{"global_symbol": "{kernel.name}", "tirx.noalias": True}})')
        _declare_tensors(head, kernel)
        _declare_buffers(head, ctx)
    return str(head) + str(ctx.out).lstrip("\n"), max(LINE, ctx.workspace.end)


# arguments ----------------------------------------------------------------------------------------


def _parameters(kernel: Kernel) -> str:
    given = [f"{p.name}: {p.type}" for p in signature(kernel)]
    return ", ".join([*given, "worker: T.int64", "workers: T.int64", 'p_ws: T.handle("uint8")'])


def _declare_tensors(out: Lines, kernel: Kernel) -> None:
    for tensor in kernel.tensors:
        dtype = TENSOR_DTYPES[tensor.dtype]
        shape = ", ".join(safe(s) if isinstance(s, str) else f"T.int64({s})" for s in tensor.shape)
        strides = ", ".join(stride_name(tensor, d) for d in range(len(tensor.shape)))
        # No alignment beyond an element's own: callers pass views.
        layout = f"data=p_{tensor.name}, strides=[{strides}], align={BYTES.get(dtype, 1)}, layout=None"
        out.line(f'{safe(tensor.name)} = T.decl_buffer([{shape}], "{dtype}", {layout})')


def _declare_buffers(out: Lines, ctx: Context) -> None:
    size = max(LINE, ctx.workspace.end)
    out.line(f'ws = T.decl_buffer(({size},), "uint8", data=p_ws, align={LINE})')
    for tile in (*ctx.tiles.values(), *ctx.workspace.scratch.values()):
        out.line(_declaration(tile))
    for name, (shape, dtype) in ctx.registers.items():
        # Lowered, the buffer would come from TVM's runtime, which a loaded object does without.
        unlowered = 'annotations={"disable_lower_builtin": True}'
        out.line(f'{name} = T.alloc_buffer({shape}, "{dtype}", scope="local", {unlowered})')


def _declaration(tile: Tile) -> str:
    place = f"data=ws.data, elem_offset={tile.offset // BYTES[tile.storage]}"
    return f'b_{tile.name} = T.decl_buffer({tile.shape}, "{tile.storage}", {place})'


# control ------------------------------------------------------------------------------------------


def _cells(ctx: Context) -> None:
    """The loop over this worker's cells and, inside, the kernel's body."""
    extents = [ctx.scalar(g.extent) for g in ctx.kernel.grid]
    for g, extent in zip(ctx.kernel.grid, extents, strict=True):
        ctx.out.line(f"{safe(g.name)}_cells: T.let = {extent}")
    names = [safe(g.name) for g in ctx.kernel.grid]
    cells = " * ".join(f"{name}_cells" for name in names) or "T.int64(1)"
    with ctx.out.block(f"for turn in range(T.truncdiv({cells} - worker + workers - 1, workers)):"):
        rest = "cell"
        ctx.out.line("cell: T.let = worker + turn * workers")
        for name in names:
            here = rest if name == names[-1] else f"T.truncmod({rest}, {name}_cells)"
            ctx.out.line(f"{name}: T.let = {here}")
            rest = f"T.truncdiv({rest}, {name}_cells)"
        _body(ctx, ctx.kernel.body)


def _body(ctx: Context, body: tuple[Stmt, ...]) -> None:
    for stmt in body:
        _statement(ctx, stmt)


def _statement(ctx: Context, stmt: Stmt) -> None:
    match stmt:
        case Let():
            _let(ctx, stmt)
        case Compute():
            compute(ctx, stmt)
        case Load():
            if stmt.dst not in ctx.in_place:
                load(ctx, stmt)
        case Store():
            store(ctx, stmt)
        case Dot():
            dot(ctx, stmt)
        case Reduce():
            reduce(ctx, stmt)
        case Scan():
            scan(ctx, stmt)
        case If():
            with ctx.out.block(f"if {ctx.scalar(stmt.cond, 'bool')}:"):
                _body(ctx, stmt.body)
        case For():
            _for(ctx, stmt)


def _let(ctx: Context, stmt: Let) -> None:
    value = ctx.printer(stmt.expr, address=True).print(stmt.expr)
    if ctx.names.natural(stmt.expr):
        ctx.names.never_negative.add(stmt.name)
    if value.dtype == "bool":
        ctx.names.truths.add(stmt.name)
    text = f"T.int64({value.text})" if value.number else value.text
    if (
        value.dtype == "int32" and not value.number
    ):  # an element of a tensor: names of scalars are 64 bits wide
        text = f'T.Cast("int64", {value.text})'
    counted = [a.name for a in ctx.kernel.axes if a.live == stmt.name and ctx.is_live(a.name)]
    if counted:
        text = _unseen(ctx, text)
    ctx.out.line(f"{safe(stmt.name)}: T.let = {text}")
    for axis in counted:
        _count_vectors(ctx, f"v_{axis}", safe(stmt.name))


def _unseen(ctx: Context, text: str) -> str:
    """A value by way of a register: TVM would analyse anew, at every index of every loop that it bounds, what
    it was computed from."""
    register = ctx.register("count", (1,), "int64")
    ctx.out.line(f"{register}[0] = {text}")
    return f"{register}[0]"


def _count_vectors(ctx: Context, name: str, count: str) -> None:
    """How many vectors there are of a live axis, and how they are taken together. See Context.pieces."""
    ctx.out.line(f'{name}: T.let = T.truncdiv(T.Cast("int32", {count}) + {LIVE - 1}, {LIVE})')
    ctx.out.line(f"{name}_one: T.let = T.max(2 - {name}, 0)")
    ctx.out.line(f"{name}_two: T.let = T.truncmod(2 * {name}, 3) - 2 * {name}_one")
    ctx.out.line(f"{name}_three: T.let = T.truncdiv({name} - 2 * {name}_two, 3)")


def _for(ctx: Context, stmt: For) -> None:
    """One loop; over several spans, inside a loop over the spans, so that the body stands here once."""
    name, many = safe(stmt.var), len(stmt.spans) > 1
    bounds: dict[str, list[str]] = {"lo": [], "hi": []}
    for n, span in enumerate(stmt.spans):
        for end, expr in (("lo", span.lo), ("hi", span.hi)):
            bounds[end].append(f"{name}_{end}{n if many else ''}")
            ctx.out.line(f"{bounds[end][-1]}: T.let = {ctx.scalar(expr)}")
    if all(ctx.names.natural(span.lo) for span in stmt.spans):
        ctx.names.never_negative.add(stmt.var)
    with ExitStack() as stack:
        if many:
            stack.enter_context(ctx.out.block(f"for {name}_span in range({len(stmt.spans)}):"))
            for end, names in bounds.items():
                ctx.out.line(f"{name}_{end}: T.let = {_choose(f'{name}_span', names)}")
        # From zero: TVM would repeat a bound that is not a constant.
        stack.enter_context(ctx.out.block(f"for {name}_step in range({name}_hi - {name}_lo):"))
        ctx.out.line(f"{name}: T.let = {name}_lo + {name}_step")
        _body(ctx, stmt.body)


def _choose(selector: str, names: list[str]) -> str:
    text = names[-1]
    for n in reversed(range(len(names) - 1)):
        text = f"T.Select({selector} == {n}, {names[n]}, {text})"
    return text
