"""Masks as text, for the command line: nothing in the text is evaluated as Python.

    mask     := pattern | ir | file
    pattern  := NAME [ "(" arguments ")" ] | pattern "&" pattern | pattern "|" pattern
              | "~" pattern | "(" pattern ")"
    argument := integer | string | True | False | None | tuple or list of arguments; also NAME "=" argument
    ir       := "mask(" [NAME "=" integer ("," ...)*] [";" captures] ")" "{" predicate "}"
    file     := PATH ".npy"              a 0/1 matrix
              | PATH ".py:" NAME         a mask_mod, or a Mask, of a Python file (the file is run)

A pattern's NAME is one of `gossamer.masks`; `causal` is `causal()`. A string argument that ends in
`.npy` is that file's array. The runtime integers of IR text get their values where they are named:
`mask(p0=128) { abs(q - k) <= p0 }`; a captured tensor is read from a file:
`mask(; c0: i32[1] = "ids.npy") { c0[q] == c0[k] }`.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from ..ir.errors import GossamerError, InputError
from ..ir.syntax import parse_expression

if TYPE_CHECKING:
    from .mask import Mask

_IR = re.compile(r"\s*mask\s*\((?P<header>[^{}]*)\)\s*\{(?P<body>.*)\}\s*", re.DOTALL)
_FUNCTION = re.compile(r"(?P<path>.+\.py):(?P<name>[A-Za-z_][\w.]*)")
_PARAM = re.compile(r"(?P<name>\w+)\s*=\s*(?P<value>-?\d+)")
_CAPTURE = re.compile(r"(?P<declared>\w+\s*:[^=]*?)\s*=\s*(['\"])(?P<path>[^'\"]*)\2")


def parse_mask(text: str) -> Mask:
    """The mask that a text describes; see the module's grammar.

    Raises InputError naming what is wrong and what there is, ParseError for malformed IR text.

    >>> parse_mask("sliding_window(2) & causal") == parse_mask("mask(p0=2) { abs(q - k) <= p0 and k <= q }")
    True
    """
    text = text.strip()
    if _IR.fullmatch(text):
        return _from_ir(text)
    if text.endswith(".npy"):
        from .mask import Mask

        return Mask.from_dense(_load_array(text))
    function = _FUNCTION.fullmatch(text)
    if function:
        return _from_file(Path(function["path"]), function["name"])
    return _from_pattern(text)


# ---- patterns ----


def pattern_names() -> tuple[str, ...]:
    """The patterns that a text may name, in alphabetical order."""
    return tuple(sorted(_patterns()))


def _patterns() -> dict[str, Callable[..., Any]]:
    from . import masks

    public = getattr(masks, "__all__", None) or [n for n in vars(masks) if not n.startswith("_")]
    named = {n: getattr(masks, n) for n in public if n != "from_block_mask"}  # takes an object, no text
    return {n: f for n, f in named.items() if callable(f) and not isinstance(f, type)}


def _from_pattern(text: str) -> Mask:
    try:
        tree = parse_expression(text)
    except SyntaxError as error:
        where = f" at column {error.offset}" if error.offset else ""
        raise _wrong(text, f"{text!r}, which is malformed{where}") from None
    return _build(tree, text)


def _build(node: ast.expr, text: str) -> Mask:
    match node:
        case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
            return _build(left, text) & _build(right, text)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _build(left, text) | _build(right, text)
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            return ~_build(operand, text)
        case ast.Name(id=name):
            return _call(name, [], {}, text)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            named = {k.arg: _argument(k.value, text) for k in keywords if k.arg is not None}
            if len(named) == len(keywords):
                return _call(name, [_argument(a, text) for a in args], named, text)
    raise _wrong(text, ast.unparse(node))


def _call(name: str, args: list[Any], named: dict[str, Any], text: str) -> Mask:
    known = _patterns()
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        fix = f"Did you mean {' or '.join(near)}?" if near else ""
        raise InputError("mask", f"one of {', '.join(sorted(known))}", repr(name), fix)
    try:
        return known[name](*args, **named)
    except GossamerError:
        raise
    except TypeError as error:  # arguments that the pattern does not take
        import inspect

        signature = inspect.signature(known[name]).replace(return_annotation=inspect.Signature.empty)
        raise InputError("mask", f"{name}{_plain(signature)}", f"{text!r} ({error})") from None


def _plain(signature: Any) -> str:
    """A signature without annotations."""
    import inspect

    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare))


def _argument(node: ast.expr, text: str) -> Any:
    match node:
        case ast.Constant(value=str(value)) if value.endswith(".npy"):
            return _load_array(value)
        case ast.Constant(value=bool() | int() | str() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value))):
            return -value
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return tuple(_argument(item, text) for item in items)
    expected = "integers, strings, True, False, None and tuples of them as arguments"
    raise InputError("mask", expected, f"{ast.unparse(node)!r} in {text!r}")


def _wrong(text: str, got: str) -> InputError:
    expected = "patterns joined by & | ~, such as 'sliding_window(128) | global_tokens(4)'"
    if text.endswith(".py"):
        return InputError("mask", expected, got, f"To name a mask_mod of a file: '{text}:function'")
    return InputError("mask", expected, got)


# ---- IR text ----


def _from_ir(text: str) -> Mask:
    from ..ir import mask as ir
    from .mask import Mask

    found = _IR.fullmatch(text)
    assert found is not None
    names, _, tensors = found["header"].partition(";")
    params = {n.strip(): None for n in names.split(",") if n.strip()}
    values = {m["name"]: int(m["value"]) for n in params if (m := _PARAM.fullmatch(n))}
    captures = list(_CAPTURE.finditer(tensors))
    if len(values) < len(params):
        missing = ", ".join(n for n in params if not _PARAM.fullmatch(n))
        raise InputError("mask", "a value for each integer, as in mask(p0=128) { ... }", missing)
    if tensors.strip() and not captures:
        raise InputError(
            "mask", 'a file for each tensor, as in c0: i32[1] = "ids.npy"', repr(tensors.strip())
        )
    declared = "; " + ", ".join(m["declared"] for m in captures) if captures else ""
    mask = ir.Mask.parse(f"mask({', '.join(values)}{declared}) {{{found['body']}}}")
    arrays = [_load_array(m["path"]) for m in captures]
    return Mask.from_ir(mask, tuple(values.values()), tuple(arrays))


# ---- files ----


def _load_array(path: str) -> Any:
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise InputError("mask", "a NumPy file", f"{path!r}, which does not exist") from None
    except (OSError, ValueError) as error:
        raise InputError("mask", "a NumPy file", f"{path!r} ({error})") from None


def parse_program(text: str) -> Any:
    """The function without parameters that a text "file.py:name" names; None for the text of a mask.

    Raises InputError where the file has no such name."""
    function = _FUNCTION.fullmatch(text.strip())
    if function is None:
        return None
    value = _named(Path(function["path"]), function["name"])
    plain = isinstance(value, FunctionType) and not inspect.signature(value).parameters
    return value if plain else None


def _from_file(path: Path, name: str) -> Mask:
    from .mask import Mask

    return Mask.of(_named(path, name))


def _named(path: Path, name: str) -> Any:
    """What a Python file has under a name."""
    value: Any = _run_file(path)
    for part in name.split("."):
        if not hasattr(value, part):
            functions = [n for n, v in vars(value).items() if callable(v) and not n.startswith("_")]
            raise InputError(
                "mask", f"one of {', '.join(functions) or 'its functions'} of {path}", repr(part)
            )
        value = getattr(value, part)
    return value


def _run_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError("mask", "a Python file", f"{str(path)!r}, which does not exist")
    spec = importlib.util.spec_from_file_location(f"gossamer_mask_file_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module
