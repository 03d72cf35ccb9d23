"""Guards: what an earlier trace looked at, found again by path and compared."""

from __future__ import annotations

import numbers as abstract
from types import FunctionType
from typing import Any

from ..captured import is_array
from .tensor import dtype_name
from .value import plain_number

Path = tuple[tuple[str, Any], ...]
Guard = tuple[str, Path, Any]


def resolve(root: Any, path: Path) -> Any:
    """What stands at a path today. Raises LookupError, AttributeError or ValueError when nothing does."""
    for step, name in path:
        match step:
            case "cell":
                root = root.__closure__[name].cell_contents
            case "global":
                root = root.__globals__[name]
            case "attr":
                root = getattr(root, name)
            case "item":
                root = root[name]
            case "default":
                root = root.__defaults__[name]
            case "kwdefault":
                root = root.__kwdefaults__[name]
            case "size":
                root = plain_number(root.shape[name])
    return root


def holds(guard: Guard, root: Any) -> bool:
    """Whether a guard of an earlier trace holds for `root`."""
    kind, path, expected = guard
    value = resolve(root, path)
    match kind:
        case "number":
            whole = isinstance(value, abstract.Integral) and not isinstance(value, bool)
            return whole if expected is int else isinstance(value, abstract.Real) and not whole
        case "tensor":
            return is_array(value) and (dtype_name(value.dtype), len(value.shape)) == expected
        case "code":
            return isinstance(value, FunctionType) and value.__code__ is expected
        case "is":
            return value is expected
        case "type":
            return type(value) is expected
        case "equal":
            return type(value) is type(expected) and bool(value == expected)
        case "no global":
            return expected not in value.__globals__
        case "keys":
            now = list(value) if isinstance(value, dict) else list(range(len(value)))
            return (type(value), now) == expected
        case "same":
            other = resolve(root, expected)
            is_number = isinstance(value, (int, float)) and type(value) is type(other)
            return value is other or (is_number and value == other)
    return False
