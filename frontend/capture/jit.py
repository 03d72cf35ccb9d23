"""`gossamer.jit`: whole PyTorch models and functions, with the attention inside them compiled.

TorchDynamo captures the program; its graphs arrive here as FX graphs of torch operations. What computes
attention is found by what it computes (`attention.py` beside this) and replaced by `gossamer.attention`; the
rest runs as it is. What cannot be proven equal is left alone, and the report says why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ...ir.errors import InputError, MissingDependencyError

try:
    import torch
    import torch._dynamo
except ImportError:
    raise MissingDependencyError("torch", "torch", "gossamer.jit") from None

from ..report import Report
from . import (  # noqa: F401  they register themselves
    bigbird,
    dynamo,
    encoder,
    longformer,
    transformers_experts,
)
from .compile import compile_graph
from .report import Findings
from .rest import compile_rest


def jit(
    target: Any = None, *, dynamic: bool | None = None, fullgraph: bool = False, rest: str | None = None
) -> Any:
    """A model or function whose attention gossamer computes: `gossamer.jit(model)`, or `@gossamer.jit`.

    Args:
        target: a torch.nn.Module, which stays as it is and shares its parameters with the result, or a
            function.
        dynamic: as `torch.compile` has it: None captures anew for other sizes once, then for all of them.
        fullgraph: raise where the program cannot be captured in one piece, instead of running that line in
            Python between two pieces.
        rest: the backend of torch.compile that compiles what is left, such as "inductor"; None: it runs in
            eager mode.

    Returns:
        A module or function that is called as the original. Its `report()` gives a Report of what is
        compiled, and of what is left to PyTorch and why; programs are captured when they are called.

    Results are those of the original up to rounding: intermediate scores are not rounded to 16 bits. Rows
    without any key give what the original gives them. What is left is PyTorch's, and rounds as it does.

    Raises:
        InputError: target is neither a module nor callable, or rest is no backend.
    """
    if rest is not None and rest not in torch._dynamo.list_backends(exclude_tags=()):
        raise InputError("gossamer.jit.rest", "a backend of torch.compile, such as 'inductor'", repr(rest))
    if target is None:
        return functools.partial(jit, dynamic=dynamic, fullgraph=fullgraph, rest=rest)
    if not callable(target):
        raise InputError("gossamer.jit", "a torch.nn.Module or a function", type(target).__name__)
    findings = Findings()
    capture = torch._dynamo.optimize(backend_of(findings, rest), nopython=fullgraph, dynamic=dynamic)
    compiled: Any = capture(target)
    if isinstance(target, torch.nn.Module):
        compiled.__class__ = _Module
        settings = {"dynamic": dynamic, "fullgraph": fullgraph, "rest": rest}
        compiled.__dict__["_gossamer"] = findings, settings  # all other attributes are the module's
    else:
        compiled.report = findings.report
    return compiled


class _Module(torch._dynamo.OptimizedModule):
    """A module that is captured when it is called. Its copies, and what is unpickled, are captured anew."""

    def report(self) -> Report:
        return self.__dict__["_gossamer"][0].report()

    def __reduce__(self) -> Any:
        return functools.partial(jit, **self.__dict__["_gossamer"][1]), (self._orig_mod,)


def backend_of(findings: Findings, rest: str | None = None) -> Callable[..., Any]:
    """A backend of torch.compile that notes what it finds. rest: the one that compiles what is left."""

    def gossamer(graph: torch.fx.GraphModule, example_inputs: Any, **options: Any) -> Callable[..., Any]:
        compiled, parts = compile_graph(graph)
        findings.add(_piece(graph), parts)
        return compiled.forward if rest is None else compile_rest(compiled, rest)

    gossamer.findings = findings  # type: ignore[attr-defined]  # for adapters, while a program is captured
    gossamer.backend_ctx_ctor = _Settings  # type: ignore[attr-defined]
    return gossamer


class _Settings:
    """How torch captures programs for us: operations whose sizes depend on data, such as `torch.where` of one
    argument in loops over experts, end no graph."""

    change = staticmethod(torch._dynamo.config._make_closure_patcher(capture_dynamic_output_shape_ops=True))

    def __enter__(self) -> None:
        self.back = self.change()

    def __exit__(self, *_: Any) -> None:
        self.back()


def backend(graph: torch.fx.GraphModule, example_inputs: Any, **options: Any) -> Callable[..., Any]:
    """`torch.compile(backend="gossamer")`; options={"rest": "inductor"} is as for `gossamer.jit`."""
    vars(backend)["findings"] = Findings()
    rest = (options.get("options") or {}).get("rest")
    return backend_of(Findings(), rest)(graph, example_inputs)


backend.findings = Findings()  # type: ignore[attr-defined]  # that nobody asks for


def _piece(graph: torch.fx.GraphModule) -> Any:
    """What identifies a piece of a program when it is captured anew: its first and last lines."""
    lines = [n.meta.get("stack_trace") for n in graph.graph.nodes if n.op not in ("placeholder", "output")]
    return (lines[0], lines[-1]) if lines else None


backend.backend_ctx_ctor = _Settings  # type: ignore[attr-defined]
dynamo.pass_on_settings()
dynamo.end_graphs_at_lists()
if "gossamer" not in torch._dynamo.list_backends(exclude_tags=()):
    torch._dynamo.register_backend(compiler_fn=backend, name="gossamer")

__all__ = ["Report", "backend", "jit"]
