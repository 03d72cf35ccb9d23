"""What a traced function captures: found, replaced by stand-ins, and remembered by where it was found.

A function reaches its surroundings through closure cells, globals, defaults, bound objects and their
attributes. `Trace.lift` replaces what it finds there: numbers by `Number`, arrays by `Captured`,
functions by copies whose own surroundings are lifted, objects by `Watched`, which lifts attributes as
they are read. Each find has a *path* from the traced function (("cell", 0), ("attr", "width")), so that
the next call reads it again (`resolve`), and a guard: what has to hold for the trace to be valid again.
"""

from __future__ import annotations

import builtins
import enum
import functools
import numbers as abstract
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from .term import Term, constant
from .trace_error import at_definition, trace_error
from .trace_value import Captured, Number, Value, dtype_name, run_recipe

Path = tuple[tuple[str, Any], ...]
LIBRARIES = frozenset(
    ("torch", "numpy", "jax", "math", "operator", "functools", "itertools", "builtins", "typing", "enum")
)
_PLAIN = (type(None), str, bytes, complex, slice, range, type(Ellipsis), type(NotImplemented), frozenset, set)


class Trace:
    """One tracing: the numbers and tensors found so far, and the guards under which they stand.

    slots, values: paths of captured numbers and what they are now. captures: (tensor, path).
    guards: ("is" | "equal" | "type" | "code" | "keys" | "tensor" | "same", path, expected).
    expected: (recipe, outcome) of numbers that were looked at. memo: whether the trace may be reused.
    """

    def __init__(self, role: str, *, float_params: bool) -> None:
        self.role, self.float_params = role, float_params
        self.slots: list[Path] = []
        self.values: list[int | float] = []
        self.captures: list[tuple[Any, Path]] = []
        self.guards: list[tuple[str, Path, Any]] = []
        self.expected: dict[Any, Any] = {}
        self.baked: set[int] = set()
        self.memo = True
        self.builtins = _builtins(self)
        self._seen: dict[Any, tuple[Any, Path]] = {}

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
        if isinstance(x.value, float) and not self.float_params:
            return self.constant(x.bake())
        if isinstance(x.value, float):
            return Value(self, ("num", x.recipe), "float")
        return Value(self, _spelled(x.recipe), "int")

    def size(self, capture: int, d: int) -> Number:
        tensor, path = self.captures[capture]
        return self._number(int(tensor.shape[d]), (*path, ("size", d)), ("size", capture, d))

    def _number(self, value: Any, path: Path, origin: Any) -> Number:
        plain = float(value) if isinstance(value, float) or not isinstance(value, abstract.Integral) else int(value)

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
        if isinstance(value, enum.Enum):
            return self._same_object(value, path)
        if isinstance(value, (abstract.Integral, abstract.Real)):
            return self._number(value, path, origin)
        if _is_array(value):
            return self._once(("tensor", id(value)), path, lambda: self._tensor(value, path))
        if isinstance(value, (FunctionType, MethodType, functools.partial)):
            return self._callable(value, path)
        if type(value) in (tuple, list, dict) or (isinstance(value, tuple) and hasattr(value, "_fields")):
            return self._container(value, path)
        if isinstance(value, BuiltinFunctionType) or _is_library_constant(value):
            return self._plain(value, path)
        if isinstance(value, ModuleType) and value.__name__.partition(".")[0] in LIBRARIES:
            return self._same_object(value, path)
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
        return Copied(self, value, path)


class Copied:
    """A captured function; called, it runs a copy whose cells, globals and defaults are lifted."""

    def __init__(self, trace: Trace, function: FunctionType, path: Path) -> None:
        self.trace, self.function, self.path = trace, function, path
        self.copy: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.copy is None:
            self.copy = self._build()
        return self.copy(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return self.trace.lift(getattr(self.function, name), (*self.path, ("attr", name)))

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def _build(self) -> Callable[..., Any]:
        f, lift, path = self.function, self.trace.lift, self.path
        cells = tuple(self._cell(i, c) for i, c in enumerate(f.__closure__ or ()))
        names: dict[str, Any] = {"__builtins__": self.trace.builtins, "__name__": f.__globals__.get("__name__")}
        for name in _names_in(f.__code__):
            if name in f.__globals__ and name not in names:
                value = f.__globals__[name]
                names[name] = lift(value, (*path, ("global", name)), ("global", id(f.__globals__), name))
        defaults = tuple(lift(v, (*path, ("default", i))) for i, v in enumerate(f.__defaults__ or ()))
        copy = FunctionType(f.__code__, names, f.__name__, defaults or None, cells or None)
        keywords = f.__kwdefaults__ or {}
        copy.__kwdefaults__ = {k: lift(v, (*path, ("kwdefault", k))) for k, v in keywords.items()}
        return copy

    def _cell(self, i: int, cell: CellType) -> CellType:
        try:
            value = cell.cell_contents
        except ValueError:  # not assigned yet; reading it raises NameError as it would outside
            self.trace.memo = False
            return CellType()
        return CellType(self.trace.lift(value, (*self.path, ("cell", i)), ("cell", id(cell))))


class Watched:
    """A captured object: what is read from it is lifted; writing to it is refused."""

    __slots__ = ("_object", "_path", "_trace")
    __hash__ = object.__hash__

    def __init__(self, trace: Trace, value: Any, path: Path) -> None:
        for name, part in (("_trace", trace), ("_object", value), ("_path", path)):
            object.__setattr__(self, name, part)

    def __getattr__(self, name: str) -> Any:
        return self._lifted(getattr(self._object, name), ("attr", name))

    def _lifted(self, value: Any, step: tuple[str, Any]) -> Any:
        method_of_mine = isinstance(value, MethodType) and value.__self__ is self._object
        if not method_of_mine:
            return self._trace.lift(value, (*self._path, step))
        function = self._trace.lift(value.__func__, (*self._path, step, ("attr", "__func__")))
        return functools.partial(function, self)

    def __setattr__(self, name: str, value: Any) -> None:
        raise trace_error(f"{self._trace.role} assigns .{name}", "It may compute, but not change what it captures")

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, Number):
            key = key.bake()
        return self._lifted(self._object[key], ("item", key))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self._object, type):  # what its instances capture is out of sight
            self._trace.memo = False
            return self._object(*args, **kwargs)
        if hasattr(self._object, "forward"):
            return self.forward(*args, **kwargs)
        if isinstance(getattr(type(self._object), "__call__", None), FunctionType):
            return self.__getattr__("__call__")(*args, **kwargs)
        self._trace.memo = False
        return self._object(*args, **kwargs)

    def __iter__(self) -> Iterator[Any]:
        self._trace.memo = False
        return iter(self._object)

    def __len__(self) -> int:
        self._trace.memo = False
        return len(self._object)

    def __contains__(self, item: Any) -> bool:
        self._trace.memo = False
        return item in self._object

    def __bool__(self) -> bool:
        self._trace.memo = False
        return bool(self._object)

    def __eq__(self, other: object) -> bool:
        self._trace.memo = False
        return self._object == (other._object if isinstance(other, Watched) else other)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance._object if type(instance) is Watched else instance, self._object)


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
    call = getattr(type(function), "forward", None) or getattr(type(function), "__call__", None)
    return call.__code__ if isinstance(call, FunctionType) else None


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
                root = int(root.shape[name])
    return root


def holds(guard: tuple[str, Path, Any], root: Any) -> bool:
    """Whether a guard of an earlier trace holds for `root`."""
    kind, path, expected = guard
    value = resolve(root, path)
    match kind:
        case "number":
            whole = isinstance(value, abstract.Integral) and not isinstance(value, bool)
            return whole if expected is int else isinstance(value, abstract.Real) and not whole
        case "tensor":
            return _is_array(value) and (dtype_name(value.dtype), len(value.shape)) == expected
        case "code":
            return isinstance(value, FunctionType) and value.__code__ is expected
        case "is":
            return value is expected
        case "type":
            return type(value) is expected
        case "equal":
            return type(value) is type(expected) and bool(value == expected)
        case "keys":
            now = list(value) if isinstance(value, dict) else list(range(len(value)))
            return (type(value), now) == expected
        case "same":
            other = resolve(root, expected)
            return value is other or (isinstance(value, (int, float)) and (type(value), value) == (type(other), other))
    return False


def _is_array(value: Any) -> bool:
    return (
        hasattr(value, "shape")
        and hasattr(value, "dtype")
        and hasattr(value, "__getitem__")
        and not isinstance(value, type)
        and not isinstance(value, abstract.Number)
    )


def _is_tracer(function: FunctionType) -> bool:
    """Whether a function works on stand-ins itself, as the tracer's own `where` does."""
    return function.__module__.startswith(f"{__package__}.trace")


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool) or (_library(type(value)) == "numpy" and type(value).__name__ in ("bool", "bool_"))


def _is_library_constant(value: Any) -> bool:
    """A dtype, a device, a NumPy function: what has no attributes of its own to look into."""
    return _library(type(value)) in ("torch", "numpy", "jax") and not hasattr(value, "__dict__")


def _library(value: Any) -> str:
    module = getattr(value, "__module__", None) or getattr(type(value), "__module__", None) or ""
    return module.partition(".")[0] if isinstance(module, str) else ""


def _names_in(code: CodeType) -> list[str]:
    """Names that the code and the functions inside it may read as globals."""
    names = list(code.co_names)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            names += _names_in(inner)
    return names


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
        return run_recipe(recipe, trace.values)
    return None
