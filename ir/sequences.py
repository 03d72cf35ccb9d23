"""Sequences: how long the sequences of a batch are, and where their rows lie in memory.

An attention of the graph is over logical tensors q [B, Hq, q_len, D] and k, v [B, Hk, kv_len, D], with
lengths that may differ by batch. This value says what a kernel is given in their place:

    what        in memory               tensors of integers that say where
    queries     [B, Hq, q_len, D]
      packed    [1, Hq, q_total, D]     q_bounds [B + 1]: b's are the rows q_bounds[b] .. q_bounds[b + 1]
    keys        [B, Hk, kv_len, D]
      shorter   [B, Hk, kv_size, D]     kv_lens [B]: b's are the first kv_lens[b] rows
      packed    [1, Hk, kv_total, D]    kv_bounds [B + 1], and kv_lens if given
      paged     [pages, Hk, page, D]    block_table [B, table_width] and kv_lens: key k is row k % page of
                                        page block_table[b, k // page]

Query row q of a sequence stands at position q + q_offset: an integer, or one a sequence, q_offsets [B].
Values outside what memory holds are clamped, so that kernels never leave a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from .errors import VerifyError

INTEGERS = ("i32", "i64")


@dataclass(frozen=True)
class Sequences:
    """Each field but `page` is the dtype of the tensor of its name, '' where there is none.

    q_offset: 'scalar' when one runtime integer holds for all sequences. page: keys a page, with a
    block_table; else 0. Powers of two from 16 to 256 make the best loads."""

    q_offset: str = ""
    q_bounds: str = ""
    kv_bounds: str = ""
    kv_lens: str = ""
    block_table: str = ""
    page: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            known = ("", "scalar", *INTEGERS) if field.name == "q_offset" else ("", *INTEGERS)
            if field.name != "page" and value not in known:
                raise VerifyError(f"sequences: {field.name}: expected one of {known}; got {value!r}")
        if bool(self.block_table) != (self.page > 0) or (self.block_table and not self.kv_lens):
            raise VerifyError(f"sequences: a block_table comes with a page size and kv_lens; got {self}")
        if self.kv_bounds and (self.block_table or not self.q_bounds):
            raise VerifyError(f"sequences: packed keys need packed queries and no block_table; got {self}")
        if self.q_bounds and not (self.kv_bounds or self.block_table):
            raise VerifyError(f"sequences: packed queries need packed or paged keys; got {self}")

    @property
    def uneven(self) -> bool:
        """Whether a length or position depends on the sequence, so that the host does not know it."""
        return bool(self.q_bounds or self.kv_lens or self.q_offset in INTEGERS)

    @property
    def transposed(self) -> Sequences:
        """The same with queries and keys exchanged, where both are stored alike."""
        if self.block_table or self.kv_lens:
            raise VerifyError(f"sequences: pages and shorter keys have no transposed form; got {self}")
        return replace(self, q_bounds=self.kv_bounds, kv_bounds=self.q_bounds)


PLAIN = Sequences()
"""Tensors that are what they look like."""
