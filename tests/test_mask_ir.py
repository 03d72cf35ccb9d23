"""The mask level: isl sets against evaluation, algebra, text, verifier, interpreter."""

import islpy as isl
import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.ir.affine import bounds, condition, convex, project, to_expr, to_pw_aff, to_sets
from gossamer.ir.errors import InputError, ParseError, UnsupportedError, VerifyError
from gossamer.ir.evaluate import evaluate
from gossamer.ir.expr import (
    bitand,
    bitor,
    bitxor,
    floordiv,
    floormod,
    integer,
    maximum,
    minimum,
    read,
    shl,
    shr,
    where,
)
from gossamer.ir.mask import Capture, Mask

Q, K, P = integer("q"), integer("k"), integer("p0")
N = 14
GRID = {"q": np.arange(N)[:, None], "k": np.arange(N + 3)[None, :]}
number = st.integers(-7, 7).map(sympy.Integer)
divisor = st.integers(-6, 6).filter(bool).map(sympy.Integer)


def _affine(depth: int) -> st.SearchStrategy:
    if depth == 0:
        return st.one_of(st.sampled_from([Q, K, Q - K, P]), number)
    inner = _affine(depth - 1)
    return st.one_of(
        inner,
        st.builds(lambda a, b: a + b, inner, inner),
        st.builds(lambda a, b: a * b, inner, number),
        st.builds(floordiv, inner, divisor),
        st.builds(floormod, inner, divisor),
        st.builds(minimum, inner, inner),
        st.builds(maximum, inner, inner),
        st.builds(sympy.Abs, inner),
        st.builds(lambda a, b, c, d: where(a <= b, c, d), inner, inner, inner, inner),
    )


RELATIONS = (sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, sympy.Eq, sympy.Ne)
relation = st.builds(lambda r, a, b: r(a, b), st.sampled_from(RELATIONS), _affine(2), _affine(1))
predicate = st.recursive(
    relation,
    lambda p: st.one_of(
        st.builds(sympy.And, p, p),
        st.builds(sympy.Or, p, p),
        st.builds(sympy.Not, p),
        st.builds(sympy.Xor, p, p),
    ),
    max_leaves=3,
)


def members(points: isl.Set, p: int) -> np.ndarray:
    """The points of a set over [q, k] on the grid, for p0 = p."""
    box = isl.Set(f"[p0] -> {{ [q, k] : p0 = {p} and 0 <= q < {N} and 0 <= k < {N + 3} }}")
    found = np.zeros((N, N + 3), bool)
    coordinate = isl.dim_type.set
    points.intersect(box).project_out(isl.dim_type.param, 0, 1).foreach_point(
        lambda x: found.__setitem__(
            tuple(int(x.get_coordinate_val(coordinate, d).to_python()) for d in range(2)), True
        )
    )
    return found


@settings(max_examples=120, deadline=None)
@given(predicate, st.integers(-3, 9))
def test_sets_hold_what_the_predicate_says(pred, p):
    may, must = to_sets(sympy.And(pred, P >= P - 1, sympy.Or(P < 100, Q + K > 200)))
    want = np.broadcast_to(evaluate(pred, {**GRID, "p0": p}), (N, N + 3))
    assert (members(may, p) >= want).all()
    assert (members(must, p) <= want).all()
    if may.is_equal(must):
        assert (members(may, p) == want).all()


@settings(max_examples=120, deadline=None)
@given(_affine(3), st.integers(-3, 9))
def test_functions_survive_the_way_to_isl_and_back(expr, p):
    function = to_pw_aff(expr)
    if function is None:  # more pieces than it pays to follow
        return
    values = {**GRID, "p0": p}
    assert (evaluate(to_expr(function), values) == evaluate(expr, values)).all()


@settings(max_examples=60, deadline=None)
@given(predicate, st.integers(-3, 9))
def test_conditions_are_their_sets(pred, p):
    may, _ = to_sets(pred)
    values = {**GRID, "p0": p}
    found = np.broadcast_to(evaluate(condition(may), values), (N, N + 3))
    assert (found == members(may.align_params(isl.Set("[p0] -> { [q, k] }").get_space()), p)).all()


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([bitand, bitor, bitxor]), st.integers(-70, 70), st.booleans())
def test_bits_by_numbers_with_few_runs_are_affine(op, n, flip):
    expr = op(sympy.Integer(n), Q - K) if flip else op(Q - K, sympy.Integer(n))
    function = to_pw_aff(expr)
    runs = len([run for run in bin(n if n >= 0 else ~n)[2:].split("0") if run])
    assert (function is None) == (runs > 2)
    if function is None:
        return
    assert (evaluate(to_expr(function), GRID) == evaluate(expr, GRID)).all()


def test_shifts_by_numbers_are_affine():
    expr = shl(shr(Q, sympy.Integer(2)), sympy.Integer(3))
    assert (evaluate(to_expr(to_pw_aff(expr)), GRID) == evaluate(expr, GRID) + 0 * GRID["k"]).all()


@pytest.mark.parametrize("atom", ["q * k < 9", "q % p0 == 0", "c0[q] == 1", "(q & k) == 0", "p0 * q <= k"])
def test_what_isl_cannot_hold_is_opaque(atom):
    text = atom.replace("(q & k)", "bitand(q, k)")
    mask = Mask.parse(f"mask(p0; c0: i32[1]) {{ {text} and k <= q }}")
    causal = Mask.parse("mask() { k <= q }")
    assert not mask.exact
    assert mask.may.is_equal(causal.may) and mask.must.is_empty()
    assert (~mask).must.is_equal((~causal).may)
    assert (mask | causal).exact


def test_bounds_are_least_and_greatest():
    points = isl.Set("[p0] -> { [q, k] : q >= 0 and k >= 0 and q - p0 <= k <= q + p0 }")
    low, high, domain = bounds(points, "k")
    assert (str(low), str(high)) == ("maximum(0, -p0 + q)", "p0 + q")
    assert domain == sympy.And(P >= 0, Q >= 0)
    assert convex(points, "k")
    holes = isl.Set("{ [q, k] : 0 <= k <= q and k mod 2 = 0 }")
    assert not convex(holes, "k")
    assert str(project(holes, "k")) == "{ [q] : q >= 0 }"
    assert bounds(isl.Set("{ [q, k] : k >= q >= 0 }"), "k")[1] == sympy.oo
    with pytest.raises(UnsupportedError, match="no least value"):
        bounds(isl.Set("{ [q, k] : k <= q }"), "k")
    with pytest.raises(UnsupportedError, match="split the set first"):
        bounds(isl.Set("{ [q, k] : 0 <= k and (k <= q or q < 4) }"), "k")


def test_clamps_are_recognised():
    clamp = minimum(maximum(Q - 6, sympy.Integer(0)), sympy.Integer(51))
    assert str(to_expr(to_pw_aff(clamp))) in (
        "minimum(51, maximum(0, q - 6))",
        "minimum(maximum(0, q - 6), 51)",
    )


# Algebra and equality.


def test_operands_keep_their_own_integers_and_tensors():
    a = Mask(sympy.Le(Q - K, P), ("p0",))
    c = Capture("c0", "i32", 1)
    same = sympy.Eq(read(c.symbol, Q), read(c.symbol, K))
    b = Mask(sympy.And(same, K - Q <= P), ("p0",), (c,))
    both = a & b
    assert both.params == ("p0", "p1") and both.captures == (c,)
    assert both.predicate == sympy.And(Q - K <= P, same, sympy.Le(K - Q, integer("p1")))
    assert (b | b).captures == (c, Capture("c1", "i32", 1))
    q, k = GRID["q"], GRID["k"]
    ids = np.arange(20) // 4
    want = a.evaluate(0, 0, q, k, (3,)) & ~b.evaluate(0, 0, q, k, (2,), (ids,))
    assert ((a & ~b).evaluate(0, 0, q, k, (3, 2), (ids,)) == want).all()


def test_equality_is_of_sets():
    parse = Mask.parse
    assert parse("mask(p0) { q - k <= p0 }").equal(parse("mask(p0) { k + p0 + 1 > q }"))
    assert not parse("mask(p0) { q - k <= p0 }").equal(parse("mask(p0) { q - k < p0 }"))
    opaque = parse("mask(; c0: i32[1]) { c0[q] < k }")
    assert opaque.equal(parse(opaque.to_text()))
    assert not opaque.equal(~opaque)


def test_substitution():
    mask = Mask.parse("mask(p0, p1) { q - k <= p0 and k - q <= p1 }")
    shifted = mask.substitute({"q": Q + integer("p2"), "p0": 4}, params=("p2",))
    assert shifted == Mask.parse("mask(p1, p2) { p2 + q - k <= 4 and k - q - p2 <= p1 }")


# Text and rules.


@settings(max_examples=80, deadline=None)
@given(predicate)
def test_text_round_trip(pred):
    c = Capture("c0", "i32", 2)
    mask = Mask(sympy.Or(pred, sympy.Eq(read(c.symbol, Q, K), 1)), ("p0",), (c, Capture("c1", "f32", 0)))
    assert Mask.parse(mask.to_text()) == mask
    assert hash(Mask.parse(mask.to_text())) == hash(mask)


@pytest.mark.parametrize(
    "text", ["", "mask { true }", "mask(p0 { true }", "mask(; c0) { true }", "mask() { q <= }"]
)
def test_malformed_text(text):
    with pytest.raises(ParseError):
        Mask.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mask() { q + k }", "truth value; got int"),
        ("mask(p0, p0) { true }", "distinct"),
        ("mask(kv_len) { true }", "none of b, h, q"),
        ("mask(; c0: i33[1]) { true }", "a capture has a dtype"),
        ("mask(; c0: i32[1]) { c0[q, k] == 1 }", "with 2 indices"),
    ],
)
def test_rules(text, message):
    with pytest.raises(VerifyError, match=message):
        Mask.parse(text)


def test_unknown_symbols_are_refused():
    with pytest.raises(VerifyError, match="got w"):
        Mask(integer("w") <= Q)
    with pytest.raises(VerifyError, match="does not declare"):
        Mask(sympy.Eq(read(integer("c0"), Q), 1))


# The interpreter.


def test_evaluation_broadcasts():
    mask = Mask.parse("mask(; c0: i32[2]) { c0[b, h] <= q - k }")
    table = np.arange(6).reshape(2, 3)
    b, h, q, k = np.ix_(range(2), range(3), range(8), range(5))
    found = mask.evaluate(b, h, q, k, captures=(table,))
    assert found.shape == (2, 3, 8, 5)
    assert (found == (table[:, :, None, None] <= q - k)).all()


def test_python_semantics_of_division():
    mask = Mask.parse("mask() { (q - k) % 4 == 1 and (q - k) // 4 >= -1 }")
    q, k = GRID["q"], GRID["k"]
    assert (mask.evaluate(0, 0, q, k) == (((q - k) % 4 == 1) & ((q - k) // 4 >= -1))).all()


def test_a_read_outside_a_capture_is_an_error():
    mask = Mask.parse("mask(; c0: i32[1]) { c0[k + 1] == 1 }")
    assert mask.evaluate(0, 0, 0, np.arange(4), captures=(np.ones(5, int),)).all()
    with pytest.raises(InputError, match=r"c0\[k \+ 1\].*1 \.\. 5.*5 entries"):
        mask.evaluate(0, 0, 0, np.arange(5), captures=(np.ones(5, int),))


def test_values_have_to_fit():
    mask = Mask.parse("mask(p0; c0: i32[1]) { c0[k] == p0 }")
    with pytest.raises(InputError, match="1 integers for p0"):
        mask.evaluate(0, 0, 0, 0, (), (np.ones(1, int),))
    with pytest.raises(InputError, match=r"tensors for \(c0: i32\[1\]\)"):
        mask.evaluate(0, 0, 0, 0, (1,), (np.ones((1, 1), int),))
