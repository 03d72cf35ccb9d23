"""Compiled kernels for CUDA, launched on a driver that only writes down what it is given."""

import inspect
import threading
from dataclasses import replace

import pytest
import torch

import gossamer
from gossamer import masks
from gossamer.ir.errors import ArtifactError, BackendError, InputError, UnsupportedError
from gossamer.ir.kernel_text import parse
from gossamer.runtime import gpu
from gossamer.runtime.backends import BACKENDS
from gossamer.runtime.compile import compile_kernels
from gossamer.runtime.executable import Executable
from gossamer.runtime.target import Target

COPY = """
kernel @copy(
  x: f32[n, m] in unit 1 align 16,
  gain: f64,
  y: f16[m, n] out unit 1,
  shift: i64
) grid(t: (n + 7) // 8, u: m) axes(i: 8) meta(stages=1, warps=2) {
  tile X: f32[i] = load x[8 * t + i, u] where 8 * t + i < n else 0
  store y[u, 8 * t + i] = gain * X + shift over i where 8 * t + i < n
}
"""


LIMITS = torch.tensor([3, 17])


def executable(text: str = COPY) -> Executable:
    return Executable(compile_kernels([parse(text)], "cuda:sm_90"))


def copies(n: int = 9, m: int = 4):
    return {"x": torch.randn(n, m), "gain": 2.5, "y": torch.empty(m, n, dtype=torch.float16), "shift": -3}


def test_a_kernel_gets_its_arguments_in_order(fake):
    values = copies()
    executable()(values)
    [done] = fake.launched
    x, y = values["x"].data_ptr(), values["y"].data_ptr()
    assert done.arguments == (x, 4, y, 9, 9, 4, 2.5, -3, 0, 0)  # addresses, strides, sizes, scalars, Triton's
    assert (done.name, done.grid, done.threads, done.stream) == ("copy", 2 * 4, 64, 7)


def test_linear_attention_recalls_its_kernels(fake):
    """A call like one before, of other memory: the same kernel with the same numbers, at other addresses."""
    tensors = [torch.randn(3, 1, 2, 70, 16) for _ in range(2)]
    found = [gossamer.linear_attention(*qkv, causal=True) for qkv in tensors]
    first, second = fake.launched
    places = [[t.data_ptr() for t in (*qkv, out)] for qkv, out in zip(tensors, found, strict=True)]
    changed = [(a, b) for a, b in zip(first.arguments, second.arguments, strict=True) if a != b]
    assert len(fake.loaded) == 1 and changed == list(zip(*places, strict=True))


@pytest.mark.parametrize(
    "mask", [masks.causal(), masks.strided(8, 3), gossamer.Mask.trace(lambda b, h, q, k: k <= LIMITS[b] + q)]
)
def test_arguments_are_those_that_the_emitted_module_binds(fake, mask):
    """Two ways from a call to a kernel's arguments: the manifest, and the module's own `bind` and `grid`."""
    q, k, v = torch.randn(2, 4, 33, 64), torch.randn(2, 2, 50, 64), torch.randn(2, 2, 50, 32).transpose(1, 2)
    v = v.contiguous().transpose(1, 2)
    out, lse = gossamer.attention(q, k, v, mask=mask, enable_gqa=True, return_lse=True)
    inputs = {"q": q, "k": k, "v": v, "o": out, "lse": lse, "scale": 0.125}
    inputs |= {f"p{i}": p for i, p in enumerate(mask.values)} | {
        f"c{i}": t for i, t in enumerate(mask.tensors)
    }
    assert len(fake.launched) == len(fake.sources)
    for done in fake.launched:
        module = gpu.load(fake.sources[done.name])
        names = inspect.signature(module.bind).parameters
        state = {name: torch.empty(2, 4, 33) for name in names}  # one number a row
        bound = module.bind(**{name: inputs.get(name, state[name]) for name in names})
        assert done.grid == module.grid(**dict(zip(module.kernel.arg_names, bound, strict=True)))[0]
        for wanted, got in zip((*bound, 0, 0), done.arguments, strict=True):
            if not isinstance(wanted, torch.Tensor):
                assert got == pytest.approx(wanted)
            elif any(wanted is given for given in inputs.values()):
                assert got == wanted.data_ptr()


def test_an_empty_grid_launches_nothing(fake):
    executable()(copies(n=0))
    assert not fake.launched


def test_shared_memory_beyond_48_kib_is_asked_for(fake):
    q = torch.randn(1, 1, 64, 128, dtype=torch.float16)
    gossamer.attention(q, q, q, mask=masks.causal())
    [done] = fake.launched
    assert done.shared > 48 << 10 and list(fake.optins.values()) == [done.shared]


def test_a_kernel_that_does_not_fit_the_device_says_what_to_do(fake):
    fake.optin = 48 << 10
    q = torch.randn(1, 1, 64, 128, dtype=torch.float16)
    with pytest.raises(BackendError, match=r"needs \d+ bytes of shared memory, .* has 49152. Pass schedule="):
        gossamer.attention(q, q, q, mask=masks.causal())


def test_threads_without_a_context_enter_it(fake):
    run = executable()
    fake.failing = [201]
    run(copies())
    assert fake.entered == 1 and len(fake.launched) == 1


def test_errors_of_the_driver_are_told(fake):
    run = executable()
    fake.failing = [700]
    with pytest.raises(BackendError, match=r"CUDA_ERROR_FAKE: it was asked to fail \(700\)"):
        run(copies())


def test_many_threads_launch_at_once(fake):
    bound = executable().bind(copies())

    def launch():
        for _ in range(200):
            values = copies()
            bound(values, 1)
            seen.append((values["x"].data_ptr(), values["y"].data_ptr()))

    seen = []
    threads = [threading.Thread(target=launch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((d.arguments[0], d.arguments[2]) for d in fake.launched) == sorted(seen)


def test_binaries_are_loaded_once(fake):
    run = executable()
    run(copies())
    run(copies(n=20))
    assert fake.loaded == ["copy"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shift": 1 << 31}, r"copy: shift: expected an integer of 32 bits; got 2147483648"),
        (
            {"x": torch.randn(9, 5)},
            r"copy: x: expected an address and strides that are multiples of 16 bytes",
        ),
        ({"x": torch.randn(37)[1:].view(9, 4)}, r"copy: x: expected an address and strides"),
        (
            {
                "x": torch.empty(1, 1).expand(1 << 20, 1 << 14),
                "y": torch.empty(1, 1).expand(1 << 14, 1 << 20),
            },
            r"copy: expected fewer than 2\*\*31 tiles; got 2147483648",
        ),
        (
            {"x": torch.empty_strided((9, 4), (1 << 29, 1), device="meta")},
            r"copy: x.stride\(0\): expected at most",
        ),
    ],
)
def test_what_a_kernel_cannot_address_is_an_input_error(fake, change, message):
    run = executable()
    with pytest.raises(InputError, match=message):
        run(copies() | change)


def test_strides_of_a_dimension_of_size_one_do_not_matter(fake):
    values = copies(n=1) | {"x": torch.empty_strided((1, 4), ((1 << 40) + 1, 1), device="meta")}
    executable()(values)
    assert fake.launched[0].arguments[1] == (1 << 40) + 1


def test_parameters_of_a_strange_manifest_are_refused(fake):
    artifact = compile_kernels([parse(COPY)], "cuda:sm_90")
    [launch] = artifact.manifest.launches
    strange = replace(launch, details={**launch.details, "parameters": [["i64", "x.nbytes"]]})
    with pytest.raises(ArtifactError, match=r"got 'x.nbytes'"):
        BACKENDS["triton"].load(strange, artifact.parts[launch.binary], Target("cuda", "sm_90"))


def test_kernels_for_amd_are_not_launched():
    run = Executable(compile_kernels([parse(COPY)], "hip:gfx942"))
    with pytest.raises(UnsupportedError, match=r"copy is a binary for hip:gfx942"):
        run(copies())


def test_a_scale_that_turns_scores_around_has_its_own_kernel(fake):
    q = torch.randn(1, 1, 33, 64, dtype=torch.float16)
    for scale in (0.5, 0.25, -0.5, 0.0, 1e-40):
        gossamer.attention(q, q, q, mask=masks.causal(), scale=scale)
    assert len(fake.sources) == 1 and len(set(fake.loaded)) == 1 and len(fake.loaded) == 2


def test_kernels_of_cpus_take_any_scale():
    kernel = gossamer.compile(gossamer.AttentionSpec(masks.causal(), dtype="f32"))
    x = torch.randn(1, 1, 9, 64)
    same = kernel(-x, x, x, mask=masks.causal(), scale=1.0)
    torch.testing.assert_close(kernel(x, x, x, mask=masks.causal(), scale=-1.0), same)
