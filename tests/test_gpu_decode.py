"""Decoding and sequences of different lengths on a GPU: caches, pages, packed rows, positions."""

import math
from dataclasses import dataclass

import pytest
import torch

import gossamer
from gossamer.frontend.checking import judged, see_results
from gossamer.ir.errors import InputError
from gossamer.runtime.driver import compilations

pytestmark = pytest.mark.gpu

DEVICE, SIZE = "cuda", 64

MASKS = {
    "full": lambda b, h, q, k: k >= 0,
    "causal": lambda b, h, q, k: k <= q,
    "window": lambda b, h, q, k: (k <= q) & (q - k < 200),
    "sinks and window": lambda b, h, q, k: (k <= q) & ((q - k < 100) | (k < 4)),
    "window of the head": lambda b, h, q, k: (k <= q) & (q - k < 64 * (h + 1)),
    "prefix of the sequence": lambda b, h, q, k: (k <= q) | (k < 10 * b + 5),
}


@dataclass
class Sequences:
    """Rows of sequences of (q_len, kv_len), one tensor (heads, length, size) each; the last query stands at
    the last key."""

    lengths: list[tuple[int, int]]
    heads: tuple[int, int] = (4, 2)
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self):
        hq, hk = self.heads
        self.q = [self.rows(hq, n) for n, _ in self.lengths]
        self.k = [self.rows(hk, m) for _, m in self.lengths]
        self.v = [self.rows(hk, m) for _, m in self.lengths]
        self.offsets = [max(0, m - n) for n, m in self.lengths]

    def rows(self, heads, length):
        return torch.randn(heads, length, SIZE, device=DEVICE).to(self.dtype)

    def integers(self, values):
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    def padded(self, tensors, length):
        """(B, heads, length, size) with NaN behind each."""
        shape = (len(tensors), tensors[0].shape[0], length, SIZE)
        whole = torch.full(shape, math.nan, device=DEVICE, dtype=self.dtype)
        for row, tensor in zip(whole, tensors, strict=True):
            row[:, : tensor.shape[1]] = tensor
        return whole

    # how they are stored: positional arguments and keywords of gossamer.attention

    def even(self):
        offset = self.offsets[0]
        return [torch.stack(x) for x in (self.q, self.k, self.v)], {"q_offset": offset}

    def shorter(self):
        most = max(m for _, m in self.lengths) + 37
        tensors = [torch.stack(self.q), self.padded(self.k, most), self.padded(self.v, most)]
        return tensors, {"kv_lens": self.integers([m for _, m in self.lengths]), **self.positions()}

    def paged(self, page):
        widths = [-(-m // page) for _, m in self.lengths]
        order = torch.randperm(sum(widths) + 3).tolist()
        table = torch.randint(-(2**30), 2**30, (len(widths), max(widths) + 2))
        caches = [
            torch.full((len(order), self.heads[1], page, SIZE), math.nan, device=DEVICE, dtype=self.dtype)
            for _ in range(2)
        ]
        for b, width in enumerate(widths):
            for n in range(width):
                table[b, n] = order.pop()
                for cache, whole in zip(caches, (self.k[b], self.v[b]), strict=True):
                    part = whole[:, n * page : (n + 1) * page]
                    cache[table[b, n], :, : part.shape[1]] = part
        lens = self.integers([m for _, m in self.lengths])
        keywords = {"block_table": table.int().to(DEVICE), "kv_lens": lens, **self.positions()}
        return [torch.stack(self.q), *caches], keywords

    def packed(self):
        tensors = [torch.cat(x, 1)[None] for x in (self.q, self.k, self.v)]
        bounds = [[0], [0]]
        for lengths in self.lengths:
            for side, length in zip(bounds, lengths, strict=True):
                side.append(side[-1] + length)
        given = {"cu_seqlens_q": self.integers(bounds[0]), "cu_seqlens_kv": self.integers(bounds[1])}
        return tensors, given | self.positions()

    def positions(self):
        return {"q_offset": self.integers(self.offsets)}

    def check(self, form, mask, *arguments):
        """The rule, for every sequence."""

        def draw(judge, n):
            drawn = Sequences(self.lengths, self.heads, self.dtype) if n else self
            drawn.see(judge, form, mask, *arguments)

        judged(draw)

    def see(self, judge, form, mask, *arguments):
        tensors, keywords = getattr(self, form)(*arguments)
        out, lse = gossamer.attention(
            *tensors, mask=mask, return_lse=True, enable_gqa=True, validate=True, **keywords
        )
        first = 0
        for b, offset in enumerate(self.offsets):
            rows = slice(first, first + self.lengths[b][0]) if form == "packed" else slice(None)
            first, at = rows.stop or 0, 0 if form == "packed" else b
            found = out[at : at + 1, :, rows], lse[at : at + 1, :, rows]
            given = (x[b][None] for x in (self.q, self.k, self.v))
            see_results(
                judge,
                found,
                *given,
                mask=lambda _, h, q, k, b=b, offset=offset: mask(b, h, q + offset, k),
                enable_gqa=True,
            )


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("q_len", [1, 4, 16, 150])
def test_a_cache(name, q_len):
    Sequences([(q_len, 2999)] * 2).check("even", MASKS[name])


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("q_len", [1, 5])
def test_caches_of_different_lengths(name, q_len):
    Sequences([(q_len, m) for m in (2000, 5, 1, 1337, 64)]).check("shorter", MASKS[name])


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("page", [16, 64, 256])
@pytest.mark.parametrize("q_len", [1, 7])
def test_pages(name, page, q_len):
    Sequences([(q_len, m) for m in (2000, 7, 1337, 64)]).check("paged", MASKS[name], page)


@pytest.mark.parametrize("name", MASKS)
def test_packed_sequences(name):
    Sequences([(100, 100), (1, 300), (257, 513), (64, 64), (33, 1)]).check("packed", MASKS[name])


@pytest.mark.parametrize("heads", [(8, 8), (8, 1), (32, 8), (6, 2), (5, 1)])
@pytest.mark.parametrize("form", ["shorter", "paged"])
def test_grouped_heads(heads, form):
    arguments = (64,) if form == "paged" else ()
    Sequences([(1, 1500), (1, 40)], heads).check(form, MASKS["window of the head"], *arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("form", ["shorter", "paged", "packed"])
def test_dtypes(dtype, form):
    arguments = (64,) if form == "paged" else ()
    Sequences([(1, 1500), (1, 40)], dtype=dtype).check(form, MASKS["window"], *arguments)


def test_a_sequence_without_keys_gives_zeros():
    made = Sequences([(1, 50), (1, 0)])
    tensors, keywords = made.shorter()
    out, lse = gossamer.attention(*tensors, enable_gqa=True, return_lse=True, **keywords)
    assert (out[1] == 0).all() and (lse[1] == -math.inf).all() and (out[0] != 0).any()


@pytest.mark.parametrize("form", ["shorter", "paged"])
def test_a_cache_grows_in_a_graph(form):
    made = Sequences([(1, 1800)] * 3)
    tensors, keywords = getattr(made, form)(*((64,) if form == "paged" else ()))
    lens, offsets = keywords["kv_lens"], keywords["q_offset"]
    call = lambda: gossamer.attention(*tensors, mask=MASKS["window"], enable_gqa=True, **keywords)  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    before = compilations()
    for length in (1, 63, 64, 700, 1800):
        lens.fill_(length)
        offsets.fill_(length - 1)
        graph.replay()
        assert torch.equal(out, call())
        wanted = gossamer.attention(
            *(torch.stack(x)[:, :, :n] for x, n in ((made.q, 1), (made.k, length), (made.v, length))),
            mask=MASKS["window"],
            enable_gqa=True,
            q_offset=length - 1,
        )
        torch.testing.assert_close(out, wanted, atol=2e-2, rtol=2e-2)
    assert compilations() <= before + 4, "caches of few keys and of many, and rows of one key"


def test_other_lengths_compile_nothing():
    Sequences([(1, 1500)] * 2).check("paged", MASKS["window"], 64)
    before = compilations()
    for lengths in ([(1, 20)] * 3, [(1, 4000)], [(1, 1025), (1, 1024), (1, 1)]):
        Sequences(lengths).check("paged", MASKS["window"], 64)
    assert compilations() <= before + 1, "a cache of few keys is not split, a large one is"


@pytest.mark.parametrize(
    "keyword, wrong, message",
    [
        ("block_table", 10**6, r"block_table\[0, 0\]: expected one of the \d+ pages"),
        ("kv_lens", -1, r"kv_lens\[0\]: expected a length from 0"),
        ("kv_lens", 10**6, r"kv_lens\[0\]: expected a length from 0"),
    ],
)
def test_validate_reads_what_tensors_hold(keyword, wrong, message):
    tensors, keywords = Sequences([(1, 300)] * 2).paged(64)
    keywords[keyword].view(-1)[0] = wrong
    with pytest.raises(InputError, match=message):
        gossamer.attention(*tensors, enable_gqa=True, validate=True, **keywords)


def test_overlapping_sequences_are_refused():
    tensors, keywords = Sequences([(10, 10)] * 3).packed()
    keywords["cu_seqlens_kv"][1] = 25
    with pytest.raises(InputError, match="cu_seqlens_kv"):
        gossamer.attention(*tensors, enable_gqa=True, validate=True, **keywords)
