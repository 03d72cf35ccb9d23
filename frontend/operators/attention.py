"""`torch.ops.gossamer.attention` and its gradient: what torch's tracers and transforms see of a call.

    attention(query, key, value, tensors, integers, numbers, form) -> [out, *extra]
    attention_backward(..., out, lse, grad_out, grad_lse, wanted) -> [a gradient for each name in wanted]

tensors: whatever else the call reads, in the order of `Form.names`. integers, numbers: what kernels take as
arguments, so that other values trace and compile nothing. form: `Form.text`, which says the rest and is all
that another process needs. Loading this module registers both operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..form import Form
from ..problem import Problem

LIBRARY = torch.library.Library("gossamer", "FRAGMENT")
CALL = (
    "Tensor query, Tensor key, Tensor value, Tensor[] tensors, SymInt[] integers, float[] numbers, str form"
)
LIBRARY.define(f"attention({CALL}) -> Tensor[]")
LIBRARY.define(
    f"attention_backward({CALL}, Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse, str wanted)"
    " -> Tensor[]"
)
FORWARD, BACKWARD = "gossamer::attention", "gossamer::attention_backward"

INPUTS = ("q", "k", "v")


# what both compute ----------------------------------------------------------------------------------


def evaluate(
    form: Form,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tensors: Sequence[Tensor],
    integers: Sequence[int],
    numbers: Sequence[float],
) -> tuple[Tensor, ...]:
    """(out, *extra) of a call taken apart."""
    from ..attention import launch

    query, key, value, *others = (t.detach() for t in (query, key, value, *tensors))
    return launch(query, key, value, form.join(others, integers, numbers))


def differentiate(
    form: Form,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tensors: Sequence[Tensor],
    integers: Sequence[int],
    numbers: Sequence[float],
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    wanted: Sequence[str],
) -> list[Tensor]:
    """The gradient of each wanted input, contiguous, of its shape and dtype."""
    from ...runtime.driver import driver
    from .. import gradients as kernels
    from ..placement import Placement
    from ..plan import recall, serves

    query, key, value, *others = (t.detach() for t in (query, key, value, *tensors))
    call = form.join(others, integers, numbers)
    options = call.options
    shapes = dict(zip((*INPUTS, *form.names), (query, key, value, *others), strict=True))
    rows = kernels.known_rows(out, lse, grad_out, grad_lse)
    plans, named = driver().plans, {"q": query, "k": key, "v": value, **call.held, **rows}
    known = recall(plans, named, call, "gradients", *wanted)
    if known.plan is not None:
        found = known.plan(known.tensors)
        return [found[name].reshape(shapes[name].shape) for name in wanted]
    problem = Problem(query, key, value, options.enable_gqa, paged="block_table" in call.held)
    placed = Placement.of(problem, *call.where, sums="column_sums" in options.extra)
    settings = (call.softmax, placed, rows, wanted, options.deterministic, known.tensors)
    plan, values = kernels.planned(problem, call.mask, call.score, call.scale, *settings)
    found = plan(values)
    if known.key is not None and serves(values, known.tensors):
        plans.put(known.key, plan)
    return [found[name].reshape(shapes[name].shape) for name in wanted]


# the operators --------------------------------------------------------------------------------------


def _attention(
    query: Tensor, key: Tensor, value: Tensor, tensors: Any, integers: Any, numbers: Any, form: str
) -> list[Tensor]:
    return list(evaluate(Form.parse(form), query, key, value, tensors, integers, numbers))


def _attention_backward(*arguments: Any) -> list[Tensor]:
    call, (form, *results, wanted) = arguments[:6], arguments[6:]
    given = (*call, *results, wanted.split(","))
    return differentiate(Form.parse(form), *given)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("attention", _attention, _device)
    LIBRARY.impl("attention_backward", _attention_backward, _device)


@torch.library.register_fake(FORWARD, lib=LIBRARY)
def _fake(
    query: Tensor, key: Tensor, value: Tensor, tensors: Any, integers: Any, numbers: Any, form: str
) -> list[Tensor]:
    parsed = Form.parse(form)
    options = parsed.options
    problem = Problem(query, key, value, options.enable_gqa, paged="block_table" in parsed.held)
    heads = (problem.batch, problem.heads)
    wide = torch.float64 if problem.dtype == "f64" else torch.float32
    found = [query.new_empty((*heads, problem.q_len, problem.v_size))]
    for name in options.extra:
        length = problem.kv_len if name == "column_sums" else problem.q_len
        found.append(query.new_empty((*heads, length), dtype=wide))
    return found


@torch.library.register_fake(BACKWARD, lib=LIBRARY)
def _fake_backward(*arguments: Any) -> list[Tensor]:
    query, key, value, tensors, _, _, form, *_, wanted = arguments
    inputs = dict(zip((*INPUTS, *Form.parse(form).names), (query, key, value, *tensors), strict=True))
    return [inputs[name].new_empty(inputs[name].shape) for name in wanted.split(",")]


# their calls ----------------------------------------------------------------------------------------


def attention(form: Form, *given: Any) -> tuple[Tensor, ...]:
    """What `evaluate` gives, by the operator."""
    return tuple(torch.ops.gossamer.attention(*given, form.text))


def attention_backward(form: Form, *given: Any) -> list[Tensor]:
    """What `differentiate` gives, by the operator."""
    *call, out, lse, grad_out, grad_lse, wanted = given
    return torch.ops.gossamer.attention_backward(
        *call, form.text, out, lse, grad_out, grad_lse, ",".join(wanted)
    )
