"""Adapters that tokens choose: one set of kernels for all of a stack, whatever the tokens ask for."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tvm_ffi_orcjit")
import gossamer  # noqa: E402
from gossamer.frontend import testing  # noqa: E402
from gossamer.ir import graph_interpret, kernel_interpret  # noqa: E402
from gossamer.ir.errors import InputError, VerifyError  # noqa: E402
from gossamer.ir.expr import real, sigmoid  # noqa: E402
from gossamer.ir.graph import Graph, Op, Value  # noqa: E402
from gossamer.passes.moe.build import build_experts  # noqa: E402
from gossamer.passes.moe.gradient import WANTED, build_gradients  # noqa: E402
from gossamer.passes.moe.pipeline import compile_experts, compile_gradients  # noqa: E402
from gossamer.passes.moe.spec import ExpertsSpec  # noqa: E402
from gossamer.runtime.driver import compilations  # noqa: E402
from gossamer.tests import moe_cases as CASES  # noqa: E402

Case, plain, ULP = CASES.Case, CASES.plain, CASES.ULP

SWIGLU = real("x0") * sigmoid(real("x0")) * real("x1")
MANY = 3  # adapters of a stack


def adapters(case, rank=4, seed=0):
    """gate_up_lora, down_lora and adapter_ids, of which some are no adapter's."""
    g = torch.Generator().manual_seed(seed)
    columns = case.inner * (2 if case.gated else 1)
    shapes = (rank, case.hidden), (columns, rank), (rank + 1, case.inner), (case.hidden, rank + 1)
    a, b, c, d = (
        (torch.randn(MANY, case.experts, *s, generator=g, dtype=torch.float64) / s[1] ** 0.5).to(case.dtype)
        for s in shapes
    )
    ids = torch.randint(-1, MANY, (case.tokens,), generator=g)
    return {"gate_up_lora": (a, b), "down_lora": (c, d), "adapter_ids": ids.to(case.ids_dtype)}


def alone(case, x, ids, weights, layer, lora, scale, dtype):
    """The layer by torch, the tokens of one adapter after another, each with matrices of its own."""
    out = torch.zeros(x.shape, dtype=dtype)
    for number in range(-1, MANY):
        merged, mine = dict(layer), torch.where(lora["adapter_ids"] == number)[0]
        for name in ("gate_up", "down") if number >= 0 else ():
            a, b = (m[number].to(dtype) for m in lora[f"{name}_lora"])
            more = scale * b @ a
            merged[f"{name}_proj"] = layer[f"{name}_proj"].to(dtype) + (more.mT if case.transposed else more)
        out[mine] = plain(case, x[mine], ids[mine], weights[mine], merged, dtype)
    return out


@pytest.mark.parametrize(
    "case",
    [
        Case(tokens=70, biased=True),
        Case(tokens=9, transposed=True, interleaved=True, dtype=torch.bfloat16, ids_dtype=torch.int32),
        Case(tokens=1, biased=True),
    ],
    ids=repr,
)
def test_every_token_takes_its_own(case):
    largest = torch.zeros(4, dtype=torch.float64)  # over draws: errors of ours, theirs, the reference; values
    for seed in range(2 + 60 // case.tokens):
        layer, x, lora = case.layer(seed), case.x(seed), adapters(case, seed=seed)
        ids, weights = case.routing(seed, -1, case.experts + 1)
        given = (case, x, ids, weights, layer, lora, 0.5)
        exact, theirs = (alone(*given, dtype) for dtype in (torch.float64, case.dtype))
        more = {**layer, **lora, "lora_scale": 0.5, "validate": True}
        found = gossamer.experts(x, ids, weights, **more)
        reference = gossamer.experts(x, ids, weights, **more, backend="reference")
        errors = [(t.double() - exact).abs().max() for t in (found, theirs, reference)]
        largest = torch.maximum(largest, torch.stack([*errors, exact.abs().max()]))
    ours, theirs, reference, value = largest
    allowed = 2 * theirs + 2 * ULP[case.dtype] * value
    assert ours <= allowed and reference <= allowed


def test_ids_of_nobody_take_no_adapter():
    case = Case(tokens=5)
    layer, lora, routing = case.layer(), adapters(case), case.routing()
    without = gossamer.experts(case.x(), *routing, **layer)
    for none in (-1, MANY, 2**40, -(2**40)):
        lora["adapter_ids"] = torch.full((5,), none)
        assert torch.equal(gossamer.experts(case.x(), *routing, **layer, **lora), without)


@pytest.mark.parametrize("matrix", range(4))
def test_what_is_not_a_number_stays_with_the_tokens_that_take_it(matrix):
    case = Case(tokens=6, experts=2)
    layer, lora, routing = case.layer(), adapters(case), case.routing()
    lora["adapter_ids"] = torch.tensor([0, 1, -1, 2, 1, 0])
    clean = gossamer.experts(case.x(), *routing, **layer, **lora)
    (lora["gate_up_lora"] + lora["down_lora"])[matrix][1] = torch.nan
    found = gossamer.experts(case.x(), *routing, **layer, **lora)
    takes = lora["adapter_ids"] == 1
    assert torch.equal(found[~takes], clean[~takes]) and found[takes].isnan().all()


def test_routings_carry_adapters_along():
    case = Case(tokens=11)
    layer, lora, (ids, weights) = case.layer(), adapters(case), case.routing()
    routing = gossamer.Routing.from_topk(ids, weights, case.experts)
    routing = routing.replace(weights=routing.weights.clone())  # a list of rows
    found = gossamer.experts(case.x(), routing, None, **layer, **lora)
    torch.testing.assert_close(found, gossamer.experts(case.x(), ids, weights, **layer, **lora))
    logits = torch.randn(11, case.experts, generator=torch.Generator().manual_seed(0))
    chosen = gossamer.moe(case.x(), logits, top_k=2, router="expert_choice", **layer, **lora)
    expected = gossamer.moe(
        case.x(), logits, top_k=2, router="expert_choice", backend="reference", **layer, **lora
    )
    torch.testing.assert_close(chosen, expected, rtol=1e-4, atol=1e-5)


def test_other_tokens_adapters_and_stacks_compile_nothing():
    def run(tokens, many):
        case = Case(tokens=tokens)
        lora = adapters(case)
        for name in ("gate_up_lora", "down_lora"):
            lora[name] = tuple(m[:many] for m in lora[name])
        gossamer.experts(case.x(), *case.routing(), **case.layer(), **lora)

    run(9, MANY)
    before = compilations()
    for tokens, many in ((7, MANY), (12, 1), (20, 2)):
        run(tokens, many)
    assert compilations() == before


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients(recompute):
    case = Case(tokens=6, experts=2, hidden=4, inner=3, dtype=torch.float64, transposed=recompute)
    layer, x, lora = case.layer(), case.x(), adapters(case, 2)
    lora["adapter_ids"] = torch.tensor([0, 2, 2, -1, 0, 7])
    ids, weights = case.routing(0, -1, case.experts + 1)

    def function(x, weights, a, b, c, d):
        more = {**lora, "gate_up_lora": (a, b), "down_lora": (c, d), "lora_scale": 1.5}
        return gossamer.experts(x, ids, weights, **layer, **more, recompute=recompute)

    given = [x, weights.double(), *lora["gate_up_lora"], *lora["down_lora"]]
    assert torch.autograd.gradcheck(function, [t.clone().requires_grad_() for t in given])


def test_compiled():
    case = Case(tokens=9)
    layer, x, lora = case.layer(), case.x().requires_grad_(), adapters(case)
    b = lora["gate_up_lora"][1].requires_grad_()

    def function(x, ids, weights, adapter_ids):
        return gossamer.experts(x, ids, weights, **layer, **{**lora, "adapter_ids": adapter_ids})

    given = (x, *case.routing(), lora["adapter_ids"])
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    found, expected = compiled(*given), function(*given)
    torch.testing.assert_close(found, expected)
    mine, theirs = (torch.autograd.grad(o.sum(), (x, b)) for o in (found, expected))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("load", ["few", "many"])
@pytest.mark.parametrize("target", ["cpu", "cuda:sm_90"])
def test_every_level_computes_the_same(target, load):
    spec = ExpertsSpec(
        3, 2, 8, 6, SWIGLU, ranks=(4, 5), lora_scale=2.0, biased=True, load=load, target=target,
        adapters="i64", masked=True,
    )  # fmt: skip
    rng, tokens = np.random.default_rng(0), 9
    ids = rng.integers(-1, 4, tokens * 2)
    kept = np.flatnonzero((ids >= 0) & (ids < 3))
    order = kept[np.argsort(ids[kept], kind="stable")]
    place = np.full(18, -1)
    place[order] = np.arange(len(order))
    known = {
        "ids": ids.reshape(9, 2),
        "adapter_ids": np.array([0, 0, 2, 2, -1, 2**33, 1, 0, 7]),
        "tokens": np.pad(order // 2, (0, 18 - len(order))),
        "bounds": np.concatenate([[0], np.cumsum(np.bincount(ids[kept], minlength=3))]),
        "place": place.reshape(9, 2),
        "trains": np.array([1, 0, 1]),
    }
    sizes = {"T": tokens, "rows": 18, "adapters": 3}
    wanted = [name for name in WANTED if name[-2:] in ("_a", "_b") or name == "x"]
    graphs = build_experts(spec), build_gradients(spec, wanted)
    programs = compile_experts(spec), compile_gradients(spec, wanted)
    for graph, program in zip(graphs, programs, strict=True):
        assert testing.parse(testing.to_text(graph)) == graph
        assert testing.parse(testing.to_text(program)) == program
        given = {
            v.name: known.get(v.name, rng.standard_normal([sizes.get(n, n) for n in v.shape]))
            for v in graph.inputs
        }
        given = {n: v.astype(np.float32) if v.dtype == np.float64 else v for n, v in given.items()}
        expected = graph_interpret.interpret(graph, given)
        by_entry = given.keys() & {"ids", "weights", "place", "ones"}
        flat = given | {name: given[name].reshape(-1) for name in by_entry}
        flat |= {name: np.full_like(value, np.nan) for name, value in expected.items()}
        for name, value in kernel_interpret.interpret(program, flat).items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-3, err_msg=name)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"adapter_ids": None}, r"gate_up_lora\[0\]: expected 3 dimensions .* Pass adapter_ids="),
        ({"gate_up_lora": None, "down_lora": None}, "adapter_ids: expected gate_up_lora or down_lora"),
        (
            {"adapter_ids": torch.zeros(4, dtype=torch.int64)},
            "adapter_ids: expected 5 tokens, as x has; got 4",
        ),
        ({"adapter_ids": torch.zeros(5)}, "adapter_ids: expected int32 or int64"),
        ({"adapter_ids": torch.zeros((5, 1), dtype=torch.int32)}, r"adapter_ids: expected 1 dimensions"),
        ({"adapter_ids": torch.tensor([0, 1, 3, 0, 0])}, "expected ids from 0 to 2, or -1 for none; got 3"),
        ({"adapter_ids": torch.tensor([0, 1, -2, 0, 0])}, "expected ids from 0 to 2, or -1 for none; got -2"),
        (
            {"down_lora": (torch.zeros(2, 4, 5, 12), torch.zeros(2, 4, 16, 5))},
            r"down_lora\[0\]: expected shape \(3, 4, 5, 12\)",
        ),
        ({"down_lora": (torch.zeros(4, 5, 12), torch.zeros(4, 16, 5))}, r"down_lora\[0\]: expected 4 dimens"),
    ],
)
def test_bad_input(changed, message):
    case = Case(tokens=5)
    given = {name: value for name, value in {**adapters(case), **changed}.items() if value is not None}
    with pytest.raises(InputError, match=message):
        gossamer.experts(case.x(), *case.routing(), **case.layer(), **given, validate=True)


def test_ids_are_validated_beside_copies():
    case = Case(tokens=5)
    ids, weights = case.routing(0, 0, case.experts + 1)
    given = adapters(case) | {"adapter_ids": torch.tensor([0, 1, 9, 0, 0])}
    for backend in ("auto", "reference"):
        with pytest.raises(InputError, match="expected ids from 0 to 2, or -1 for none; got 9"):
            gossamer.experts(
                case.x(),
                ids,
                weights,
                **case.layer(),
                **given,
                copy_experts=1,
                validate=True,
                backend=backend,
            )


@pytest.mark.parametrize(
    ("attrs", "message"),
    [
        ({"chooses": "a"}, "chooses: expected one of w, b; got 'a'"),
        ({"chooses": "b"}, "chooses: 'b' is what `adds` has added"),
        ({"chooses": "w"}, "expected one number of rows; got more and rows"),
    ],
)
def test_rules(attrs, message):
    values = [
        Value("a", "f32", ("rows", 8)), Value("w", "f32", ("A", 3, 8, 4)), Value("bounds", "i32", (4,)),
        Value("tokens", "i32", ("more",)), Value("choice", "i64", ("T",)),
    ]  # fmt: skip
    made = Op("grouped_gemm", tuple(v.name for v in values), (Value("o", "f32", ("rows", 4)),))
    graph = Graph("wrong", tuple(values), (made.with_attrs(**attrs),), ("o",))
    with pytest.raises(VerifyError, match=message):
        testing.verify(graph)
