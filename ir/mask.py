"""Masks: which (query, key) pairs attend, as a predicate and as integer sets.

    mask    := "mask(" [name ("," name)*] [";" capture ("," capture)*] ")" "{" (let ";")* predicate "}"
    capture := name ":" dtype "[" rank "]"
    let     := "let" name "=" expr

The predicate is a Boolean expression (ir/expr.py) over the batch `b`, the query head `h`, the indices
`q` and `k`, the lengths `q_len` and `kv_len`, the position `q_offset` of the first query, runtime integers
`p0, p1, ...` and captured tensors
`c0, c1, ...`:

    mask(p0; c0: i32[1]) { ((c0[k] == c0[q]) and (q - k <= p0)) }

A let names an integer that does not depend on q and k: isl takes it for a parameter, whatever it is made of
(passes/uniform.py makes them).

`may` and `must` are isl maps { [q] -> [k] } on the unbounded quadrant q, k >= 0, parametric in every
other integer: no pair outside may attends, every pair in must does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import islpy as isl
import numpy as np
import sympy
from sympy.logic.boolalg import Boolean

from .affine import IN, ISL_LOCK, OUT, to_sets
from .errors import InputError, InterpretError, ParseError, VerifyError
from .evaluate import evaluate
from .expr import DTYPES, Expr, integer, kind, parse, read, readf, real, to_text
from .functions import rebuilt

INDICES = ("b", "h", "q", "k", "q_len", "kv_len", "q_offset")


@dataclass(frozen=True)
class Capture:
    """A captured tensor: its name in the predicate, dtype (one of expr.DTYPES) and rank.

    >>> str(Capture("c0", "i32", 1))
    'c0: i32[1]'
    """

    name: str
    dtype: str
    rank: int

    @property
    def symbol(self) -> sympy.Symbol:
        return real(self.name) if self.dtype[0] == "f" or self.dtype == "bf16" else integer(self.name)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{self.rank}]"


@dataclass(frozen=True)
class Mask:
    """A predicate on pairs with the names of its runtime integers and its captured tensors.

    lets: (name, integer expression without q and k) pairs that the predicate may use.

    >>> m = Mask.parse("mask(p0) { (abs(q - k) <= p0) }")
    >>> str(m.may)
    '[p0] -> { [q] -> [k] : q >= 0 and k >= 0 and -p0 + q <= k <= p0 + q }'
    >>> m.exact
    True
    """

    predicate: Expr
    params: tuple[str, ...] = ()
    captures: tuple[Capture, ...] = ()
    lets: tuple[tuple[str, Expr], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "predicate", rebuilt(sympy.sympify(self.predicate)))
        object.__setattr__(self, "params", tuple(self.params))
        object.__setattr__(self, "captures", tuple(self.captures))
        object.__setattr__(self, "lets", tuple((name, rebuilt(term)) for name, term in self.lets))
        verify(self)

    @cached_property
    def _maps(self) -> tuple[isl.Map, isl.Map]:
        with ISL_LOCK:
            quadrant = isl.Set("{ [q, k] : q >= 0 and k >= 0 }")
            may, must = (_as_map(s.intersect(quadrant).coalesce()) for s in to_sets(self.predicate))
            return may, must

    @property
    def may(self) -> isl.Map:
        """The smallest affine map known to hold every pair that attends."""
        return self._maps[0]

    @property
    def must(self) -> isl.Map:
        """The largest affine map known to hold only pairs that attend."""
        return self._maps[1]

    @cached_property
    def exact(self) -> bool:
        """Whether may equals must, so that the sets are the mask."""
        with ISL_LOCK:
            return self.may.is_equal(self.must)

    @property
    def inlined(self) -> Mask:
        """The same mask without lets."""
        if not self.lets:
            return self
        terms = {integer(name): term for name, term in self.lets}
        return Mask(self.predicate.xreplace(terms), self.params, self.captures)

    # Algebra. The right operand's integers and tensors follow the left's.

    def __and__(self, other: Mask) -> Mask:
        return self._join(other, sympy.And)

    def __or__(self, other: Mask) -> Mask:
        return self._join(other, sympy.Or)

    def __invert__(self) -> Mask:
        return replace(self, predicate=sympy.Not(self.predicate))

    def _join(self, other: Mask, connective: type[Boolean]) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        apart = other.renumbered(len(self.params), len(self.captures))
        predicate = connective(self.inlined.predicate, apart.predicate)
        return Mask(predicate, self.params + apart.params, self.captures + apart.captures)

    def renumbered(self, first_param: int = 0, first_capture: int = 0) -> Mask:
        """The same mask with its integers and tensors named from p<first_param> and c<first_capture> on."""
        params = tuple(f"p{i}" for i, _ in enumerate(self.params, first_param))
        captures = tuple(
            Capture(f"c{i}", c.dtype, c.rank) for i, c in enumerate(self.captures, first_capture)
        )
        names = {integer(a): integer(b) for a, b in zip(self.params, params, strict=True)}
        names |= {a.symbol: b.symbol for a, b in zip(self.captures, captures, strict=True)}
        return Mask(self.inlined.predicate.xreplace(names), params, captures)

    def substitute(self, values: Mapping[str, Expr | int], params: Sequence[str] = ()) -> Mask:
        """Replace indices, lengths or integers by expressions, all at once.

        Replaced integers leave `params`; new ones that the expressions bring are named in `params`.
        Nothing is renumbered.
        """
        new = self.inlined.predicate.xreplace({integer(n): sympy.sympify(v) for n, v in values.items()})
        return Mask(new, (*(p for p in self.params if p not in values), *params), self.captures)

    def equal(self, other: Mask) -> bool:
        """Whether both masks hold the same pairs for all values of their integers (matched by name).

        Exact masks are compared as sets by isl. Opaque ones are equal when their texts are: True is
        then still a proof, False is not.
        """
        if self == other:
            return True
        if not (self.exact and other.exact):
            return False
        with ISL_LOCK:
            return self.may.is_equal(other.may)

    # Text.

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self) -> str:
        """Deterministic text; `Mask.parse` reads it back to an equal mask."""
        captures = "; " + ", ".join(map(str, self.captures)) if self.captures else ""
        lets = "".join(f"let {name} = {to_text(term)}; " for name, term in self.lets)
        return f"mask({', '.join(self.params)}{captures}) {{ {lets}{to_text(self.predicate)} }}"

    @staticmethod
    def parse(text: str) -> Mask:
        """The mask of a text. Raises ParseError when it is malformed, VerifyError when it breaks a rule."""
        head = _HEAD.fullmatch(text)
        if head is None:
            raise ParseError(f"expected mask(p0, ...; c0: i32[1], ...) {{ predicate }}; got {text!r}")
        names, _, tensors = head["header"].partition(";")
        params = tuple(_split(names))
        captures = tuple(_capture(t) for t in _split(tensors))
        symbols: dict[str, Expr] = {n: integer(n) for n in (*INDICES, *params)}
        symbols |= {c.name: c.symbol for c in captures}
        *bindings, body = head["body"].split(";")
        lets = tuple((name, parse(term, symbols)) for name, term in map(_let, bindings))
        return Mask(parse(body, symbols | {n: integer(n) for n, _ in lets}), params, captures, lets)

    # Meaning.

    def evaluate(
        self,
        b: np.ndarray | int,
        h: np.ndarray | int,
        q: np.ndarray | int,
        k: np.ndarray | int,
        params: Sequence[int] = (),
        captures: Sequence[np.ndarray] = (),
        q_len: int = 0,
        kv_len: int = 0,
    ) -> np.ndarray:
        """Whether each pair attends: a bool array of the shape to which b, h, q and k broadcast.

        Raises InputError when the values do not fit params and captures, or when a captured tensor is
        read outside its bounds at a point that is asked for.
        """
        self.check_values(params, captures)
        values: dict[str, object] = {"b": b, "h": h, "q": q, "k": k, "q_len": q_len, "kv_len": kv_len}
        values |= dict(zip(self.params, params, strict=True))
        values |= {c.name: a for c, a in zip(self.captures, captures, strict=True)}
        wide = any(np.asarray(a).dtype == np.float64 for a in captures)
        try:
            found = evaluate(self.inlined.predicate, values, floats=np.float64 if wide else np.float32)
        except InterpretError as error:
            raise InputError(
                "mask", "captured tensors that cover every index read from them", str(error)
            ) from None
        shape = np.broadcast_shapes(*(np.shape(v) for v in (b, h, q, k)))
        return np.broadcast_to(np.asarray(found, bool), shape)

    def check_values(self, params: Sequence[int], captures: Sequence[np.ndarray]) -> None:
        if len(params) != len(self.params):
            raise InputError(
                "mask", f"{len(self.params)} integers for {', '.join(self.params)}", tuple(params)
            )
        ranks = tuple(np.ndim(a) for a in captures)
        if ranks != tuple(c.rank for c in self.captures):
            raise InputError("mask", f"tensors for ({', '.join(map(str, self.captures))})", f"ranks {ranks}")


def verify(mask: Mask) -> None:
    """Check the rules of this level; raise VerifyError naming the first one broken."""
    names = [*mask.params, *(c.name for c in mask.captures), *(name for name, _ in mask.lets)]
    if len({*names, *INDICES}) != len(names) + len(INDICES):
        raise VerifyError(
            f"names of a mask are distinct and none of {', '.join(INDICES)}; got {', '.join(names)}"
        )
    for c in mask.captures:
        if c.dtype not in DTYPES or c.rank < 0:
            raise VerifyError(
                f"a capture has a dtype of {', '.join(DTYPES)} and a rank of at least 0; got {c}"
            )
    if kind(mask.predicate) != "bool":
        raise VerifyError(
            f"a mask's predicate is a truth value; got {kind(mask.predicate)} {to_text(mask.predicate)}"
        )
    captures = {c.symbol: c for c in mask.captures}
    terms = [term for _, term in mask.lets]
    for r in set().union(*(e.atoms(read, readf) for e in (mask.predicate, *terms))):
        c = captures.get(r.args[0])
        if c is None:
            raise VerifyError(f"{to_text(r)} reads a tensor that the mask does not declare with this kind")
        if len(r.args) - 1 != c.rank:
            raise VerifyError(f"{to_text(r)} reads {c} with {len(r.args) - 1} indices")
    known = {integer(n) for n in (*INDICES, *mask.params)} | set(captures) | {sympy.Symbol(d) for d in DTYPES}
    for term in terms:
        if (
            kind(term) != "int"
            or term.free_symbols - known
            or {"q", "k"} & {s.name for s in term.free_symbols}
        ):
            raise VerifyError(f"a mask's let is an integer without q and k; got {to_text(term)}")
    known |= {integer(name) for name, _ in mask.lets}
    unknown = sorted(str(s) for s in mask.predicate.free_symbols - known)
    if unknown:
        raise VerifyError(
            f"a mask's symbols are indices, its params, captures or lets; got {', '.join(unknown)}"
        )


_HEAD = re.compile(r"\s*mask\((?P<header>[^)]*)\)\s*\{(?P<body>.*)\}\s*", re.DOTALL)
_LET = re.compile(r"\s*let\s+(\w+)\s*=(?!=)(.*)", re.DOTALL)
_CAPTURE = re.compile(r"(\w+)\s*:\s*(\w+)\[(\d+)\]")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _let(text: str) -> tuple[str, str]:
    found = _LET.fullmatch(text)
    if found is None:
        raise ParseError(f"expected a let like let u0 = c0[b]; got {text.strip()!r}")
    return found[1], found[2]


def _capture(text: str) -> Capture:
    found = _CAPTURE.fullmatch(text)
    if found is None:
        raise ParseError(f"expected a capture like c0: i32[1]; got {text!r}")
    return Capture(found[1], found[2], int(found[3]))


def _as_map(points: isl.Set) -> isl.Map:
    return isl.Map.from_domain(points).move_dims(OUT, 0, IN, 1, 1)
