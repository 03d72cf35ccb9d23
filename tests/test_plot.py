"""Pictures: terms and tiles where the mask has them, bounded whatever the lengths are."""

import struct
import sys
import tracemalloc

import numpy as np
import pytest

from gossamer import Mask, masks
from gossamer.frontend import plot as module
from gossamer.frontend.blocks import Values
from gossamer.frontend.plot import label, plot, raster, terms_panel, tiles_panel
from gossamer.ir.errors import InputError, MissingDependencyError
from gossamer.ir.mask import Mask as IRMask
from gossamer.passes.decompose import decompose

WHITE = np.ones(3)


def size_of(path):
    head = path.read_bytes()[:24]
    assert head[:4] == b"\x89PNG"
    return struct.unpack(">II", head[16:24])


def lengths(q_len, kv_len, params=()):
    return Values(params, (), q_len, kv_len)


# ---- what is drawn ----


@pytest.mark.parametrize("shape", [(40, 40), (37, 61)])
@pytest.mark.parametrize(
    "mask",
    [
        masks.causal(),
        masks.strided(8, 3),
        masks.longformer(5, 2),
        masks.random_blocks(1, 8),
        masks.document([0] * 20 + [1] * 50),
        ~masks.full(),
    ],
    ids=repr,
)
def test_pixels_are_the_pairs(mask, shape):
    panel = terms_panel(mask.ir, Values(mask.values, [np.asarray(t) for t in mask.tensors], *shape))
    assert panel.pixel == (1, 1)
    np.testing.assert_array_equal((panel.picture != WHITE).any(2), mask.to_dense(*shape))


@pytest.mark.parametrize("q_len, kv_len", [(64, 48), (61, 50)])
def test_tiles_are_those_of_the_matrix(q_len, kv_len):
    mask = IRMask.parse("mask() { abs(q - k) <= 20 }")
    dense = mask.evaluate(0, 0, np.arange(q_len)[:, None], np.arange(kv_len))
    found = raster(mask, lengths(q_len, kv_len), (16, 8))
    for t, u in np.ndindex(found.some.shape):
        tile = dense[16 * t : 16 * t + 16, 8 * u : 8 * u + 8]
        assert (found.some[t, u], found.every[t, u]) == (tile.any(), tile.all())


def test_terms_have_colours_of_their_own():
    panel = terms_panel(IRMask.parse("mask() { abs(q - k) < 8 or (q - k) % 8 == 0 }"), lengths(64, 64))
    assert len({tuple(c) for c in panel.picture.reshape(-1, 3)}) == 4  # three terms and paper
    assert len(panel.legend) == 3


def test_long_masks_are_drawn_in_squares():
    panel = terms_panel(IRMask.parse("mask() { k <= q }"), lengths(5000, 3000))
    assert panel.pixel == (5, 5) and panel.picture.shape == (1000, 600, 3)
    inside, edge = panel.picture[10, 3], panel.picture[10, 10]
    assert (inside < edge).any() and (edge < WHITE).any()  # pale where some pairs attend
    assert "5×5" in panel.title


def test_many_tiles_are_drawn_in_squares():
    panel = tiles_panel(IRMask.parse("mask() { k <= q }"), lengths(1 << 16, 1 << 16), (64, 64))
    assert panel.picture.shape == (256, 256, 3) and "squares of 4×4" in panel.title
    text = dict((t.split(":")[0], t) for _, t in panel.legend)
    assert text["partial"].startswith("partial: 256 squares")


# ---- legends ----


def test_labels_are_closed_forms():
    terms = decompose(IRMask.parse("mask() { abs(q - k) < 64 or (q - k) % 64 == 0 }"))
    assert {label(t, {}) for t in terms} == {
        "from k = max(0, q - 63), min(126, q + 63) + 1 keys",
        "from k = q % 64 by 64, q // 64 keys; rows q >= 64",
        "from k = q + 64 by 64 to the end",
    }


def test_labels_have_numbers_for_integers():
    [term] = decompose(IRMask.parse("mask(p0) { k <= q and k >= p0 }"))
    assert label(term, {"p0": 7}).startswith("from k = 7, ")


def test_legend_says_what_colours_cannot():
    empty = terms_panel(IRMask.parse("mask() { false }"), lengths(8, 8))
    assert [t for _, t in empty.legend] == ["no pair attends"]
    opaque = terms_panel(IRMask.parse("mask() { bitand(q, k) == 0 and k <= q }"), lengths(8, 8))
    assert "tested one by one" in opaque.legend[-1][1]


def test_terms_beyond_the_palette_share_a_colour(monkeypatch):
    monkeypatch.setattr(module, "MAX_COLOURS", 2)
    panel = terms_panel(IRMask.parse("mask() { abs(q - k) < 8 or (q - k) % 8 == 0 }"), lengths(64, 64))
    assert [t for _, t in panel.legend][1] == "2 more terms"


# ---- the file ----


def test_picture_keeps_the_shape_of_the_mask(tmp_path):
    square, wide, tall = (
        size_of(plot(masks.causal(), tmp_path / f"{q}_{k}.png", q, k))
        for q, k in ((64, 64), (32, 96), (96, 32))
    )
    assert wide[0] == square[0] and wide[1] < square[1]
    assert tall[0] < square[0] and tall[1] == square[1]


def test_mask_plots_itself(tmp_path):
    masks.sliding_window(8).plot(tmp_path / "mask.png", 64, 64, tiles=(16, 16), title="a window")
    assert size_of(tmp_path / "mask.png")[0] > 1000


def test_head_is_chosen(tmp_path):
    mask = Mask.trace(lambda b, h, q, k: abs(q - k) <= 8 * h)
    paths = [plot(mask, tmp_path / f"{h}.png", 32, 32, head=h, title="same") for h in (0, 1)]
    assert paths[0].read_bytes() != paths[1].read_bytes()


def test_memory_does_not_grow_with_the_lengths(tmp_path):
    plot(masks.causal(), tmp_path / "warm.png", 64, 64)
    tracemalloc.start()
    plot(masks.sliding_window(4096, 0), tmp_path / "long.png", 1 << 20, 1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400 << 20  # of the 128 GiB that the mask has bits for


@pytest.mark.parametrize("sizes", [(0, 8, (4, 4)), (8, 0, (4, 4)), (8, 8, (0, 4))])
def test_sizes_below_one_are_errors(tmp_path, sizes):
    with pytest.raises(InputError, match="expected at least 1"):
        plot(masks.causal(), tmp_path / "no.png", *sizes)


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'gossamer\[plot\]'"):
        plot(masks.causal(), tmp_path / "no.png", 8, 8)
