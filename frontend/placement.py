"""What a call says of its sequences: how long they are, where their rows lie, where queries stand.

Also decided here, for every call: whether its rows are so few that programs share the keys of one row tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ..ir.errors import InputError, UnsupportedError
from ..runtime.strided import Device
from .problem import Problem, as_integer
from .trace.value import is_symbolic

MAX_POSITION = 2**28  # as `passes.uniform` has it
FEW_QUERIES, MANY_KEYS = 16, 1024  # calls of at most so many queries against at least so many keys are split
FEW_ROWS = (16, 64)  # the least and greatest row tile of such a call
TILE_KEYS = 128  # a program's least share of the keys
PROGRAMS = 2  # that a multiprocessor runs at once


@dataclass(frozen=True)
class Placement:
    """The checked keywords of one call. values: what kernels take for them, by name.

    where: fields of `ir.sequences.Sequences`. few, group: as AttentionSpec of the passes has them. count:
    how many sequences there are. capacity: keys of the longest one that memory has room for."""

    where: tuple[tuple[str, Any], ...] = ()
    values: dict[str, Any] = field(default_factory=dict)
    few: int = 0
    group: int = 1
    count: int = 0
    capacity: int = 0

    @staticmethod
    def of(
        problem: Problem,
        q_offset: Any = None,
        cu_seqlens_q: Any = None,
        cu_seqlens_kv: Any = None,
        block_table: Any = None,
        kv_lens: Any = None,
        *,
        sums: bool = False,
    ) -> Placement:
        """Check the keywords' types and shapes; what they hold is checked by `check_values`.

        sums: whether column sums are asked for. Raises InputError, UnsupportedError."""
        where, values, count, capacity = check_placement(
            problem, q_offset, cu_seqlens_q, cu_seqlens_kv, block_table, kv_lens, sums=sums
        )
        uneven = "q_bounds" in values
        queries = -(-problem.q_len // count) if uneven else problem.q_len
        keys = -(-capacity // count) if "kv_bounds" in values else capacity
        few, group = _few_rows(problem, queries, keys)
        if few:
            values["splits"] = _splits(problem, few, group, count, keys, bool(where.keys() - {"q_offset"}))
        if not where and not few:
            return PLAIN
        return Placement(tuple(sorted(where.items())), values, few, group, count, capacity)

    @property
    def key(self) -> tuple[Any, ...] | None:
        """What a kernel depends on, made of primitives."""
        return (self.where, self.few, self.group) if self.where or self.few else None

    @property
    def spec_fields(self) -> dict[str, Any]:
        """The fields of an AttentionSpec of the passes that hold it."""
        from ..ir.sequences import Sequences

        return {"sequences": Sequences(**dict(self.where)), "few": self.few, "group": self.group}

    @property
    def uneven(self) -> bool:
        """Whether lengths or positions are in tensors, so that only `pieces` knows them."""
        return any(name != "splits" and name != "q_offset" for name in self.values)

    # contents -------------------------------------------------------------------------------------

    def check_values(self, problem: Problem) -> None:
        """Check what the tensors hold, which waits for a GPU. Raises InputError."""
        held = {name: x.tolist() for name, x in self.values.items() if hasattr(x, "tolist")}
        for name, keyword, total in (
            ("q_bounds", "cu_seqlens_q", problem.q_len),
            ("kv_bounds", "cu_seqlens_kv", problem.kv_len),
        ):
            if name in held:
                _check_bounds(keyword, held[name], total)
        room = [self.capacity] * self.count
        if "kv_bounds" in held:
            bounds = held["kv_bounds"]
            room = [b - a for a, b in itertools.pairwise(bounds)]
        for b, (length, most) in enumerate(zip(held.get("kv_lens", ()), room, strict=False)):
            if not 0 <= length <= most:
                raise InputError(f"attention.kv_lens[{b}]", f"a length from 0 to {most}", length)
        for b, offset in enumerate(held.get("q_offsets", ())):
            if not 0 <= offset < MAX_POSITION:
                raise InputError(
                    f"attention.q_offset[{b}]", f"a position from 0 to {MAX_POSITION - 1}", offset
                )
        if "block_table" in held:
            pages = problem.key.shape[0]
            for b, (row, length) in enumerate(zip(held["block_table"], held["kv_lens"], strict=True)):
                for n, page in enumerate(row[: -(-length // problem.kv_len)]):
                    if not 0 <= page < pages:
                        where = f"attention.block_table[{b}, {n}]"
                        raise InputError(where, f"one of the {pages} pages (kv_lens[{b}] is {length})", page)

    def pieces(self, problem: Problem) -> Iterator[Piece]:
        """Every sequence. Contents are taken to be checked."""
        held = {name: x.tolist() for name, x in self.values.items() if hasattr(x, "tolist")}
        for b in range(self.count):
            batch, rows, keys = b, slice(0, problem.q_len), slice(0, self.capacity)
            if "q_bounds" in held:
                batch, rows = 0, slice(*held["q_bounds"][b : b + 2])
            if "kv_bounds" in held:
                keys = slice(*held["kv_bounds"][b : b + 2])
            if "kv_lens" in held:
                keys = slice(keys.start, keys.start + held["kv_lens"][b])
            offset = held["q_offsets"][b] if "q_offsets" in held else self.values.get("q_offset", 0)
            table = held["block_table"][b] if "block_table" in held else None
            yield Piece(b, offset, batch, rows, keys, table)


@dataclass(frozen=True)
class Piece:
    """One sequence: its number, the position of its first query, and where its rows are.

    batch, rows: of its queries. keys: its rows, counted through the pages of `table` if it has one."""

    b: int
    offset: int
    batch: int
    rows: slice
    keys: slice
    table: list[int] | None

    @property
    def lengths(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.keys.stop - self.keys.start

    def problem(self, whole: Problem) -> Problem:
        """Its rows, gathered, as a problem of their own."""
        import torch

        only = slice(self.batch, self.batch + 1)
        key, value = whole.key[only], whole.value[only]
        if self.table is not None:
            used = self.table[: -(-self.keys.stop // whole.kv_len)]
            pages = torch.tensor(used, dtype=torch.long, device=whole.device)
            key, value = (t[pages].transpose(0, 1).flatten(1, 2)[None] for t in (whole.key, whole.value))
        query = whole.query[only, :, self.rows]
        return Problem(query, key[:, :, self.keys], value[:, :, self.keys], True)


PLAIN = Placement()
"""Tensors that are what they look like, and many rows."""

NOWHERE = (None, None, None, None, None)
"""q_offset, cu_seqlens_q, cu_seqlens_kv, block_table and kv_lens of a call that says nothing of them."""

NAMES = {
    "cu_seqlens_q": "q_bounds",
    "cu_seqlens_kv": "kv_bounds",
    "block_table": "block_table",
    "kv_lens": "kv_lens",
}


def tensors_of(where: tuple[Any, ...]) -> tuple[dict[str, Any], Any]:
    """(tensors by the kernels' names, the integer offset) of a call's keywords, unchecked."""
    offset, *others = where
    held = {name: x for name, x in zip(NAMES.values(), others, strict=True) if x is not None}
    if not isinstance(offset, int) and hasattr(offset, "dim"):
        return held | {"q_offsets": offset}, None
    return held, offset


# types and shapes -----------------------------------------------------------------------------------


def check_placement(
    problem: Problem,
    q_offset: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_kv: Any = None,
    block_table: Any = None,
    kv_lens: Any = None,
    *,
    sums: bool = False,
) -> tuple[dict[str, Any], dict[str, Any], int, int]:
    """Check types and shapes of a call's keywords; tells the problem which pairs its masks see.

    Returns fields of `ir.sequences.Sequences`, what kernels take, how many sequences there are, and the keys
    that one has room for. Raises InputError, UnsupportedError."""
    given = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_kv": cu_seqlens_kv,
        "block_table": block_table,
        "kv_lens": kv_lens,
    }
    given = {name: x for name, x in given.items() if x is not None}
    _check_combination(problem, given)
    count = problem.batch
    if "cu_seqlens_q" in given:
        count = _bounds(problem, "cu_seqlens_q", given["cu_seqlens_q"])
    if "cu_seqlens_kv" in given and _bounds(problem, "cu_seqlens_kv", given["cu_seqlens_kv"]) != count:
        raise InputError(
            "attention.cu_seqlens_kv",
            f"{count + 1} bounds, as cu_seqlens_q has",
            given["cu_seqlens_kv"].shape[0],
        )
    capacity = problem.kv_len
    if "block_table" in given:
        if problem.kv_len == 0:
            raise InputError("attention.key", "pages of one key or more", tuple(problem.key.shape))
        _check_integers(problem, "block_table", block_table, (count, None))
        capacity = problem.kv_len * block_table.shape[1]
    if "kv_lens" in given:
        _check_integers(problem, "kv_lens", kv_lens, (count,))
    where: dict[str, Any] = {NAMES[name]: _dtype(tensor) for name, tensor in given.items()}
    values: dict[str, Any] = {NAMES[name]: tensor for name, tensor in given.items()}
    if "block_table" in given:
        where["page"] = problem.kv_len
    if q_offset is not None and not (type(q_offset) is int and q_offset == 0):
        where["q_offset"], values_of_offset = _offset(problem, q_offset, count)
        values |= values_of_offset
    uneven, paged = "cu_seqlens_q" in given, "block_table" in given
    lengths = (None if uneven else problem.q_len, None if uneven or paged else problem.kv_len)
    problem.pairs = (count, problem.heads, *lengths)
    if sums and (given or "q_offsets" in values):
        raise UnsupportedError(
            "attention.return_column_sums: not built for sequences of different lengths or positions. "
            "Call once for each sequence"
        )
    return where, values, count, capacity


def _check_combination(problem: Problem, given: dict[str, Any]) -> None:
    if "block_table" in given and "kv_lens" not in given:
        raise InputError(
            "attention.kv_lens", "the number of keys of every sequence, beside block_table", None
        )
    if "block_table" in given and "cu_seqlens_kv" in given:
        raise InputError(
            "attention.cu_seqlens_kv", "None beside block_table: pages say where keys are", "both"
        )
    if "cu_seqlens_kv" in given and "cu_seqlens_q" not in given:
        raise InputError("attention.cu_seqlens_q", "bounds of the queries, beside cu_seqlens_kv", None)
    if "cu_seqlens_q" in given:
        if "cu_seqlens_kv" not in given and "block_table" not in given:
            fix = "Pass cu_seqlens_kv=cu_seqlens_q for self-attention"
            raise InputError("attention.cu_seqlens_kv", "bounds of the keys, or a block_table", None, fix)
        if problem.batch != 1:
            raise InputError(
                "attention.query", "(1, Hq, total_q, D) with cu_seqlens_q", tuple(problem.query.shape)
            )


def _bounds(problem: Problem, name: str, bounds: Any) -> int:
    """How many sequences bounds delimit."""
    _check_integers(problem, name, bounds, (None,))
    if bounds.shape[0] < 2:
        raise InputError(
            f"attention.{name}", "two bounds or more: 0, the end of the first sequence, ...", bounds.shape[0]
        )
    return bounds.shape[0] - 1


def _check_integers(problem: Problem, name: str, tensor: Any, shape: tuple[int | None, ...]) -> None:
    where = f"attention.{name}"
    problem.check_integers(where, tensor)
    fits = len(tensor.shape) == len(shape) and all(
        n in (None, m) for n, m in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        comma = "," if len(shape) == 1 else ""
        raise InputError(where, f"shape ({wanted}{comma})", tuple(tensor.shape))


def _dtype(tensor: Any) -> str:
    return f"i{tensor.element_size() * 8}"


def _offset(problem: Problem, q_offset: Any, count: int) -> tuple[str, dict[str, Any]]:
    if not hasattr(q_offset, "dim"):  # no tensor
        position = q_offset if is_symbolic(q_offset) else as_integer(q_offset)
        if position is None or not 0 <= position < MAX_POSITION:
            expected = f"an integer from 0 to {MAX_POSITION - 1}, or a tensor of one a sequence"
            raise InputError("attention.q_offset", expected, repr(q_offset))
        return "scalar", {"q_offset": position}
    _check_integers(problem, "q_offset", q_offset, (count,))
    return _dtype(q_offset), {"q_offsets": q_offset}


# contents -------------------------------------------------------------------------------------------


def _check_bounds(keyword: str, bounds: list[int], total: int) -> None:
    if bounds[0] != 0:
        raise InputError(f"attention.{keyword}[0]", "0, where the first sequence starts", bounds[0])
    for b, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end < start:
            expected = f"at least {start}, where its sequence starts: sequences may not overlap"
            raise InputError(f"attention.{keyword}[{b + 1}]", expected, end)
    if bounds[-1] > total:
        raise InputError(f"attention.{keyword}[-1]", f"at most {total}, the rows there are", bounds[-1])


# few rows -------------------------------------------------------------------------------------------


def _few_rows(problem: Problem, queries: int, keys: int) -> tuple[int, int]:
    """(few, group): the row tile for few queries against many keys of a sequence, (0, 1) for others."""
    heads = problem.key.shape[1]
    if queries > FEW_QUERIES or keys < MANY_KEYS or heads == 0:
        return 0, 1
    group = problem.heads // heads
    rows = 1 << max(queries * group - 1, 0).bit_length()
    return min(max(rows, FEW_ROWS[0]), FEW_ROWS[1]), group


def _splits(problem: Problem, few: int, group: int, count: int, keys: int, uneven: bool) -> int:
    """How many programs share a row tile: the same for the same sizes and machine."""
    tiles = -(-problem.q_len // max(1, few // group)) + (count if problem.batch < count else 0)
    programs = tiles * max(1, problem.batch) * problem.key.shape[1]
    return even_splits(programs, _slots(problem.device), -(-keys // TILE_KEYS), uneven)


@lru_cache(maxsize=1024)
def even_splits(programs: int, slots: int, most: int, uneven: bool = False) -> int:
    """The number of splits, at most `most`, that keeps `slots` busy to the end; few rather than many.

    uneven: sequences may be shorter than the longest, so that more and smaller shares even out.

    >>> [even_splits(n, 264, 256) for n in (8, 128, 256, 1000)]
    [33, 2, 1, 1]
    """
    if programs == 0 or most <= 1:
        return 1
    enough = slots * (4 if uneven else 1)
    first = max(1, min(most, enough // programs))

    def idle(splits: int) -> float:
        """The share of slots without work, and what each split costs in merging."""
        waves = programs * splits / slots
        return -(-programs * splits // slots) / waves - 1 + 0.002 * splits

    return min(range(first, min(most, 2 * first + 2) + 1), key=idle)


def _slots(device: Any) -> int:
    """Programs that the device runs at once."""
    if device.type != "cpu":
        return PROGRAMS * _multiprocessors(device)
    from ..runtime.knobs import NUM_THREADS

    return NUM_THREADS.get()


@lru_cache(maxsize=64)
def _multiprocessors(device: Any) -> int:
    if isinstance(device, Device):
        return device.multiprocessors
    import torch

    return torch.cuda.get_device_properties(device).multi_processor_count
