"""`gossamer.flex` against `torch.nn.attention.flex_attention`: same signatures, lists, printing, numbers."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention as pytorch

import gossamer
from gossamer import flex
from gossamer.flex import BlockMask, create_block_mask, flex_attention
from gossamer.ir.errors import InputError, TraceError, UnsupportedError

DOCUMENTS = torch.arange(700) // 90
TABLE = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) < 0.3
WINDOWS = torch.tensor([3, 40, 17, 200])
OFFSET = 37


def causal(b, h, q, k):
    return q >= k


def window(b, h, q, k):
    return (q - k).abs() <= OFFSET


def documents(b, h, q, k):
    return (DOCUMENTS[q] == DOCUMENTS[k]) & (q >= k)


MASKS: dict[str, Callable[..., Any]] = {
    "full": pytorch.noop_mask,
    "causal": causal,
    "window": window,
    "strided": lambda b, h, q, k: ((q - k).abs() < 9) | ((q - k) % 32 == 0),
    "dilated": lambda b, h, q, k: (q - k) % 16 == 0,
    "blocked": lambda b, h, q, k: q // 48 == k // 48,
    "longformer": flex.or_masks(window, lambda b, h, q, k: (k < 5) | (q < 5)),
    "prefix": pytorch.or_masks(causal, lambda b, h, q, k: k < 100),
    "causal_window": flex.and_masks(causal, window),
    "documents": documents,
    "table": lambda b, h, q, k: TABLE[q // 88, k // 88],
    "heads": lambda b, h, q, k: (q - k).abs() <= WINDOWS[h],
    "batches": lambda b, h, q, k: q + 10 * b >= k,
    "empty_rows": lambda b, h, q, k: (k > q) & (q % 3 != 0),
    "nothing": flex.or_masks(),
}

SCORES: dict[str, Callable[..., Any]] = {
    "alibi": lambda s, b, h, q, k: s + torch.exp2(-(h + 1).float()) * (k - q),
    "capped": lambda s, b, h, q, k: 5 * torch.tanh(s / 5),
    "bias": lambda s, b, h, q, k: s + SLOPES[(q - k).abs()],
    "causal": lambda s, b, h, q, k: torch.where(q >= k, s, -float("inf")),
}
SLOPES = torch.randn(700, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """PyTorch's unfused flex_attention, without compiling a wrapper around it."""
    monkeypatch.setattr(pytorch, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    return pytorch.flex_attention


def tensors(batch=2, heads=4, kv_heads=4, q_len=130, kv_len=130, size=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(q_len + kv_len)
    shapes = (heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len)
    return tuple(torch.randn(batch, *shape, size, generator=generator).to(dtype) for shape in shapes)


def both(
    mask_mod: Callable[..., Any], *arguments: Any, **options: Any
) -> tuple[BlockMask, pytorch.BlockMask]:
    return (
        create_block_mask(mask_mod, *arguments, device="cpu", **options),
        pytorch.create_block_mask(mask_mod, *arguments, device="cpu", **options),
    )


def assert_same_lists(ours: pytorch.BlockMask, theirs: pytorch.BlockMask) -> None:
    for name in flex_lists():
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert (mine is None) == (other is None), name
        if mine is not None:
            assert mine.dtype == other.dtype and torch.equal(mine, other), name


def flex_lists() -> list[str]:
    return [f"{f}{s}_{w}" for f in ("", "full_") for s in ("kv", "q") for w in ("num_blocks", "indices")]


# ---- the interface ----


@pytest.mark.parametrize("name", pytorch.__all__)
def test_every_name_has_pytorchs_signature(name: str) -> None:
    if getattr(flex, name) is getattr(pytorch, name):
        return
    ours, theirs = (inspect.signature(getattr(m, name)).parameters.values() for m in (flex, pytorch))

    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


def test_gossamer_flex_is_a_module_of_its_own_name() -> None:
    import gossamer.flex as imported

    assert imported is gossamer.flex is flex
    assert set(pytorch.__all__) == set(flex.__all__)


# ---- block masks ----


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(
    "lengths, size", [((256, 256), 128), ((700, 517), 128), ((130, 300), (32, 64)), ((100, 100), 128)]
)
def test_lists_are_pytorchs(name: str, lengths: tuple[int, int], size: Any) -> None:
    ours, theirs = both(MASKS[name], 2, 4, *lengths, BLOCK_SIZE=size)
    assert ours.shape == theirs.shape and ours.numel() == theirs.numel()
    assert_same_lists(ours, theirs)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert ours.sparsity() == theirs.sparsity()


def test_printing_is_pytorchs() -> None:
    ours, theirs = both(causal, 1, 2, 700, 700)
    assert str(ours) == str(theirs)
    assert repr(ours) == repr(theirs)
    assert ours.to_string(grid_size=(3, 5), limit=1) == theirs.to_string(grid_size=(3, 5), limit=1)


@pytest.mark.parametrize("options", [{}, {"separate_full_blocks": False}])
def test_as_tuple_is_pytorchs(options: dict[str, Any]) -> None:
    ours, theirs = both(window, None, None, 300, 400, **options)
    for mine, other in zip(ours.as_tuple(), theirs.as_tuple(), strict=True):
        assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other


def test_a_block_mask_makes_no_lists_until_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = create_block_mask(window, 2, 4, 130, 130)
    sliced = ours[1].to("cpu")._adjust(65, 65)
    flex_attention(*tensors(), block_mask=ours)
    assert ours.shape == (2, 4, 130, 130) and sliced.shape == (1, 4, 65, 65)
    assert not set(flex_lists()) & {*vars(ours), *vars(sliced)}
    assert ours.kv_indices is ours.kv_indices


def test_lists_of_a_long_closed_form_mask_cost_nothing_of_its_size() -> None:
    length = 1 << 17
    ours = create_block_mask(window, None, None, length, length)
    assert ours.kv_num_blocks.sum() + ours.full_kv_num_blocks.sum() == 3 * 1024 - 2


@pytest.mark.parametrize(
    "index",
    [
        0,
        -1,
        (1, 2),
        (slice(0, 1), slice(1, 4, 2)),
        (slice(None), slice(None, None, None)),
        (torch.tensor([1, 0]),),
        (slice(None), torch.tensor([3, 1])),
        (0, slice(None), slice(1, 3)),
        (slice(None), slice(None), torch.tensor([2, 0])),
    ],
    ids=str,
)
def test_slices_are_pytorchs(index: Any) -> None:
    ours, theirs = both(lambda b, h, q, k: q + 100 * b >= k + 50 * h, 2, 4, 400, 300)
    ours, theirs = ours[index], theirs[index]
    assert isinstance(ours, BlockMask)
    assert ours.shape == theirs.shape
    assert_same_lists(ours, theirs)


def test_slicing_out_of_range_is_an_index_error() -> None:
    with pytest.raises(IndexError):
        _ = create_block_mask(causal, 2, 4, 128, 128)[2]


def test_slice_over_batches_and_heads_still_attends_alike() -> None:
    def mask_mod(b, h, q, k):
        return q + 10 * b >= k + 20 * h

    q, k, v = tensors()
    whole = create_block_mask(mask_mod, 2, 4, 130, 130)
    expected = flex_attention(q, k, v, block_mask=whole)
    every = slice(None)
    for batches, heads in [(1, 2), (0, slice(1, 3)), (every, slice(0, 4, 2)), (1, torch.tensor([3, 0]))]:
        b, h = (slice(i, i + 1) if isinstance(i, int) else i for i in (batches, heads))
        some = [t[b][:, h] for t in (q, k, v)]
        assert torch.equal(flex_attention(*some, block_mask=whole[batches, heads]), expected[b][:, h])


def test_slice_over_query_blocks_wants_a_new_mask_mod() -> None:
    q, k, v = tensors(q_len=256, kv_len=256)
    whole = create_block_mask(window, 2, 4, 256, 256)
    sliced = whole[:, :, 1]
    with pytest.raises(UnsupportedError, match="assign mask_mod"):
        flex_attention(q, k, v, block_mask=sliced)
    sliced.mask_mod = lambda b, h, q, k: window(b, h, q + 128, k)
    sliced.seq_lengths = (128, 256)
    expected = flex_attention(q, k, v, block_mask=whole)[:, :, 128:]
    torch.testing.assert_close(flex_attention(q[:, :, 128:], k, v, block_mask=sliced), expected)


def test_mask_mod_is_captured_when_the_block_mask_is_made() -> None:
    with pytest.raises(TraceError, match=r"test_flex\.py"):
        create_block_mask(lambda b, h, q, k: q if q > k else k, None, None, 64, 64)


def test_block_mask_of_a_library_mask() -> None:
    ours = create_block_mask(gossamer.masks.causal(), None, None, 300, 300)
    assert_same_lists(ours, pytorch.create_block_mask(causal, None, None, 300, 300, device="cpu"))


# ---- block masks made of lists ----


def listed(partial: list[list[int]], full: list[list[int]], mask_mod: Any, cls: Any = BlockMask) -> Any:
    def lists(blocks: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        dense = torch.tensor(blocks, dtype=torch.int32)[None, None]
        order = torch.argsort(dense, dim=-1, descending=True, stable=True)
        return dense.sum(-1, dtype=torch.int32), order.to(torch.int32)

    return cls.from_kv_blocks(*lists(partial), *lists(full), BLOCK_SIZE=64, mask_mod=mask_mod)


@pytest.mark.parametrize("cls", [BlockMask, pytorch.BlockMask])
@pytest.mark.parametrize("mask_mod", [None, causal])
def test_lists_say_which_blocks_attend(cls: type, mask_mod: Any) -> None:
    partial, full = [[1, 0, 0], [0, 1, 1]], [[0, 0, 1], [0, 0, 0]]
    q, k, v = tensors(q_len=128, kv_len=192)
    ours = flex_attention(q, k, v, block_mask=listed(partial, full, mask_mod, cls))
    rows, cols = torch.arange(128)[:, None], torch.arange(192)
    allowed = torch.tensor(partial, dtype=torch.bool)[rows // 64, cols // 64]
    if mask_mod is not None:
        allowed &= rows >= cols
    allowed |= torch.tensor(full, dtype=torch.bool)[rows // 64, cols // 64]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask_mod", [causal, documents], ids=["exact", "opaque"])
def test_lists_that_add_nothing_leave_the_mask_as_it_is(mask_mod: Any) -> None:
    theirs = pytorch.create_block_mask(mask_mod, None, None, 300, 400, device="cpu")
    ours = BlockMask.from_kv_blocks(
        theirs.kv_num_blocks,
        theirs.kv_indices,
        theirs.full_kv_num_blocks,
        theirs.full_kv_indices,
        mask_mod=mask_mod,
        seq_lengths=(300, 400),
    )
    assert ours.mask.key == gossamer.Mask.trace(mask_mod).key
    ours.kv_num_blocks = ours.kv_num_blocks - 1
    assert ours.mask.key != gossamer.Mask.trace(mask_mod).key


# ---- numbers ----


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("lengths", [(130, 130), (70, 257), (257, 70)], ids=str)
def test_masks_agree_with_pytorch(name: str, lengths: tuple[int, int], eager: Callable[..., Any]) -> None:
    q, k, v = tensors(q_len=lengths[0], kv_len=lengths[1])
    ours, theirs = both(MASKS[name], 2, 4, *lengths)
    out, lse = flex_attention(q, k, v, block_mask=ours, return_lse=True)
    expected, aux = eager(q, k, v, block_mask=theirs, return_aux=flex.AuxRequest(lse=True))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, aux.lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name, mask_mod",
    [("alibi", None), ("alibi", window), ("capped", None), ("bias", window), ("causal", None)],
)
def test_score_mods_agree_with_pytorch(name: str, mask_mod: Any, eager: Callable[..., Any]) -> None:
    q, k, v = tensors(q_len=90, kv_len=150)
    masks = both(mask_mod, None, None, 90, 150) if mask_mod else (None, None)
    out = flex_attention(q, k, v, SCORES[name], masks[0], scale=0.3)
    expected = eager(q, k, v, SCORES[name], masks[1], scale=0.3)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_grouped_heads_agree_with_pytorch(
    kv_heads: int, dtype: torch.dtype, eager: Callable[..., Any]
) -> None:
    q, k, v = tensors(kv_heads=kv_heads, dtype=dtype)
    ours, theirs = both(MASKS["heads"], 1, 4, 130, 130)
    out = flex_attention(q, k, v, block_mask=ours, enable_gqa=True)
    expected = eager(q, k, v, block_mask=theirs, enable_gqa=True)
    tolerance = max(2 * torch.finfo(dtype).eps, 1e-6)  # PyTorch rounds probabilities to dtype, we do not
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


def test_one_batch_of_keys_serves_all_queries(eager: Callable[..., Any]) -> None:
    q, k, v = tensors()
    ours, theirs = both(causal, 2, None, 130, 130)
    out = flex_attention(q, k[:1], v[:1], block_mask=ours)
    torch.testing.assert_close(out, eager(q, k[:1], v[:1], block_mask=theirs), atol=1e-5, rtol=1e-5)


def test_pytorch_takes_our_block_mask_and_we_take_theirs(eager: Callable[..., Any]) -> None:
    q, k, v = tensors()
    ours, theirs = both(window, None, None, 130, 130)
    expected = flex_attention(q, k, v, block_mask=ours)
    assert torch.equal(flex_attention(q, k, v, block_mask=theirs), expected)
    torch.testing.assert_close(eager(q, k, v, block_mask=ours), expected, atol=1e-5, rtol=1e-5)


def test_adjusted_block_mask_agrees_with_pytorch(eager: Callable[..., Any]) -> None:
    q, k, v = tensors(q_len=100, kv_len=80)
    ours, theirs = (m._adjust(100, 80) for m in both(MASKS["strided"], None, None, 256, 256))
    assert_same_lists(ours, theirs)
    out = flex_attention(q, k, v, block_mask=ours)
    torch.testing.assert_close(out, eager(q, k, v, block_mask=theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name, score", [("full", "alibi"), ("empty_rows", None), ("heads", "bias")])
def test_aux_outputs(name: str, score: str | None) -> None:
    q, k, v = tensors(q_len=70, kv_len=90, kv_heads=2)
    score_mod = SCORES[score] if score else None
    masks = create_block_mask(MASKS[name], 2, 4, 70, 90)
    request = flex.AuxRequest(lse=True, max_scores=True)
    out, aux = flex_attention(q, k, v, score_mod, masks, enable_gqa=True, return_aux=request)

    grid = torch.meshgrid(*map(torch.arange, (2, 4, 70, 90)), indexing="ij")
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 32**0.5
    scores = score_mod(scores, *grid) if score_mod else scores
    dense = flex.create_mask(MASKS[name], 2, 4, 70, 90, device="cpu")
    scores = scores.masked_fill(~dense, -torch.inf)
    torch.testing.assert_close(aux.max_scores, scores.amax(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(aux.lse, scores.logsumexp(-1), atol=1e-5, rtol=1e-5)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    torch.testing.assert_close(out, weights @ v.repeat_interleave(2, 1), atol=1e-5, rtol=1e-5)


def test_aux_holds_what_was_asked_for() -> None:
    q, k, v = tensors()
    for lse, largest in [(True, False), (False, True), (False, False)]:
        _, aux = flex_attention(q, k, v, return_aux=flex.AuxRequest(lse=lse, max_scores=largest))
        assert isinstance(aux, flex.AuxOutput)
        assert (aux.lse is not None, aux.max_scores is not None) == (lse, largest)


# ---- errors ----


def test_return_lse_and_return_aux_exclude_each_other() -> None:
    with pytest.raises(InputError, match="return_lse or return_aux"):
        flex_attention(*tensors(), return_lse=True, return_aux=flex.AuxRequest(lse=True))


@pytest.mark.parametrize("lengths", [(128, 130), (256, 256)])
def test_block_mask_of_other_lengths(lengths: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=r"expected lengths \(130, 130\).*_adjust"):
        flex_attention(*tensors(), block_mask=create_block_mask(causal, None, None, *lengths))


@pytest.mark.parametrize(
    "batch, what", [((3, 4), "batch size: expected 1 or the query's 2; got 3"), ((2, 2), "head size")]
)
def test_block_mask_of_another_batch(batch: tuple[int, int], what: str) -> None:
    with pytest.raises(InputError, match=what):
        flex_attention(*tensors(), block_mask=create_block_mask(causal, *batch, 130, 130))


def test_what_only_pytorchs_backward_uses_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="compute_dq_write_order"):
        create_block_mask(causal, None, None, 64, 64, compute_dq_write_order=True)


@pytest.mark.parametrize("name", ["Q_LEN", "KV_LEN", "BLOCK_SIZE"])
def test_sizes_of_a_block_mask_are_positive(name: str) -> None:
    sizes: dict[str, Any] = {"Q_LEN": 64, "KV_LEN": 64} | {name: 0}
    with pytest.raises(InputError, match=name):
        create_block_mask(causal, None, None, **sizes)


def test_only_functions_are_joined() -> None:
    for join in (flex.and_masks, flex.or_masks):
        with pytest.raises(InputError, match="functions"):
            join(causal, True)
