"""What can be tested of the GPU benchmarks without a GPU: arithmetic, results in JSON, tables, options."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

import gossamer

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    """The benchmarks' modules by name; they import each other as scripts in one folder do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module


def row(mask, dim=128, ms=0.1, **peers):
    return {
        "mask": mask, "shape": [4, 16, 4096, dim], "dtype": "bf16", "density": 0.1, "floor_ms": 0.05,
        "ms": ms, "peers": {name: {"ours_ms": ms, "ms": ratio * ms} for name, ratio in peers.items()},
    }  # fmt: skip


# ---- masks ----


@pytest.mark.parametrize("length", [1024, 2048])
def test_pairs_of_every_case_are_counted_by_analyze_too(benchmark, length):
    cases = benchmark("cases")
    for case in (cases.cases(length) | cases.more_cases(length)).values():
        assert gossamer.Mask.trace(case.mask_mod).analyze(length, length).nnz == case.pairs(length), case.name


def test_densities_are_those_published(benchmark):
    published = {"strided64": 0.046, "bigbird": 0.120, "document_causal": 0.139, "natten2d_13": 0.037}
    found = benchmark("cases").cases(4096)
    assert {name: round(found[name].pairs(4096) / 4096**2, 3) for name in published} == published


# ---- correctness ----


def test_accuracy_finds_a_wrong_row(benchmark):
    accuracy = benchmark("gpu_check").accuracy
    q, k, v = torch.randn(3, 2, 4, 70, 16).bfloat16().unbind()
    mask = gossamer.masks.sliding_window(9)
    dense = torch.from_numpy(mask.to_dense(70, 70))
    out = gossamer.attention(q, k, v, mask=mask)
    assert accuracy(out, (q, k, v), lambda rows: dense[rows]).passes
    for b, h in ((0, 0), (1, 3)):
        wrong = out.clone()
        wrong[b, h, 69] = out[b, h, 68]
        assert not accuracy(wrong, (q, k, v), lambda rows: dense[rows]).passes
    wrong = out.clone()
    wrong[1, 1, 5, 5] = torch.nan
    assert not accuracy(wrong, (q, k, v), lambda rows: dense[rows]).passes
    assert not accuracy(out[:, :, 1:], (q, k, v), lambda rows: dense[rows]).passes


def test_accuracy_of_shared_keys_and_empty_rows(benchmark):
    q, (k, v) = torch.randn(1, 4, 33, 8), torch.randn(2, 1, 2, 40, 8).unbind()
    mask = gossamer.Mask.trace(lambda b, h, q, k: k >= q + 20)
    dense = torch.from_numpy(mask.to_dense(33, 40))
    out = gossamer.attention(q, k, v, mask=mask, enable_gqa=True)
    assert benchmark("gpu_check").accuracy(out, (q, k, v), lambda rows: dense[rows]).passes


# ---- results ----


def test_an_invocation_replaces_what_it_measured(benchmark):
    merged = benchmark("gpu_report").merged
    old = {"date": "then", "decode": [1], "speed": [row("causal", flex=2.0), row("full", cudnn=1.0)]}
    new = row("causal", ms=0.05, fa4=3.0)
    found = merged(old, {"date": "now", "speed": [new]})
    assert found["date"] == "now" and "decode" not in found  # which the caller keeps
    causal, full = found["speed"]
    assert full == old["speed"][1] and causal["ms"] == 0.05
    assert causal["peers"] == {**row("causal", flex=2.0)["peers"], **new["peers"]}


def test_a_failure_replaces_a_time(benchmark):
    report = benchmark("gpu_report")
    broken = {"mask": "causal", "shape": (4, 16, 4096, 128), "dtype": "bf16", "failed": "wrong"}
    (found,) = report.merged({"speed": [row("causal", flex=2.0)]}, {"speed": [broken]})["speed"]
    assert "ms" not in found and report.share(found) is None
    (mended,) = report.merged({"speed": [found]}, {"speed": [row("causal")]})["speed"]
    assert "failed" not in mended and report.share(mended) == 0.5


def test_goals(benchmark):
    report = benchmark("gpu_report")
    rows = [row(mask, dim, flex=12.0) for mask in report.SPARSE for dim in (128, 64)]
    rows += [row("causal", 128, cudnn=0.5), row("full", 64, cudnn=1.0)]
    rows[0]["peers"]["flex"]["ms"] = 0.11
    found = {goal.text: goal for goal in report.goals({"speed": rows, "overhead": {"above_launch_us": 25.0}})}
    least = found["D128: over compiled Flex, least of them"]
    assert least.got == pytest.approx(1.1) and least.met is False
    mean = found["D128: over compiled Flex, geometric mean of 11 sparse masks"]
    assert mean.got == pytest.approx((1.1 * 12.0**10) ** (1 / 11)) and mean.met
    assert found["D64: over compiled Flex, least of them"].met
    assert found["D128: our time over cuDNN's, causal"].met is False
    assert found["D64: our time over cuDNN's, full"].met
    assert found["D128: share of the floor, window64"].met is False
    assert found["D128: share of the floor, longformer"].met
    assert found["host time above a bare launch: microseconds"].met is False
    assert found["cost model: median regret"].met is None
    anchored = found["D128: over FlashAttention-4 (published anchor, another run), window64"]
    assert anchored.got == pytest.approx(1.4)


def test_a_mean_of_some_masks_is_no_mean(benchmark):
    goals = benchmark("gpu_report").goals({"speed": [row("window64", flex=9.0)]})
    (mean,) = (goal for goal in goals if goal.text.startswith("D128: over compiled Flex, geometric"))
    assert mean.met is None


def test_tables(benchmark, tmp_path):
    report, path = benchmark("gpu_report"), tmp_path / "gpu.json"
    results = {
        "device": {"name": "A GPU"},
        "ceilings": {"bf16_tflops": 790.0, "copy_tbs": 3.0},
        "speed": [row("strided64", flex=7.5), row("natten2d_13") | {"failed": "no kernel"}],
        "decode": [{"case": "paged", "share": 0.9}],
    }
    benchmark("report").save(path, results)
    run = subprocess.run(
        [sys.executable, FOLDER / "gpu_report.py", path], capture_output=True, text=True, check=True
    )
    assert report.goals({"decode": {"failed": "no kernel"}})
    for part in ("A GPU", "790 TFLOP/s", "strided64", "50%", "7.50x", "failed", "paged", "goals:"):
        assert part in run.stdout
    lines = report.markdown(json.loads(path.read_text())).splitlines()
    assert lines[2] == "| strided64 | 128 | 0.050 | **0.100** | 50% | 0.750 | 7.5x |  |  |"


# ---- options ----


@pytest.mark.parametrize(
    "options, message",
    [
        ({"masks": "window"}, "no mask 'window'; there are full, causal, "),
        ({"sizes": "4x4096"}, "expected batch x heads x length such as 4x16x4096"),
        ({"sizes": "1x1x100"}, "a multiple of 64; got 100"),
        ({"dims": "large"}, "sizes of a head"),
        ({"peers": "xformers"}, "no peer 'xformers'"),
        ({"sections": "speed,nothing"}, "no section 'nothing'"),
        ({"dtype": "fp8"}, "no dtype 'fp8'"),
    ],
)
def test_options_are_checked(benchmark, options, message):
    with pytest.raises(typer.BadParameter, match=message):
        benchmark("attention_gpu").main(**options)


def test_without_a_gpu_it_says_so(benchmark, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        benchmark("attention_gpu").main()


# ---- what calls our own interfaces ----


def test_host_time_of_a_call_is_that_above_its_launch(benchmark):
    found = benchmark("gpu_host").overhead(calls=2, rounds=1, device="cpu")
    assert found["above_launch_us"] == found["mask_us"] - found["launch_us"]
    assert min(found[name] for name in found if name != "above_launch_us") > 0


def test_pages_hold_the_cache(benchmark):
    decode = benchmark("gpu_decode")
    case = decode.Decode("tiny", 2, 192, page=64)
    _, k, v = decode.inputs(case, "cpu")
    table, keys, values = decode.paged(case, k, v)
    for pages, whole in ((keys, k), (values, v)):
        gathered = pages[table.long()].transpose(1, 2).flatten(2, 3)
        assert torch.equal(gathered, whole)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("page", [0, 64])
def test_decoding_is_what_the_dense_mask_says(benchmark, window, page):
    decode, accuracy = benchmark("gpu_decode"), benchmark("gpu_check").accuracy
    case = decode.Decode("tiny", 2, 192, window, page)
    q, k, v = decode.inputs(case, "cpu")
    out = decode.ours(case, q, k, v)()
    assert accuracy(out, (q, k, v), lambda rows: decode.dense(case, "cpu")).passes
