"""BlockMask: PyTorch's block mask, which carries a mask and makes its lists of blocks only on demand.

It is PyTorch's class with the expensive part left out. The mask_mod is captured at once, so that its
errors show where the block mask is made; the lists (`kv_num_blocks`, `kv_indices`, `full_...`, `q_...`)
are worked out when somebody asks for them. Our kernels never do: their loops come from the mask. What
the class inherits (`sparsity`, `to_dense`, `to_string`, printing, `as_tuple`) works unchanged, and
PyTorch's own flex_attention takes it too.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as pytorch

from ..ir.errors import UnsupportedError
from .captured import as_numpy
from .mask import Mask

LISTS = tuple(
    f"{full}{side}_{what}"
    for full in ("", "full_")
    for side in ("kv", "q")
    for what in ("num_blocks", "indices")
)
Lists = dict[str, Any]  # tensors, and None for the full blocks where they have no lists of their own
MaskMod = Callable[..., Any]
Index = int | slice | Tensor


class BlockMask(pytorch.BlockMask):
    """Which pairs attend, in blocks; every attribute of PyTorch's class, and `mask`, a `gossamer.Mask`.

    One from `create_block_mask` means its mask_mod. One made of lists (the constructor, `from_kv_blocks`)
    means what PyTorch's compiled kernels make of it: every pair of a full block, and those pairs of the
    other listed blocks that mask_mod allows.
    """

    dq_write_order = dq_write_order_full = dq_kv_order = dq_kv_order_spt = None
    _bound: Mask | None = None  # the mask, once bound; whatever it depends on resets it
    _listed = False  # whether the lists were given, and so say something that mask_mod does not
    _batch: tuple[int, ...]
    _recipe: Callable[[], Lists]

    @classmethod
    def lazy(
        cls,
        mask_mod: MaskMod,
        batch: tuple[int, ...],
        seq_lengths: tuple[int, int],
        block_size: tuple[int, int],
        recipe: Callable[[], Lists],
    ) -> BlockMask:
        """A block mask that means its mask_mod, with lists that `recipe` makes when they are asked for."""
        self = cls.__new__(cls)
        self.seq_lengths, self.BLOCK_SIZE, self.mask_mod = seq_lengths, block_size, mask_mod
        self._batch, self._recipe = batch, recipe
        return self

    @property
    def mask(self) -> Mask:
        """The pairs that attend."""
        if self._bound is not None:
            return self._bound
        if self.mask_mod is _sliced:
            raise UnsupportedError(
                "a block mask sliced over query blocks has no mask_mod of its own: assign mask_mod, shifted "
                "to the queries it now stands for, and seq_lengths"
            )
        mask = Mask.of(self.mask_mod)
        self._bound = _listed(self, mask) if self._listed else mask
        return self._bound

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, H, q_len, kv_len)."""
        return super().shape if self._listed else (*self._batch, *self.seq_lengths)

    def __getitem__(self, index: Index | tuple[Index, ...]) -> BlockMask:
        """The mask of some batches, heads and blocks of queries.

        A slice over batches and heads keeps its mask_mod. As in PyTorch, one over blocks of queries needs
        a new mask_mod and new `seq_lengths` before it can be used. Integers keep their dimension.
        """
        index = index if isinstance(index, tuple) else (index,)
        sizes = self.shape[:-2]
        index = (*map(_kept, index[:2], sizes), *index[2:])
        batch = tuple(torch.empty(()).expand(sizes)[index[:2]].shape)
        mask_mod = _reindexed(self.mask_mod, index, sizes) if len(index) <= 2 else _sliced
        return self._like(functools.partial(super().__getitem__, index), batch, self.seq_lengths, mask_mod)

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask with its lists on another device; tensors that mask_mod captured stay."""
        move = functools.partial(super().to, device)
        return self._like(move, self.shape[:-2], self.seq_lengths, self.mask_mod)

    def _adjust(self, new_q_len: int, new_kv_len: int) -> BlockMask:
        """The mask of other lengths, counted from the same top left corner."""
        crop = functools.partial(super()._adjust, new_q_len, new_kv_len)
        return self._like(crop, self.shape[:-2], (new_q_len, new_kv_len), self.mask_mod)

    def _like(
        self,
        make: Callable[[], pytorch.BlockMask],
        batch: tuple[int, ...],
        seq_lengths: tuple[int, int],
        mask_mod: MaskMod,
    ) -> BlockMask:
        """A block mask with the lists of `make()`, which is PyTorch's own method on this one."""
        if self._listed:
            return BlockMask(seq_lengths, **_lists(make()), BLOCK_SIZE=self.BLOCK_SIZE, mask_mod=mask_mod)
        return BlockMask.lazy(mask_mod, batch, seq_lengths, self.BLOCK_SIZE, lambda: _lists(make()))

    def __getattr__(self, name: str) -> Any:
        if name not in LISTS or "_recipe" not in vars(self):
            raise AttributeError(f"a block mask has no attribute {name!r}", name=name, obj=self)
        vars(self).update(self._recipe())
        return vars(self)[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in LISTS:
            vars(self)["_listed"] = True
        if name in LISTS or name in ("mask_mod", "seq_lengths"):
            vars(self).pop("_bound", None)
        super().__setattr__(name, value)


def of(block_mask: pytorch.BlockMask) -> BlockMask:
    """Ours for one of PyTorch's, remembered as long as nothing in it is replaced."""
    if isinstance(block_mask, BlockMask):
        return block_mask
    parts = (block_mask.seq_lengths, block_mask.BLOCK_SIZE, block_mask.mask_mod, *_lists(block_mask).values())
    known = _OURS.get(block_mask)
    if known is None or any(a is not b for a, b in zip(known[0], parts, strict=True)):
        seq_lengths, block_size, mask_mod, *lists = parts
        named = dict(zip(LISTS, lists, strict=True))
        known = parts, BlockMask(seq_lengths, **named, BLOCK_SIZE=block_size, mask_mod=mask_mod)
        _OURS[block_mask] = known
    return known[1]


_OURS: weakref.WeakKeyDictionary[pytorch.BlockMask, tuple[tuple[Any, ...], BlockMask]] = (
    weakref.WeakKeyDictionary()
)


# ---- lists from a mask ----


def lists_of(
    mask: Mask,
    batch: tuple[int, int],
    seq_lengths: tuple[int, int],
    block_size: tuple[int, int],
    device: torch.device,
    separate_full_blocks: bool = True,
) -> Lists:
    """The lists of blocks of a mask, as PyTorch's create_block_mask makes them."""
    some, every = _classify(mask, batch, seq_lengths, block_size)
    kinds = (some & ~every, every) if separate_full_blocks else (some, None)
    out: Lists = dict.fromkeys(LISTS)
    for prefix, blocks in zip(("", "full_"), kinds, strict=True):
        if blocks is None:
            continue
        for side, rows in (("kv", blocks), ("q", blocks.swapaxes(-2, -1))):
            count, indices = _in_order(torch.from_numpy(rows).to(device))
            out[f"{prefix}{side}_num_blocks"] = count.expand(*batch, -1).contiguous()
            out[f"{prefix}{side}_indices"] = indices.expand(*batch, -1, -1).contiguous()
    return out


def _in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, and the numbers of its columns: those first, each part ascending."""
    order = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _classify(
    mask: Mask, batch: tuple[int, ...], seq_lengths: tuple[int, int], block_size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    from .blocks import Values, classify  # brings isl and sympy, which calling a kernel does not need

    captures = [as_numpy(t) for t in mask.tensors]
    batches, heads = batch
    return classify(mask.ir, Values(mask.values, captures, *seq_lengths), batches, heads, block_size)


# ---- a mask from lists ----


def _lists(block_mask: pytorch.BlockMask) -> Lists:
    return {name: getattr(block_mask, name) for name in LISTS}


def _listed(block_mask: BlockMask, mask: Mask) -> Mask:
    """The pairs of listed blocks: all of a full one, of the others those in `mask`.

    Lists that leave out nothing but empty blocks, and call full what is full, add nothing to the mask:
    then it is returned as it came, for without tables it makes the better kernel.
    """
    partial, full = _tables(block_mask)
    size = block_mask.BLOCK_SIZE
    found = _classify(mask, tuple(partial.shape[:2]), block_mask.seq_lengths, size)
    some, every = map(torch.from_numpy, found)
    if not (full & ~every).any() and not (some & ~(partial | full)).any():
        return mask
    partial, full = (table.to(block_mask.kv_indices.device) for table in (partial, full))
    pairs = _table_mask(partial, size) & mask
    return pairs | _table_mask(full, size) if full.any() else pairs


def _tables(block_mask: BlockMask) -> tuple[Tensor, Tensor]:
    """Whether each block is listed, and whether it is listed as full: bool [B, H, rows, columns]."""
    sizes = zip(block_mask.seq_lengths, block_mask.BLOCK_SIZE, strict=True)
    down, across = (-(-length // size) for length, size in sizes)
    tables = []
    for prefix in ("", "full_"):
        count, indices = (getattr(block_mask, f"{prefix}kv_{what}") for what in ("num_blocks", "indices"))
        if indices is None:
            tables.append(torch.zeros_like(tables[0]))
            continue
        listed = torch.arange(indices.shape[-1], device=indices.device) < count.unsqueeze(-1)
        columns = torch.where(listed, indices, across).long()
        table = torch.zeros(*indices.shape[:-1], across + 1, dtype=torch.bool, device=indices.device)
        table = table.scatter_(-1, columns, True)[..., :down, :across].cpu()
        tables.append(table.reshape(*(1,) * (4 - table.dim()), *table.shape))
    return tables[0], tables[1]


def _table_mask(table: Tensor, block_size: tuple[int, int]) -> Mask:
    """The pairs of the blocks that are set in a table [B or 1, H or 1, rows, columns]."""
    varies = tuple(d for d in (0, 1) if table.shape[d] > 1)
    table = table.reshape([table.shape[d] for d in (*varies, 2, 3)])
    rows, cols = block_size

    def listed(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return table[(*((b, h)[d] for d in varies), q_idx // rows, kv_idx // cols)]

    return Mask.of(listed)


# ---- slices ----


def _sliced(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    raise RuntimeError("a block mask sliced over query blocks has no mask_mod: assign one")


def _kept(index: Index, size: int) -> slice | Tensor:
    """The index as one that keeps its dimension."""
    if not isinstance(index, int):
        return index
    position = range(size)[index]  # raises IndexError
    return slice(position, position + 1)


def _reindexed(mask_mod: MaskMod, index: tuple[Any, ...], sizes: tuple[int, ...]) -> MaskMod:
    """mask_mod of a slice over batches and heads: its indices are those of the whole."""
    batch, head = (_origin(i, n) for i, n in zip((*index, slice(None), slice(None)), sizes, strict=False))

    def reindexed(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return mask_mod(batch(b), head(h), q_idx, kv_idx)

    return reindexed


def _origin(index: slice | Tensor, size: int) -> Callable[[Any], Any]:
    """From the position in a slice of `size` batches or heads to the one sliced."""
    if size == 1:  # it stands for all of them
        return lambda i: i
    if isinstance(index, Tensor):
        chosen = index.nonzero().squeeze(-1) if index.dtype == torch.bool else index % size
        return lambda i: chosen[i]
    positions = range(size)[index]
    start, step = positions.start, positions.step if len(positions) > 1 else 0
    return lambda i: start + step * i
