"""Graphs: text and back, every rule, NumPy meaning, attributes as text, rewriting."""

# ruff: noqa: E501, RUF043  (IR text reads better unbroken)

from dataclasses import dataclass, replace

import numpy as np
import pytest
import sympy
from hypothesis import given, settings

from gossamer import testing
from gossamer.ir import expr as E
from gossamer.ir import text as attribute_text
from gossamer.ir.errors import InputError, ParseError, UnsupportedError, VerifyError
from gossamer.ir.formats import ACSR, Blocks, Progression, StoredACSR
from gossamer.ir.graph import Graph, Op, Value
from gossamer.ir.graph_interpret import interpret
from gossamer.ir.graph_text import parse, to_text
from gossamer.ir.graph_verify import verify
from gossamer.ir.kernel import Span
from gossamer.ir.order import Order, OrderDim
from gossamer.ir.text import dump, load, register

BASE = """\
graph @attention(%q: f32[B, 4, q_len, 8], %k: f32[B, 2, kv_len, 8], %v: f32[B, 2, kv_len, 6], %w: i64[], %a: f32[], %t: f32[n]) {
  %s = sddmm %q, %k, %w {mask = Mask('mask(p0) { abs(k - q) <= p0 }'), scale = 0.5} : f32[B, 4, q_len, kv_len] as acsr
  %m = score_map %s, %a, %t {score = ScoreMap('score(s0: float; t0: f32[1]) { s0 * t0[h] + score }')} : f32[B, 4, q_len, kv_len] as acsr
  %p, %lse = softmax %m : f32[B, 4, q_len, kv_len] as acsr, f32[B, 4, q_len]
  %o = spmm %p, %v : f32[B, 4, q_len, 6]
  %e = map %o, %lse2 {expr = expr('exp2(x1) * x0', floats=('x0', 'x1'))} : f32[B, 4, q_len, 6]
  %r = reduce %e {axis = 3, op = 'sum'} : f32[B, 4, q_len]
  return %o, %r
}
""".replace(", %lse2", ", %o")


def test_base_reads_and_spells() -> None:
    graph = parse(BASE)
    assert to_text(graph) == BASE and parse(to_text(graph)) == graph
    verify(graph)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("graph @", "graph ", "line 1, column 7: expected '@'"),
        (" = spmm", " spmm", "line 5, column 6: expected '='"),
        ("as acsr\n", "as coo\n", "expected a format (dense, acsr, blocks); got 'coo'"),
        ("scale = 0.5", "scale = 0.5.5", "line 2, column 80: not a value"),
        ("scale = 0.5", "scale = open('x')", "unknown class 'open'; known: ACSR, Blocks"),
        ("scale = 0.5", "scale = __import__", "expected a value; got '__import__'"),
        ("mask(p0) {", "mask(p0) { z +", "unknown name 'z'"),
        ("f32[n]) {", "f33[n]) {", "expected a dtype"),
        ("return %o, %r", "return", "expected at least one value"),
        ("  return %o, %r\n", "", "expected '%'"),
    ],
)
def test_malformed_text_says_where(old: str, new: str, message: str) -> None:
    assert old in BASE
    with pytest.raises((ParseError, VerifyError)) as error:
        verify(parse(BASE.replace(old, new, 1)))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("rule", "old", "new", "message"),
    [
        ("name", "%w: i64[]", "%k: i64[]", "%k is defined twice"),
        ("name", "%p, %lse", "%s, %lse", "%s is defined twice"),
        ("order", "spmm %p", "spmm %x", "%x is used before it is made; known: q, k, v"),
        ("operands", "spmm %p", "conv %p", "expected an operation (matmul, sddmm"),
        ("operands", "%k, %w {", "%k {", "expected 1 after the first 2 (p0); got 0"),
        ("operands", "%k, %w {", "%k, %t {", "%t: expected rank 0 for p0; got [n]"),
        ("operands", "spmm %p, %v", "spmm %p", "expected at least 2; got 1"),
        ("type", "%o = spmm %p, %v : f32[B, 4, q_len, 6]", "%o = spmm %p, %v : f32[B, 4, q_len, 8]", "expected shape [B, 4, q_len, 6]"),
        ("type", "%k: f32[B, 2, kv_len, 8]", "%k: f32[B, 2, kv_len, 7]", "expected one head size; got 8 and 7"),
        ("type", "%k: f32[B, 2", "%k: f32[B, 3", "a multiple of key heads; got 4 and 3"),
        ("type", "%v: f32[B, 2, kv_len, 6]", "%v: f32[B, 2, n, 6]", "expected one number of keys; got kv_len and n"),
        ("type", "%v: f32[B, 2, kv_len, 6]", "%v: f32[B, kv_len, 6]", "%v: expected 4 dimensions"),
        ("type", "%t: f32[n]", "%t: f32[0]", "%t: expected extents of at least 1"),
        ("type", "%p, %lse = softmax %m : ", "%p = softmax %m : f32[n], ", "expected"),
        ("attrs", "scale = 0.5", "scale = 'half'", "scale: expected int or float; got 'half'"),
        ("attrs", "mask = Mask('mask(p0) { abs(k - q) <= p0 }')", "mask = 3", "mask: expected Mask; got 3"),
        ("attrs", "op = 'sum'", "op = 'prod'", "op: expected one of sum, max, min, mean; got 'prod'"),
        ("attrs", "axis = 3", "axis = 4", "axis: expected a dimension of [B, 4, q_len, 6]; got 4"),
        ("attrs", "exp2(x1) * x0", "exp2(x2) * x0", "expr: expected an expression of x0, x1; got exp2(x2) * x0"),
        ("output", "return %o, %r", "return %o, %z", "%z is returned but not made"),
    ],
)  # fmt: skip
def test_rejects(rule: str, old: str, new: str, message: str) -> None:
    assert old in BASE
    if new.startswith("%p = softmax"):
        new, message = "%p, %lse = softmax %m : f32[n], ", "%p: expected shape [B, 4, q_len, kv_len]; got [n]"
        old = "%p, %lse = softmax %m : f32[B, 4, q_len, kv_len] as acsr, "
    text = BASE.replace(old, new, 1)
    text = text.replace("floats=('x0', 'x1')", "floats=('x0', 'x1', 'x2')")
    with pytest.raises(VerifyError) as error:
        verify(parse(text))
    assert str(error.value).startswith(f"{rule}: ") and message in str(error.value)
    assert "graph @attention" in str(error.value)


def _attention_arguments() -> dict[str, np.ndarray | float]:
    rng = np.random.default_rng(0)
    made = {"q": (2, 4, 9, 8), "k": (2, 2, 5, 8), "v": (2, 2, 5, 6), "t": (4,)}
    return {n: rng.standard_normal(s) for n, s in made.items()} | {"w": 1, "a": 0.25}


def test_attention_means_what_loops_say() -> None:
    x = _attention_arguments()
    o = interpret(parse(BASE), x)["o"]
    for b, h, q in np.ndindex(2, 4, 9):
        keys = [k for k in range(5) if abs(q - k) <= 1]
        scores = np.array([x["q"][b, h, q] @ x["k"][b, h // 2, k] * 0.5 + x["t"][h] * 0.25 for k in keys])
        weights = np.exp(scores - scores.max(initial=0))
        expected = sum(w * x["v"][b, h // 2, k] for w, k in zip(weights, keys, strict=True)) / max(
            weights.sum(), 1e-9
        )
        np.testing.assert_allclose(o[b, h, q], expected if keys else np.zeros(6), rtol=1e-4, atol=1e-6)


def test_fused_attention_is_the_primitives() -> None:
    masks = "mask = Mask('mask(p0) { abs(k - q) <= p0 }'), scale = 0.5"
    score = "score = ScoreMap('score(s0: float; t0: f32[1]) { s0 * t0[h] + score }')"
    head = BASE.split("\n")[0]
    types = "f32[B, 4, q_len, 6], f32[B, 4, q_len]"
    fused = f"{head}\n  %o, %lse = attention %q, %k, %v, %w, %a, %t {{{masks}, {score}}} : {types}\n  return %o, %lse\n}}"
    apart = BASE.replace("return %o, %r", "return %o, %lse")
    testing.assert_equivalent(apart, fused, _attention_arguments())
    empty = interpret(parse(fused), _attention_arguments())
    assert np.isneginf(empty["lse"][:, :, 7:]).all() and (empty["o"][:, :, 7:] == 0).all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("%c = matmul %a, %b : f32[2, 2]", lambda a, b: a @ b),
        ("%c = matmul %a, %b {transpose_b = True} : f32[2, 2]", lambda a, b: a @ b.T),
        ("%c = reduce %a {axis = 0, op = 'mean'} : f32[2]", lambda a, b: a.mean(0)),
        ("%c = map %a, %b {expr = expr('where(x0 < x1, x0, 2 * x1)', floats=('x0', 'x1'))} : f32[2, 2]",
         lambda a, b: np.where(a < b, a, 2 * b)),
        ("%c = softmax %a : f32[2, 2]", lambda a, b: np.exp(a) / np.exp(a).sum(1, keepdims=True)),
        ("%c = map %a {expr = expr('x0 / 3', floats=('x0',))} : f16[2, 2]", lambda a, b: (a / 3).astype(np.float16)),
    ],
)  # fmt: skip
def test_primitives_mean_what_numpy_says(text: str, expected) -> None:
    a, b = np.array([[1, 2], [3, -4]], np.float32), np.array([[0.5, 2.5], [-1, 7]], np.float32)
    graph = parse(f"graph @one(%a: f32[2, 2], %b: f32[2, 2]) {{\n {text}\n return %c\n}}")
    got = interpret(graph, {"a": a, "b": b})["c"]
    np.testing.assert_allclose(got, expected(a, b), rtol=1e-6)
    assert got.dtype == (np.float16 if "f16" in text else np.float32)


def test_interpreter_checks_arguments() -> None:
    with pytest.raises(InputError, match=r"expected arguments a, k, q, t, v, w; got \['q'\]"):
        interpret(parse(BASE), {"q": 1})
    with pytest.raises(InputError, match=r"%v: expected shape \[2, 2, 5, 6\]"):
        interpret(parse(BASE), _attention_arguments() | {"v": np.zeros((2, 2, 4, 6))})


@settings(max_examples=25, deadline=None)
@given(testing.graphs())
def test_drawn_graphs_verify_come_back_and_run(graph: Graph) -> None:
    verify(graph)
    assert parse(to_text(graph)) == graph
    testing.interpret(graph, testing.random_arguments(graph, lengths={"n": 5, "B": 1, "Hq": 2, "Hk": 1}))


# Rewriting --------------------------------------------------------------------------------------------


def test_dag_and_queries() -> None:
    graph = parse(BASE)
    assert set(graph.dag.predecessors("s")) == {"q", "k", "w"} and set(graph.dag.successors("o")) == {"e"}
    assert graph.producer("lse").kind == "softmax" and graph.producer("q") is None
    assert [op.kind for op in graph.users("p")] == ["spmm"]
    assert graph.values["p"].format == "acsr"


def test_rewriting_makes_new_graphs() -> None:
    graph = parse(BASE)
    assert graph.map_ops(lambda op: None) is graph
    scaled = graph.map_ops(lambda op: op.with_attrs(scale=2.0) if op.kind == "sddmm" else None)
    assert scaled.of_kind("sddmm")[0].attr("scale") == 2.0 and graph.of_kind("sddmm")[0].attr("scale") == 0.5
    assert scaled.of_kind("sddmm")[0].with_attrs(scale=None).attr("scale", 1) == 1
    shorter = replace(graph, outputs=("o",)).without_dead()
    assert [op.kind for op in shorter.ops] == ["sddmm", "score_map", "softmax", "spmm"]
    assert shorter.without_dead() is shorter
    merged = graph.replace_ops(graph.ops[3:5], [Op("fused", ("p", "v"), graph.ops[4].outputs)])
    assert [op.kind for op in merged.ops][-3:] == ["softmax", "fused", "reduce"]


# Attributes -------------------------------------------------------------------------------------------

q, x = E.integer("q"), E.real("x")
VALUES = [
    None, True, 3, -2, 0.1, -1e-30, float("inf"), "it's \"so\"\n", (), (1,), ((1, 2.5), "a", None),
    q, sympy.Integer(3), -E.INF, E.where(q < 3, x, E.readf(E.real("t0"), q)), sympy.And(E.boolean("ok"), q > 1),
    ACSR((8,), (Progression(1, 0, q, 4), Progression(2, E.floormod(q, 2), q, E.INF)), q >= 2, "{ [q] -> [k] }"),
    StoredACSR([0, 1], [1, 2], [3, 0]), Blocks((16, 16), [0, 1], [2]), Order(), Order((OrderDim(8, 2, slope=1),)),
    (Span(q, q + 1), Span(sympy.Integer(0), E.INF)),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda v: dump(v)[:40])
def test_attributes_come_back(value: object) -> None:
    again = load(dump(value))
    assert again == value and type(again) is type(value)
    assert dump(again) == dump(value)


def test_fields_of_expressions_are_plain_text_and_defaults_are_left_out() -> None:
    assert dump(Progression(4, E.floormod(q, 4), q, q + 1)) == (
        "Progression(stride=4, offset='q % 4', first='q', count='q + 1')"
    )
    assert dump(Order()) == "Order()"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eval('1')", "unknown class 'eval'"),
        ("[1]", "expected a value; got '[1]'"),
        ("1 + 2", "expected a value; got '1 + 2'"),
        ("Order(3)", "expected Order(field=value, ...)"),
        ("Order(depth=3)", "Order: "),
        ("Progression(stride=0, offset='0', first='0', count='1')", "expected a stride of at least 1; got 0"),
        ("expr('q +')", "in the expression 'q +'"),
        ("expr('q', ints=('q',))", "expr takes floats and bools; got ints"),
        ("Order(**x)", "expected name=value"),
        ("(" * 300 + ")" * 300, "not a value"),
    ],
)
def test_attributes_reject(text: str, message: str) -> None:
    with pytest.raises(ParseError) as error:
        load(text)
    assert message in str(error.value)


def test_own_classes_register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attribute_text, "REGISTRY", dict(attribute_text.REGISTRY))

    @register
    @dataclass(frozen=True)
    class Note:
        text: str
        weight: float = 1.0

    assert load(dump(Note("hi"))) == Note("hi") and dump(Note("hi")) == "Note(text='hi')"
    graph = parse(BASE).map_ops(lambda op: op.with_attrs(note=Note("here", 2.0)))
    assert parse(to_text(graph)) == graph
    with pytest.raises(UnsupportedError, match="the name Order is taken by gossamer.ir.order"):
        register(dataclass(frozen=True)(type("Order", (), {"__module__": "mine"})))
    with pytest.raises(UnsupportedError, match="not a frozen dataclass"):
        register(dict)
    with pytest.raises(UnsupportedError, match="no text for {1}"):
        dump({1})


def test_values_are_plain() -> None:
    assert Value("x", "f32", ("n", 3)).format == "dense"
