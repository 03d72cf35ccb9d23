"""Captured functions and objects: copies that run on stand-ins, and watched attributes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from .error import trace_error
from .value import Number

if TYPE_CHECKING:
    from .captures import Trace
    from .guard import Path


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
        names: dict[str, Any] = {"__builtins__": self.trace.builtins, "__name__": f.__module__}
        for name in _names_in(f.__code__):
            if name in f.__globals__ and name not in names:
                value = f.__globals__[name]
                names[name] = lift(value, (*path, ("global", name)), ("global", id(f.__globals__), name))
            elif name in self.trace.builtins:
                self.trace.guards.append(("no global", path, name))
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
        try:
            value = getattr(self._object, name)
        except AttributeError:
            self._trace.memo = False  # it may be there the next time
            raise
        return self._lifted(value, ("attr", name))

    def _lifted(self, value: Any, step: tuple[str, Any]) -> Any:
        method_of_mine = isinstance(value, MethodType) and value.__self__ is self._object
        if not method_of_mine:
            return self._trace.lift(value, (*self._path, step))
        function = self._trace.lift(value.__func__, (*self._path, step, ("attr", "__func__")))
        return functools.partial(function, self)

    def __setattr__(self, name: str, value: Any) -> None:
        fix = "It may compute, but not change what it captures"
        raise trace_error(f"{self._trace.role} assigns .{name}", fix)

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
        if call_of(self._object) is not None:
            return self.__getattr__("__call__")(*args, **kwargs)
        self._trace.memo = False
        return self._object(*args, **kwargs)

    def __iter__(self) -> Iterator[Any]:
        self._trace.memo = False
        for i, item in enumerate(self._object):
            yield self._lifted(item, ("iteration", i))

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


def _names_in(code: CodeType) -> list[str]:
    """Names that the code and the functions inside it may read as globals."""
    names = list(code.co_names)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            names += _names_in(inner)
    return names


def call_of(value: Any) -> FunctionType | None:
    """The Python function that runs when an object is called; a module's `forward`."""
    kind = type(value)
    call = getattr(kind, "forward", None) or vars(kind).get("__call__") or getattr(kind, "__call__", None)  # noqa: B004
    return call if isinstance(call, FunctionType) else None
