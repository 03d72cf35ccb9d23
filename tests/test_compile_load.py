"""`gossamer.compile`, `Kernel.save`, `gossamer.load`: results stay, and loading compiles nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sympy
import torch

import gossamer
from gossamer import AttentionSpec, masks
from gossamer.ir.errors import ArtifactError, InputError
from gossamer.runtime.driver import compilations


def soft_cap(score, b, h, q_idx, kv_idx):
    return 20 * torch.tanh(score / 20)


def tensors(q_len=50, kv_len=60, *, size=16, v_size=None, heads=2, kv_heads=None, dtype=torch.float32):
    kv_heads, v_size = kv_heads or heads, v_size or size
    shapes = (1, heads, q_len, size), (1, kv_heads, kv_len, size), (1, kv_heads, kv_len, v_size)
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


CASES = {
    "window": (AttentionSpec(masks.sliding_window(5), qk_size=16), {"mask": masks.sliding_window(30, 2)}),
    "two kernels": (AttentionSpec(masks.strided(8, 3), qk_size=16), {"mask": masks.strided(8, 11)}),
    "document": (
        AttentionSpec(masks.document(torch.arange(9)), qk_size=16),
        {"mask": masks.document(torch.arange(60) // 7)},
    ),
    "score": (
        AttentionSpec(masks.causal(), soft_cap, qk_size=16),
        {"mask": masks.causal(), "score_mod": soft_cap},
    ),
    "all pairs, half": (AttentionSpec(dtype="f16", qk_size=16, v_size=24), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("suffix", [".gossamer", ""])
def test_kernel_is_called_saved_and_loaded(name, suffix, tmp_path):
    spec, options = CASES[name]
    kernel = gossamer.compile(spec)
    dtype = torch.float16 if spec.dtype == "f16" else torch.float32
    q, k, v = tensors(v_size=spec.v_size, dtype=dtype)
    expected = gossamer.attention(q, k, v, **options)
    out = kernel(q, k, v, **options)
    # Key tiles of documents come in another order where ids are known to be sorted.
    apart = 1e-6 if name == "document" else 0
    torch.testing.assert_close(out, expected, rtol=apart, atol=apart)
    loaded = gossamer.load(kernel.save(tmp_path / f"kernel{suffix}"))
    before = compilations()
    assert torch.equal(loaded(q, k, v, **options), out)
    assert compilations() == before
    assert (loaded.source, loaded.ir, loaded.target) == (kernel.source, kernel.ir, kernel.target)
    assert "attention" in kernel.source and "kernel @attention" in kernel.ir
    assert repr(kernel).startswith("Kernel(attention_")


def test_return_lse_is_part_of_the_spec():
    kernel = gossamer.compile(AttentionSpec(masks.causal(), qk_size=16, return_lse=True))
    q, k, v = tensors(heads=4, kv_heads=2)
    options = {"mask": masks.causal(), "scale": 0.5, "enable_gqa": True}
    for found, wanted in zip(
        kernel(q, k, v, **options), gossamer.attention(q, k, v, return_lse=True, **options), strict=True
    ):
        assert torch.equal(found, wanted)


FRESH = """
import sys, torch, gossamer
from gossamer import masks
from gossamer.runtime import driver
kernel = gossamer.load(sys.argv[1])
q, k, v = torch.randn(3, 1, 2, 70, 16)
out = kernel(q, k, v, mask=masks.sliding_window(9))
assert torch.equal(out, gossamer.attention(q, k, v, mask=masks.sliding_window(9)))  # which it answers too
distance = torch.arange(70)[:, None] - torch.arange(70)
plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=distance.abs() <= 9)
assert (out - plain).abs().max() < 1e-5
print(driver.compilations(), *{"tvm", "sympy", "islpy", "networkx"} & set(sys.modules))
"""


def test_saved_kernel_runs_without_compiler_or_passes(tmp_path):
    path = gossamer.compile(AttentionSpec(masks.sliding_window(5), qk_size=16)).save(tmp_path / "w.gossamer")
    environment = {
        "PATH": "/nonexistent",
        "HOME": str(tmp_path),
        "GOSSAMER_CACHE_DIR": str(tmp_path / "empty"),
    }
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", FRESH, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0"


FROM_CACHE = """
import sys, torch, gossamer
from gossamer import masks
from gossamer.runtime import driver
q, k, v = torch.randn(3, 1, 2, 70, 16)
gossamer.attention(q, k, v, mask=masks.strided(8, 5))
print(driver.compilations(), *{"tvm", "sympy", "islpy", "networkx"} & set(sys.modules))
"""


def test_second_process_finds_the_kernel_on_disk(tmp_path):
    environment = os.environ | {"GOSSAMER_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", FROM_CACHE]
    first, second = (
        subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=True
        ).stdout
        for _ in range(2)
    )
    assert int(first.split()[0]) == 2
    assert second.strip() == "0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "kernel: dtype: expected 'f32'; got 'f64'. Compile another spec"),
        ({"size": 24}, "kernel: qk_size: expected 16; got 24"),
        ({"v_size": 24}, "kernel: v_size: expected 16; got 24"),
    ],
)
def test_other_tensors_are_refused(change, message):
    kernel = gossamer.compile(AttentionSpec(masks.causal(), qk_size=16))
    with pytest.raises(InputError, match=message):
        kernel(*tensors(**change), mask=masks.causal())


def test_other_structure_is_refused():
    kernel = gossamer.compile(AttentionSpec(masks.causal(), qk_size=16))
    q, k, v = tensors()
    with pytest.raises(InputError, match=r"expected the structure Mask\(k <= q\); got Mask\(true\)"):
        kernel(q, k, v)
    with pytest.raises(InputError, match="score_mod"):
        kernel(q, k, v, mask=masks.causal(), score_mod=soft_cap)
    strided = q.transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(InputError, match="kernel: query: expected a last dimension of stride 1"):
        kernel(strided, k, v, mask=masks.causal())


def test_kernel_for_a_gpu_takes_no_cpu_tensors(tmp_path):
    pytest.importorskip("triton")
    kernel = gossamer.compile(AttentionSpec(masks.sliding_window(9), dtype="f16"), target="cuda:sm_90")
    loaded = gossamer.load(kernel.save(tmp_path / "gpu"))
    assert loaded.target == "cuda:sm_90"
    with pytest.raises(InputError, match="expected a tensor on a cuda device, for cuda:sm_90; got cpu"):
        loaded(*tensors(size=64, dtype=torch.float16), mask=masks.sliding_window(9))


@pytest.mark.parametrize("suffix", [".gossamer", ""])
def test_flipped_byte_is_found(suffix, tmp_path):
    path = gossamer.compile(AttentionSpec(masks.causal(), qk_size=16)).save(tmp_path / f"kernel{suffix}")
    file = (
        path if path.is_file() else max(filter(Path.is_file, path.rglob("*")), key=lambda f: f.stat().st_size)
    )
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)
    with pytest.raises(ArtifactError):
        gossamer.load(path)


def test_foreign_files_are_refused(tmp_path):
    stranger = tmp_path / "stranger.gossamer"
    stranger.write_bytes(b"PK not ours" * 9)
    (tmp_path / "folder").mkdir()
    for path in (stranger, tmp_path / "folder", Path("nowhere.gossamer")):
        with pytest.raises(ArtifactError):
            gossamer.load(path)


# ---- schedules ----


@pytest.mark.parametrize("rows, cols", [(16, 16), (48, 8), (24, 7), (8, 96)])
def test_schedules_change_speed_only(rows, cols):
    q, k, v = tensors(90, 75)
    options = {"mask": masks.sliding_window(9), "schedule": gossamer.Schedule((rows,), (cols,))}
    expected = gossamer.attention(q, k, v, mask=masks.sliding_window(9))
    torch.testing.assert_close(gossamer.attention(q, k, v, **options), expected, atol=2e-6, rtol=1e-5)


BAD_SCHEDULES = {
    "two dimensions": (gossamer.Schedule((8, 4), (4, 4)), r"one extent a dimension \(1\)"),
    "no rows": (gossamer.Schedule((0,), (32,)), "at least 1"),
    "huge": (gossamer.Schedule((100_000,), (32,)), "1024 together at most"),
    "anchors": (gossamer.Schedule((32,), (32,), (None, None)), "one anchor a dimension"),
    "anchor too late": (gossamer.Schedule((32,), (32,), (sympy.Integer(0),)), "bounds k - q from below"),
    "one too many": ((gossamer.Schedule((32,), (32,)),) * 2, "1 schedules, one a group"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SCHEDULES)
def test_schedules_that_do_not_fit(name):
    schedule, message = BAD_SCHEDULES[name]
    with pytest.raises(InputError, match=message):
        gossamer.attention(*tensors(), mask=masks.sliding_window(9), schedule=schedule)
