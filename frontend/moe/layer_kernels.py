"""The compiled kernels of layers of experts and of their routers, whatever library the tensors are from."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ...runtime.driver import get_or_compile
from ..device import makes_descriptors, precision_of, target_of
from ..problem import is_aligned
from ..term import Term
from ..trace.tensor import dtype_name
from .layer import Layer, decoded_once, is_handful, is_layer_aligned, load_of

if TYPE_CHECKING:
    from ...ir.kernel import Program
    from ...runtime.driver import Executable

SINGLE = 512  # entries that one program sorts


def dtype_of(tensor: Any) -> str:
    """The dtype of a tensor of any library, or of a `Strided`, by its name in the IR."""
    return tensor.dtype if isinstance(tensor.dtype, str) else str(dtype_name(tensor.dtype))


# layers ---------------------------------------------------------------------------------------------


def layer_executable(
    what: str,
    values: Mapping[str, Any],
    layer: Layer,
    asked: tuple[int, Term, bool, bool],
    wanted: tuple[str, ...] = (),
) -> Executable:
    """The kernels of a layer, "experts", or of its "gradients", those of `wanted` inputs.

    values: the tensors by the kernels' names. asked: top_k, the activation's term, and whether rows are
    sorted and products kept already."""
    x, (top_k, term, routed, keeps) = values["x"], asked
    rows = values["tokens"] if routed else values["ids"]
    target, entries = target_of(x.device), rows.shape[0]
    mean, dtype = entries / layer.experts, dtype_of(x)
    alone = what == "experts" and not routed and is_handful(x.shape[0], entries, layer.experts)
    load = "one" if alone else load_of(mean, x.device)
    facts = {
        "experts": layer.experts,
        "top_k": top_k,
        "hidden": layer.hidden,
        "inner": layer.inner,
        "halves": layer.halves,
        "dtype": dtype,
        "transposed": layer.transposed,
        "units": layer.units,
        "biased": layer.gate_up_bias is not None,
        "routing": ("i32" if routed else dtype_of(rows), dtype_of(values.get("weights", x))),
        "load": load,
        "single": entries <= SINGLE and not routed,
        "routed": routed and top_k > 0,
        "keeps": keeps,
        "ranks": layer.ranks,
        "lora_scale": layer.lora_scale,
        "adapters": dtype_of(layer.adapter_ids) if layer.choices else None,
        "masked": layer.trains is not None,
        "quantized": layer.quantized,
        "once": decoded_once(layer, mean, dtype, target) if load == "many" else (False, False),
        "aligned": is_layer_aligned(x, layer),
        "descriptors": makes_descriptors(x.device),
        "precision": precision_of(x.device, dtype),
    }

    def make() -> Program:
        from ...ir.quantized import Quantized
        from ...passes.moe.pipeline import compile_experts, compile_gradients
        from ...passes.moe.spec import ExpertsSpec
        from ..term_expr import to_expr

        expr = to_expr(term, frozenset(("x0", "x1")))
        stored = tuple(key and Quantized(*key) for key in layer.quantized)
        spec = ExpertsSpec(activation=expr, target=target, **{**facts, "quantized": stored})
        return compile_gradients(spec, wanted) if what == "gradients" else compile_experts(spec)

    return get_or_compile((what, term, wanted, tuple(facts.items())), make, target)


def groups_facts(experts: int, top_k: int, ids: Any) -> tuple[Any, ...]:
    """What kernels that sort ids (entries,), of top_k each token, by expert depend on."""
    return experts, top_k, dtype_of(ids), ids.shape[0] <= SINGLE, target_of(ids.device)


def groups_program(facts: tuple[Any, ...]) -> Program:
    """ids -> tokens, bounds, place."""
    from ...ir.expr import real
    from ...passes.moe.pipeline import compile_groups
    from ...passes.moe.spec import ExpertsSpec

    experts, top_k, dtype, single, target = facts
    sizes = (experts, top_k, 1, 1, real("x0"), None)
    return compile_groups(ExpertsSpec(*sizes, routing=(dtype, "f32"), single=single, target=target))


def groups_executable(experts: int, top_k: int, ids: Any) -> Executable:
    facts = groups_facts(experts, top_k, ids)
    return get_or_compile(("groups", facts), partial(groups_program, facts), facts[-1])


def product_executable(
    a: Any,
    sizes: tuple[int, int, int],
    unit: int | None,
    load: str,
    *,
    biased: bool,
    outer: bool,
    aligned: bool,
) -> Executable:
    """One product by groups: a, w, bounds (, bias) -> o, or, if `outer`, a, b, bounds -> o.

    sizes: groups and the extents of their matrices. unit: which dimension of w has stride 1."""
    dtype, target = dtype_of(a), target_of(a.device)
    precision = precision_of(a.device, dtype)
    described = makes_descriptors(a.device)
    facts = (unit, load, biased, outer, aligned, described)

    def make() -> Program:
        from ...ir.expr import real
        from ...passes.moe.pipeline import compile_product
        from ...passes.moe.spec import ExpertsSpec

        groups, hidden, inner = sizes
        spec = ExpertsSpec(
            groups, 1, hidden, inner, real("x0"), None, dtype=dtype, units=(unit, unit), load=load,
            aligned=aligned, descriptors=described, precision=precision, target=target,
        )  # fmt: skip
        return compile_product(spec, outer=outer, biased=biased)

    return get_or_compile(("product", sizes, facts, dtype, precision), make, target)


def are_rows_aligned(tensor: Any) -> bool:
    """Whether GPU kernels may read rows of a tensor in pieces of 16 bytes; those of CPUs do not ask."""
    return tensor.device.type == "cpu" or (
        is_aligned(tensor) and tensor.shape[-1] * tensor.element_size() % 16 == 0
    )
