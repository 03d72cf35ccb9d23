"""Scripts become the TIR that TVM's own parser makes of them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

tvm = pytest.importorskip("tvm")
from gossamer.ir.errors import BackendError  # noqa: E402
from gossamer.runtime.cpu import build_object  # noqa: E402
from gossamer.runtime.tvm_script import read  # noqa: E402

GOLDEN = sorted((Path(__file__).parent / "golden" / "tvm").glob("*.py"))


def parsed(source):
    """What TVM's parser makes of a script."""
    return tvm.script.from_source(source, extra_vars={"T": tvm.script.tirx}, check_well_formed=False)


def script(*lines):
    """A kernel with an integer `n` and a buffer `x` of 64 numbers."""
    head = ("@T.prim_func", "def kernel(p_x: T.handle, n: T.int64):")
    body = ('x = T.match_buffer(p_x, (64,), "float32")', *lines)
    return "\n".join((*head, *(f"    {line}" for line in body), ""))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_files(path):
    source = path.read_text()
    tvm.ir.assert_structural_equal(read(source), parsed(source), map_free_vars=True)


@pytest.mark.parametrize(
    "lines",
    [
        ["y: T.let = x[0] * 2 + 1", "x[1] = y"],
        ["y: T.let = 3", "x[y] = T.float32(0)"],
        ["for i in T.vectorized(T.int64(16)):", "    x[i] = -x[i]"],
        ["for i in range(n):", "    for j in T.unroll(2):", "        x[i * 2 + j] = x[i // 3] / x[i % 3]"],
        ["if n < 64 and (n != 0 or 3 >= n) and not n == 5:", "    x[n] = x[n - 1]"],
        ["if n > 0 and n <= 8:", "    x[n] = x[n - 1]", "else:", "    x[0] = T.float32(2)"],
        ["if 0 < 1 and not 2 != 2:", "    x[0] = T.float32(2)", "else:", "    x[1] = T.float32(2)"],
        ["if 2 >= 1 or n > 2:", "    x[0] = T.float32(2)"],
        ['T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(x[n]), 0, 3, 1)'],
        ["if x[0] > 0 and 1.5 < x[1]:", "    x[0] = T.max(x[1], x[2])"],
    ],
)
def test_statements(lines):
    source = script(*lines)
    tvm.ir.assert_structural_equal(read(source), parsed(source), map_free_vars=True)


def test_a_condition_has_no_term_that_is_known():
    known, shorter = (script(f"if {test}:", "    x[0] = x[1]") for test in ("2 <= 1 or n > 2", "n > 2"))
    tvm.ir.assert_structural_equal(read(known), read(shorter), map_free_vars=True)


def test_names_end_with_their_block():
    source = script("if n > 0:", "    y: T.let = x[0]", "x[1] = y")
    with pytest.raises(KeyError, match="y"):
        read(source)


@pytest.mark.parametrize(
    "line", ["while n > 0: x[0] = x[1]", "x[0] = x[1] if n > 0 else x[2]", "x[0] += 1", "x[0] = x[1] @ x[2]"]
)
def test_other_syntax_is_refused(line):
    with pytest.raises(SyntaxError, match=r"line 4: no .* in a generated kernel"):
        read(script(line))
    with pytest.raises(BackendError, match=r"TVM refused .* in a generated kernel"):
        build_object(script(line), "cpu")


def test_threads_build_side_by_side():
    sources = [path.read_text() for path in GOLDEN] * 2
    with ThreadPoolExecutor(8) as pool:
        for source, function in zip(sources, pool.map(read, sources), strict=True):
            tvm.ir.assert_structural_equal(function, read(source), map_free_vars=True)
