"""Adapters: modules that no graph can be captured of, computed by code that knows their class.

Some modules write masks in place or branch on data, so that TorchDynamo captures them in pieces, in which
nothing can be found. An adapter computes the same from the module's parameters. While gossamer captures a
program, the class's `forward` becomes one node of the graph, which calls the adapter when it runs; everywhere
else, other backends of torch.compile included, it is the class's own.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from operator import attrgetter
from types import ModuleType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx

from ..report import Compiled
from .dynamo import line_of_trace, tracing
from .report import place


@dataclass(frozen=True)
class Adapter:
    """One class's adapter.

    kind: what it computes. where: the class's module, and the function in it that is replaced.
    take: called as that function is, while a program is captured: the tensors that `compute` needs, or why
    the call is left to the original. compute: (module, *tensors) -> a tensor like the first of them, when the
    program runs. give: the function's result from it.
    wrap: (name, original) -> the function that takes its place."""

    kind: str
    where: tuple[str, str]
    take: Callable[..., tuple[Any, ...] | str]
    compute: Callable[..., torch.Tensor]
    give: Callable[[torch.Tensor], Any] = lambda result: result
    wrap: Callable[[str, Any], Any] = lambda name, original: of_class(name, original)


ADAPTERS: dict[str, Adapter] = {}
_MODULES: WeakValueDictionary[int, torch.nn.Module] = WeakValueDictionary()


@torch._dynamo.assume_constant_result
def capturing() -> bool:
    """Whether gossamer captures the program at this moment."""
    return hasattr(tracing(), "findings")


@torch._dynamo.assume_constant_result
def adopt(number: int, kind: str, why_not: str | None) -> int:
    """What `adapted` knows a module by. number: its `id`, for not every dynamo hands modules to what it runs;
    a module that is captured is alive. why_not: why this call is left to the module, for the report."""
    module = ctypes.cast(number, ctypes.py_object).value
    if why_not is not None:
        tracing().findings.leave(module, kind, line_of_trace(), why_not)
    _MODULES[number] = module
    return number


def run(name: str, original: Any, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `original` gives for a module while gossamer captures a program: by the adapter, or by itself."""
    adapter = ADAPTERS[name]
    taken = adapter.take(module, *args, **kwargs)
    if isinstance(taken, str):
        adopt(id(module), adapter.kind, taken)
        return original(module, *args, **kwargs)
    return adapter.give(adapted(name, adopt(id(module), adapter.kind, None), *taken))


def of_class(name: str, original: Any) -> Any:
    """A class's `forward` with its adapter. What the adapter leaves alone is not captured at all."""
    whole = torch._dynamo.disable(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if capturing():
            return run(name, whole, self, args, kwargs)
        return original(self, *args, **kwargs)

    return forward


@torch.compiler.allow_in_graph
def adapted(name: str, number: int, *tensors: Any) -> torch.Tensor:
    """The node of a graph that an adapter computes."""
    module = _MODULES[number]
    if any(isinstance(t, torch._subclasses.FakeTensor) for t in tensors):
        learns = any(t.requires_grad for t in (*tensors, *module.parameters()) if t is not None)
        return torch.empty_like(tensors[0]).requires_grad_(learns and torch.is_grad_enabled()) * 1
    return ADAPTERS[name].compute(module, *tensors)


def adapted_parts(graph: fx.Graph) -> Iterator[Compiled]:
    """The parts of a graph that adapters compute."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target is adapted:
            name, number = node.args[:2]
            by = f"by the adapter of {type(_MODULES[number]).__name__}"
            yield Compiled(ADAPTERS[name].kind, place([node]), by)


# ---- into the classes ----


def register(name: str, adapter: Adapter) -> None:
    """Add an adapter; its class is looked for now, and when its module is imported."""
    ADAPTERS[name] = adapter
    module = sys.modules.get(adapter.where[0])
    if module is not None:
        _install(module, name)


def _install(module: ModuleType, name: str) -> None:
    adapter = ADAPTERS[name]
    path, _, last = adapter.where[1].rpartition(".")
    owner = attrgetter(path)(module)
    original = getattr(owner, last)
    setattr(owner, last, adapter.wrap(name, original))


class _AfterImport(MetaPathFinder):
    """Puts adapters into their classes once the modules of these have been imported."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        found = [name for name, adapter in ADAPTERS.items() if adapter.where[0] == fullname]
        if not found:
            return None
        others: Any = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, found)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader, names: list[str]) -> None:
        self.loader, self.names = loader, names

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        for name in self.names:
            _install(module, name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


sys.meta_path.insert(0, _AfterImport())
