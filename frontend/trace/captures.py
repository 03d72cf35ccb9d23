"""What a traced function captures: found, replaced by stand-ins, and remembered by where it was found.

A function reaches its surroundings through closure cells, globals, defaults, bound objects and their
attributes. `Trace.lift` replaces what it finds there: numbers by `Number`, arrays by `Captured`,
functions by copies whose own surroundings are lifted, objects by `Watched`, which lifts attributes as
they are read. Each find has a *path* from the traced function (("cell", 0), ("attr", "width")), so that
the next call reads it again, and a guard (guard.py): what has to hold for the trace to stand.
"""

from __future__ import annotations

import builtins
import enum
import functools
import numbers as abstract
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from ..captured import is_array
from ..term import Term, constant
from .error import at_definition, trace_error
from .gradient import grad_enabled
from .guard import Guard, Path
from .jax_functions import adapted
from .objects import Copied, Watched, call_of
from .operate import operate, value_of
from .tensor import Captured, dtype_name
from .value import Number, Value, is_symbolic, kind_of, plain_number, run_recipe, settled

_COMPILED = "_torchdynamo_orig_callable"  # where torch.compile keeps the function that it wraps
LIBRARIES = frozenset(
    ("torch", "numpy", "jax", "math", "operator", "functools", "itertools", "builtins", "typing", "enum")
)
_PLAIN = (type(None), str, bytes, complex, slice, range, type(Ellipsis), type(NotImplemented), frozenset, set)


class Trace:
    """One tracing: the numbers and tensors found so far, and the guards under which they stand.

    slots, values: paths of captured numbers and what they are now. captures: (tensor, path).
    guards: (kind, path, expected), see guard.py.
    expected: (recipe, outcome) of numbers that were looked at. memo: whether the trace may be reused.
    learns: whether gradients go through what it computes. recording: whether torch's switch of gradients is
    the function's own, so that `torch.no_grad()` inside it counts.
    """

    def __init__(self, role: str, *, float_params: bool, learns: bool = True) -> None:
        self.role, self.float_params, self.learns = role, float_params, learns
        self.recording = False
        self.slots: list[Path] = []
        self.values: list[int | float] = []
        self.captures: list[tuple[Any, Path]] = []
        self.guards: list[Guard] = []
        self.expected: dict[Any, Any] = {}
        self.baked: set[int] = set()
        self.memo = True
        self.builtins = _builtins(self)
        self._seen: dict[Any, tuple[Any, Path]] = {}

    # what stand-ins ask for

    def detaches(self) -> bool:
        """Whether what is computed now is constant to gradients: the function is inside `torch.no_grad()`."""
        return self.recording and not grad_enabled()

    operate = staticmethod(operate)

    def value_of(self, x: Any) -> Value:
        return value_of(self, x)

    # numbers

    def constant(self, value: bool | int | float) -> Value:
        kind = {bool: "bool", int: "int", float: "float"}[type(value)]
        return Value(self, constant(value), kind)

    def expect(self, recipe: Any, outcome: Any) -> None:
        """The trace holds only while the recipe gives this outcome."""
        self.expected[recipe] = outcome

    def bake(self, recipe: Any) -> None:
        for slot in _slots_of(recipe):
            self.baked.add(slot)
            self.expected["slot", slot] = self.values[slot]

    def number(self, x: Number) -> Value:
        """A captured number as an expression: its sums spelled out, the rest of its recipe one parameter."""
        if isinstance(x.value, bool):
            return self.constant(bool(x.bake()))
        if kind_of(x.value) == "float" and not self.float_params:
            return self.constant(x.bake())
        if kind_of(x.value) == "float":
            return Value(self, ("num", x.recipe), "float")
        return Value(self, _spelled(x.recipe), "int")

    def size(self, capture: int, d: int) -> Number:
        tensor, path = self.captures[capture]
        return self._number(tensor.shape[d], (*path, ("size", d)), ("size", capture, d))

    def _number(self, value: Any, path: Path, origin: Any) -> Number:
        plain = plain_number(value)
        self.memo &= not is_symbolic(value)

        def make() -> Number:
            self.guards.append(("number", path, type(plain)))
            self.slots.append(path)
            self.values.append(plain)
            return Number(self, ("slot", len(self.slots) - 1), plain)

        return self._once(origin, path, make)

    def _once(self, origin: Any, path: Path, make: Callable[[], Any]) -> Any:
        """One stand-in for what is reached on several paths, guarded to stay one thing."""
        if origin is None:
            return make()
        if origin not in self._seen:
            self._seen[origin] = make(), path
        found, first = self._seen[origin]
        if first != path:
            self.guards.append(("same", path, first))
        return found

    # everything else

    def lift(self, value: Any, path: Path, origin: Any = None) -> Any:
        """The stand-in for something captured at `path`; `origin` identifies the variable that holds it."""
        if isinstance(value, _PLAIN):
            return self._plain(value, path)
        if _is_truth(value):
            self.guards.append(("equal", path, value))
            return bool(value)
        if isinstance(value, enum.Enum) or _is_grad_mode(value):
            return self._same_object(value, path)
        if isinstance(value, (abstract.Integral, abstract.Real)) or is_symbolic(value):
            return self._number(value, path, origin)
        if is_array(value):
            return self._once(("tensor", id(value)), path, lambda: self._tensor(value, path))
        if _library(value) == "jax" and callable(value) and not isinstance(value, type):
            return adapted(self._same_object(value, path))
        if isinstance(value, (FunctionType, MethodType, functools.partial)):
            return self._callable(value, path)
        if type(value) in (tuple, list, dict) or (isinstance(value, tuple) and hasattr(value, "_fields")):
            return self._container(value, path)
        if isinstance(value, BuiltinFunctionType) or _is_library_constant(value):
            if not isinstance(getattr(value, "__self__", None), (ModuleType, type(None))):
                self.memo = False  # a method: what it reads of its object is out of sight
            return self._plain(value, path)
        if isinstance(value, functools._lru_cache_wrapper) or type(value).__name__ == "PjitFunction":
            wrapping: Any = value
            return self.lift(wrapping.__wrapped__, (*path, ("attr", "__wrapped__")))
        if isinstance(value, ModuleType) and value.__name__.partition(".")[0] in LIBRARIES:
            same = self._same_object(value, path)
            return adapted(same) if value.__name__.startswith("jax") else same
        if isinstance(value, type) and _library(value) in LIBRARIES:
            return self._same_object(value, path)
        self.guards.append(("type", path, type(value)))
        return Watched(self, value, path)

    def _plain(self, value: Any, path: Path) -> Any:
        self.guards.append(("equal", path, set(value) if isinstance(value, set) else value))
        return value

    def _same_object(self, value: Any, path: Path) -> Any:
        self.guards.append(("is", path, value))
        return value

    def _tensor(self, value: Any, path: Path) -> Captured:
        dtype, rank = dtype_name(value.dtype), len(value.shape)
        if dtype is None:
            raise trace_error(
                f"{self.role} captures a tensor of {value.dtype}; expected one of int8..int64, uint8, bool, "
                "float16, bfloat16, float32, float64",
                "Convert it before capturing it",
            )
        self.guards.append(("tensor", path, (dtype, rank)))
        self.captures.append((value, path))
        return Captured(self, len(self.captures) - 1, value, (None,) * rank)

    def _container(self, value: Any, path: Path) -> Any:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        self.guards.append(("keys", path, (type(value), keys)))
        items = [self.lift(value[k], (*path, ("item", k))) for k in keys]
        if isinstance(value, dict):
            return dict(zip(keys, items, strict=True))
        return value._make(items) if hasattr(value, "_fields") else type(value)(items)

    def _callable(self, value: Any, path: Path) -> Any:
        if isinstance(value, MethodType):
            function = self.lift(value.__func__, (*path, ("attr", "__func__")))
            owner = self.lift(value.__self__, (*path, ("attr", "__self__")))
            self.guards.append(("type", path, MethodType))
            return functools.partial(function, owner)
        if isinstance(value, functools.partial):
            self.guards.append(("type", path, functools.partial))
            function = self.lift(value.func, (*path, ("attr", "func")))
            args = self.lift(value.args, (*path, ("attr", "args")))
            keywords = self.lift(value.keywords, (*path, ("attr", "keywords")))
            return functools.partial(function, *args, **keywords)
        if (_library(value) in LIBRARIES and value.__closure__ is None) or _is_tracer(value):
            return self._same_object(value, path)
        self.guards.append(("code", path, value.__code__))
        if hasattr(value, "_torchdynamo_orig_callable"):  # what torch.compile made a wrapper of
            return self.lift(
                value._torchdynamo_orig_callable, (*path, ("attr", "_torchdynamo_orig_callable"))
            )
        return Copied(self, value, path)


def lift_root(trace: Trace, function: Callable[..., Any]) -> Callable[..., Any]:
    """The traced function itself, ready to be called with stand-ins."""
    if not callable(function):
        raise at_definition(None, f"{trace.role}: expected a function; got {type(function).__name__}")
    return trace.lift(function, ())


def code_of(function: Any) -> CodeType | None:
    """The code behind a function, method, partial or callable object; None for anything else."""
    if isinstance(function, functools.partial):
        return code_of(function.func)
    if isinstance(function, MethodType):
        return code_of(function.__func__)
    if isinstance(function, FunctionType):
        return function.__code__
    call = call_of(function)
    return None if call is None else call.__code__


def _is_tracer(function: FunctionType) -> bool:
    """Whether a function works on stand-ins itself, as the tracer's own `where` does."""
    return function.__module__.startswith(__name__.rpartition(".")[0])


def _is_truth(value: Any) -> bool:
    numpy_s = _library(type(value)) == "numpy" and type(value).__name__ in ("bool", "bool_")
    return isinstance(value, bool) or numpy_s


def _is_grad_mode(value: Any) -> bool:
    """`torch.no_grad()` and its like, as decorators hold them."""
    return _library(type(value)) == "torch" and type(value).__module__.endswith("autograd.grad_mode")


def _is_library_constant(value: Any) -> bool:
    """A dtype, a device, a NumPy function: what has no attributes of its own to look into."""
    return _library(type(value)) in ("torch", "numpy", "jax") and not hasattr(value, "__dict__")


def _library(value: Any) -> str:
    module = getattr(value, "__module__", None) or getattr(type(value), "__module__", None) or ""
    return module.partition(".")[0] if isinstance(module, str) else ""


def _builtins(trace: Trace) -> dict[str, Any]:
    def load(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] not in LIBRARIES:
            trace.memo = False  # what is read from it is out of sight
        return __import__(name, *args, **kwargs)

    return {**vars(builtins), "__import__": load}


def _slots_of(recipe: Any) -> Iterator[int]:
    if isinstance(recipe, tuple):
        if recipe[0] == "slot":
            yield recipe[1]
        else:
            for part in recipe[1:]:
                yield from _slots_of(part)


def _spelled(recipe: Any) -> Term:
    if not isinstance(recipe, tuple):
        return recipe
    op, *parts = recipe
    if op in ("add", "sub", "neg") and all(_is_whole(p) for p in parts):
        return (op, *(_spelled(p) for p in parts))
    if op == "mul" and any(isinstance(p, int) for p in parts):
        return ("mul", *(_spelled(p) for p in parts))
    return ("num", recipe)


def _is_whole(recipe: Any) -> bool:
    return isinstance(recipe, (int, tuple))


def settle(trace: Trace, recipe: Any) -> Any:
    """The value of a recipe all of whose slots are baked; None when it is a parameter."""
    if all(slot in trace.baked for slot in _slots_of(recipe)):
        return settled(run_recipe(recipe, trace.values))
    return None
