"""Score maps and probability maps: what happens to a score before the softmax, to a probability after it.

    map       := word "(" [param ("," param)*] [";" capture ("," capture)*] ")" "{" expression "}"
    word      := "score" | "prob" | "score_grad" | "prob_grad"
    param     := name ":" ("int" | "float")
    capture   := name ":" dtype "[" rank "]"

The expression is a float over `score` (already scaled), the batch `b`, the query head `h`, the indices
`q` and `k`, runtime numbers `s0, s1, ...` and captured tensors `t0, t1, ...`:

    score(s0: float; t0: f32[1]) { score + s0 * (k - q) * t0[h] }

A probability map is the same over `prob`, with numbers `x0, ...` and tensors `w0, ...`. Their gradients,
`score_grad(...)` and `prob_grad(...)`, are expressions of `grad`, the gradient of what the map gives, too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import sympy

from .errors import InputError, InterpretError, ParseError, VerifyError
from .evaluate import evaluate
from .expr import DTYPES, Expr, integer, kind, parse, read, readf, real, to_text, where
from .mask import Capture

INDICES = ("b", "h", "q", "k", "q_offset")
KINDS = ("int", "float")


@dataclass(frozen=True)
class ScoreMap:
    """An expression of the score with its runtime numbers, (name, kind), and captured tensors.

    >>> alibi = ScoreMap.parse("score(; t0: f32[1]) { score + (k - q) * t0[h] }")
    >>> float(alibi.evaluate(1.0, 0, 1, 5, 3, captures=[np.array([1.0, 0.5])]))
    0.0
    """

    word: ClassVar[str] = "score"
    """The first word of the text."""
    arguments: ClassVar[tuple[str, ...]] = ("score",)
    """The names of what is mapped."""

    expr: Expr
    params: tuple[tuple[str, str], ...] = ()
    captures: tuple[Capture, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "expr", sympy.sympify(self.expr))
        object.__setattr__(self, "params", tuple((name, kind) for name, kind in self.params))
        object.__setattr__(self, "captures", tuple(self.captures))
        verify(self)

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self) -> str:
        """Deterministic text; `ScoreMap.parse` reads it back to an equal one."""
        params = ", ".join(f"{name}: {kind}" for name, kind in self.params)
        captures = "; " + ", ".join(map(str, self.captures)) if self.captures else ""
        return f"{self.word}({params}{captures}) {{ {to_text(self.expr)} }}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The map of a text. Raises ParseError when malformed, VerifyError when it breaks a rule."""
        head = _HEAD.fullmatch(text)
        if head is None or head["word"] != cls.word:
            expected = f"{cls.word}(s0: float; t0: f32[1]) {{ expression }}"
            raise ParseError(f"expected {expected}; got {text!r}")
        numbers, _, tensors = head["header"].partition(";")
        params = tuple((name, number) for name, number in _fields(_PARAM, "a param like s0: float", numbers))
        captures = tuple(
            Capture(name, dtype, int(rank))
            for name, dtype, rank in _fields(_CAPTURE, "a capture like t0: f32[1]", tensors)
        )
        names: dict[str, Expr] = {a: real(a) for a in cls.arguments} | {n: integer(n) for n in INDICES}
        names |= {**_symbols(params), **{c.name: c.symbol for c in captures}}
        return cls(parse(head["body"], names), params, captures)

    def evaluate(
        self,
        score: np.ndarray | float,
        b: np.ndarray | int,
        h: np.ndarray | int,
        q: np.ndarray | int,
        k: np.ndarray | int,
        params: Sequence[int | float] = (),
        captures: Sequence[np.ndarray] = (),
        *,
        floats: type = np.float64,
        grad: np.ndarray | float = 0.0,
    ) -> np.ndarray:
        """The mapped values, of the shape to which all arguments broadcast, computed in `floats`.

        grad: of a gradient, the gradient of what the map gives.

        Raises InputError when the values do not fit params and captures, or when a captured tensor is
        read outside its bounds at a point that is asked for.
        """
        if len(params) != len(self.params):
            names = ", ".join(name for name, _ in self.params)
            raise InputError(f"{self.word} map", f"{len(self.params)} numbers for ({names})", tuple(params))
        ranks = tuple(np.ndim(a) for a in captures)
        if ranks != tuple(c.rank for c in self.captures):
            expected = f"tensors for ({', '.join(map(str, self.captures))})"
            raise InputError(f"{self.word} map", expected, f"ranks {ranks}")
        values: dict[str, Any] = {"b": b, "h": h, "q": q, "k": k}
        given = zip(self.arguments, (score, grad), strict=False)
        values |= {name: np.asarray(value, floats) for name, value in given}
        for (name, number), value in zip(self.params, params, strict=True):
            values[name] = floats(value) if number == "float" else int(value)
        values |= {c.name: a for c, a in zip(self.captures, captures, strict=True)}
        try:
            found = evaluate(self.expr, values, floats=floats)
        except InterpretError as error:
            expected = "captured tensors that cover every index read from them"
            raise InputError(f"{self.word} map", expected, str(error)) from None
        shape = np.broadcast_shapes(*(np.shape(v) for v in (score, b, h, q, k)))
        return np.broadcast_to(np.asarray(found, floats), shape)


@dataclass(frozen=True)
class ProbMap(ScoreMap):
    """An expression of a probability, `prob`, of the pair's indices, runtime numbers and captured tensors.

    >>> half = ProbMap.parse("prob(x0: float) { where(k < q, prob * x0, prob) }")
    >>> float(half.evaluate(0.25, 0, 0, 5, 3, params=[0.5]))
    0.125
    """

    word: ClassVar[str] = "prob"
    arguments: ClassVar[tuple[str, ...]] = ("prob",)

    @property
    def is_linear(self) -> bool:
        """Whether map(c * prob) == c * map(prob) for every c, so that it may run before a normalisation.

        >>> ProbMap.parse("prob() { max(prob - 0.1, 0) }").is_linear
        False
        """
        return _is_linear(self.expr, real(self.arguments[0]))


@dataclass(frozen=True)
class ScoreGrad(ScoreMap):
    """What a gradient `grad` of a mapped score becomes, for the score or for what the map reads.

    >>> ScoreGrad.parse("score_grad(s0: float) { grad * (1 - tanh(score / s0) ** 2) }").word
    'score_grad'
    """

    word: ClassVar[str] = "score_grad"
    arguments: ClassVar[tuple[str, ...]] = ("score", "grad")


@dataclass(frozen=True)
class ProbGrad(ScoreMap):
    """Likewise of a mapped probability."""

    word: ClassVar[str] = "prob_grad"
    arguments: ClassVar[tuple[str, ...]] = ("prob", "grad")


def _is_linear(expr: Expr, x: Expr) -> bool:
    """Whether an expression is x times something free of x: sums, products with what is free, choices."""
    if expr in (x, sympy.S.Zero) or expr == 0.0:
        return True
    if isinstance(expr, sympy.Add):
        return all(_is_linear(a, x) for a in expr.args)
    if isinstance(expr, sympy.Mul):
        [*bound] = (a for a in expr.args if a.has(x))
        return len(bound) == 1 and _is_linear(bound[0], x)
    if isinstance(expr, where):
        condition, yes, no = expr.args
        return not condition.has(x) and _is_linear(yes, x) and _is_linear(no, x)
    return False


def verify(score_map: ScoreMap) -> None:
    """Check the rules of this level; raise VerifyError naming the first one broken."""
    arguments = ", ".join(score_map.arguments)
    what = f"a {score_map.word} map"
    names = [*(n for n, _ in score_map.params), *(c.name for c in score_map.captures)]
    taken = {*INDICES, *score_map.arguments}
    if len({*names, *taken}) != len(names) + len(taken):
        raise VerifyError(
            f"names of {what} are distinct and none of {arguments}, b, h, q, k; got {', '.join(names)}"
        )
    for name, number in score_map.params:
        if number not in KINDS:
            raise VerifyError(f"a param of {what} is an int or a float; got {name}: {number}")
    for c in score_map.captures:
        if c.dtype not in DTYPES or c.rank < 0:
            raise VerifyError(
                f"a capture has a dtype of {', '.join(DTYPES)} and a rank of at least 0; got {c}"
            )
    if kind(score_map.expr) == "bool":
        raise VerifyError(f"{what} gives a number; got the truth value {to_text(score_map.expr)}")
    captures: dict[Expr, Capture] = {c.symbol: c for c in score_map.captures}
    for r in score_map.expr.atoms(read, readf):
        c = captures.get(r.args[0])
        if c is None:
            raise VerifyError(f"{to_text(r)} reads a tensor that {what} does not declare with this kind")
        if len(r.args) - 1 != c.rank:
            raise VerifyError(f"{to_text(r)} reads {c} with {len(r.args) - 1} indices")
    known = {
        *map(real, score_map.arguments),
        *map(integer, INDICES),
        *captures,
        *_symbols(score_map.params).values(),
    }
    unknown = score_map.expr.free_symbols - known - {sympy.Symbol(d) for d in DTYPES}
    if unknown:
        raise VerifyError(
            f"{what}'s symbols are {arguments}, b, h, q, k, its params or its captures; got "
            + ", ".join(sorted(map(str, unknown)))
        )


def _symbols(params: Sequence[tuple[str, str]]) -> dict[str, sympy.Symbol]:
    return {name: integer(name) if number == "int" else real(name) for name, number in params}


_HEAD = re.compile(r"\s*(?P<word>\w+)\((?P<header>[^)]*)\)\s*\{(?P<body>.*)\}\s*", re.DOTALL)
_PARAM = re.compile(r"(\w+)\s*:\s*(\w+)")
_CAPTURE = re.compile(r"(\w+)\s*:\s*(\w+)\[(\d+)\]")


def _fields(pattern: re.Pattern[str], expected: str, text: str) -> list[tuple[str, ...]]:
    fields = []
    for part in filter(None, map(str.strip, text.split(","))):
        found = pattern.fullmatch(part)
        if found is None:
            raise ParseError(f"expected {expected}; got {part!r}")
        fields.append(found.groups())
    return fields
