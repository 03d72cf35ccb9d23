"""Calls inside torch.compile and strict torch.export: what dynamo runs in place of `attention.run`.

A call becomes one node of dynamo's graph, `captured_attention`. Functions that it passes are traced by dynamo
to graphs of their own (frontend/capture/dynamo.py), whose closures are inputs of the node: tensors, and
numbers that may change. When the graph is run, which compilers do once with tensors of shapes only, the
node captures these graphs as masks and maps, and calls the operator. No compiler sees the node itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import HigherOrderOperator

from ...ir.errors import InputError, UnsupportedError
from ..form import Call, Form, Options, take_apart
from ..mask import Mask
from ..placement import tensors_of
from ..pure import pure
from ..score import ProbMod, ScoreMod
from ..softmax import dropout_of
from ..term import TRUE


class CapturedAttention(HigherOrderOperator):
    """An attention whose mask, score_mod and prob_mod are graphs, or captured before.

    functions: for each of the three, None, a boolean tensor (a mask), or a graph and what it lifted. The rest
    is a call taken apart. dropout: a threshold, a factor and a seed, or None."""

    def __init__(self) -> None:
        super().__init__("gossamer_attention")

    def __call__(
        self,
        query: Any,
        key: Any,
        value: Any,
        functions: Sequence[Any],
        dropout: Any,
        form: Form,
        tensors: Sequence[Any],
        integers: Sequence[Any],
        numbers: Sequence[Any],
    ) -> tuple[Any, ...]:
        from ..attention import dispatch
        from ..trace.graph import trace_graph

        call = form.join(tensors, integers, numbers)
        mask, score, prob = (_near(function, query.device) for function in functions)
        table = None
        if isinstance(mask, torch.Tensor):
            table, call = mask, call._replace(mask=Mask.of(mask))
        elif mask is not None:
            call = call._replace(mask=trace_graph(mask[0], "mask_mod", mask[1]))
        if score is not None:
            call = call._replace(score=trace_graph(score[0], "score_mod", score[1]))
        if prob is not None:
            call = call._replace(prob=trace_graph(prob[0], "prob_mod", prob[1]))
        if dropout is not None:
            call = call._replace(prob=(call.prob or ProbMod.identity()).dropped_out(*dropout))
        return dispatch(query, key, value, call, table)


def _near(function: Any, device: torch.device) -> Any:
    """A function whose lifted numbers are on a device: those of Python come in tensors of the CPU's."""
    if not isinstance(function, tuple):
        return function
    graph, lifted = function
    numbers = (isinstance(x, torch.Tensor) and x.dim() == 0 for x in lifted)
    return graph, tuple(x.to(device) if n else x for x, n in zip(lifted, numbers, strict=True))


captured_attention = CapturedAttention()


@pure
def _teach_dynamo() -> bool:
    """Tell dynamo how to trace the node's functions; dynamo itself runs this."""
    from ..capture import dynamo

    return dynamo.register(captured_attention)


def traced(
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    score_mod: Any,
    scale: Any,
    options: Options,
    sinks: Any,
    modified: tuple[Any, Any, Any],
    where: tuple[Any, ...],
) -> Any:
    """As `attention.run`. Written for dynamo, which reads every line of it."""
    _teach_dynamo()
    if not isinstance(query, torch.Tensor):
        raise InputError("attention.query", "a torch.Tensor", type(query).__name__)
    prob_mod, dropout_p, dropout_seed = modified
    held, offset = tensors_of(where)
    if sinks is not None:
        held["sinks"] = sinks
    if isinstance(scale, torch.Tensor):
        raise UnsupportedError(
            "attention.scale is a tensor, whose value torch.compile does not know. Pass a number, or "
            "multiply the scores in a score_mod, which captures tensors"
        )
    functions, given = [], []
    for source, kind in ((mask, Mask), (score_mod, ScoreMod), (prob_mod, ProbMod)):
        captured = source is None or isinstance(source, kind)
        functions.append(None if captured else source)
        given.append(source if captured else None)
    bound = Mask(TRUE) if given[0] is None else given[0]
    call = Call(bound, given[1], given[2], scale, held, offset, options)
    form, tensors, integers, numbers = take_apart(call, query.device)
    dropout = dropout_of(query, dropout_p, dropout_seed)
    arguments = (query, key, value, tuple(functions), dropout, form)
    return captured_attention(*arguments, tuple(tensors), tuple(integers), tuple(numbers))
