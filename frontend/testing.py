"""`gossamer.testing`: unit tests for compiler passes, gossamer's own and yours.

    from gossamer import testing

    before = testing.parse("graph @f(...) { ... }")
    after = testing.run_pass(before, "fuse")
    testing.assert_same(after, "graph @f(...) { ... }")
    testing.assert_equivalent(before, after)

`parse` reads IR text of any level; `run_pass` and `run_pipeline` verify what goes in and comes out,
and that it survives a trip through its text; `assert_same` compares up to renaming and shows a diff;
`interpret` runs any level in NumPy. Strategies for hypothesis: `expressions`, `masks`, `graphs`,
`kernels`. All of it works on the CPU, without a compiler.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ..ir import graph_interpret, graph_text, graph_verify, kernel_interpret, kernel_text, kernel_verify
from ..ir.errors import InputError, ParseError
from ..ir.evaluate import NUMPY
from ..ir.graph import Graph
from ..ir.kernel import Kernel, Program, Tensor
from ..ir.mask import Mask
from ..ir.rename import canonical
from ..ir.score import ProbMap, ScoreMap
from .strategies import expressions, graphs, kernels, masks

__all__ = [
    "assert_equivalent",
    "assert_same",
    "expressions",
    "graphs",
    "interpret",
    "kernels",
    "masks",
    "parse",
    "random_arguments",
    "run_pass",
    "run_pipeline",
    "to_text",
    "verify",
]

IR = Graph | Kernel | Program | Mask | ScoreMap
Pass = Callable[..., Any]

_PARSERS: dict[str, Callable[[str], IR]] = {
    "graph": graph_text.parse,
    "kernel": kernel_text.parse,
    "program": kernel_text.parse_program,
    "mask": Mask.parse,
    "score": ScoreMap.parse,
    "prob": ProbMap.parse,
}


def parse(text: str) -> Any:
    """IR text of any level: a graph, kernel, program, mask or score map. Raises ParseError."""
    lines = (line.strip() for line in text.splitlines())
    first = next((line for line in lines if line and not line.startswith("#")), "")
    for word, read in _PARSERS.items():
        if first.startswith(word) and not first[len(word) :][:1].isalnum():
            return read(text)
    raise ParseError(f"expected text that starts with {', '.join(_PARSERS)}; got {first[:40]!r}", 1, 1)


def to_text(value: IR) -> str:
    """The text of a value of any level; `parse(to_text(v)) == v`. A `gossamer.Mask` gives that of its IR."""
    value = _read(value)
    if isinstance(value, Graph):
        return graph_text.to_text(value)
    return kernel_text.to_text(value) if isinstance(value, Kernel | Program) else value.to_text()


def verify(value: IR) -> None:
    """Check the rules of a value's level. Raises VerifyError."""
    if isinstance(value, Graph):
        graph_verify.verify(value)
    elif isinstance(value, Kernel | Program):
        kernel_verify.verify(value)


def interpret(value: Graph | Kernel | Program | str, arguments: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Run a graph, kernel or program in NumPy; its outputs by name. Arguments: arrays and numbers by name."""
    program = _read(value)
    if isinstance(program, Graph):
        return graph_interpret.interpret(program, arguments)
    return kernel_interpret.interpret(program, arguments)


def _read(value: Any) -> Any:
    """The IR of a value, a text, or a `gossamer.Mask` or `ScoreMod`. Raises InputError for anything else."""
    value = parse(value) if isinstance(value, str) else getattr(value, "ir", value)
    if not isinstance(value, Graph | Kernel | Program | Mask | ScoreMap):
        raise InputError(
            "gossamer.testing",
            "a graph, kernel, program, mask or score map, or its text",
            type(value).__name__,
        )
    return value


def run_pass(value: IR | str, pass_: Pass | str, **options: Any) -> Any:
    """One pass (a function, or the name of one in the pipeline) on a value or its text.

    Before and after, the value is verified, printed, parsed and compared: a pass that breaks a rule
    or makes what has no text fails here. The input must come out unchanged.
    """
    given = _read(value)
    _check(given, "the input")
    function = _named(pass_) if isinstance(pass_, str) else pass_
    before = to_text(given)
    result = function(given, **options)
    name = pass_ if isinstance(pass_, str) else getattr(pass_, "__name__", str(pass_))
    if to_text(given) != before:
        raise AssertionError(f"pass {name} changed its input; expected a new value")
    if isinstance(result, Graph | Kernel | Program | Mask | ScoreMap):
        _check(result, f"what pass {name} returned")
    return result


def run_pipeline(value: IR | str, start: str | None = None, stop: str | None = None) -> Any:
    """The passes of the pipeline from `start` to `stop`, both included, each checked as by `run_pass`."""
    names = [name for name, _ in _pipeline()]
    first = _place(names, start) if start is not None else 0
    last = _place(names, stop) if stop is not None else len(names) - 1
    if first > last:
        raise InputError("run_pipeline", f"{start} at or before {stop}", " -> ".join(names))
    value = _read(value)
    for name in names[first : last + 1]:
        value = run_pass(value, name)
    return value


def assert_same(a: IR | str, b: IR | str) -> None:
    """Two values (or their texts) are equal up to the names they bind; else AssertionError with a diff."""
    one, two = (_canonical(_read(x)) for x in (a, b))
    if one == two:
        return
    if type(one) is not type(two):
        raise AssertionError(
            f"expected values of one level; got {type(one).__name__} and {type(two).__name__}"
        )
    raise AssertionError("not the same up to renaming:\n" + "\n".join(_diff(to_text(one), to_text(two))))


def assert_equivalent(
    a: Graph | Kernel | Program | str,
    b: Graph | Kernel | Program | str,
    arguments: Mapping[str, Any] | None = None,
    *,
    rtol: float = 1e-4,
    atol: float = 1e-5,
) -> None:
    """Both compute the same on these arguments (random ones unless given), outputs paired in order."""
    arguments = random_arguments(_read(a)) if arguments is None else arguments
    one, two = interpret(a, arguments), interpret(b, arguments)
    if len(one) != len(two):
        raise AssertionError(f"expected outputs {', '.join(one)}; got {', '.join(two)}")
    for (name, x), (other, y) in zip(one.items(), two.items(), strict=True):
        np.testing.assert_allclose(y, x, rtol=rtol, atol=atol, err_msg=f"{name} and {other} differ")


def random_arguments(
    value: Graph | Kernel, seed: int = 0, lengths: Mapping[str, int] | None = None
) -> dict[str, np.ndarray | int | float]:
    """Arguments that fit: standard normal floats, integers from 0 to 7.

    lengths: sizes of named extents; those not given are drawn from 1 to 24, head counts Hk and Hq as
    1 to 3 and a multiple of it.
    """
    rng = np.random.default_rng(seed)
    sizes: dict[str, int] = {"Hk": int(rng.integers(1, 4))}
    sizes["Hq"] = sizes["Hk"] * int(rng.integers(1, 3))
    sizes |= lengths or {}
    out: dict[str, np.ndarray | int | float] = {}
    for name, dtype, shape in _arguments(value):
        extents = tuple(
            sizes.setdefault(n, int(rng.integers(1, 25))) if isinstance(n, str) else n for n in shape
        )
        floats = np.dtype(NUMPY[dtype]).kind == "f"
        drawn = rng.standard_normal(extents) if floats else rng.integers(0, 8, extents)
        out[name] = drawn.astype(NUMPY[dtype]) if shape else drawn.item() if hasattr(drawn, "item") else drawn
    return out


def _arguments(value: Graph | Kernel) -> Iterator[tuple[str, str, tuple[int | str, ...]]]:
    if isinstance(value, Graph):
        yield from ((v.name, v.dtype, v.shape) for v in value.inputs)
        return
    for argument in value.args:
        if not isinstance(argument, Tensor):
            yield argument.name, argument.dtype, ()
        elif argument.role != "out":
            yield argument.name, argument.dtype, argument.shape


def _canonical(value: Any) -> Any:
    return value if isinstance(value, Mask | ScoreMap) else canonical(value)


def _check(value: Any, what: str) -> None:
    verify(value)
    again = parse(to_text(value))
    if again != value:
        diff = "\n".join(_diff(to_text(value), to_text(again)))
        raise AssertionError(f"{what} does not come back from its text:\n{diff or to_text(value)}")


def _diff(a: str, b: str) -> Iterator[str]:
    return difflib.unified_diff(a.splitlines(), b.splitlines(), "first", "second", lineterm="", n=2)


def _pipeline() -> list[tuple[str, Pass]]:
    from ..passes.pipeline import PIPELINE

    return list(PIPELINE)


def _named(name: str) -> Pass:
    passes = dict(_pipeline())
    _place(list(passes), name)
    return passes[name]


def _place(names: list[str], name: str) -> int:
    if name not in names:
        raise InputError("gossamer.testing", f"a pass of the pipeline ({', '.join(names)})", repr(name))
    return names.index(name)
