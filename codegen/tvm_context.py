"""What the emitters of statements share: output, names, tiles, registers, and loops over tile axes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import sympy

from ..ir.expr import Expr
from ..ir.kernel import Compute, Dot, Kernel, Load, Reduce, Scan
from .tvm_expr import SCALAR_CALLS, Printer, contains
from .tvm_layout import Piece, Tile, Workspace, pieces, walk
from .tvm_names import Names
from .tvm_text import Lines

LIVE = 16  # elements of the vectors that hold what is there of an axis
Place = tuple[str, tuple[Expr, ...]]  # a tensor and an index


class Context:
    """The state of one emission."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.meta = dict(kernel.meta)
        self.workspace = Workspace(kernel)
        self.names = Names(kernel, self.workspace.tiles)
        self.out = Lines()
        self.registers: dict[str, tuple[tuple[int, ...], str]] = {}
        self.definitions = _definitions(kernel)
        self.in_place = _in_place(kernel, self.definitions) if self.meta.get("in_place") else {}

    @property
    def tiles(self) -> dict[str, Tile]:
        return self.workspace.tiles

    def extent(self, axis: str) -> int:
        return self.kernel.axis(axis).extent

    def is_live(self, axis: str) -> bool:
        """Whether the coordinates of an axis may be fewer than its extent, so that loops run over as many
        vectors of LIVE as hold them."""
        found = self.kernel.axis(axis)
        return found.live is not None and found.extent > LIVE and found.extent % LIVE == 0

    def count(self, axis: str, width: int = 1) -> str:
        """How many blocks of `width`, a divisor of LIVE and of the extent, an axis has: a number, or text."""
        if not self.is_live(axis):
            return str(self.extent(axis) // width)
        return f"v_{axis}" if width == LIVE else f"v_{axis} * {LIVE // width}"

    def pieces(self, axis: str, dtype: str, *, blocked: bool = False) -> list[Piece]:
        """The vectors of an axis. blocked: those whose accumulators share registers; of a live axis three, or
        two where three do not divide what there is, or one that is alone."""
        if not self.is_live(axis):
            return pieces(self.extent(axis), dtype)
        if not blocked:
            return [Piece(0, self.count(axis, LIVE), LIVE)]
        one, two, three = (f"v_{axis}_{n}" for n in ("one", "two", "three"))
        found = [Piece(0, one, LIVE), Piece(0, two, 2 * LIVE), Piece(f"{two} * {2 * LIVE}", three, 3 * LIVE)]
        return found[: self.extent(axis) // LIVE]

    def register(self, stem: str, shape: tuple[int, ...], dtype: str) -> str:
        """A local buffer, shared by uses of the same shape."""
        name, n = f"r_{stem}", 1
        while self.registers.get(name, (shape, dtype)) != (shape, dtype):
            n += 1
            name = f"r_{stem}_{n}"
        self.registers[name] = shape, dtype
        return name

    # expressions ----------------------------------------------------------------------------------

    def printer(self, *exprs: Expr, dtype: str = "", address: bool = False) -> Printer:
        """A printer for use at this place; floats are as wide as `dtype` or the tiles that are read."""
        wide = dtype == "float64"
        if dtype[:5] != "float":
            names = {str(s) for e in exprs for s in e.free_symbols}
            wide = any(self.tiles[n].storage == "float64" for n in names & set(self.tiles))
        return Printer(self.names, self.out.let, "float64" if wide else "float32", address=address)

    def scalar(self, expr: Expr, dtype: str = "int64") -> str:
        """A scalar of the kernel: a bound, a condition."""
        return self.printer(expr, address=True).text(expr, dtype)

    def depends(self, expr: Expr, axis: str) -> bool:
        """Whether an expression differs along an axis, through tiles too."""
        names = {str(s) for s in expr.free_symbols}
        return axis in names or any(axis in self.tiles[n].axes for n in names & set(self.tiles))

    # loops ----------------------------------------------------------------------------------------

    @contextmanager
    def loops(self, *axes: str) -> Iterator[None]:
        """Nested serial loops over whole axes."""
        with ExitStack() as stack:
            for axis in axes:
                if self.extent(axis) == 1:
                    stack.enter_context(self.names.at(**{axis: "0"}))
                    continue
                stack.enter_context(self.out.block(f"for i_{axis} in range({self.count(axis)}):"))
                stack.enter_context(self.names.at(**{axis: f"i_{axis}"}))
            yield

    def each(
        self, axis: str | None, dtype: str, body: Callable[[], None], *exprs: Expr, address: bool = False
    ) -> None:
        """body for every coordinate of an axis, in vectors unless one of exprs has no vector form.

        address: the coordinate indexes a tensor (64 bits)."""
        if axis is None:
            body()
        elif any(contains(e, SCALAR_CALLS) for e in exprs):
            with self.loops(axis):
                body()
        else:
            for piece in self.pieces(axis, dtype):
                with self.outer(axis, piece), self.vector(axis, piece, address=address):
                    body()

    @contextmanager
    def blocks(self, axis: str, width: int) -> Iterator[None]:
        """The loop over blocks of a whole axis."""
        with self.out.block(f"for i_{axis}0 in range({self.count(axis, width)}):"):
            yield

    @contextmanager
    def outer(self, axis: str, piece: Piece) -> Iterator[None]:
        """The loop over the vectors of a piece."""
        if piece.count == 1:
            yield
            return
        with self.out.block(f"for i_{axis}0 in range({piece.count}):"):
            yield

    def lane(self, axis: str, piece: Piece) -> str:
        """The number of an element in the vector of a piece, inside `vector`."""
        parts = [f"i_{axis}1 * {piece.lanes}"] if piece.lanes < piece.width else []
        return " + ".join([*parts, f"i_{axis}"]) if piece.lanes > 1 else "0"

    @contextmanager
    def vector(self, axis: str, piece: Piece, *, address: bool = False) -> Iterator[None]:
        """The lanes of one vector of a piece, inside `outer`."""
        # A tensor's index is 64 bits wide, and TVM sees no vector through a conversion.
        lanes = piece.lanes
        width = f"T.int64({lanes})" if address else str(lanes)
        with ExitStack() as stack:
            terms = [f"i_{axis}0 * {piece.width}" if piece.width > 1 else f"i_{axis}0"]
            if piece.count == 1:
                terms = []
            if lanes < piece.width:
                stack.enter_context(self.out.block(f"for i_{axis}1 in T.unroll({piece.width // lanes}):"))
                terms.append(f"i_{axis}1 * {lanes}")
            if lanes > 1:
                stack.enter_context(self.out.block(f"for i_{axis} in T.vectorized({width}):"))
                terms.append(f"i_{axis}")
            if piece.start or not terms:
                terms.insert(0, str(piece.start))
            stack.enter_context(self.names.at(**{axis: " + ".join(terms)}))
            yield


def _in_place(kernel: Kernel, definitions: dict[sympy.Symbol, Expr]) -> dict[str, Place]:
    """Tiles that dots read where they lie in memory: those loaded as they are, without a guard, along whose
    rows a dot sums, each element a scalar of its register block. A copy would cost a pass over them, in which
    nothing else is computed."""
    tensors = {t.name: t for t in kernel.tensors}
    found: dict[str, Place] = {}
    for stmt in walk(kernel.body):
        if isinstance(stmt, Load) and stmt.guard == sympy.true and kernel.lanes not in stmt.axes:
            tensor = tensors[stmt.tensor]
            if tensor.dtype == stmt.dtype and tensor.dtype in ("f32", "f64"):
                found[stmt.dst] = tensor.name, tuple(i.xreplace(definitions) for i in stmt.index)
    for stmt in walk(kernel.body):
        if isinstance(stmt, Dot):
            over = sympy.Symbol(stmt.over, integer=True)
            for name in {stmt.a, stmt.b} & set(found):
                tensor, index = found[name]
                unit = tensors[tensor].unit
                others = [i for d, i in enumerate(index) if d != unit]
                if unit is None or (index[unit] - over).has(over) or any(i.has(over) for i in others):
                    del found[name]
    return {n: f for n, f in found.items() if not _used_elsewhere(kernel, n)}


def _used_elsewhere(kernel: Kernel, tile: str) -> bool:
    """Whether anything but dots reads a tile."""
    for stmt in walk(kernel.body):
        for name in ("expr", "guard", "other", "value", "cond"):
            expr = getattr(stmt, name, None)
            if expr is not None and tile in {str(s) for s in expr.free_symbols}:
                return True
        if tile in {str(s) for i in getattr(stmt, "index", ()) for s in i.free_symbols}:
            return True
    return False


def _definitions(kernel: Kernel) -> dict[sympy.Symbol, Expr]:
    """Integer tiles that are written once, from coordinates and scalars only: what they stand for."""
    written: dict[str, list[object]] = {}
    for stmt in walk(kernel.body):
        if isinstance(stmt, (Compute, Load, Dot, Reduce, Scan)):
            written.setdefault(stmt.dst, []).append(stmt)
    known: dict[sympy.Symbol, Expr] = {}
    for name, (first, *more) in written.items():
        if more or not isinstance(first, Compute) or first.dtype not in ("i32", "i64"):
            continue
        expr = first.expr.xreplace(known)
        if not {str(s) for s in expr.free_symbols} & set(written):
            known[sympy.Symbol(name, integer=True)] = expr
    return known
