"""Keys and values through tensor descriptors: which loads are spelled so, and what the driver is told."""

import struct
from dataclasses import replace

import pytest
import torch

import gossamer
from gossamer import masks
from gossamer.codegen import triton as codegen
from gossamer.frontend.mask import Mask
from gossamer.ir.kernel_text import parse
from gossamer.passes.pipeline import compile_spec
from gossamer.passes.spec import AttentionSpec
from gossamer.runtime import gpu
from gossamer.runtime.triton_interpreter import run_interpreted

LOADS = """
kernel @loads(
  x: f16[n, m, 40] in unit 2 align 16, y: f16[n, m, 64] in unit 2 align 16, z: f16[n, m, 64] in unit 2,
  o: f32[64] out unit 0, first: i64
) grid(t: n) axes(i: 32, d: 40 of 64, e: 64) meta(descriptors=1) {
  tile row: i32[i] = 32 * t + i - first
  tile X: f16[i, d] = load x[t, row, d] where row >= 0 and row < m else 0
  tile Y: f16[i, e] = load y[t, 2 * row, e] where row >= 0 and 2 * row < m else 0
  tile Z: f16[i, e] = load z[t, row, e] where row >= 0 and row < m else 0
  tile S: f32[e] = sum Y + Z + 0 * first over i
  store o[e] = S over e
}
"""


def test_only_boxes_of_aligned_rows_are_fetched_by_descriptors():
    module = codegen.module(parse(LOADS))
    names = [a.name for a in module.signature]
    assert "d_x" in names and "p_x" not in names and "s_x_0" not in names
    assert "p_y" in names and "d_y" not in names, "every other row is no box"
    assert "p_z" in names and "d_z" not in names, "nothing says that z is aligned"
    assert "d_x.load([t, 32 * t - first, 0]).reshape([32, 64])" in module.source
    assert gpu.compile_ahead(module.source, "cuda:sm_90").boxes[0][1] == (1, 32, 64)


def test_tiles_with_their_dimensions_in_another_order_come_as_the_tensor_lies():
    text = """
    kernel @turned(x: f16[n, m, 64] in unit 2 align 16, o: f32[n, 64] out unit 1)
    grid(t: n) axes(d: 64, i: 32) meta(descriptors=1) {
      tile X: f16[d, i] = load x[t, i, d] where i < m else 0
      tile S: f32[d] = sum X over i
      store o[t, d] = S over d
    }
    """
    source = codegen.emit(parse(text))
    assert "d_x.load([t, 0, 0]).reshape([32, 64]).permute([1, 0])" in source
    x, o = torch.randint(0, 9, (3, 20, 64)).half(), torch.zeros(3, 64)
    run_interpreted(source, {"x": x, "o": o})
    assert torch.equal(o, x.float().sum(1))
    assert gpu.compile_ahead(source, "cuda:sm_90").boxes[0][1] == (1, 32, 64)


def test_the_hint_decides():
    text = LOADS.replace("descriptors=1", "descriptors=0")
    assert "tensordesc" not in codegen.emit(parse(text))


@pytest.mark.parametrize(
    "mask, dtype, aligned, described",
    [
        (masks.causal(), "bf16", True, True),
        (masks.sliding_window(5), "f16", True, True),
        (masks.causal(), "bf16", False, False),
        (masks.causal(), "f32", True, False),
        (masks.dilated_window(9, 4), "bf16", True, False),
    ],
)
def test_which_attention_uses_them(mask, dtype, aligned, described):
    spec = AttentionSpec(Mask.of(mask).ir, dtype=dtype, target="cuda:sm_90", aligned=aligned)
    [kernel] = compile_spec(spec).kernels
    assert ("d_k.load" in codegen.emit(kernel)) == described
    [older] = compile_spec(replace(spec, target="cuda:sm_80")).kernels
    assert "tensordesc" not in codegen.emit(older)


def test_loops_that_count_in_64_bits_start_boxes_in_32():
    mask = masks.prefix_lm(torch.tensor([4, 50]))
    [kernel] = compile_spec(AttentionSpec(mask.ir, dtype="bf16", target="cuda:sm_90")).kernels
    source = codegen.emit(kernel)
    assert "d_k.load([b, hk, tl.cast(64 * n0, tl.int32), 0])" in source
    gpu.compile_ahead(source, "cuda:sm_90")


def test_the_driver_is_told_shape_strides_and_box(fake):
    q = torch.randn(2, 3, 33, 40, dtype=torch.float16)
    k = torch.randn(2, 50, 3, 40, dtype=torch.float16).transpose(1, 2)
    v = torch.randn(2, 3, 50, 72, dtype=torch.float16)
    gossamer.attention(q, k, v, mask=masks.causal())
    (shape, strides, box, rest), (v_shape, *_) = fake.encoded
    assert shape == (40, 50, 3, 2) and v_shape == (72, 50, 3, 2)
    assert strides == tuple(2 * s for s in (3 * 40, 40, 50 * 3 * 40))
    assert box[0] <= 64 and box[2:] == (1, 1) and rest[0] == 0 and rest[2:] == (2, 0)
    for done in fake.launched:
        described = [a for a in done.arguments if isinstance(a, bytes)]
        assert [struct.unpack("<2Q", d[:16]) for d in described] == [(6, k.data_ptr()), (6, v.data_ptr())]


def test_no_keys_at_all_describe_nothing(fake):
    q, k = torch.randn(1, 1, 33, 64, dtype=torch.float16), torch.randn(1, 1, 0, 64, dtype=torch.float16)
    gossamer.attention(q, k, k, mask=masks.causal())
    assert not fake.encoded and len(fake.launched) == 1


def test_numbers_of_queries_come_as_queries_do_in_rows_of_16_bytes(fake):
    q, k, v = (torch.randn(2, 3, 33, 40, dtype=torch.float16, requires_grad=True) for _ in range(3))
    out = gossamer.attention(q, k, v, mask=masks.causal())
    fake.encoded.clear()
    torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    numbers = [(shape, strides, box) for shape, strides, box, _ in fake.encoded if len(shape) == 3]
    assert len(numbers) == 2, "the log-sum-exp and delta"
    for shape, strides, box in numbers:
        assert shape == (33, 3, 2) and strides == (36 * 4, 36 * 4 * 3)
        assert box[0] * 4 % 128 == 0


@pytest.mark.parametrize("count, described", [(16, False), (32, True)])
def test_boxes_fill_whole_lines_of_shared_memory(count, described):
    text = f"""
    kernel @numbers(x: f32[n, m] in unit 1 align 16, o: f32[n, m] out unit 1)
    grid(t: n) axes(i: {count}) meta(descriptors=1) {{
      tile X: f32[i] = load x[t, i] where i >= 0 and i < m else 0
      store o[t, i] = X over i where i < m
    }}
    """
    assert ("d_x.load" in codegen.emit(parse(text))) == described
