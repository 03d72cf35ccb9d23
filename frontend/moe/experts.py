"""`gossamer.experts` and `gossamer.moe`: layers of experts on torch tensors.

The hot path touches keys only: a call like an earlier one finds its plan, allocates and launches. Building an
IR, and importing what that needs, happens behind a miss.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from ...ir.errors import InputError, MissingDependencyError, UnsupportedError
from ...runtime.driver import driver
from ..device import precision_of
from ..operators.rules import autocast, is_traced
from ..plan import Plan, _signature
from ..pure import pure
from .activation import activation_term
from .arguments import beside_light, pair_of, refuse_alone, shared_by_token
from .form import MoeForm
from .layer import Layer, is_transposed
from .layer_kernels import dtype_of, layer_executable
from .layers import LORA, check_adapter_ids, check_routing, layer_by_name
from .light_step import Light, with_light
from .operator import call, learns
from .quantized import QuantizedWeight
from .routers import route
from .routing import Routing

try:
    import torch
except ImportError:
    raise MissingDependencyError("torch", "torch", "gossamer.experts") from None

BACKENDS = {"auto": ("cpu", "cuda"), "tvm": ("cpu",), "triton": ("cuda",), "reference": ("cpu", "cuda")}


def experts(
    x: torch.Tensor,
    topk_ids: torch.Tensor | Routing,
    topk_weights: torch.Tensor | None,
    gate_up_proj: torch.Tensor | QuantizedWeight,
    down_proj: torch.Tensor | QuantizedWeight,
    *,
    activation: str | Callable[..., Any] = "swiglu",
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    gate_up_lora: tuple[torch.Tensor, torch.Tensor] | None = None,
    down_lora: tuple[torch.Tensor, torch.Tensor] | None = None,
    lora_scale: float = 1.0,
    adapter_ids: torch.Tensor | None = None,
    zero_experts: int = 0,
    copy_experts: int = 0,
    constant_experts: torch.Tensor | None = None,
    constant_gates: torch.Tensor | None = None,
    shared_gate_up_proj: torch.Tensor | QuantizedWeight | None = None,
    shared_down_proj: torch.Tensor | QuantizedWeight | None = None,
    shared_gate_up_bias: torch.Tensor | None = None,
    shared_down_bias: torch.Tensor | None = None,
    shared_gate_up_lora: tuple[torch.Tensor, torch.Tensor] | None = None,
    shared_down_lora: tuple[torch.Tensor, torch.Tensor] | None = None,
    shared_weights: torch.Tensor | None = None,
    transposed: bool | None = None,
    interleaved: bool = False,
    trainable: torch.Tensor | None = None,
    recompute: bool = False,
    validate: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """For every token the weighted sum of its experts' outputs, down(activation(gate_up(x))).

    Args:
        x: (T, H), float16, bfloat16, float32 or float64, on a CPU or a CUDA GPU. T may be 0.
        topk_ids: (T, k), int32 or int64: the experts of each token, in any order, an expert twice if you
        like.
            Ids outside 0 .. E - 1 mean "not here" and are dropped; E and -1 are what others use. Or a
            Routing; then topk_weights is None.
        topk_weights: (T, k), any float dtype.
        gate_up_proj, down_proj: (E, 2 I, H) and (E, H, I), gate first, then up, as Hugging Face and vLLM have
            them, or transposed, (E, H, 2 I) and (E, I, H); without a gate I in place of 2 I. Any strides.
            Which layout it is, shapes tell. Or a QuantizedWeight (E, out, in), either or both.
        activation: "swiglu", "geglu", "geglu_tanh", "reglu"; "silu", "gelu", "gelu_tanh", "relu", "relu2"; or
            a function of (gate, up) or of one argument (`torch.nn.functional.silu`), which is traced. What is
            of one argument is multiplied by up, where there is a gate.
        gate_up_bias, down_bias: (E, 2 I) and (E, H).
        gate_up_lora, down_lora, lora_scale: low-rank adapters, a (E, r, H) and b (E, 2 I, r), a (E, r, I) and
            b (E, H, r), in either layout: lora_scale * b @ a is added to each expert's matrix.
        adapter_ids: (T,) int32 or int64, which of several adapters a token takes, -1 for none: the matrices
            of adapters are then stacks, (A, E, r, H), (A, E, 2 I, r) and so on. Ids outside of 0 .. A - 1
            mean none too. Neither they nor A are compiled in.
        zero_experts, copy_experts, constant_experts, constant_gates: experts that multiply nothing (MoE++),
            whose ids follow those of the matrices, in this order: so many give zeros; so many give x; the
            others a vector v of (C, H), or, with gates (C, 2, H), a x + (1 - a) v, a the first of
            softmax(gates x).
        shared_gate_up_proj, shared_down_proj, shared_weights: a network that all tokens take beside their
            experts, (2 S, H) and (H, S), laid out as those of the experts are; several shared experts are one
            of their sizes together (DeepSeek-V3). What it gives is multiplied by the weights, (T,) or (T, 1),
            if there are any (Qwen2-MoE's gate).
        shared_gate_up_bias, shared_down_bias, shared_gate_up_lora, shared_down_lora: those of that network,
            (2 S,) and (H,), a (r, H) and b (2 S, r) and so on, or, beside adapter_ids, stacks (A, r, H);
            lora_scale is that of all.
        transposed: which layout, where shapes fit both (I == H without a gate); default: the first.
        interleaved: gate and up take turns (gpt-oss) instead of following each other.
        trainable: (E,) bool, which experts learn (Lifelong-MoE): gradients of the others' matrices, biases
            and adapters are zeros, for which no products are computed.
        recompute: compute the first product anew for gradients, instead of keeping it: 2 I numbers a row.
        validate: also check ids, which waits for a GPU: -1 to E, and -1 to A - 1 of adapters.
        backend: "auto" (CPU: "tvm", GPU: "triton"), either by name, or "reference" (float64, slow).

    Returns:
        (T, H) in x's dtype. Products accumulate in float32 (float64 for float64); what an expert gives is
        rounded to x's dtype, weighted and added in float32, in the order of k, whatever the device does.

        Gradients flow to x, topk_weights, the matrices, biases, adapters and constants; what needs none costs
        nothing.

    Under torch.autocast, x, the matrices and what is added to them are taken in its dtype, but for float64.

    Raises:
        InputError: a shape, dtype, device or value is wrong. UnsupportedError: something that is not built
        yet. TraceError: an activation cannot be captured.
    """
    if isinstance(topk_ids, Routing) != (topk_weights is None):
        expected = "None beside a Routing, a tensor beside ids"
        raise InputError("experts.topk_weights", expected, type(topk_weights).__name__)
    for name, matrix in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if not isinstance(matrix, (torch.Tensor, QuantizedWeight)):
            raise InputError(f"experts.{name}", "a torch.Tensor or a QuantizedWeight", type(matrix).__name__)
    lora = pair_of("gate_up_lora", gate_up_lora) + pair_of("down_lora", down_lora)
    shared_lora = pair_of("shared_gate_up_lora", shared_gate_up_lora)
    shared_lora += pair_of("shared_down_lora", shared_down_lora)
    if torch._C._is_any_autocast_enabled() and isinstance(x, torch.Tensor):
        x, gate_up_proj, down_proj, gate_up_bias, down_bias, *rest = autocast(
            x, gate_up_proj, down_proj, gate_up_bias, down_bias, constant_experts, constant_gates,
            shared_gate_up_proj, shared_down_proj, shared_gate_up_bias, shared_down_bias, *shared_lora, *lora,
        )  # fmt: skip
        constant_experts, constant_gates, shared_gate_up_proj, shared_down_proj, *rest = rest
        shared_gate_up_bias, shared_down_bias, *rest = rest
        shared_lora, lora = rest[:4], rest[4:]
    light, first = Light(zero_experts, copy_experts, constant_experts, constant_gates), gate_up_proj.shape[0]
    by_light: tuple[Any, Any] = (None, None)
    checked: Any = bool(validate)
    if light.count:
        light.check(x)
        given = (topk_ids, topk_weights, x, first, light.count)
        (topk_ids, topk_weights), by_light = beside_light(*given, validate=checked)
        checked = checked and "adapters"
    settings = (activation, transposed, interleaved, recompute, checked, backend)
    tensors = {"x": x, "gate_up": gate_up_proj, "down": down_proj}
    if gate_up_bias is not None:
        tensors["gate_up_bias"] = gate_up_bias
    if down_bias is not None:
        tensors["down_bias"] = down_bias
    if trainable is not None:
        tensors["trains"] = trainable
    tensors |= {name: matrix for name, matrix in zip(LORA, lora, strict=True) if matrix is not None}
    if adapter_ids is not None and (tensors.keys() & {*LORA} or not any(t is not None for t in shared_lora)):
        tensors["adapter_ids"] = adapter_ids
    found = run(tensors, topk_ids, topk_weights, lora_scale, *settings)
    if light.count:
        add: Any = with_light
        if backend == "reference":
            from .reference import reference_light as add
        found = add(found, x, *by_light, first, light)
    more = {"gate_up_bias": shared_gate_up_bias, "down_bias": shared_down_bias, "adapter_ids": adapter_ids}
    more |= dict(zip(LORA, shared_lora, strict=True))
    if shared_gate_up_proj is None is shared_down_proj:
        refuse_alone(shared_weights, more)
        return found
    flipped = is_transposed(x.shape[1], gate_up_proj.shape, down_proj.shape, transposed)
    coded = any(isinstance(m, QuantizedWeight) for m in (shared_gate_up_proj, shared_down_proj))
    flipped = flipped and not coded  # codes are always (out, in)
    gated = math.prod(gate_up_proj.shape) == 2 * math.prod(down_proj.shape)
    layout = {"gated": gated, "flipped": flipped}
    shared = shared_by_token(x, shared_gate_up_proj, shared_down_proj, shared_weights, more, **layout)
    return found + run(*shared, lora_scale, activation, flipped, *settings[2:])


def run(
    tensors: dict[str, Any],
    ids: Any,
    weights: Any,
    lora_scale: float,
    activation: Any,
    transposed: Any,
    interleaved: Any,
    recompute: bool,
    validate: bool | str,
    backend: str,
) -> torch.Tensor:
    """`experts`, its arguments by the kernels' names. validate: "adapters" checks the ids of these alone."""
    if torch.compiler.is_compiling() or is_traced(tensors.values()):
        settings = (activation, transposed, interleaved, recompute, validate, backend)
        return traced(tensors, ids, weights, lora_scale, *settings)
    x, layer = tensors["x"], layer_by_name(tensors, transposed, interleaved, lora_scale)
    _check_backend(backend, x)
    if isinstance(ids, Routing):
        ids.check(x.shape[0], layer.experts, x.device, validate=validate is True)
        given = ids.operands()
    else:
        names = ("experts.topk_ids", "experts.topk_weights")
        check_routing(names, ids, weights, x.shape[0], layer.experts, validate=validate is True)
        for name, tensor in zip(names, (ids, weights), strict=True):
            if tensor.device != x.device:
                raise InputError(name, f"a tensor on {x.device}, as x is", tensor.device)
        given = {"ids": ids, "weights": weights}
    if validate:
        check_adapter_ids(layer)
    term = activation_term(activation, gated=layer.gated)
    if backend == "reference":
        from .reference import reference_experts

        return reference_experts(x, given, layer, term)
    return compute(x, given, layer, term, bool(recompute))


def traced(
    tensors: dict[str, Any],
    ids: Any,
    weights: Any,
    lora_scale: float,
    activation: Any,
    transposed: Any,
    interleaved: Any,
    recompute: bool,
    validate: bool | str,
    backend: str,
) -> torch.Tensor:
    """`run` where torch watches: one operator. Dynamo reads every line of this."""
    if backend not in ("auto", "tvm", "triton"):
        raise UnsupportedError(f'experts.backend={backend!r} inside a tracer of torch. Pass "auto"')
    given = ids.operands() if isinstance(ids, Routing) else {"ids": ids, "weights": weights}
    up, down = tensors["gate_up"], tensors["down"]
    named, keys = {**tensors, **given}, []
    for name, matrix in (("gate_up", up), ("down", down)):
        keys.append(None if isinstance(matrix, torch.Tensor) else matrix.key)
        if not isinstance(matrix, torch.Tensor):
            del named[name]
            named |= matrix.parts(name)
    gated = True if up.shape[1] * up.shape[2] == 2 * down.shape[1] * down.shape[2] else False  # noqa: SIM210
    facts = (
        ("activation", activation if isinstance(activation, str) else (_term_of(activation, gated),)),
        ("transposed", transposed),
        ("interleaved", bool(interleaved)),
        ("recompute", bool(recompute)),
        ("validate", validate),
        ("quantized", tuple(keys)),
    )
    form = MoeForm("experts", tuple(named), (), ("lora_scale",), facts, learns(list(named.values())))
    return call(form, list(named.values()), (), (float(lora_scale),))[0]


@pure
def _term_of(activation: Any, gated: bool) -> Any:
    return activation_term(activation, gated=gated)


def compute(x: Any, given: dict[str, Any], layer: Layer, term: Any, recompute: bool) -> torch.Tensor:
    """The layer by compiled kernels, for checked arguments. given: ids and weights, or a list of rows."""
    if x.stride(1) != 1 and x.shape[1] > 1:
        x = x.contiguous()
    needed = (x, given["weights"], *layer.tensors.values())
    if torch.is_grad_enabled() and any(t.requires_grad for t in needed):
        from .autograd import differentiable

        return differentiable(x, given, layer, term, recompute)
    if x.shape[0] == 0 or given["weights"].numel() == 0:
        return torch.zeros_like(x)
    return forward(x, given, layer, term)[0]


def forward(x: Any, given: dict[str, Any], layer: Layer, term: Any, *, keeps: bool = False) -> Any:
    """The result and, if asked for, what the activation was taken of, by row. There is at least one row.

    given: ids and weights; tokens, bounds, place and weights by token; or these with starts, by row."""
    top_k = given["weights"].shape[1] if "starts" not in given else 0
    flat = {name: tensor.detach().reshape(-1).contiguous() for name, tensor in given.items()}
    values = {"x": x.detach(), **flat, **{name: tensor.detach() for name, tensor in layer.tensors.items()}}
    values |= layer.choices
    outputs = (("o", tuple(x.shape), x.dtype),)
    if keeps:
        rows = flat.get("tokens", flat["weights"]).shape[0]
        outputs += (("g", (rows, layer.columns), x.dtype),)
    asked = (top_k, term, "ids" not in given, keeps)
    return launch("experts", values, outputs, layer, asked)


def launch(
    what: str,
    values: dict[str, Any],
    outputs: tuple[tuple[str, tuple[int, ...], Any], ...],
    layer: Layer,
    asked: tuple[int, Any, bool, bool],
    wanted: tuple[str, ...] = (),
) -> tuple[torch.Tensor, ...]:
    """The outputs of the kernels of a layer, "experts", or of its "gradients", those of `wanted` inputs.

    asked: top_k, the activation's term, and whether rows are sorted and products kept already."""
    x = values["x"]
    facts = (asked, wanted, layer.halves, layer.transposed, layer.units, layer.quantized)
    facts += (
        layer.lora_scale,
        layer.trains is not None,
        precision_of(x.device, dtype_of(x)),
    )
    key = (what, facts, tuple((name, _signature(t)) for name, t in values.items()))
    plans = driver().plans
    plan = plans.get(key)
    if plan is None:
        plan = _plan(what, values, outputs, layer, asked, wanted)
        plans.put(key, plan)
    return plan(values)


def _plan(
    what: str,
    values: dict[str, Any],
    outputs: Any,
    layer: Layer,
    asked: tuple[Any, ...],
    wanted: tuple[str, ...],
) -> Plan:
    from ...runtime.executable import Contiguous
    from ..prepare import allocate

    device = values["x"].device
    executable = layer_executable(what, values, layer, asked, wanted)
    stand_ins = {name: Contiguous(shape) for name, shape, _ in outputs}
    bound = executable.bind({**values, **stand_ins}, allocate=partial(allocate, device=device))
    return Plan(bound, outputs, device)


def _check_backend(backend: Any, x: Any) -> None:
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise InputError("experts.backend", f"one of {', '.join(BACKENDS)}", repr(backend))
    if x.device.type not in BACKENDS[backend]:
        kinds = " or ".join(BACKENDS[backend])
        raise InputError("experts.backend", f"{kinds} tensors for {backend!r}", x.device, 'Pass "auto"')


def moe(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    gate_up_proj: torch.Tensor | QuantizedWeight,
    down_proj: torch.Tensor | QuantizedWeight,
    *,
    top_k: int,
    router: str | Callable[..., Any] = "softmax",
    activation: str | Callable[..., Any] = "swiglu",
    **options: Any,
) -> torch.Tensor:
    """A mixture of experts: `route` decides from the logits, `experts` computes.

    Args:
        x: (T, H). router_logits: (T, E), any float dtype. gate_up_proj, down_proj, activation: as for
            `experts`. top_k: experts a token, 1 to E. router: as for `route`.
        options: of `route` and of `experts`, by name.

    Returns (T, H) in x's dtype. Raises as those two do.
    """
    known = {name: options.pop(name) for name in ROUTING if name in options}
    shaped = isinstance(x, torch.Tensor) and isinstance(gate_up_proj, (torch.Tensor, QuantizedWeight))
    if shaped and isinstance(router_logits, torch.Tensor) and router_logits.dim() == 2:
        light = Light(*(options.get(name, default) for name, default in LIGHT))
        given = [(0, x.shape[0]), (1, gate_up_proj.shape[0] + light.count)]
        for where, wanted in given[: 1 if known.keys() & {"expert_vectors", "remap"} else 2]:
            if router_logits.shape[where] != wanted:
                what = f"{wanted} {'tokens, as x has' if where == 0 else 'experts, as gate_up_proj has'}"
                raise InputError("moe.router_logits", what, router_logits.shape[where])
    chosen = route(router_logits, top_k, router=router, **known)
    return experts(x, chosen, None, gate_up_proj, down_proj, activation=activation, **options)


LIGHT = (("zero_experts", 0), ("copy_experts", 0), ("constant_experts", None), ("constant_gates", None))
ROUTING = frozenset(inspect.signature(route).parameters) - {"router_logits", "top_k", "router"}
