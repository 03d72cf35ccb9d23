"""What routers have in common: logits, the scores of all experts, and how these change with the logits.

    L [i, e]    logits of the tokens `token` [i]: loaded, or cosines of features with a vector an expert
    P [i, e]    scores; of 'levels' p [i, g] * q [i, e]: that of the group, and that within it

Cosines are Tutel's: features and vectors are divided by their lengths, or 1e-12 if that is more, and cosines
multiplied by exp(min(temperature, log 100)).
"""

from __future__ import annotations

import math

import sympy

from ...ir.derivative import derivative
from ...ir.expr import (
    Expr,
    all_of,
    bitand,
    cast,
    floordiv,
    integer,
    maximum,
    minimum,
    random_bits,
    real,
    where,
)
from ...ir.expr import sigmoid as sigmoid_of
from ...ir.kernel import Axis, Compute, Dot, For, Load, Reduce, Scalar, Span, Stmt, Tensor
from .router_spec import RouterSpec

ZERO, NONE, MINUS_INF = sympy.Integer(0), sympy.Float(0.0), -sympy.oo
TOKEN, E_AXIS, G, D = map(integer, ("token", "e", "g", "d"))
INSIDE = integer("T") > TOKEN
LARGEST = sympy.Float(math.log(100.0))
FEATURES = 32  # at once


def axis(spec: RouterSpec, name: str, extent: int) -> Axis:
    least = 16 if spec.features and name in "ide" else 1  # products want as much
    return Axis(name, extent, extent if spec.is_cpu else max(least, 1 << (extent - 1).bit_length()))


def score_axes(spec: RouterSpec) -> list[Axis]:
    """i, e, and what else scores need."""
    found = [axis(spec, "i", spec.rows), axis(spec, "e", spec.experts)]
    if spec.groups > 1:
        found.insert(1, axis(spec, "g", spec.groups))
    if spec.features:
        found.append(axis(spec, "d", min(FEATURES, spec.features)))
    return found


def score_arguments(spec: RouterSpec) -> list[Tensor | Scalar]:
    e, acc = spec.experts, spec.accumulator
    if spec.features:
        found: list[Tensor | Scalar] = [
            Tensor("logits", spec.logits, ("T", spec.features), unit=1),
            Tensor("vectors", spec.logits, (e, spec.features), unit=1),
            Tensor("temperature", acc, (1,), unit=0),
        ]
    else:
        found = [Tensor("logits", spec.logits, ("T", e), unit=1)]
    if spec.scoring == "levels":
        found.append(Tensor("group_logits", spec.logits, ("T", spec.groups), unit=1))
    found += [Scalar("seed", "i64")] if spec.scoring == "random" else []
    found += [Tensor("token_ids", "i64", ("T",), unit=0)] if spec.hashed else []
    return found


def logits_of(spec: RouterSpec) -> list[Stmt]:
    """L."""
    acc = spec.accumulator
    if not spec.features:
        return [Load("L", acc, ("i", "e"), "logits", (TOKEN, E_AXIS), INSIDE, NONE)]
    step = min(FEATURES, spec.features)
    at = integer("f") * step + D
    here = sympy.true if spec.features % step == 0 else at < spec.features
    product: tuple[Stmt, ...] = (
        Load("X", acc, ("i", "d"), "logits", (TOKEN, at), all_of([INSIDE, here]), NONE),
        Load("V", acc, ("e", "d"), "vectors", (E_AXIS, at), here, NONE),
        Dot("L", acc, ("i", "e"), "X", "V", "d", accumulate=True, declares=False),
        Reduce("xx", acc, ("i",), "sum", real("X") * real("X"), ("d",)),
        Reduce("vv", acc, ("e",), "sum", real("V") * real("V"), ("d",)),
        Compute("x_length", acc, ("i",), real("x_length") + real("xx"), declares=False),
        Compute("v_length", acc, ("e",), real("v_length") + real("vv"), declares=False),
    )
    lengths: list[Expr] = [
        maximum(sympy.sqrt(real(name)), sympy.Float(1e-12)) for name in ("x_length", "v_length")
    ]
    scale = sympy.exp(minimum(real("t"), LARGEST))
    return [
        Compute("L", acc, ("i", "e"), NONE),
        Compute("x_length", acc, ("i",), NONE),
        Compute("v_length", acc, ("e",), NONE),
        For("f", (Span(ZERO, sympy.Integer(-(-spec.features // step))),), product),
        Load("t", acc, (), "temperature", (ZERO,)),
        Compute("L", acc, ("i", "e"), real("L") / (lengths[0] * lengths[1]) * scale, declares=False),
    ]


def scores_of(spec: RouterSpec) -> list[Stmt]:
    """P, where there is L."""
    acc, logits, ie = spec.accumulator, real("L"), ("i", "e")
    match spec.scoring:
        case "softmax":
            return [
                Reduce("peak", acc, ("i",), "max", logits, ("e",)),
                Compute("P", acc, ie, sympy.exp(logits - real("peak"))),
                Reduce("all", acc, ("i",), "sum", real("P"), ("e",)),
                Compute("P", acc, ie, real("P") / real("all"), declares=False),
            ]
        case "sigmoid":
            return [Compute("P", acc, ie, sigmoid_of(logits))]
        case "random":
            return _random(spec)
        case "map":
            return [Compute("P", acc, ie, _mapped(spec).xreplace({real("x0"): logits}))]
        case "levels":
            return _levels(spec)
    return [Compute("P", acc, ie, logits)]


def within(spec: RouterSpec) -> Expr:
    """Whether expert e lies in group g."""
    return sympy.Eq(floordiv(E_AXIS, sympy.Integer(spec.experts // spec.groups)), G)


def of_group(spec: RouterSpec, name: str) -> Reduce:
    """`name`_at [i, e]: what stands in [i, g] for the group of each expert."""
    picked = where(within(spec), real(name), NONE)
    return Reduce(f"{name}_at", spec.accumulator, ("i", "e"), "sum", picked, ("g",))


def _levels(spec: RouterSpec) -> list[Stmt]:
    acc, ig, ie, inner = spec.accumulator, ("i", "g"), ("i", "e"), within(spec)
    group = real("L_g")
    return [
        Load("L_g", acc, ig, "group_logits", (TOKEN, G), INSIDE, NONE),
        Reduce("peak_g", acc, ("i",), "max", group, ("g",)),
        Compute("p", acc, ig, sympy.exp(group - real("peak_g"))),
        Reduce("all_g", acc, ("i",), "sum", real("p"), ("g",)),
        Compute("p", acc, ig, real("p") / real("all_g"), declares=False),
        Reduce("peak", acc, ig, "max", where(inner, real("L"), MINUS_INF), ("e",)),
        of_group(spec, "peak"),
        Compute("q", acc, ie, sympy.exp(real("L") - real("peak_at"))),
        Reduce("all", acc, ig, "sum", where(inner, real("q"), NONE), ("e",)),
        of_group(spec, "all"),
        of_group(spec, "p"),
        Compute("q", acc, ie, real("q") / real("all_at"), declares=False),
        Compute("P", acc, ie, real("q") * real("p_at")),
    ]


def _random(spec: RouterSpec) -> list[Stmt]:
    """Numbers in (0, 1), of 23 random bits each."""
    word, out = TOKEN, []
    if spec.hashed:
        out.append(Load("name", "i32", ("i",), "token_ids", (TOKEN,), INSIDE, ZERO))
        word = integer("name")
    bits = bitand(random_bits(integer("seed"), word, E_AXIS), sympy.Integer(2**23 - 1))
    value = (cast(sympy.Symbol(spec.accumulator), bits) + sympy.Float(0.5)) * sympy.Float(2.0**-23)
    return [*out, Compute("P", spec.accumulator, ("i", "e"), value)]


def _mapped(spec: RouterSpec) -> Expr:
    assert spec.expr is not None
    return sympy.sympify(spec.expr)


def slopes_of(spec: RouterSpec) -> list[Stmt]:
    """DL [i, e], the gradient of L, from DP, that of P; of 'levels' DL_g [i, g] too."""
    acc, ie, ig, dp, p = spec.accumulator, ("i", "e"), ("i", "g"), real("DP"), real("P")
    match spec.scoring:
        case "softmax":
            return [
                Reduce("shared", acc, ("i",), "sum", p * dp, ("e",)),
                Compute("DL", acc, ie, p * (dp - real("shared"))),
            ]
        case "sigmoid":
            return [Compute("DL", acc, ie, p * (1 - p) * dp)]
        case "map":
            slope = derivative(_mapped(spec), real("x0")).xreplace({real("x0"): real("L")})
            return [Compute("DL", acc, ie, slope * dp)]
        case "levels":
            q, p_g = real("q"), real("p")
            return [
                Reduce("dp", acc, ig, "sum", where(within(spec), q * dp, NONE), ("e",)),
                of_group(spec, "dp"),
                Compute("DL", acc, ie, p * (dp - real("dp_at"))),
                Reduce("shared_g", acc, ("i",), "sum", p_g * real("dp"), ("g",)),
                Compute("DL_g", acc, ig, p_g * (real("dp") - real("shared_g"))),
            ]
    return [Compute("DL", acc, ie, dp)]
