"""The command line: every command at tiny sizes, masks as text, errors in one line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import gossamer
from gossamer import masks
from gossamer.frontend import doctor
from gossamer.frontend.cli import plot as cli_plot
from gossamer.frontend.cli.explain import order_text
from gossamer.frontend.cli.main import app
from gossamer.frontend.pattern_text import parse_mask, pattern_names
from gossamer.ir.errors import InputError, ParseError
from gossamer.ir.order import Order, OrderDim
from gossamer.runtime import driver
from gossamer.runtime.artifact import Artifact

COMMANDS = ["explain", "compile", "plot", "bench", "cache", "doctor"]
TINY = ["--q-len", "70", "--kv-len", "50", "--heads", "2", "--dim", "16"]


@pytest.fixture(scope="module", autouse=True)
def cache_folder(tmp_path_factory):
    """One cache for the module: a kernel that two tests need is compiled once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_CACHE_DIR", str(folder))
        driver.reset()
        yield folder
    driver.reset()


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.output


# ---- programs ----

PROGRAM = """
import torch
import torch.nn.functional as F

def program(q, k, v, causal):
    local = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return local, (q @ k.mT).softmax(-2) @ v

def example():
    return program, torch.randn(3, 1, 2, 9, 8).unbind(), {"causal": True}

def nothing():
    return program
"""


def test_explain_of_a_program_says_what_is_compiled_and_what_is_left(tmp_path):
    file = tmp_path / "my_model.py"
    file.write_text(PROGRAM)
    text = run("explain", f"{file}:example").replace("\n", "")
    assert "compiled attention at " in text and "my_model.py:6" in text
    assert "left attention at " in text and "not summed over the keys" in text
    assert "(a model or function, a tuple of its arguments)" in run("explain", f"{file}:nothing", code=2)


# ---- help ----


def test_help_names_every_command():
    text = run("--help")
    assert all(f" {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example(command):
    text = run(command, "--help")
    assert "--help" in text
    if command == "cache":
        text = "".join(run("cache", name, "--help") for name in ("info", "list", "clear", "verify"))
    assert f"gossamer {command} " in text or f"gossamer {command}\n" in text.replace(" \n", "\n")


def test_version():
    assert run("--version") == f"gossamer {gossamer.__version__}\n"


def test_help_loads_nothing_heavy(tmp_path):
    code = """
import sys
from gossamer.frontend.cli.main import app
print(*{"torch", "tvm", "triton", "jax", "sympy", "islpy", "numpy", "matplotlib"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("", "")


# ---- masks as text ----


@pytest.mark.parametrize(
    "text, mask",
    [
        ("causal", masks.causal()),
        ("causal()", masks.causal()),
        ("sliding_window(128)", masks.sliding_window(128)),
        ("sliding_window(3, right=0) | global_tokens(2, columns=False)",
         masks.sliding_window(3, 0) | masks.global_tokens(2, columns=False)),
        ("~(causal() & blocked(4)) | full() & causal", ~(masks.causal() & masks.blocked(4)) | masks.causal()),
        ("neighborhood((4, 6), [3, 3], edges='clip')", masks.neighborhood((4, 6), (3, 3), edges="clip")),
        ("sliding_window(2) & causal", parse_mask("mask(p0=2, p1=0) { q - k <= p0 and k - q <= p1 }")),
        ("mask() { q == k }", masks.blocked(1)),
    ],
)  # fmt: skip
def test_text_gives_the_mask_it_names(text, mask):
    assert parse_mask(text) == mask


def test_integers_of_ir_text_stay_runtime_values():
    mask = parse_mask("mask(p0=5, p1=-2) { q - k <= p0 and k - q <= p1 }")
    assert mask.values == (5, -2)
    assert mask.key == parse_mask("mask(p0=7, p1=3) { q - k <= p0 and k - q <= p1 }").key


def test_files(tmp_path):
    matrix = np.tri(9, dtype=np.int8)
    np.save(tmp_path / "matrix.npy", matrix)
    np.save(tmp_path / "ids.npy", np.repeat(np.arange(3), 4).astype(np.int32))
    (tmp_path / "own.py").write_text(
        "import gossamer\nWINDOW = 3\n"
        "def near(b, h, q, k):\n    return abs(q - k) <= WINDOW\n"
        "class Of:\n    mask = gossamer.masks.causal()\n"
    )
    same = np.repeat(np.arange(3), 4)[:, None] == np.repeat(np.arange(3), 4)
    dense = {
        f"{tmp_path}/matrix.npy": matrix.astype(bool),
        f"{tmp_path}/own.py:near": abs(np.subtract.outer(range(9), range(9))) <= 3,
        f"{tmp_path}/own.py:Of.mask": matrix.astype(bool),
        f"document('{tmp_path}/ids.npy')": same,
        f'mask(; c0: i32[1] = "{tmp_path}/ids.npy") {{ c0[q] == c0[k] }}': same,
    }
    for text, wanted in dense.items():
        np.testing.assert_array_equal(parse_mask(text).to_dense(*wanted.shape), wanted, text)


@pytest.mark.parametrize(
    "text, message",
    [
        ("slidng_window(3)", "Did you mean sliding_window"),
        ("sliding_window(3", "malformed at column"),
        ("", "patterns joined by & | ~"),
        ("sliding_window()", r"sliding_window\(left, right=None\)"),
        ("sliding_window(wide=3)", "unexpected keyword"),
        ("sliding_window(-1)", "an integer of at least 0"),
        ("causal() + full()", r"got causal\(\) \+ full\(\)"),
        ("sliding_window(2 ** 99)", r"'2 \*\* 99' in"),
        ("sliding_window(*(1, 2))", "as arguments"),
        ("causal(**{})", r"got causal\("),
        ("__import__('os')", "expected one of"),
        ("causal.__class__", "patterns joined"),
        ("from_block_mask(1)", "expected one of"),
        ("mask(p0) { k <= p0 }", r"a value for each integer, as in mask\(p0=128\)"),
        ("mask(; c0: i32[1]) { c0[q] == 1 }", "a file for each tensor"),
        ("no_such.npy", "does not exist"),
        ("no_such.py:f", "does not exist"),
        ("no_such.py", "'no_such.py:function'"),
    ],
)
def test_bad_text_is_explained(text, message):
    with pytest.raises(InputError, match=message):
        parse_mask(text)


def test_bad_files_are_explained(tmp_path):
    (tmp_path / "own.py").write_text("def near(b, h, q, k):\n    return q == k\n")
    with pytest.raises(InputError, match="expected one of near of"):
        parse_mask(f"{tmp_path}/own.py:far")
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(InputError, match="expected a NumPy file"):
        parse_mask(f"{tmp_path}/text.npy")
    with pytest.raises(ParseError):
        parse_mask("mask() { k <= }")


def test_names_are_those_of_the_library():
    assert set(pattern_names()) == set(masks.__all__) - {"from_block_mask"}


# ---- errors ----


def test_error_is_one_line(tmp_path):
    text = run("explain", "caussal", code=2)
    assert text.startswith("error: mask: expected one of") and text.endswith("Did you mean causal?\n")
    assert text.count("\n") == 1
    file = tmp_path / "file"
    file.write_text("")
    assert run("plot", "causal", "-o", file / "mask.png", code=2).startswith("error: ")


@pytest.mark.parametrize("arguments", [["--debug", "explain", "no.npy"], ["explain", "no.npy", "--debug"]])
def test_debug_lets_the_traceback_through(arguments):
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, InputError)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["explain", "causal", "--dtype", "f8"], "--dtype: expected f16, bf16, f32 or f64; got 'f8'"),
        (["explain", "causal", "--target", "tpu"], "target: expected 'cpu'"),
        (["explain", "causal", "--device", "h900"], "device: expected one of cpu, h100"),
        (
            ["explain", "causal", "--heads", "4", "--kv-heads", "3"],
            "--kv-heads: expected a number that divides",
        ),
        (["plot", "causal", "--tiles", "64"], "--tiles: expected a shape such as 64x32; got '64'"),
    ],
)
def test_bad_options_are_explained(arguments, message):
    assert message in run(*arguments, code=2)


# ---- explain ----


def test_explain_goes_from_mask_to_time():
    text = run("explain", "strided(16, 4) & causal", *TINY, "--source", "--device", "a100")
    headings = ["mask", "geometry", "schedule", "passes", "kernel IR", "source of attention", "time"]
    places = [text.index(f"\n{name}") for name in headings]
    assert places == sorted(places)
    nnz = (masks.strided(16, 4) & masks.causal()).to_dense(70, 50).sum()
    assert f"pairs {nnz}, density" in text
    assert "by residue: k = q (mod 16)" in text and "2 kernels" in text
    assert f"{2 * nnz:,} pairs" in text  # two heads
    for name in ("normalize", "align", "fuse", "tile"):
        assert f"[{name}]" in text
    assert "A100" in text and "predicted" in text and "floor" in text


def test_explain_shows_what_happens_around_the_softmax():
    text = run("explain", "causal", *TINY, "--sinks", "--dropout", "--column-sums")
    for expected in (
        "%p = softmax %t, %sinks",
        "random_bits(",
        "rows are keys",
        "kernel @column_sums_acsr_fwd(",
    ):
        assert expected in " ".join(text.split()), expected


def test_explain_can_be_short():
    text = run("explain", "causal", *TINY, "--no-ir")
    assert "normalize" not in text and "kernel @" not in text
    assert "CPU (measured)" in text


def test_explain_a_gpu():
    text = run("explain", "causal", *TINY, "--target", "cuda:sm_90", "--dtype", "bf16", "--source", "--no-ir")
    assert "triton.jit" in text and "H100" in text
    assert "name one with --device" in run("explain", "causal", *TINY, "--target", "cuda:sm_100", "--no-ir")


def test_explain_reads_captured_tensors():
    text = run("explain", "document((0, 0, 0, 1, 1, 2))", "--q-len", "6", "--no-ir")
    assert "pairs 14, " in text and "point by point" in text


def test_orders_in_words():
    assert order_text(Order()) == "natural"
    assert order_text(Order((OrderDim(None, 1, 5, 0, 2),))) == "by residue: k = 2 (mod 5)"
    assert order_text(Order((OrderDim(None, 3, 3, 2, 1),))) == "by residue: k = 2q + 1 (mod 3)"
    assert order_text(Order((OrderDim(), OrderDim(20)))) == "boxes of q0, k0; q1, k1 mod 20"


# ---- compile, bench ----


def test_compile_one_file(tmp_path):
    path = tmp_path / "window.gossamer"
    text = run("compile", "sliding_window(4)", "--dim", 16, "--lse", "-o", path)
    assert "attention_acsr_fwd" in text and "needs" in text and f"gossamer.load('{path}')" in text
    launch = Artifact.load(path).manifest.launches[0]
    assert [a.name for a in launch.arguments if a.role == "out"] == ["o", "lse"]


def test_compile_several_into_a_folder(tmp_path):
    options = ["--dim", 16, "--dtype", "f32", "--dtype", "float64", "-o", tmp_path / "all"]
    run("compile", "causal", *options)
    names = sorted(p.name for p in (tmp_path / "all").iterdir())
    assert names == ["attention_f32_16_cpu.gossamer", "attention_f64_16_cpu.gossamer"]
    text = run("compile", "causal", *options[:-1], tmp_path / "one.gossamer", code=2)
    assert "--output: expected a folder for 2 artifacts" in text


def test_bench():
    text = run("bench", "sliding_window(8)", *TINY, "--repeats", 2)
    assert "gossamer" in text and "torch SDPA, dense mask" in text and "GFLOP/s" in text
    assert float(text.split("largest difference to PyTorch ")[1]) < 1e-4
    assert "torch SDPA" not in run("bench", "sliding_window(8)", *TINY, "--repeats", 1, "--no-dense")


def test_bench_says_what_devices_there_are(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device: expected cpu or cuda; got 'tpu'" in run("bench", "causal", "--device", "tpu", code=2)
    assert "--device: expected cpu: torch finds no GPU; got cuda" in run(
        "bench", "causal", "--device", "cuda", code=2
    )


def test_peers_of_bench():
    import torch

    from gossamer.frontend import bench_calls as calls
    from gossamer.passes.cost import Size

    size = Size(40, 40, 2, 4, 2, 16, 16, "f32")
    tensors = calls.inputs(size, "cpu")
    by_head = gossamer.Mask.trace(lambda b, h, q, k: k <= q + h)
    for mask, without_a_tensor in ((masks.causal(), True), (masks.full(), True), (by_head, False)):
        wanted = calls.ours(mask, tensors, size)()
        torch.testing.assert_close(calls.dense(mask, tensors, size)(), wanted)
        plain = calls.sdpa(mask, tensors, size)
        assert (plain is not None) == without_a_tensor
        if plain is not None:
            torch.testing.assert_close(plain(), wanted)
    assert calls.sdpa(masks.causal(), tensors, Size(40, 50, 2, 4, 2, 16, 16, "f32")) is None
    assert calls.dense(masks.full(), tensors, Size(1 << 15, 1 << 15, 1, 8, 8, 16, 16, "f32")) is None


# ---- plot ----


def test_plot(tmp_path):
    text = run("plot", "causal", "--q-len", 40, "--tiles", "8x16", "-o", tmp_path / "mask.png")
    assert text.startswith(f"wrote {tmp_path / 'mask.png'} (")
    assert (tmp_path / "mask.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("text, tiles", [("64x32", (64, 32)), ("8X8", (8, 8)), ("3 × 4", (3, 4))])
def test_tile_shapes(text, tiles):
    assert cli_plot.parse_tiles(text) == tiles


# ---- cache ----


def test_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GOSSAMER_CACHE_DIR", str(tmp_path / "kernels"))
    driver.reset()
    assert "the cache is empty" in run("cache", "list")
    run("compile", "causal", "--dim", 16, "-o", tmp_path / "causal.gossamer")
    assert "attention_acsr_fwd" in run("cache", "list")
    info = run("cache", "info")
    assert f"folder     {tmp_path / 'kernels'}" in info and "artifacts  1" in info
    assert run("cache", "verify") == "1 intact, 0 removed\n"
    [stored] = (tmp_path / "kernels").glob("*/objects/*")
    stored.write_bytes(stored.read_bytes()[:-1] + b"?")
    text = run("cache", "verify", code=1)
    assert "warning: discarded" in text and "0 intact, 1 removed" in text
    assert run("cache", "clear") == "removed 0 artifacts\n"
    driver.reset()


# ---- doctor ----


def test_doctor_tries_the_default_backend():
    text = run("doctor")
    assert "the default backend works" in text
    assert "a small attention was compiled and run" in text


def test_doctor_fails_with_the_default_backend(monkeypatch):
    def broken(name):
        return doctor.Finding(name, doctor.BROKEN, "it is [very] broken", "repair it")

    def absent(name):
        return doctor.Finding(name, doctor.MISSING, "not installed", "pip install it")

    checks = [doctor.Check("heart", broken, default=True), doctor.Check("hat", absent)]
    monkeypatch.setattr(doctor, "checks", lambda: iter(checks))
    text = run("doctor", code=1)
    assert "it is [very] broken" in text and "heart: repair it" in text and "hat: pip install it" in text
    assert "the default backend does not work: heart" in text
    monkeypatch.setattr(doctor, "checks", lambda: iter(checks[1:]))
    run("doctor")


def test_doctor_looks_at_packages(monkeypatch):
    look = doctor._package
    assert look("numpy", "numpy", "")("numpy").status == doctor.OK
    absent = look("no-such-package", "no_such_package", "cpu")("it")
    assert (absent.status, absent.fix) == (doctor.MISSING, "pip install 'gossamer[cpu]'")
    assert look("numpy", "no_such_module", "")("numpy").status == doctor.BROKEN
    from packaging.specifiers import SpecifierSet

    monkeypatch.setattr(doctor, "constraint", lambda distribution: SpecifierSet("<1"))
    old = look("numpy", "numpy", "")("numpy")
    assert old.status == doctor.BROKEN and old.fix == "pip install 'numpy<1'"


def test_doctor_reads_constraints(monkeypatch):
    required = ["numpy>=2.0", "apache_tvm_ffi!=0.1.15.*,>=0.1.14", 'jax>=0.10; extra == "jax"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: required)
    assert str(doctor.constraint("numpy")) == ">=2.0"
    assert not doctor.constraint("apache-tvm-ffi").contains("0.1.15.post1")
    assert str(doctor.constraint("jax")) == ">=0.10"
    assert doctor.constraint("rich") is None


def test_doctor_finds_a_folder_it_may_not_use(tmp_path, monkeypatch):
    file = Path(tmp_path, "file")
    file.write_text("")
    monkeypatch.setenv("GOSSAMER_CACHE_DIR", str(file))
    found = doctor._cache("cache")
    assert found.status == doctor.BROKEN and "GOSSAMER_CACHE_DIR" in found.fix
    monkeypatch.setenv("GOSSAMER_NUM_THREADS", "many")
    assert doctor._threads("threads").status == doctor.BROKEN
