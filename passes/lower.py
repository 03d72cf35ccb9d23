"""lower: one fused operation, planned, to tile programs: one kernel a group.

A kernel loads the features of its rows, walks over its key tiles, computes the scores of each and masks
them where the mask cuts, and hands them to the operation's fold (passes/folds.py).

Before (one group)::  %o, %lse = attention %q, %k, %v {mask, groups, schedule, loops}
After::               kernel @attention_acsr_fwd(q, k, v, o, lse, ...) grid(...) { ... }

Leaves alone: nothing; an operation without loops is an error.
"""

from __future__ import annotations

from dataclasses import replace

import sympy

from ..ir.expr import INF, Expr, all_of, integer, maximum, minimum, read, real, where
from ..ir.graph import Op
from ..ir.kernel import Axis, Compute, Dot, GridDim, If, Kernel, Let, Load, Reduce, Scalar, Stmt, Tensor
from ..ir.plan import Group, Loops, Schedule
from ..ir.rename import exchange
from .fold_table import FOLDS
from .folds import LOG2E, Part
from .lower_lists import list_kernels
from .operands import Operands, Transposed
from .rounding import together
from .scaffold import COL, KV_LEN, Q_LEN, ROW, B, Scaffold
from .spec import SCALE, AttentionSpec
from .split import SPLITS, leave, merge, partials, share
from .transpose import TRANSPOSED, exchanged

D_AXIS = integer("d")
Plan = tuple[Group, Schedule, Loops]


# What queries and keys call alike; exchanged in kernels whose rows are keys.
ALIKE = (("q_len", "kv_len"), ("q_total", "kv_total"), ("q_bounds", "kv_bounds"))


def lower_operation(
    op: Op, spec: AttentionSpec, plans: tuple[Plan, ...]
) -> tuple[tuple[Kernel, ...], tuple[Tensor, ...]]:
    """The kernels of one fused operation in launch order, and the lists of tiles that they share."""
    kernels: list[Kernel] = []
    lists: list[Tensor] = []
    transposed = op.kind in TRANSPOSED
    spec = _transposed(spec) if transposed else spec
    if not FOLDS[op.kind].walks_for(op):
        plans = plans[:1]
    builders = [_Builder(op, spec, plan, n, len(plans)) for n, plan in enumerate(plans)]
    for plan, builder in zip(plans, builders, strict=True):
        kernel = builder.kernel()
        if builder.over.lists is not None and builder.fold.walks:
            kernels += list_kernels(plan, spec.sequences, kernel, builder.over.lists)
            lists += builder.over.lists.intermediates()
        kernels.append(kernel)
    if builders[-1].split:
        kernels.append(merge(op.kind, spec, builders[-1].schedule, builders[-1].at))
    if transposed:
        kernels = [exchange(kernel, *ALIKE) for kernel in kernels]
        lists = [replace(t, shape=tuple(map(_exchanged_extent, t.shape))) for t in lists]
    return tuple(kernels), tuple(lists)


def _transposed(spec: AttentionSpec) -> AttentionSpec:
    """The spec as kernels whose rows are keys see it: what it says of queries it says of keys."""
    score, prob = (m and replace(m, expr=exchanged(m.expr)) for m in (spec.score_map, spec.prob_map))
    return replace(spec, score_map=score, prob_map=prob, sequences=spec.sequences.transposed)


def _exchanged_extent(extent: int | str | Expr) -> int | str | Expr:
    names = {integer(old): integer(new) for a, b in ALIKE for old, new in ((a, b), (b, a))}
    return extent.xreplace(names) if isinstance(extent, sympy.Basic) else extent


def label_of(op: Op) -> str:
    """What an operation is called among those of a program."""
    of = op.attr("of")
    return op.kind if of is None else f"{op.kind}_of_{of.word}"


class _Builder:
    """Builds the kernel of one group. Every method returns statements; nothing is decided here."""

    def __init__(self, op: Op, spec: AttentionSpec, plan: Plan, index: int, total: int) -> None:
        group, schedule, loops = plan
        kind = op.kind
        self.kind, self.spec, self.schedule, self.loops = kind, spec, schedule, loops
        self.index, self.total = index, total
        self.split = schedule.split
        self.shares: list[Stmt] = []
        if self.split:
            self.shares, loops = share(loops)
            spec = replace(spec, sinks=None)  # they join at the end, once
        flat = spec.target_kind != "cpu"
        self.suffix = f"_{index}" if total > 1 else ""
        self.label = label_of(op)
        lists = f"tiles{'' if kind == 'attention' else f'_{self.label}'}{self.suffix}"
        fold = FOLDS[kind]
        self.over = Scaffold(
            group,
            schedule,
            loops,
            spec.accumulator,
            spec.sequences,
            heads=spec.group,
            flat=flat,
            members=fold.members,
            lists=lists,
            narrow=frozenset(c.name for c in spec.capture_tensors if c.dtype != "i64"),
        )
        operands = Transposed if kind in TRANSPOSED else Operands
        self.at = operands(spec, self.over, values=fold.values)
        if spec.shorter_keys:
            self._stop_at_the_last_key(kind)
        self.acc = spec.accumulator
        self.wide = (
            spec.target_kind != "cpu"
        )  # tensor cores: operands keep their dtype, axes are powers of two
        self.operand = spec.dtype if self.wide else self.acc
        assert spec.score_map is not None, "lower takes specs whose score map holds the scale"
        score = spec.score_map.expr
        plain = score == real("score") * SCALE
        self.folded = plain and not self.wide  # the scale goes into the rows once
        self.late = plain and self.wide and spec.positive  # it follows the maximum, and joins the exponent
        self.score = self.over.bind(together(score, self.acc), attending=True)
        first, last = self.split or index == 0, self.split or index == total - 1
        scale = SCALE * LOG2E if self.late else sympy.S.One
        part = Part(spec, schedule, self.over, self.at, self.operand, scale, first, last, op, self.folded)
        self.fold = fold(part)

    def _stop_at_the_last_key(self, kind: str) -> None:
        """Keys behind those of their sequence are taken as zeros: what memory holds there may be anything."""
        length = maximum(read(integer("kv_lens"), B), sympy.Integer(0))
        self.at.head.append(Let("key_end", minimum(length, Q_LEN if kind in TRANSPOSED else KV_LEN)))
        if kind in TRANSPOSED:
            self.at.row_exists = integer("key_end") > ROW
        else:
            self.over.valid_col = all_of([self.over.valid_col, integer("key_end") > COL])

    def kernel(self) -> Kernel:
        rows = self.over.rows
        axes = [
            self._feature("i", rows) if self.spec.group > 1 else Axis("i", rows, rows),
            Axis("j", self.over.cols, self.over.cols),
        ]
        axes.append(self._feature("d", self.spec.qk_size))
        axes += [self._feature("e", self.spec.v_size)] if self.fold.values else []
        axes += self.over.axes
        end = leave(self.fold, self.index) if self.split else self.fold.end()
        tiles = [*self.shares, *self.over.loop(self._tile())] if self.fold.walks else []
        rows, prepare = self.over.make_rows, self.fold.prepare()
        if self.over.members:
            rows, tiles = self.over.each_member([*prepare, *tiles])
            prepare = []
        body = [*self.at.head, *rows, *self._load_rows(), *prepare, *self.fold.begin(), *tiles, *end]
        grid = (*self.over.grid(), *([GridDim("split", SPLITS)] if self.split else []))
        grid, framed = self.fold.placed(grid, self.over.framed(body))
        return Kernel(
            name=f"{self.label}_{self.spec.format}_{self.fold.direction}{self.suffix}",
            args=self._arguments(),
            grid=grid,
            axes=tuple(axes),
            lanes=None if self.wide else "i",
            body=framed,
            meta=self.schedule.meta,
            comment=self._comment(),
        )

    def _feature(self, name: str, extent: int) -> Axis:
        return Axis(name, extent, max(16, 1 << (extent - 1).bit_length()) if self.wide else extent)

    def _comment(self) -> tuple[str, ...]:
        part = f"part {self.index + 1} of {self.total}" if self.total > 1 else "one part"
        s, (rows, cols) = self.schedule, ("keys", "queries") if self.kind in TRANSPOSED else ("rows", "keys")
        return (
            f"mask: {self.spec.mask_text}",
            f"{part}; {rows} {s.rows}, {cols} {s.cols}, order {self.over.order}",
        )

    def _arguments(self) -> tuple[Tensor | Scalar, ...]:
        args: list[Tensor | Scalar] = [*self.at.inputs, *self.fold.reads(), *self.spec.capture_tensors]
        if self.over.lists is not None and self.fold.walks:
            args += self.over.lists.tensors("in")
        args += partials(self.fold, "inout") if self.split else self.fold.results()
        splits = [Scalar("splits", "i64")] if self.split else []
        args += [*self.at.scalars, *splits, *(Scalar(name, "i64") for name in self.spec.params)]
        args += [Scalar(name, kind) for name, kind in self.spec.map_params]
        return tuple(args)

    def _load_rows(self) -> list[Stmt]:
        if not self.fold.walks:
            return []
        rows = self.at.rows
        place = (*rows.at, D_AXIS)
        load = Load(rows.tile, self.operand, ("i", "d"), rows.tensor, place, self.at.row_exists)
        return [load, *(self._folded(rows.tile, "i") if self.kind not in TRANSPOSED else [])]

    def _folded(self, tile: str, axis: str) -> list[Stmt]:
        """The scale taken into the features of queries, whichever kernel they are loaded by: so that a pair's
        score is the same to the bit in all."""
        fold = self._set(tile, self.operand, (axis, "d"), real(tile) * SCALE * LOG2E)
        return [fold] if self.folded else []

    def _tile(self) -> list[Stmt]:
        """What happens to one key tile: scores, the mask where it cuts, the fold's step."""
        ij, full = ("i", "j"), self.over.full
        if self.over.group.exact or self.over.lists is not None:
            masked = self._set("S", self.acc, ij, where(self.over.attends, real("S"), -INF))
            mask = (*self.over.mask_cols, masked)
            guard: list[Stmt] = [If(sympy.Not(full), mask)]
            if full in (sympy.true, sympy.false):
                guard = [] if full == sympy.true else [*mask]
            return [*self._scores(), *self.fold.products(), *guard, *self.fold.step()]
        ok = sympy.Symbol("ok")
        whole: list[Stmt] = []
        attends = self.over.attends
        if full != sympy.false:
            whole = [Let("whole", where(full, 1, 0))]
            attends = sympy.Or(integer("whole") > 0, attends)
        masked = self._set("S", self.acc, ij, where(ok, real("S"), -INF))
        return [
            *whole,
            *self.over.mask_cols,
            Compute("ok", "bool", ij, attends),
            Reduce("some", "bool", (), "any", ok, ij),
            If(
                sympy.Symbol("some"),
                (*self._scores(), *self.fold.products(), masked, *self.fold.step()),
            ),
        ]

    def _scores(self) -> list[Stmt]:
        rows, cols = self.at.rows, self.at.cols
        at, ij, mapped = (*cols.at, D_AXIS), ("i", "j"), not (self.folded or self.late)
        kept = mapped and self.fold.keeps_products
        products = "R" if kept else "S"
        out: list[Stmt] = [
            Load(cols.tile, self.operand, ("j", "d"), cols.tensor, at, self.over.valid_col),
            *(self._folded(cols.tile, "j") if self.kind in TRANSPOSED else []),
            Dot(products, self.acc, ij, rows.tile, cols.tile, "d", precision=self.spec.precision),
        ]
        if not mapped:
            return out
        score = self.score.xreplace({real("score"): real(products)})
        # As one product, sympy would distribute log2(e): differences of large, rounded numbers.
        steps = [score, real("S") * LOG2E] if isinstance(score, sympy.Add) else [score * LOG2E]
        made = [self._set("S", self.acc, ij, step) for step in steps]
        return [*out, replace(made[0], declares=kept), *made[1:]]

    def _set(self, name: str, dtype: str, axes: tuple[str, ...], expr: Expr) -> Compute:
        return Compute(name, dtype, axes, expr, declares=False)
