"""`gossamer.masks`: the patterns of the literature.

Bounds are inclusive as written. Each pattern is an ordinary mask_mod, captured: widths, counts and
prefixes are runtime values (another one compiles nothing), while strides, divisors and shapes are
numbers that the kernel is built for. Combine patterns with `&`, `|` and `~`.

    masks.sliding_window(128) | masks.global_tokens(64)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from ..ir.errors import InputError
from .captured import Derived, as_numpy, derivation, is_array
from .mask import Mask
from .pure import pure
from .term import Term
from .trace.function import dtype_name, kv_length, maximum, minimum

__all__ = [
    "axial",
    "bigbird",
    "blocked",
    "causal",
    "chunked_causal",
    "dilated_window",
    "document",
    "fixed",
    "from_block_mask",
    "from_flashmask",
    "full",
    "global_tokens",
    "longformer",
    "neighborhood",
    "prefix_lm",
    "random_blocks",
    "selected",
    "sliding_window",
    "strided",
]

CAUSAL: Term = ("le", "k", "q")


@pure
def full() -> Mask:
    """Every pair."""
    return Mask.of(None)


def causal() -> Mask:
    """k <= q: no query sees a later key."""
    return Mask(CAUSAL)


def sliding_window(left: int, right: int | None = None) -> Mask:
    """q - left <= k <= q + right.

    left, right: how many keys before and after its own a query sees; right is left unless given.
    """
    left = _whole("sliding_window", "left", left)
    right = left if right is None else _whole("sliding_window", "right", right)
    return Mask(("and", ("le", ("sub", "q", "k"), "p0"), ("le", ("sub", "k", "q"), "p1")), (left, right))


@pure
def dilated_window(width: int, dilation: int) -> Mask:
    """(q - k) % dilation == 0 and |q - k| <= dilation * (width // 2).

    width: keys in a window, its own included; one more when width is even. dilation: the distance
    between them, a number. Longformer (arXiv:2004.05150).
    """
    width = _whole("dilated_window", "width", width)
    dilation = _whole("dilated_window", "dilation", dilation, least=1)
    reach = dilation * (width // 2)
    return Mask.trace(lambda b, h, q, k: ((q - k) % dilation == 0) & (abs(q - k) <= reach))


@pure
def strided(stride: int, local: int) -> Mask:
    """|q - k| < local or (q - k) % stride == 0.

    stride: the distance of the far keys, a number. local: keys nearer than this are all seen.
    Sparse Transformers (arXiv:1904.10509), there with `& causal()`.
    """
    stride = _whole("strided", "stride", stride, least=1)
    local = _whole("strided", "local", local)
    return Mask.trace(lambda b, h, q, k: (abs(q - k) < local) | ((q - k) % stride == 0))


@pure
def fixed(block: int, summary: int) -> Mask:
    """q // block == k // block or k % block >= block - summary.

    block: size of a block, a number. summary: how many keys at the end of each block everyone sees.
    Sparse Transformers (arXiv:1904.10509), there with `& causal()`.
    """
    block = _whole("fixed", "block", block, least=1)
    summary = _whole("fixed", "summary", summary)
    if summary > block:
        raise InputError("masks.fixed.summary", f"at most the {block} keys of a block", summary)
    first = block - summary
    return Mask.trace(lambda b, h, q, k: (q // block == k // block) | (k % block >= first))


@pure
def blocked(size: int) -> Mask:
    """q // size == k // size: blocks on the diagonal. size: a number."""
    size = _whole("blocked", "size", size, least=1)
    return Mask.trace(lambda b, h, q, k: q // size == k // size)


@pure
def chunked_causal(size: int) -> Mask:
    """k <= q and q // size == k // size: causal within chunks, as in Llama 4. size: a number."""
    size = _whole("chunked_causal", "size", size, least=1)
    return Mask.trace(lambda b, h, q, k: (k <= q) & (q // size == k // size))


def global_tokens(n: int, rows: bool = True, columns: bool = True) -> Mask:
    """q < n (rows) or k < n (columns): the first n positions see all and are seen by all.

    Longformer (arXiv:2004.05150), ETC (arXiv:2004.08483).
    """
    n = _whole("global_tokens", "n", n)
    if not rows and not columns:
        raise InputError("masks.global_tokens", "rows, columns or both", "neither")
    sides = [("lt", index, "p0") for index, asked in (("q", rows), ("k", columns)) if asked]
    return Mask(("or", *sides) if len(sides) == 2 else sides[0], (n,))


def longformer(half_window: int, n_global: int) -> Mask:
    """|q - k| <= half_window or q < n_global or k < n_global. Longformer (arXiv:2004.05150)."""
    half_window = _whole("longformer", "half_window", half_window)
    n_global = _whole("longformer", "n_global", n_global)
    near, first = ("le", ("abs", ("sub", "q", "k")), "p0"), (("lt", "q", "p1"), ("lt", "k", "p1"))
    return Mask(("or", ("or", near, first[0]), first[1]), (half_window, n_global))


@pure
def bigbird(half_window: int, n_global: int, n_random: int, block: int = 64, seed: int = 0) -> Mask:
    """longformer(half_window, n_global) or random_blocks(n_random, block, seed).

    Big Bird (arXiv:2007.14062).
    """
    return longformer(half_window, n_global) | random_blocks(n_random, block, seed)


def prefix_lm(n: Any) -> Mask:
    """k <= q or k < n: a prefix that everyone sees, then causal.

    n: the length of the prefix; or an integer tensor (B,) with one for each batch.
    """
    if is_array(n):
        lengths = _integers("prefix_lm", "n", n, ranks=(1,))
        return _reading(("or", CAUSAL, ("lt", "k", ("read", "c0", "b"))), lengths)
    n = _whole("prefix_lm", "n", n)
    return Mask(("or", CAUSAL, ("lt", "k", "p0")), (n,))


def document(ids: Any = None, *, offsets: Any = None) -> Mask:
    """ids[q] == ids[k]: pairs within one document.

    ids: integers (S,) or (B, S), the document of each position; at least as long as both lengths.
    offsets: instead, integers (n + 1,) that do not decrease: document i is offsets[i] .. offsets[i+1] - 1
    (`cu_seqlens` elsewhere). Tensors are read at each call.
    """
    if (ids is None) == (offsets is None):
        raise InputError("masks.document", "ids or offsets", "both" if ids is not None else "neither")
    if offsets is not None:
        bounds = _integers("document", "offsets", offsets, ranks=(1,))
        table = Derived(bounds, (IDS,))
        return Mask(("eq", ("read", "c0", "q"), ("read", "c0", "k")), (), (table,), (("i32", 1),))
    ids = _integers("document", "ids", ids, ranks=(1, 2))
    batch = ("b",) if len(ids.shape) == 2 else ()
    return _reading(("eq", ("read", "c0", *batch, "q"), ("read", "c0", *batch, "k")), ids)


def _ids_of(offsets: Any) -> Any:
    """The document of each position, on the device of the offsets."""
    import numpy as np

    bounds = as_numpy(offsets)
    lengths = np.diff(bounds)
    if len(bounds) < 2 or bounds[0] != 0 or (lengths < 0).any():
        raise InputError("masks.document", "offsets that start at 0 and do not decrease", bounds.tolist()[:8])
    ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    if not hasattr(offsets, "detach"):
        return ids
    import torch

    return torch.from_numpy(ids).to(offsets.device)


IDS = derivation("document ids", _ids_of, waits=True)


@pure
def axial(shape: Sequence[int], axis: int) -> Mask:
    """Positions of a grid on one line along `axis`: all their other coordinates are equal.

    shape: the grid, row-major, its product the length; numbers. Axial attention (arXiv:1912.12180).
    """
    sizes = _sizes("axial", "shape", shape)
    axis = _whole("axial", "axis", axis, least=-len(sizes))
    if axis >= len(sizes):
        raise InputError("masks.axial", f"an axis of the grid {sizes}", axis)
    axis %= len(sizes)

    def on_one_line(b: Any, h: Any, q: Any, k: Any) -> Any:
        at_q, at_k = _coordinates(q, sizes), _coordinates(k, sizes)
        attends: Any = True
        for d, (x, y) in enumerate(zip(at_q, at_k, strict=True)):
            attends = attends if d == axis else attends & (x == y)
        return attends

    return Mask.trace(on_one_line)


@pure
def neighborhood(
    shape: int | Sequence[int],
    kernel: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    edges: str = "shift",
) -> Mask:
    """Each position of a grid sees a box of `kernel` neighbours around it.

    In every dimension, with x and y the coordinates of query and key counted in steps of `dilation`
    among those of the same remainder: start <= y < start + kernel, where start = x - kernel // 2, or
    x - kernel + 1 when causal.

    shape: the grid, 1 to 3 sizes, row-major, their product the length. kernel, dilation, causal: one for
    each dimension, or one for all. All are numbers. edges: at the border of the grid, "shift" moves the
    box inside (NATTEN, so that each position has as many keys), "clip" cuts it off; a causal dimension is
    always cut off. Neighborhood attention (arXiv:2204.07143), dilated (arXiv:2209.15001).
    """
    sizes = _sizes("neighborhood", "shape", shape)
    if len(sizes) > 3:
        raise InputError("masks.neighborhood", "a grid of 1 to 3 dimensions", f"shape {sizes}")
    kernels = _sizes("neighborhood", "kernel", kernel, like=sizes)
    steps = _sizes("neighborhood", "dilation", dilation, like=sizes)
    causals = (causal,) * len(sizes) if isinstance(causal, bool) else tuple(bool(c) for c in causal)
    if len(causals) != len(sizes):
        raise InputError("masks.neighborhood.causal", f"one for each dimension of {sizes}", causals)
    if edges not in ("shift", "clip"):
        raise InputError("masks.neighborhood.edges", "'shift' or 'clip'", repr(edges))
    for size, width, step in zip(sizes, kernels, steps, strict=True):
        if edges == "shift" and width * step > size:
            raise InputError(
                "masks.neighborhood", f"kernel * dilation <= {size}, the size of the grid", width * step,
                'Take a smaller kernel, or edges="clip"',
            )  # fmt: skip

    def near(b: Any, h: Any, q: Any, k: Any) -> Any:
        attends: Any = True
        at_q, at_k = _coordinates(q, sizes), _coordinates(k, sizes)
        for x, y, size, width, step, ahead in zip(at_q, at_k, sizes, kernels, steps, causals, strict=True):
            attends = attends & _near(x, y, int(size), int(width), int(step), ahead, edges == "shift")
        return attends

    return Mask.trace(near)


def _near(x: Any, y: Any, size: int, width: int, step: int, causal: bool, shift: bool) -> Any:
    """Whether the coordinate y of a key is in the box of the coordinate x of a query, in one dimension."""
    alike: Any = True
    if step > 1:
        alike = (x - y) % step == 0
        remainder, x, y = x % step, x // step, y // step
        size = size // step if size % step == 0 else (size - remainder + step - 1) // step
    start = x - width + 1 if causal else x - width // 2
    if shift and not causal:
        start = maximum(minimum(start, size - width), 0)
    return alike & (start <= y) & (y < start + width)


@pure
def random_blocks(count: int, block: int, seed: int = 0, per_head: bool = False) -> Mask:
    """Each block of queries sees `count` blocks of keys, drawn uniformly (some may coincide).

    Blocks are drawn by a counter hash of (seed, block of queries, draw), so nothing is stored; the draws
    repeat after 65521 blocks of queries.
    count, block: numbers. seed: 31 bits are used. per_head: whether heads draw on their own.
    The random part of Big Bird (arXiv:2007.14062).
    """
    count = _whole("random_blocks", "count", count)
    block = _whole("random_blocks", "block", block, least=1)
    seed = _whole("random_blocks", "seed", seed) % 2**31

    def drawn(b: Any, h: Any, q: Any, k: Any) -> Any:
        row = q // block + 4099 * h if per_head else q // block
        blocks = maximum((kv_length(k) + (block - 1)) // block, 1)
        attends: Any = False
        for draw in range(count):
            attends = attends | (k // block == _hash(row, seed, draw) % blocks)
        return attends

    return Mask.trace(drawn)


def _hash(row: Any, seed: Any, draw: int) -> Any:
    """A random number below 2**31 for each (row, seed, draw).

    Multiplication modulo different primes mixes as xor-shifts do, but uses each value once, so that the
    expression stays short. No step leaves int32: NumPy and all backends agree.
    """
    low, high = seed % 32768, seed // 32768
    x = ((row % 65521) * 22987 + (low * 3 + 15823 * draw) % 65521) % 65521
    x = ((x ^ ((high + 24593 * draw) % 65536)) * 29787 + 17389) % 65519
    return ((x ^ 43690) * 31337 + 12289) % 65497 * 28411


def selected(indices: Any, kv_len: int, *, rows: int = 1, keys: int = 64, group: int = 1) -> Mask:
    """Each block of `rows` queries sees the blocks of `keys` keys that a tensor lists for it.

    indices: integers (B or 1, H or 1, ceil(q_len / rows), n), in any order, repeats allowed; -1: none. Read
    at each call. The query head h has row h // group, so that heads that share a key head can share it.
    kv_len: the number of keys at most. rows, keys, group: numbers.

    The selection of NSA (arXiv:2502.11089), MoBA (arXiv:2502.13189) and the like; causal by `& causal()`.
    It is kept as one byte a block, from which kernels list tiles: queries of one tile share the keys that
    any of them sees, so selections that differ from query to query cost more than those of 16 and more.
    Raises InputError for a selection so fine that its table would be no smaller than the scores, and, on
    the CPU, for a block behind the last one; elsewhere such a block selects nothing.
    """
    kv_len, rows, keys, group = (
        _whole("selected", name, value, least=1)
        for name, value in (("kv_len", kv_len), ("rows", rows), ("keys", keys), ("group", group))
    )
    indices = _integers("selected", "indices", indices, ranks=(4,))
    if rows * keys < MIN_SELECTED:
        raise InputError(
            "masks.selected", f"blocks of {MIN_SELECTED} pairs at least, rows * keys", rows * keys,
            "Select blocks of keys; single keys are gathered before the call",
        )  # fmt: skip
    batches, heads = indices.shape[:2]
    blocks = -(-kv_len // keys)
    kept = [d for d, n in enumerate((batches, heads)) if n > 1]
    table = Derived(indices, (SELECTION, blocks, (*kept, 2)))
    places = ("b", ("floordiv", "h", group) if group > 1 else "h")
    block = [places[d] for d in kept]
    for index, size in (("q", rows), ("k", keys)):
        block.append(("floordiv", index, size) if size > 1 else index)
    return Mask(("ne", ("read", "c0", *block), 0), (), (table,), (("bool", len(block)),))


MIN_SELECTED = 16  # pairs for each byte of a table of selected blocks


def _selection(indices: Any, blocks: int, kept: tuple[int, ...]) -> Any:
    """bool [*sizes of the kept dimensions, blocks]: whether a block is listed in the row of indices."""
    shape = [indices.shape[d] for d in kept]
    if not hasattr(indices, "detach"):
        import numpy as np

        _check_selection(indices, blocks)
        table = np.zeros((*indices.shape[:-1], blocks + 1), bool)
        np.put_along_axis(table, np.where(indices < 0, blocks, indices).astype(np.int64), True, -1)
        return np.ascontiguousarray(table[..., :blocks].reshape(*shape, blocks))
    import torch

    if indices.device.type == "cpu":
        _check_selection(indices, blocks)
    listed = torch.where((indices < 0) | (indices >= blocks), blocks, indices).long()
    table = torch.zeros(*indices.shape[:-1], blocks + 1, dtype=torch.bool, device=indices.device)
    return table.scatter_(-1, listed, True)[..., :blocks].reshape(*shape, blocks).contiguous()


SELECTION = derivation("selected blocks", _selection)


def _check_selection(indices: Any, blocks: int) -> None:
    most = int(indices.max()) if 0 not in indices.shape else -1
    if most >= blocks:
        raise InputError("masks.selected.indices", f"numbers of blocks below {blocks}, or -1", most)


def from_block_mask(block_mask: Any) -> Mask:
    """The pairs that a BlockMask of `torch.nn.attention.flex_attention`, or of ours, lets attend."""
    return Mask.from_block_mask(block_mask)


def from_flashmask(startend_row_indices: Any, causal: bool = True) -> Mask:
    """The mask of FlashMask's column bounds: which queries each key is hidden from.

    startend_row_indices: integers (B or 1, H or 1, S_kv, 1, 2 or 4), r below; read at each call. Key k is
    hidden from queries
        causal, 1 bound:   q < k,  r0 <= q
        causal, 2 bounds:  q < k,  r0 <= q < r1
        else, 2 bounds:    r0 <= q,  q < r1
        else, 4 bounds:    r0 <= q < r1,  r2 <= q < r3

    H is the number of query heads. FlashMask (arXiv:2410.01359).
    """
    bounds = _integers("from_flashmask", "startend_row_indices", startend_row_indices, ranks=(4,))
    batches, heads, _, n = bounds.shape
    if n not in ((1, 2) if causal else (2, 4)):
        expected = "1 or 2 bounds a key when causal, 2 or 4 when not"
        raise InputError("masks.from_flashmask", expected, f"causal={causal} and shape {tuple(bounds.shape)}")

    def seen(b: Any, h: Any, q: Any, k: Any) -> Any:
        column = bounds[b if batches > 1 else 0, h if heads > 1 else 0, k]
        r = [column[i] for i in range(n)]
        if causal:
            return (k <= q) & ((q < r[0]) if n == 1 else (q < r[0]) | (q >= r[1]))
        if n == 2:
            return (q < r[0]) & (q >= r[1])
        return ((q < r[0]) | (q >= r[1])) & ((q < r[2]) | (q >= r[3]))

    return Mask.trace(seen)


# ---- arguments ----


def _reading(term: Term, table: Any) -> Mask:
    """The mask of a predicate that reads one tensor, c0."""
    return Mask(term, (), (table,), ((dtype_name(table.dtype) or "", len(table.shape)),))


def _whole(pattern: str, name: str, value: Any, least: int = 0) -> int:
    try:
        whole = value if type(value) is int else operator.index(value)
    except TypeError:
        whole = None
    if whole is None or whole < least:
        raise InputError(f"masks.{pattern}.{name}", f"an integer of at least {least}", repr(value))
    return whole


def _sizes(pattern: str, name: str, value: Any, like: tuple[int, ...] | None = None) -> tuple[int, ...]:
    one = not isinstance(value, Sequence)
    sizes = (value,) * len(like or (1,)) if one else tuple(value)
    if not sizes or (like is not None and len(sizes) != len(like)):
        raise InputError(f"masks.{pattern}.{name}", f"one for each dimension of {like or 'a grid'}", value)
    return tuple(_whole(pattern, name, s, least=1) for s in sizes)


def _integers(pattern: str, name: str, value: Any, ranks: tuple[int, ...]) -> Any:
    if not is_array(value):
        import numpy as np

        value = np.asarray(value)
    dtype = dtype_name(value.dtype) or ""
    if len(value.shape) not in ranks or dtype[:1] not in ("i", "u"):
        wanted = " or ".join(map(str, ranks))
        got = f"{value.dtype} of shape {tuple(value.shape)}"
        raise InputError(f"masks.{pattern}.{name}", f"an integer tensor of rank {wanted}", got)
    return value


def _coordinates(index: Any, shape: tuple[int, ...]) -> list[Any]:
    """The coordinates of a position of a row-major grid; the first runs on past the end."""
    coordinates, below = [], 1
    for size in reversed(shape[1:]):
        coordinates.append(index // below % size)
        below *= size
    return [index // below, *reversed(coordinates)]
