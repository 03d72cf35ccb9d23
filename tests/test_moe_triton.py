"""Kernels of layers of experts as Triton text: on Triton's interpreter, and compiled ahead of time."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from sympy import sympify

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
from gossamer.codegen.triton import emit, signature  # noqa: E402
from gossamer.ir.evaluate import evaluate  # noqa: E402
from gossamer.ir.expr import integer, real, sigmoid  # noqa: E402
from gossamer.ir.graph_interpret import interpret  # noqa: E402
from gossamer.ir.ragged import Tiling  # noqa: E402
from gossamer.passes.moe.build import build_experts, lora_values  # noqa: E402
from gossamer.passes.moe.expert_choice import compile_expert_choice  # noqa: E402
from gossamer.passes.moe.gradient import build_gradients  # noqa: E402
from gossamer.passes.moe.pipeline import compile_experts, compile_gradients  # noqa: E402
from gossamer.passes.moe.router import compile_router  # noqa: E402
from gossamer.passes.moe.router_gradient import compile_router_gradient  # noqa: E402
from gossamer.passes.moe.router_spec import RouterSpec  # noqa: E402
from gossamer.passes.moe.spec import LOADS, ExpertsSpec  # noqa: E402
from gossamer.runtime.gpu import compile_ahead  # noqa: E402
from gossamer.runtime.gpu import load as load_text  # noqa: E402
from gossamer.runtime.triton_interpreter import run_interpreted  # noqa: E402

SWIGLU = real("x0") * sigmoid(real("x0")) * real("x1")
DTYPES = {"f16": torch.float16, "f32": torch.float32, "i32": torch.int32}
SMALL = (Tiling(16, 16, 32, wide=2), Tiling(16, 16, 16, wide=2))
SMALL_REST = tuple(replace(t, rows=32, rest=16) for t in SMALL)  # of a group of 20 rows, 4 are a rest


def run(program, given, sizes):
    """All tensors of a program after its kernels have run on Triton's interpreter."""
    values = {k: torch.from_numpy(v.copy()) for k, v in given.items()}
    for t in program.intermediates:
        extents = [integer(n) if isinstance(n, str) else sympify(n) for n in t.shape]
        shape = [int(evaluate(n, sizes)) for n in extents]
        values[t.name] = torch.full(shape, math.nan if t.dtype[0] == "f" else -7, dtype=DTYPES[t.dtype])
    for kernel in program.kernels:
        run_interpreted(emit(kernel), {a.name: values[a.name] for a in kernel.args})
    return values


@pytest.mark.parametrize(("single", "load"), [(True, "few"), (False, "few"), (False, "one")])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"halves": "interleaved", "transposed": True, "biased": True},
        {"halves": None, "dtype": "f16"},
        {"ranks": (3, 2), "lora_scale": 0.5},
        {"hidden": 48},  # three tiles of columns, two side by side
        {"tiling": SMALL_REST, "biased": True, "ranks": (3, 2)},
        {"tiling": SMALL_REST, "ranks": (3, 2), "adapters": "i64"},
        {"transposed": True, "biased": True, "ranks": (3, 0), "adapters": "i32"},
    ],
    ids=str,
)
def test_interpreter(more, single, load):
    size = more.get("hidden", 40)
    activation = SWIGLU if more.get("halves", "split") else sigmoid(real("x0"))
    spec = ExpertsSpec(
        5,
        3,
        inner=24,
        activation=activation,
        single=single,
        load=load,
        target="cuda:sm_90",
        aligned=False,
        **({"hidden": size, "tiling": SMALL} | more),
    )
    rng, tokens = np.random.default_rng(0), 30
    kind, sizes = np.float16 if spec.dtype == "f16" else np.float32, {"adapters": 4}

    def normal(*shape):
        return (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(kind)

    n = spec.up_columns
    up, down = ((5, size, n), (5, 24, size)) if spec.transposed else ((5, n, size), (5, size, 24))
    given = {"x": normal(tokens, size), "gate_up": normal(*up), "down": normal(*down)}
    if spec.biased:
        given |= {"gate_up_bias": normal(5, n), "down_bias": normal(5, size)}
    for v in lora_values(spec):
        asked = v.name == "adapter_ids"
        given[v.name] = rng.integers(-1, 5, tokens) if asked else normal(*(sizes.get(n, n) for n in v.shape))
    ids = np.concatenate([rng.integers(-1, 6, (tokens // 2, 3)), np.full((tokens // 2, 3), 2)])
    routing = {"ids": ids, "weights": rng.random((tokens, 3)).astype(np.float32)}
    expected = interpret(build_experts(spec), given | routing)["o"]
    flat = {name: value.reshape(-1) for name, value in routing.items()}
    out = {"o": np.full((tokens, size), np.nan, kind)}
    sizes |= {"entries": ids.size, "T": tokens}
    found = run(compile_experts(spec), given | flat | out, sizes)["o"].numpy()
    tolerance = 2e-3 if kind == np.float16 else 1e-5
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("inner", "rest"), [(64, 0), (72, 0), (64, 16)])
def test_matrices_through_descriptors(inner, rest):
    """Boxes at the end of a half take rows of the next half, which nothing stores."""
    meta = (("descriptors", 1),)
    rows = {"rows": 2 * rest or 16, "rest": rest, "wide": 8, "meta": meta}
    tiling = (Tiling(cols=16, inner=64, **rows), Tiling(cols=32, inner=64, **rows))
    spec = ExpertsSpec(3, 2, 64, inner, SWIGLU, dtype="f16", target="cuda:sm_90", tiling=tiling)
    rng = np.random.default_rng(0)
    shapes = {"x": (20, 64), "gate_up": (3, 2 * inner, 64), "down": (3, 64, inner)}
    given = {n: (rng.standard_normal(s) / s[-1] ** 0.5).astype(np.float16) for n, s in shapes.items()}
    routing = {"ids": rng.integers(-1, 4, (20, 2)), "weights": rng.random((20, 2)).astype(np.float32)}
    expected = interpret(build_experts(spec), given | routing)["o"]
    program = compile_experts(spec)
    up, down = (emit(k) for k in program.kernels if k.name in ("experts_h", "experts_y"))
    assert (
        up.count("d_gate_up.load([") == (4 if rest else 2)
        and "d_down.load([" in down
        and "d_h.load([" in down
    )
    flat = {name: value.reshape(-1) for name, value in routing.items()}
    out = {"o": np.full((20, 64), np.nan, np.float16)}
    found = run(program, given | flat | out, {"entries": 40, "T": 20})["o"].numpy()
    np.testing.assert_allclose(found, expected, rtol=4e-3, atol=4e-3)


def test_router_on_the_interpreter():
    spec = RouterSpec(12, 3, groups=3, top_groups=2, target="cuda:sm_90")
    logits = np.random.default_rng(0).standard_normal((9, 12)).astype(np.float32)
    arguments = {
        "logits": torch.from_numpy(logits),
        "ids": torch.zeros(9, 3, dtype=torch.int32),
        "weights": torch.zeros(9, 3),
        "scale": 1.0,
    }
    run_interpreted(emit(compile_router(spec).kernels[0]), arguments)
    scores = torch.from_numpy(logits).softmax(-1)
    ranks = scores.view(9, 3, 4).topk(2, -1)[0].sum(-1)
    open_ = torch.zeros(9, 3).scatter(1, ranks.topk(2, -1)[1], 1).bool().repeat_interleave(4, 1)
    ids = scores.masked_fill(~open_, -1).topk(3, -1)[1]
    assert torch.equal(arguments["ids"].long(), ids)
    weights = scores.gather(1, ids)
    torch.testing.assert_close(arguments["weights"], weights / weights.sum(-1, keepdim=True))


def interpreted(program, given, sizes):
    """As `run`, with scalars among what is given."""
    scalars = {k: v for k, v in given.items() if not isinstance(v, np.ndarray)}
    values = {k: torch.from_numpy(v.copy()) for k, v in given.items() if isinstance(v, np.ndarray)}
    for t in program.intermediates:
        shape = [int(evaluate(sympify(integer(n) if isinstance(n, str) else n), sizes)) for n in t.shape]
        values[t.name] = torch.full(shape, -7, dtype=DTYPES[t.dtype])
    for kernel in program.kernels:
        run_interpreted(emit(kernel), {a.name: (values | scalars)[a.name] for a in kernel.args})
    return values


@pytest.mark.parametrize("order", ["token", "choice"])
def test_a_capacity_on_the_interpreter(order):
    spec = RouterSpec(6, 2, limited=order, keeps=True, target="cuda:sm_90")
    logits = np.random.default_rng(0).standard_normal((150, 6)).astype(np.float32)
    made = {"ids": np.zeros((150, 2), np.int32), "chosen": np.zeros((150, 2), np.int32)}
    given = {"logits": logits, "weights": np.zeros((150, 2), np.float32), "scale": 1.0, "capacity": 30}
    found = interpreted(compile_router(spec), given | made, {"T": 150})
    asked = found["chosen"] if order == "token" else found["chosen"].T
    kept, seen = found["ids"] if order == "token" else found["ids"].T, [0] * 6
    for one, expert in zip(kept.reshape(-1).tolist(), asked.reshape(-1).tolist(), strict=True):
        assert one == (expert if seen[expert] < 30 else -1)
        seen[expert] += 1


def test_experts_choose_on_the_interpreter():
    spec = RouterSpec(5, 2, features=20, target="cuda:sm_90")
    rng = np.random.default_rng(0)
    given = {"logits": rng.standard_normal((600, 20)), "vectors": rng.standard_normal((5, 20))}
    given = {name: value.astype(np.float32) for name, value in given.items()}
    given |= {"temperature": np.ones(1, np.float32), "capacity": 90, "tokens": np.full(450, -7, np.int32)}
    given |= {"bounds": np.zeros(6, np.int32), "place": np.full((600, 5), -7, np.int32)}
    given |= {name: np.zeros((600, 5), np.float32) for name in ("scores", "scored")}
    found = interpreted(compile_expert_choice(spec), given, {"T": 600})
    expected = found["scores"].T.topk(90)[1].sort(1)[0]
    assert torch.equal(found["tokens"].view(5, 90).long(), expected)
    assert found["bounds"].tolist() == [0, 90, 180, 270, 360, 450]
    rows = torch.full((5, 600), -1).scatter(1, expected, torch.arange(450).view(5, 90))
    assert torch.equal(found["place"].long(), rows.T)
    x, v = (torch.nn.functional.normalize(torch.from_numpy(given[n])) for n in ("logits", "vectors"))
    torch.testing.assert_close(found["scored"], x @ v.T * math.e)


@pytest.mark.parametrize("load", LOADS[1:])
def test_products_compile_for_an_h100_without_spills(load):
    program = compile_experts(
        ExpertsSpec(64, 8, 2048, 1024, SWIGLU, dtype="bf16", load=load, target="cuda:sm_90")
    )
    for kernel in program.kernels[2:4]:
        binary = compile_ahead(emit(kernel), "cuda:sm_90")
        assert not binary.spills and not binary.lacks
        assert ("wgmma" in binary.assembly) == (load != "few")
        assert "cp.async" in binary.assembly


def test_entries_compile_for_an_h100_without_spills():
    adapted = {"ranks": (32, 16), "adapters": "i64"}
    for experts, hidden, inner, more in (
        (8, 4096, 14336, {}),
        (32, 2880, 2880, {}),
        (64, 2048, 1024, adapted),
    ):
        facts = {"dtype": "bf16", "load": "one", "target": "cuda:sm_90", **more}
        spec = ExpertsSpec(experts, 2, hidden, inner, SWIGLU, **facts)
        for kernel in compile_experts(spec).kernels:
            binary = compile_ahead(emit(kernel), "cuda:sm_90")
            assert not binary.spills and "ld.global.v4" in binary.assembly


def test_strides_of_matrices_are_64_bits():
    program = compile_experts(ExpertsSpec(64, 8, 2048, 1024, SWIGLU, dtype="bf16", target="cuda:sm_80"))
    for kernel, matrix in zip(program.kernels[2:4], ("gate_up", "down"), strict=True):
        types = {a.name: a.type for a in signature(kernel)}
        assert types[f"s_{matrix}_0"] == "i64"


def _kernels_of_all_kinds():
    facts = {"dtype": "bf16", "target": "cuda:sm_90"}
    wanted = ("x", "gate_up", "down", "weights")
    for load in LOADS:
        yield from compile_experts(ExpertsSpec(64, 8, 2048, 1024, SWIGLU, load=load, **facts)).kernels
    adapted = {"ranks": (8, 8), "adapters": "i64"}
    for more in (
        {"keeps": True},
        {"ranks": (8, 8)},
        adapted,
        {"transposed": True, "units": (1, 1), "biased": True},
    ):
        spec = ExpertsSpec(64, 8, 2048, 1024, SWIGLU, **facts, **more)
        yield from compile_experts(spec).kernels
        yield from compile_gradients(spec, wanted).kernels


def test_what_may_lie_beyond_32_bits_is_addressed_in_64():
    """Strides are 64 bits wide; as 32 bits they only meet coordinates in a tile, whose span `bind` checks."""
    for kernel in _kernels_of_all_kinds():
        text = emit(kernel)
        assert all(a.type == "i64" for a in signature(kernel) if a.name.startswith("s_")), kernel.name
        body = text.split("@triton.jit")[1].split("\nkernel = ")[0]
        narrow = set(re.findall(r"^    (r_\w+) = s_\w+\.to\(tl\.int32\)$", body, re.MULTILINE))
        for name in narrow:
            uses = re.findall(rf"(\S+?(?:\[[^]]*\])?) \* {name}\b", body)
            assert len(uses) == len(re.findall(rf"\b{name}\b", body)) - 1, (kernel.name, name)
            assert all(use.strip("(").startswith("i_") for use in uses), uses
            tensor, dimension = re.fullmatch(r"r_(\w+)_(\d)", name).groups()
            assert f"{tensor}.stride({dimension}) * " in text.split("def bind")[1]


def test_a_tile_that_spans_too_much_is_refused():
    spec = ExpertsSpec(2, 1, 32, 128, SWIGLU, dtype="f16", target="cuda:sm_90", aligned=False)
    kernel = next(k for k in compile_experts(spec).kernels if k.name == "experts_h")

    def matrices(*strides):
        return torch.empty(1, dtype=torch.float16, device="meta").as_strided((2, 256, 32), strides)

    given = {
        "x": torch.empty(4, 32),
        "h": torch.empty(4, 128),
        "bounds": torch.zeros(3),
        "tokens": torch.zeros(4),
    }
    bind = load_text(emit(kernel)).bind
    with pytest.raises(OverflowError, match="one tile spans 2"):
        bind(**given, gate_up=matrices(2**40, 2**30, 1))
    bound = bind(**given, gate_up=matrices(2**40, 32, 1))
    assert 2**40 in [value for value in bound if isinstance(value, int)]


@pytest.mark.parametrize("target", ["cuda:sm_80", "hip:gfx942"])
def test_every_kernel_compiles_elsewhere(target):
    spec = ExpertsSpec(24, 4, 320, 192, SWIGLU, dtype="f16", biased=True, load="some", target=target)
    router = RouterSpec(
        24, 4, "sigmoid", corrected="f32", groups=4, top_groups=2, limited="token", target=target
    )
    cosines = RouterSpec(24, 2, features=64, logits="bf16", target=target)
    programs = [compile_experts(spec), compile_router(router), compile_router_gradient(router)]
    programs += [compile_router(cosines), compile_expert_choice(cosines)]
    for kernel in (k for program in programs for k in program.kernels):
        assert not compile_ahead(emit(kernel), target).lacks


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({"biased": True}, ("x", "gate_up", "down", "gate_up_bias", "down_bias", "weights")),
        ({"ranks": (3, 2), "adapters": "i64"}, ("x", "gate_up_a", "gate_up_b", "down_a", "down_b")),
    ],
    ids=["matrices", "adapters"],
)
def test_gradients_on_the_interpreter_and_compiled(more, wanted):
    facts = {"aligned": False, "target": "cuda:sm_90", "tiling": (SMALL[1],) * 7}
    spec = ExpertsSpec(4, 2, 40, 24, SWIGLU, **facts, **more)
    rng, tokens, entries = np.random.default_rng(0), 20, 40
    graph = build_gradients(spec, wanted)
    sizes = {"T": tokens, "rows": entries, "adapters": 3}
    given = {
        v.name: rng.standard_normal([sizes.get(n, n) for n in v.shape]).astype(np.float32)
        for v in graph.inputs
    }
    place = rng.permutation(entries)
    tokens_of_rows = np.zeros(entries, np.int32)
    tokens_of_rows[place] = np.arange(entries) // 2
    given |= {
        "tokens": tokens_of_rows,
        "bounds": np.array([0, 17, 17, 20, 40], np.int32),
        "place": place.reshape(tokens, 2).astype(np.int32),
        **({"adapter_ids": rng.integers(-1, 4, tokens)} if spec.adapters else {}),
    }
    expected = interpret(graph, given)
    flat = given | {name: given[name].reshape(-1) for name in ("place", "ones")}
    flat |= {name: np.full_like(value, np.nan) for name, value in expected.items()}
    program = compile_gradients(spec, wanted)
    found = run(program, flat, {**sizes, "entries": entries})
    for name, value in expected.items():
        close = 1e-4 * max(1, np.abs(value).max())
        np.testing.assert_allclose(found[name].numpy(), value, rtol=1e-4, atol=close, err_msg=name)


def test_gradients_compile_for_an_h100_without_spills():
    """Matrices come by the copy engine, also where a product sums over their rows; rows that tokens name by
    asynchronous copies, none of which wait for copies of tokens."""
    spec = ExpertsSpec(64, 8, 2048, 1024, SWIGLU, dtype="bf16", keeps=True, target="cuda:sm_90")
    for kernel in compile_gradients(spec, ("x", "gate_up", "down", "weights")).kernels:
        source = emit(kernel)
        binary = compile_ahead(source, "cuda:sm_90")
        assert not binary.spills and not binary.lacks
        assert ("[1, 64, 256]" in source) == (kernel.name in ("experts_du", "experts_dxs"))
        assert not re.search(r"cp\.async\.ca\.\S+ \[[^]]*\], \[[^]]*\], 0x4\b", binary.assembly)


@pytest.mark.parametrize("adapters", [None, "i64"])
def test_adapters_compile_for_an_h100_without_spills(adapters):
    facts = {"dtype": "bf16", "ranks": (16, 8), "adapters": adapters, "target": "cuda:sm_90"}
    spec = ExpertsSpec(64, 8, 2048, 1024, SWIGLU, **facts)
    wanted = ("down_b",) if adapters else ("x", "gate_up_a", "gate_up_b", "down_a", "down_b")
    programs = compile_experts(spec), compile_gradients(spec, wanted)
    kernels = [k for program in programs for k in program.kernels]
    for kernel in (k for k in kernels if any(a.name == "l" for a in k.axes)):
        binary = compile_ahead(emit(kernel), "cuda:sm_90")
        assert not binary.spills and not binary.lacks, kernel.name
