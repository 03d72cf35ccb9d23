"""Tracing of mask_mod and score_mod: against torch itself, and what it refuses."""

import functools
import operator
import re
import subprocess
import sys
from collections import OrderedDict, deque
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import and_masks, noop_mask, or_masks

from gossamer import masks
from gossamer.frontend.mask import Mask
from gossamer.frontend.score import ScoreMod
from gossamer.frontend.trace import function as tracing
from gossamer.ir.errors import InputError, ParseError, TraceError, VerifyError
from gossamer.ir.expr import real
from gossamer.ir.mask import Capture
from gossamer.ir.mask import Mask as IRMask
from gossamer.ir.score import ScoreMap

BATCH, HEADS, Q, K = 2, 3, 9, 11


# NumPy functions on torch tensors, which some tests compare with, warn.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")


def indices():
    """b, h, q, k as int32 tensors that broadcast to (B, H, Q, K)."""
    sizes = (BATCH, HEADS, Q, K)
    return [
        torch.arange(n, dtype=torch.int32).reshape([-1 if d == i else 1 for i in range(4)])
        for d, n in enumerate(sizes)
    ]


def dense(mask):
    return np.array([[mask.to_dense(Q, K, b, h) for h in range(HEADS)] for b in range(BATCH)])


def same_as_torch(mask_mod):
    expected = torch.as_tensor(mask_mod(*indices())).expand(BATCH, HEADS, Q, K).numpy()
    np.testing.assert_array_equal(dense(Mask.trace(mask_mod)), expected)


def same_point_by_point(mask_mod):
    """As FlexAttention sees a mask_mod: on scalars, by which tensors may be indexed step by step."""
    expected = np.empty((BATCH, HEADS, Q, K), bool)
    for point in np.ndindex(expected.shape):
        expected[point] = bool(mask_mod(*map(torch.tensor, point)))
    np.testing.assert_array_equal(dense(Mask.trace(mask_mod)), expected)


def same_score(score_mod, tolerance=1e-6):
    b, h, q, k = (i.long() for i in indices())
    score = torch.randn(BATCH, HEADS, Q, K, dtype=torch.float64)
    expected = torch.as_tensor(score_mod(score, b, h, q, k)).expand_as(score).numpy()
    traced = ScoreMod.trace(score_mod)
    assert ScoreMap.parse(traced.text) == traced.ir
    tensors = [t.detach().numpy() for t in traced.tensors]
    found = traced.ir.evaluate(score.numpy(), *(i.numpy() for i in (b, h, q, k)), traced.values, tensors)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


# ---- operators ----

W = 4

MASK_MODS = {
    "compare": lambda b, h, q, k: (q >= k) | (q < 2) | (k > 8) & (q != k),
    "arithmetic": lambda b, h, q, k: 2 * q - k * 3 + 1 <= -(k - 5),
    "reflected": lambda b, h, q, k: (10 - q) > (1 + k),
    "reflected divisions": lambda b, h, q, k: (20 // (q + 1) + 20 % (k + 1)) > 5,
    "floor division": lambda b, h, q, k: (q - k) // 3 == -1,
    "remainder": lambda b, h, q, k: (q - k) % 3 == 2,
    "true division": lambda b, h, q, k: q / 2 > k / 3,
    "power": lambda b, h, q, k: q**2 > k**3,
    "shifts": lambda b, h, q, k: (q << 1) > (k >> 1) + (1 << (q % 4)),
    "bits": lambda b, h, q, k: (q & k) == 0,
    "more bits": lambda b, h, q, k: ((q | 3) ^ k) < ~(-q - 2),
    "logic": lambda b, h, q, k: ~(q > k) ^ (k > 3),
    "abs": lambda b, h, q, k: abs(q - k) <= W,
    "python min of numbers": lambda b, h, q, k: q - k < min(W, 3),
    "batch and head": lambda b, h, q, k: (b == 0) | (h * 2 + b <= q),
    "truth values add": lambda b, h, q, k: (q > 3) + (k > 3),
    "truth values multiply": lambda b, h, q, k: (q > 3) * (k > 3),
    "truth values compare": lambda b, h, q, k: (q > 3) == (k > 5),
    "truth values count": lambda b, h, q, k: (q > 3) * 1 + (k > 5) + (q > k) > 1,
    "float compare": lambda b, h, q, k: q < 0.5 * k + 1.25,
    "float division": lambda b, h, q, k: (q * 1.5) // 2.0 == k % 2.5,
    "constant": lambda b, h, q, k: True,
    "where": lambda b, h, q, k: torch.where(q > 4, k < 3, k >= q),
    "where of numbers": lambda b, h, q, k: torch.where(q > k, q - k, 2 * (k - q)) < 5,
    "torch.abs": lambda b, h, q, k: torch.abs(q - k) < 3,
    "minimum, maximum": lambda b, h, q, k: torch.minimum(q, k) + 2 > torch.maximum(q, k),
    "clamp": lambda b, h, q, k: torch.clamp(q - k, 0, 3) == torch.clamp(k - q, min=-1, max=2),
    "logical": lambda b, h, q, k: torch.logical_and(
        torch.logical_or(q > 3, k > 3), torch.logical_not(torch.logical_xor(q > k, k > 5))
    ),
    "torch comparisons": lambda b, h, q, k: torch.eq(q, k) | torch.lt(q, 2) | torch.ge(k, 9) | torch.ne(q, q),
    "torch arithmetic": lambda b, h, q, k: (
        torch.add(q, k, alpha=2) > torch.sub(torch.mul(q, 3), torch.neg(k))
    ),
    "floor_divide, remainder": lambda b, h, q, k: torch.floor_divide(q - k, 2) < torch.remainder(q - k, 3),
    "div": lambda b, h, q, k: (
        torch.div(q - k, 2, rounding_mode="floor") < torch.div(q - k, 3, rounding_mode="trunc")
    ),
    "fmod": lambda b, h, q, k: torch.fmod(q - k, 3) == -1,
    "bitwise": lambda b, h, q, k: torch.bitwise_and(q, k) < torch.bitwise_xor(torch.bitwise_or(q, 1), k),
    "bitwise shifts": lambda b, h, q, k: torch.bitwise_left_shift(q, 2) > torch.bitwise_right_shift(k, 1),
    "sign, square": lambda b, h, q, k: torch.sign(q - k) * torch.square(q) > k,
    "sqrt, floor": lambda b, h, q, k: torch.floor(torch.sqrt(q.float() + 0.5)) == torch.ceil(k / 3.7),
    "methods": lambda b, h, q, k: (q - k).abs().clamp(max=4).le(3).logical_and(k.ne(2)),
    "method where": lambda b, h, q, k: q.where(q > k, k) > 4,
    "conversions": lambda b, h, q, k: (q > 4).to(torch.int64) + (k > 4).int() == (q.float() / 5).long(),
    "to bool": lambda b, h, q, k: (q % 3).bool() & (k % 2).to(torch.bool),
    "in place": lambda b, h, q, k: operator.ior(operator.iand(q > k, k > 3), q == k),
    "new tensors": lambda b, h, q, k: b.new_ones((), dtype=torch.bool) & (q + torch.zeros_like(q) >= k),
    "keywords": lambda b, h, q, k: torch.where(condition=q > k, input=q, other=k) > 5,
    "numpy functions": lambda b, h, q, k: np.logical_or(np.abs(q - k) < 2, np.maximum(q, k) > 8),
    "real tensor constant": lambda b, h, q, k: (torch.tensor(3) < q) & (k < torch.zeros(()) + 7),
}


@pytest.mark.parametrize("name", MASK_MODS)
def test_mask_mod_is_what_torch_computes(name):
    same_as_torch(MASK_MODS[name])


SCORE_MODS = {
    "unchanged": lambda s, b, h, q, k: s,
    "constant": lambda s, b, h, q, k: 1.5,
    "bias of indices": lambda s, b, h, q, k: s + (q - k) * 0.25 + b,
    "alibi": lambda s, b, h, q, k: s - 2 ** (-8 * (h + 1) / HEADS) * (q - k).abs(),
    "exp2": lambda s, b, h, q, k: s + torch.exp2(-((h + 1) * 8.0 / HEADS)) * (k - q),
    "soft cap": lambda s, b, h, q, k: 20.0 * torch.tanh(s / 20.0),
    "causal": lambda s, b, h, q, k: torch.where(q >= k, s, -1e9),
    "sin, cos, tan": lambda s, b, h, q, k: torch.sin(s) * torch.cos(q * 0.1) + torch.tan(s * 0.1),
    "exp, log": lambda s, b, h, q, k: torch.exp(s * 0.5) + torch.log(1 + k) + torch.log2(q + 1.5),
    "log10": lambda s, b, h, q, k: torch.log10(s * s + 1),
    "roots": lambda s, b, h, q, k: torch.sqrt(abs(s)) + torch.rsqrt(q + 1.0) + (k + 1) ** 0.5,
    "powers": lambda s, b, h, q, k: s**2 - torch.pow(s, 3) + (abs(s) + 1) ** -0.7 + (k + 1.0) ** -1,
    "sigmoid": lambda s, b, h, q, k: torch.sigmoid(s) * s.sigmoid() + torch.special.expit(s),
    "elu, softplus": lambda s, b, h, q, k: torch.nn.functional.elu(s, 0.5) + torch.nn.functional.softplus(s),
    "relu, silu": lambda s, b, h, q, k: torch.relu(s) ** 2 + torch.nn.functional.silu(s),
    "rounding": lambda s, b, h, q, k: torch.floor(s) + torch.ceil(s) - torch.trunc(s * 3) + torch.sign(s),
    "floor of floats": lambda s, b, h, q, k: s // 0.5 + s % 0.75,
    "erf": lambda s, b, h, q, k: torch.erf(s) + torch.reciprocal(s * s + 1),
    "clamp": lambda s, b, h, q, k: s.clamp(-1.0, 1.0) + torch.maximum(s, s.new_zeros(())),
    "masked_fill": lambda s, b, h, q, k: s.masked_fill(q < k, -3.0),
    "truth value times score": lambda s, b, h, q, k: s * (q >= k) + (q > 3),
}


@pytest.mark.parametrize("name", SCORE_MODS)
def test_score_mod_is_what_torch_computes(name):
    same_score(SCORE_MODS[name])


def test_score_of_captured_tensors():
    bias, slope, offset = torch.randn(HEADS, 300), torch.randn(HEADS), torch.tensor(0.5)
    same_score(lambda s, b, h, q, k: s + bias[h, q - k + 100] + slope[h] * (k - q) + offset)
    same_score(lambda s, b, h, q, k: s + torch.where(bias[h, q] > 0, bias[h, k], bias[h, -1]))


def test_divmod():
    traced = Mask.trace(lambda b, h, q, k: operator.eq(*divmod(q + k, 4)))
    assert traced == Mask.trace(lambda b, h, q, k: (q + k) // 4 == (q + k) % 4)
    assert Mask.trace(lambda b, h, q, k: divmod(20, q + 1)[1] > k) != traced


# Random expressions, written once and run by torch and by us.

LEAVES = st.sampled_from(["q", "k", "b", "h", "3", "1", "7", "W"])


def combine(children):
    pair = st.tuples(children, children)
    return st.one_of(
        st.tuples(st.sampled_from(["+", "-", "*"]), pair).map(lambda t: f"({t[1][0]} {t[0]} {t[1][1]})"),
        st.tuples(st.sampled_from(["//", "%"]), children, st.integers(1, 5)).map(
            lambda t: f"({t[1]} {t[0]} {t[2]})"
        ),
        pair.map(lambda t: f"torch.minimum(zero + {t[0]}, zero + {t[1]})"),
        st.tuples(children, children, children).map(
            lambda t: f"torch.where(zero + {t[0]} > {t[1]}, zero + {t[2]}, zero + {t[1]})"
        ),
        children.map(lambda t: f"abs({t})"),
        st.tuples(children, st.integers(0, 15)).map(lambda t: f"({t[0]} & {t[1]})"),
    )


ARITHMETIC = st.recursive(LEAVES, combine, max_leaves=6)
ATOMS = st.tuples(ARITHMETIC, st.sampled_from(["<", "<=", "==", "!=", ">", ">="]), ARITHMETIC).map(
    lambda t: f"(zero + {t[0]} {t[1]} {t[2]})"
)
PREDICATES = st.recursive(
    ATOMS,
    lambda c: st.one_of(
        st.tuples(c, st.sampled_from("&|^"), c).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        c.map(lambda t: f"(~{t})"),
    ),
    max_leaves=4,
)


@settings(max_examples=80, deadline=None)
@given(PREDICATES, st.integers(1, 6))
def test_random_predicates(text, width):
    scope = {"torch": torch, "W": width}
    exec(f"def mask_mod(b, h, q, k):\n    zero = q - q\n    return {text}", scope)
    same_as_torch(scope["mask_mod"])
    mask = Mask.trace(scope["mask_mod"])
    again = Mask.from_ir(IRMask.parse(mask.text), mask.values)
    np.testing.assert_array_equal(dense(again), dense(mask))


# ---- what is captured ----


def window(width):
    def mask_mod(b, h, q, k):
        return abs(q - k) <= width

    return mask_mod


def test_an_integer_that_is_only_compared_is_a_parameter():
    assert Mask.trace(window(3)).key == Mask.trace(window(30)).key
    assert Mask.trace(window(30)).values == (30,)
    same_as_torch(window(3))


def test_an_integer_that_divides_is_a_number():
    def blocks(size):
        return lambda b, h, q, k: (q // size == k // size) & (k >= size)

    assert Mask.trace(blocks(3)).key != Mask.trace(blocks(4)).key
    assert Mask.trace(blocks(3)).values == ()
    assert repr(Mask.trace(blocks(3))) == "Mask(((q // 3) == (k // 3)) and (k >= 3))"
    same_as_torch(blocks(3))


def test_arithmetic_of_integers_alone_is_done_at_each_call():
    def half(width, left):
        return lambda b, h, q, k: (abs(q - k) <= width // 2) & (q - k <= 2 * left - 1)

    mask = Mask.trace(half(9, 3))
    assert mask.values == (4, 3)
    assert mask.key == Mask.trace(half(40, 7)).key
    assert repr(mask) == "Mask((abs(q - k) <= p0) and (q - k <= (2 * p1) - 1), p0=4, p1=3)"


def test_python_decisions_on_integers_are_part_of_the_key():
    def maybe(flag, size, names):
        def mask_mod(b, h, q, k):
            mask = q >= k
            if flag:
                mask = mask & (q - k < size)
            if size > 10:
                mask = mask | (k == 0)
            for i in range(names["sinks"]):
                mask = mask | (k == i)
            return mask

        return mask_mod

    for flag, size, sinks in [(True, 4, 0), (False, 4, 2), (True, 20, 1)]:
        same_as_torch(maybe(flag, size, {"sinks": sinks}))
    key = Mask.trace(maybe(True, 4, {"sinks": 0})).key
    assert Mask.trace(maybe(True, 5, {"sinks": 0})).key == key
    assert Mask.trace(maybe(True, 11, {"sinks": 0})).key != key
    assert Mask.trace(maybe(True, 4, {"sinks": 1})).key != key


@pytest.mark.parametrize("compare", [operator.lt, operator.le, operator.gt, operator.ge, operator.eq])
@pytest.mark.parametrize("width", [5, 6, -3])
def test_half_an_integer_is_still_a_parameter(compare, width):
    def by(width):
        return lambda b, h, q, k: compare(q - k, width / 2) | compare(width / 2 + 1, k)

    same_as_torch(by(width))
    if compare is not operator.eq:
        assert Mask.trace(by(width)).ir.exact
        assert Mask.trace(by(width)).key == Mask.trace(by(width + 2)).key
    same_as_torch(lambda b, h, q, k: compare(2.5, q) | compare(k, 3.0))


GLOBAL_WIDTH = 3


def uses_global(b, h, q, k):
    return abs(q - k) <= GLOBAL_WIDTH


def test_globals_are_read_at_each_trace(monkeypatch):
    first = Mask.trace(uses_global)
    monkeypatch.setattr(sys.modules[__name__], "GLOBAL_WIDTH", 5)
    second = Mask.trace(uses_global)
    assert (first.values, second.values) == ((3,), (5,))
    assert first.key == second.key


@dataclass
class Window:
    left: int
    table: torch.Tensor

    @property
    def right(self):
        return self.left - 1

    def near(self, q, k):
        return (q - k <= self.left) & (k - q <= self.right)

    def __call__(self, b, h, q, k):
        return self.near(q, k) | (self.table[k] > 2)

    def mask_mod(self, b, h, q, k):
        return self(b, h, q, k)


def test_objects_methods_and_partials():
    table = torch.arange(K)
    same_as_torch(Window(3, table))
    same_as_torch(Window(3, table).mask_mod)
    assert Mask.trace(Window(3, table)).key == Mask.trace(Window(5, table)).key
    assert Mask.trace(Window(3, table)).values == (3, 2)
    same_as_torch(functools.partial(lambda width, b, h, q, k: q - k < width, 3))
    same_as_torch(functools.partial(lambda b, h, q, k, *, width: q - k < width, width=3))
    same_as_torch(lambda b, h, q, k, width=3, tables=(table, table + 1): tables[1][q] - k < width)


def test_object_that_changes_is_read_again():
    window = Window(3, torch.zeros(K))
    assert Mask.trace(window).values == (3, 2)
    window.left = 7
    assert Mask.trace(window).values == (7, 6)


def test_what_is_out_of_sight_is_traced_each_time():
    config, order = OrderedDict(width=3), deque([2, 4])

    def looks_around(b, h, q, k):
        extra = getattr(holder, "extra", 0)
        return (q - k < config.get("width") + extra) & (k != next(iter(order)))

    class Holder:
        pass

    holder = Holder()
    same_as_torch(looks_around)
    config["width"] = 5
    same_as_torch(looks_around)
    holder.extra = 2
    same_as_torch(looks_around)
    order.rotate()
    same_as_torch(looks_around)


def shadowed(b, h, q, k):
    return abs(q - k) < 3


def test_a_global_may_come_to_hide_a_builtin(monkeypatch):
    same_as_torch(shadowed)
    monkeypatch.setitem(globals(), "abs", lambda x: x)
    same_as_torch(shadowed)


def test_cached_helpers_and_strings():
    @functools.lru_cache
    def near(width, q, k):
        return q - k < width

    modes = {"mode": "near"}

    def by_mode(b, h, q, k):
        return near(W, q, k) if modes["mode"] == "near" and W != "auto" else q > k

    same_as_torch(by_mode)
    modes["mode"] = "far"
    same_as_torch(by_mode)
    assert Mask.trace(lambda b, h, q, k: near(3, q, k)).values == ()


def test_nested_functions_and_pytorch_combinators():
    near, late = window(2), lambda b, h, q, k: k > W
    same_as_torch(and_masks(near, or_masks(late, uses_global)))
    same_as_torch(or_masks(and_masks(late, noop_mask), near))
    assert Mask.trace(and_masks(near, late)).key == Mask.trace(and_masks(window(9), late)).key
    assert repr(Mask.trace(noop_mask)) == "Mask(true)"


def test_neighborhood_as_people_write_it():
    def natten(width, height, kernel):
        def position(i):
            return i // width, i % width

        def mask_mod(b, h, q_idx, kv_idx):
            (q_x, q_y), (k_x, k_y) = position(q_idx), position(kv_idx)
            x = q_x.clamp(kernel // 2, (height - 1) - kernel // 2)
            y = q_y.clamp(kernel // 2, (width - 1) - kernel // 2)
            return ((x - k_x).abs() <= kernel // 2) & ((y - k_y).abs() <= kernel // 2)

        mask_mod.__name__ = f"natten_{width}x{height}"
        return mask_mod

    same_as_torch(natten(4, 3, 3))
    assert Mask.trace(natten(4, 3, 3)) == masks.neighborhood((3, 4), (3, 3))
    assert Mask.trace(natten(4, 3, 3)).values == (1, 3)


def test_documents_as_people_write_them():
    def packed(inner, offsets):
        document = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())

        def mask_mod(b, h, q_idx, kv_idx):
            q, k = (i - offsets[document[i]] for i in (q_idx, kv_idx))
            return (document[q_idx] == document[kv_idx]) & inner(b, h, q, k)

        return mask_mod

    same_as_torch(packed(lambda b, h, q, k: q >= k, torch.tensor([0, 3, 7, 12])))


def test_module_and_what_its_lists_hold():
    class Bias(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.slopes = torch.nn.Embedding(2, HEADS)
            self.rows = torch.nn.ParameterList([torch.randn(Q), torch.randn(K)])
            self.width = 4
            self.double().requires_grad_(False)

        def forward(self, score, b, h, q, k):
            for row, i in zip(self.rows, (q, k), strict=True):
                score = score + row[i]
            return score * torch.where(q - k < self.width, self.slopes.weight[1, h], 0.5)

    same_score(Bias())
    assert ScoreMod.trace(Bias().forward).key == ScoreMod.trace(Bias()).key


def test_several_values_at_once():
    shifts = [1, 2, 5]
    same_as_torch(lambda b, h, q, k: functools.reduce(operator.or_, [q - k == s for s in shifts]))
    same_as_torch(lambda b, h, q, k: functools.reduce(torch.logical_or, (q == s for s in shifts)))
    same_as_torch(lambda b, h, q, k: sum((q == s).int() for s in shifts) > 0)
    assert Mask.trace(lambda b, h, q, k: (q == shifts[0]) | (k == shifts[2])).values == (1, 5)


def test_compiled_mask_mod():
    compiled = functools.wraps(window(4))(lambda *args: pytest.fail("the wrapper runs"))
    compiled._torchdynamo_orig_callable = window(4)  # as torch.compile leaves it
    assert Mask.trace(compiled).values == (4,)


def test_one_variable_seen_twice_is_one_parameter():
    width = 3

    def left(q, k):
        return q - k <= width

    assert Mask.trace(lambda b, h, q, k: left(q, k) & (k - q <= width)).values == (3,)


def test_captured_tensors():
    doc = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 3])
    table = torch.rand(HEADS, 3, 3) < 0.5
    slash, limit = torch.rand(40) < 0.5, torch.tensor(4)
    same_as_torch(lambda b, h, q, k: doc[q] == doc[k])
    same_as_torch(lambda b, h, q, k: table[h, q // 4, k // 4])
    same_as_torch(lambda b, h, q, k: slash[(q - k).abs()] & (q < limit))
    same_point_by_point(lambda b, h, q, k: table[h][q // 4][k // 4] | table[..., 0][h, -1])
    same_point_by_point(lambda b, h, q, k: table[:, q // 4][h, k // 4] & (limit + 1 > q))
    same_as_torch(lambda b, h, q, k: (doc[doc[q]] > 0) | (k >= doc.shape[0] - 4))
    same_as_torch(lambda b, h, q, k: torch.rand(1)[0] < 2 if len(doc) == 12 else q < 0)


def test_tensor_without_dimensions():
    limit = torch.tensor(4)
    mask = Mask.trace(lambda b, h, q, k: q < limit)
    assert mask == Mask.trace(lambda b, h, q, k: q < limit)
    limit += 2
    assert mask.to_dense(Q, K).sum() == 6 * K
    assert IRMask.parse(mask.text) == mask.ir


def test_numpy_tensor():
    doc = np.array([0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 3])
    mask = Mask.trace(lambda b, h, q, k: doc[q] == doc[k])
    np.testing.assert_array_equal(mask.to_dense(9, 11), doc[:9, None] == doc[:11])


def test_contents_of_tensors_are_never_baked():
    doc = torch.zeros(K, dtype=torch.int64)

    def mask_mod(b, h, q, k):
        return doc[q] == doc[k]

    before = Mask.trace(mask_mod)
    doc[3:] = 1
    np.testing.assert_array_equal(dense(before), dense(Mask.trace(mask_mod)))
    assert not before.to_dense(Q, K).all()
    assert before.tensors[0] is doc


def test_key_holds_dtype_and_rank_but_not_size():
    def by(table):
        return lambda b, h, q, k: table[q] == table[k]

    key = Mask.trace(by(torch.arange(4))).key
    assert key == Mask.trace(by(torch.arange(40))).key
    assert key != Mask.trace(by(torch.arange(4).int())).key


def test_tensors_that_coincide_once_need_not_the_next_time():
    def two(a, c):
        return lambda b, h, q, k: a[q] == c[k]

    x, y = torch.arange(12), torch.arange(12) % 4
    assert len(Mask.trace(two(x, x)).tensors) == 1
    assert len(Mask.trace(two(x, y)).tensors) == 2
    same_as_torch(two(x, y))
    same_as_torch(two(x, x))


def test_functions_that_differ_only_in_what_they_call():
    def outer(inner):
        return lambda b, h, q, k: inner(q, k)

    same_as_torch(outer(lambda q, k: q > k))
    same_as_torch(outer(lambda q, k: q < k))
    same_as_torch(outer(torch.lt))
    same_as_torch(outer(torch.gt))


def test_numbers_of_another_type():
    def by(number):
        return lambda b, h, q, k: q * number > k

    for number in (1, 1.5, True, np.int64(2), np.float32(0.5), 1):
        same_as_torch(by(number))
    assert Mask.trace(by(1)).key != Mask.trace(by(1.0)).key


def test_a_second_trace_does_not_run_the_function():
    calls = []

    def make(width):
        def mask_mod(b, h, q, k):
            calls.append(width)
            return q - k < width

        return mask_mod

    # what has side effects on captured objects runs on a copy: `calls` outside stays empty
    Mask.trace(make(3))
    assert calls == []
    key = next(k for k in tracing._MEMO if k[2] is make(0).__code__)
    (recorded,) = tracing._MEMO[key]
    assert Mask.trace(make(4)).values == (4,)
    assert tracing._MEMO[key] == (recorded,)


def test_keys_agree_between_processes(tmp_path):
    code = """
import sys, types
torch_like = types.SimpleNamespace(shape=(5,), dtype="int32", __getitem__=None)
from gossamer.frontend.trace.function import trace_mask
width, size = 5, 4
def near(q, k): return abs(q - k) <= width
traced = trace_mask(lambda b, h, q, k: near(q, k) & (q // size == k // size))
print(traced.term, traced.values, sorted({"sympy", "islpy", "torch", "numpy"} & set(sys.modules)))
"""
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
        ).stdout
        for _ in range(2)
    }
    (printed,) = runs
    assert printed.endswith("(5,) []\n")


# ---- what is refused ----


def branches(b, h, q_idx, kv_idx):
    if q_idx > 3:
        return kv_idx < 2
    return q_idx >= kv_idx


def calls_item(b, h, q_idx, kv_idx):
    return q_idx.item() > 3


def uses_and(b, h, q_idx, kv_idx):
    return q_idx > 3 and kv_idx < 2


def chains(b, h, q_idx, kv_idx):
    return 0 <= q_idx < 3


def sums(b, h, q_idx, kv_idx):
    return torch.cumsum(q_idx, 0) > 3


def divides(b, h, q_idx, kv_idx):
    return q_idx // (W - 4) > 3


def loops(b, h, q_idx, kv_idx):
    return sum(i for i in range(q_idx)) > 3


def raises(b, h, q_idx, kv_idx):
    return [1, 2][W] > q_idx


DOC = torch.arange(4)


def whole_tensor(b, h, q_idx, kv_idx):
    return (DOC + 1)[q_idx] > 0


def reads_content(b, h, q_idx, kv_idx):
    return q_idx < DOC[0].item()


def branches_on_tensor(b, h, q_idx, kv_idx):
    return q_idx < 3 if DOC.max() > 2 else kv_idx < 3


def too_many(b, h, q_idx, kv_idx):
    return DOC[q_idx, kv_idx] > 0


def by_float(b, h, q_idx, kv_idx):
    return DOC[q_idx / 2] > 0


def doubles(b, h, q_idx, kv_idx):
    for _ in range(20):
        q_idx = q_idx ^ (q_idx >> 3)
    return q_idx > kv_idx


class Stateful:
    count = 0

    def __call__(self, b, h, q_idx, kv_idx):
        self.count = self.count + 1
        return q_idx > self.count


@pytest.mark.parametrize(
    ("mask_mod", "message", "line"),
    [
        (branches, "branches on an index.*torch.where.*& | ~", "if q_idx > 3:"),
        (calls_item, r"calls .item\(\)", "q_idx.item() > 3"),
        (uses_and, "branches on an index.*'and'", "q_idx > 3 and"),
        (chains, "chained comparisons", "0 <= q_idx < 3"),
        (sums, r"calls cumsum\(\), which cannot be captured. What can: abs, ", "torch.cumsum(q_idx, 0)"),
        (divides, "divides by zero", "q_idx // (W - 4)"),
        (loops, "needs an index as a Python integer", "range(q_idx)"),
        (raises, "raised IndexError: list index out of range", "[1, 2][W]"),
        (whole_tensor, r"whole captured tensor of shape \(4,\).*Index it", "DOC + 1"),
        (reads_content, r"calls .item\(\)", "DOC[0].item()"),
        (branches_on_tensor, "uses .max of a whole captured tensor", "DOC.max()"),
        (too_many, "expected at most 1; got 2", "DOC[q_idx, kv_idx]"),
        (by_float, "by a float; expected an integer", "DOC[q_idx / 2]"),
        (doubles, "operations, expected at most 20000", "def doubles"),
        (Stateful(), "assigns .count", "self.count = "),
        (lambda b, h, q, k: q - k, "returns an integer; expected a truth value", "lambda b, h, q, k: q - k"),
        (lambda b, h, q, k: None, "returns None; expected a truth value", "None"),
        (lambda b, h, q, k: (q, k), "returns tuple; expected a truth value", "(q, k)"),
        (lambda h, q, k: q > k, r"expects 4 arguments \(b, h, q_idx, kv_idx\); it takes 3", "lambda h"),
        (lambda b, h, q, k: (q > k) - (k > 3), "subtracts truth values", "(q > k) -"),
        (lambda b, h, q, k: torch.where(q, k, 1) > 0, "where expects a truth value", "torch.where(q"),
        (lambda b, h, q, k: (q * 0.5) & 1, "expect truth values or integers; got a float", "& 1"),
        (lambda b, h, q, k: q in (1, 2), "branches on an index", "q in (1, 2)"),
        (lambda b, h, q, k: torch.arange(5) > q, r"got Tensor of shape \(5,\)", "torch.arange(5)"),
    ],
)
def test_refused_at_the_users_line(mask_mod, message, line):
    with pytest.raises(TraceError, match=re.compile(message, re.DOTALL)) as refused:
        Mask.trace(mask_mod)
    place, _, quoted = str(refused.value).partition("\n")
    assert re.match(re.escape(__file__) + r":\d+: mask_mod", place)
    assert line in quoted


def test_error_underlines_the_expression():
    with pytest.raises(TraceError) as refused:
        Mask.trace(branches)
    *_, source, marks = str(refused.value).splitlines()
    assert source == "    if q_idx > 3:"
    assert marks == "       ^^^^^^^^^"


def test_what_cannot_be_called():
    with pytest.raises(TraceError, match="expected a function; got int"):
        Mask.trace(3)
    with pytest.raises(TraceError, match=r"captures a tensor of torch\.complex64"):
        Mask.trace(functools.partial(lambda t, b, h, q, k: t[q] == 0, torch.zeros(3, dtype=torch.complex64)))


def test_score_mod_refused():
    with pytest.raises(TraceError, match=r"score_mod expects 5 arguments .*; it takes 4"):
        ScoreMod.trace(lambda score, b, h, q: score)
    with pytest.raises(TraceError, match="score_mod returns a truth value; expected a float"):
        ScoreMod.trace(lambda score, b, h, q, k: score > 0)
    with pytest.raises(TraceError, match="score_mod branches on an index"):
        ScoreMod.trace(lambda score, b, h, q, k: score if q > k else 0.0)


# ---- score maps ----


def test_numbers_of_a_score_mod_are_parameters():
    def capped(cap, width):
        return lambda score, b, h, q, k: torch.where(q - k < width, cap * torch.tanh(score / cap), -1e9)

    first, second = ScoreMod.trace(capped(20.0, 4)), ScoreMod.trace(capped(30.0, 5))
    assert first.key == second.key
    assert (first.values, first.kinds) == ((4, 20.0), ("int", "float"))
    assert ScoreMod.trace(capped(20, 4)).key != first.key
    assert ScoreMod.of(None) is None
    assert ScoreMod.of(first) is first
    same_score(capped(20.0, 4))


def test_score_map_text():
    text = "score(s0: float, s1: int; t0: f32[2]) { score * s0 + t0[h, q + s1] }"
    score_map = ScoreMap.parse(text)
    assert ScoreMap.parse(score_map.to_text()) == score_map
    assert score_map.params == (("s0", "float"), ("s1", "int"))
    assert score_map.captures == (Capture("t0", "f32", 2),)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("score { score }", ParseError, "expected score"),
        ("score(s0) { score }", ParseError, "a param like s0: float; got 's0'"),
        ("score(; t0) { score }", ParseError, "a capture like"),
        ("score() { score + x }", ParseError, "unknown name 'x'"),
        ("score(s0: bool) { score }", VerifyError, "an int or a float; got s0: bool"),
        ("score(q: int) { score }", VerifyError, "distinct"),
        ("score() { score > 0 }", VerifyError, "gives a number"),
        ("score(; t0: f32[2]) { score + t0[h] }", VerifyError, "with 1 indices"),
        ("score(; t0: f99[1]) { score }", VerifyError, "dtype"),
    ],
)
def test_score_map_refused(text, error, message):
    with pytest.raises(error, match=message):
        ScoreMap.parse(text)


def test_score_map_values_refused():
    score_map = ScoreMap.parse("score(s0: float; t0: f32[1]) { score * s0 + t0[q] }")
    with pytest.raises(InputError, match="1 numbers"):
        score_map.evaluate(1.0, 0, 0, 0, 0, (), (np.ones(2),))
    with pytest.raises(InputError, match="ranks"):
        score_map.evaluate(1.0, 0, 0, 0, 0, (1.0,), (np.ones((2, 2)),))
    with pytest.raises(InputError, match="dimension 0 is read at 5"):
        score_map.evaluate(1.0, 0, 0, 5, 0, (1.0,), (np.ones(2),))
    with pytest.raises(VerifyError, match="its params or its captures; got s9"):
        ScoreMap(real("score") + real("s9"))
