"""`gossamer.attention`: one fused sparse attention on torch tensors.

The hot path touches keys only: look up the compiled kernel by structure, allocate the outputs,
launch. Building an IR, and importing what that needs, happens behind a miss.
"""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any

from ..ir.errors import InputError, MissingDependencyError, UnsupportedError

try:
    import torch
except ImportError:
    raise MissingDependencyError("torch", "torch", "gossamer.attention") from None
from ..runtime.driver import driver
from .captured import is_array
from .form import Call, Options
from .mask import Mask
from .operators.calls import call_operator
from .operators.learned import look_up
from .operators.rules import autocast, is_traced, wants_gradient
from .placement import NOWHERE, Placement, check_placement, tensors_of
from .plan import recall, serves
from .prepare import number_of, prepare
from .problem import Problem
from .reads import check_reads
from .score import ScoreMod
from .softmax import check_sinks, prob_of
from .trace.value import is_symbolic

EVERY_PAIR = Mask.of(None)
PLAIN_OPTIONS = Options()

# Backends, and the kind of device whose tensors each takes.
BACKENDS = {"auto": ("cpu", "cuda"), "tvm": ("cpu",), "triton": ("cuda",), "reference": ("cpu", "cuda")}


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: Any = None,
    score_mod: Callable[..., Any] | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    prob_mod: Callable[..., Any] | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | torch.Tensor | None = None,
    return_column_sums: bool = False,
    q_offset: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_kv: Any = None,
    block_table: Any = None,
    kv_lens: Any = None,
    deterministic: bool | None = None,
    backend: str = "auto",
    schedule: Any = None,
    validate: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Softmax attention over the pairs of a mask: softmax(scale * q k^T, where mask) v.

    Args:
        query: (B, Hq, q_len, D), float16, bfloat16, float32 or float64, any strides, on a CPU or a CUDA
            GPU, where float32 products round as torch's own may (`torch.set_float32_matmul_precision`).
        key: (B, Hk, kv_len, D), same dtype and device; Hq a multiple of Hk.
        value: (B, Hk, kv_len, Dv).
        mask: a Mask, a `mask_mod(b, h, q_idx, kv_idx)`, a BlockMask, a boolean tensor broadcastable
            to (B, Hq, q_len, kv_len), or None (every pair). True means attend; h is the query head.
            Tensors that it captures are on the query's device, and read at each call.
        score_mod: `score_mod(score, b, h, q_idx, kv_idx)`, applied to scale * q k^T.
        scale: default 1 / sqrt(D).
        enable_gqa: allow Hq != Hk, as PyTorch does.
        return_lse: also return the natural log of the sum of exponentials of the scores.
        prob_mod: `prob_mod(prob, b, h, q_idx, kv_idx)`, applied to the probabilities before they weigh the
            values; what it returns is not normalised again. Pairs that do not attend weigh nothing. One that
            is not prob times something costs a second pass over the scores.
        sinks: (Hq,), any float dtype: one more score for each query head, which takes its part of every
            row's softmax and has no value.
        dropout_p: the probability with which a probability is set to 0; others grow by 1 / (1 - p).
        dropout_seed: an integer, or an int64 tensor of one, from which dropout follows whatever the backend
            and the tiles; default: drawn from the default generator of the query's device.
        return_column_sums: also return what each key gets from all queries: the sum of its probabilities,
            before prob_mod and dropout.
        q_offset: the position of the first query row of each sequence, an integer or an integer tensor (B,):
            mask and maps see q_idx + q_offset.
        kv_lens: (B,) integers: the keys of each sequence; what lies behind them is never read.
        cu_seqlens_q, cu_seqlens_kv: (B + 1,) integers, the bounds of sequences packed one after the other:
            query is (1, Hq, total_q, D), key and value are (1, Hk, total_kv, D), and so are the results.
            Indices count from the start of a sequence; b is its number. Queries behind the last sequence
            have no keys.
        block_table: (B, max_pages) integers: key and value are caches of pages (pages, Hk, page_size, D), and
            key k of sequence b is row k % page_size of page block_table[b, k // page_size]. Needs kv_lens;
            entries behind them may be anything. Another order of dimensions is passed transposed.
        deterministic: whether gradients are bitwise equal over runs, as outputs always are: True or False,
            or None for where it costs little, and everywhere under torch.use_deterministic_algorithms(True).
        backend: "auto" (CPU: "tvm", GPU: "triton"), either by name, or "reference" (dense, float64, slow).
        schedule: a Schedule, or one a group, in place of the default, or their text as `gossamer explain`
            prints it; "tune" for the fastest of a few on this device, timed once (see `gossamer.tune`).
        validate: on a GPU, also check what only the contents of tensors tell (an index of a captured tensor,
            lengths, bounds and pages out of range), which waits for the device. Without it what is read is
            clamped into the tensor. On a CPU the checks are always made.

    Returns:
        (B, Hq, q_len, Dv) in the query's dtype, on its device; with return_lse also (B, Hq, q_len), of the
        scores alone; with return_column_sums also (B, Hq, kv_len), last; both float32 (float64 for float64).
        Rows without any pair are zeros with an LSE of -inf.

    Raises:
        InputError: a shape, dtype, device or value is wrong. UnsupportedError: a gradient, or something
        else that is not built yet, is asked for. TraceError: a mask_mod, score_mod or prob_mod cannot be
        captured.
    """
    flags = {"enable_gqa": enable_gqa, "return_lse": return_lse, "return_column_sums": return_column_sums}
    _check_flags(flags | {"validate": validate}, deterministic)
    if deterministic is None and _torch_is_deterministic():
        deterministic = True
    where = (q_offset, cu_seqlens_q, cu_seqlens_kv, block_table, kv_lens)
    extra: tuple[str, ...] = ("lse",) if return_lse else ()
    extra += ("column_sums",) if return_column_sums else ()
    options = Options(enable_gqa, extra, backend, schedule, validate, deterministic)
    found = run(
        query, key, value, mask, score_mod, scale, options, sinks, (prob_mod, dropout_p, dropout_seed), where
    )
    return found[0] if len(found) == 1 else found


def _torch_is_deterministic() -> bool:
    import torch

    return torch.are_deterministic_algorithms_enabled()


def _check_flags(flags: dict[str, Any], deterministic: Any) -> None:
    for name, flag in flags.items():
        if flag is not True and flag is not False:
            raise InputError(f"attention.{name}", "True or False", repr(flag))
    if deterministic is not None and deterministic is not True and deterministic is not False:
        raise InputError("attention.deterministic", "True, False or None", repr(deterministic))


def _check_backend(backend: str, problem: Problem) -> None:
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise InputError("attention.backend", f"one of {', '.join(BACKENDS)}", repr(backend))
    if problem.device.type not in BACKENDS[backend]:
        kinds = " or ".join(BACKENDS[backend])
        raise InputError(
            "attention.backend",
            f"{kinds} tensors for {backend!r}",
            problem.device,
            'Pass "auto", or move them',
        )


def run(
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    score_mod: Any,
    scale: Any,
    options: Options = PLAIN_OPTIONS,
    sinks: Any = None,
    modified: tuple[Any, Any, Any] = (None, 0.0, None),
    where: tuple[Any, Any, Any, Any, Any] = NOWHERE,
) -> tuple[torch.Tensor, ...]:
    """(out, *options.extra); arguments as `attention` takes them.

    modified: prob_mod, dropout_p and dropout_seed. where: q_offset, cu_seqlens_q, cu_seqlens_kv, block_table
    and kv_lens."""
    if torch.compiler.is_dynamo_compiling():
        from .operators.compiled import traced

        return traced(query, key, value, mask, score_mod, scale, options, sinks, modified, where)
    held, offset = tensors_of(where)
    if sinks is not None:
        held["sinks"] = sinks
    bound = EVERY_PAIR if mask is None else Mask.of(mask)
    prob = prob_of(query, *modified)
    call = Call(bound, ScoreMod.of(score_mod), prob, scale, held, offset, options)
    return dispatch(query, key, value, call, mask if is_array(mask) else None)


def dispatch(query: Any, key: Any, value: Any, call: Call, table: Any = None) -> tuple[torch.Tensor, ...]:
    """(out, *extra) of a captured call, by the operators where torch has to see it, else by its kernel.

    table: the mask, where it was given as a boolean tensor."""
    if torch._C._is_any_autocast_enabled() and all(isinstance(t, torch.Tensor) for t in (query, key, value)):
        query, key, value = autocast(query, key, value)
    tensors = (query, key, value, *call.tensors)
    traced, learns = is_traced(tensors), wants_gradient(tensors)
    if not traced and not learns:
        return launch(query, key, value, call, table)
    if call.options.backend == "reference":
        expected = 'attention: backend="reference" has no gradient, and is not traced'
        raise UnsupportedError(f"{expected}. Call it under torch.no_grad(), outside of torch.compile")
    known = None if traced else look_up(query, key, value, call)
    if known is not None and known.plan is not None:
        return known.plan(known.tensors)
    given = traced or call.held or call.offset is not None or table is not None
    if given or not all(isinstance(t, torch.Tensor) for t in tensors[:3]):
        problem, _ = _checked(query, key, value, call, table)
        _check_backend(call.options.backend, problem)
    if not isinstance(call.scale, (float, NoneType)) and not is_symbolic(call.scale):
        call = call._replace(scale=number_of(call.scale))
    return call_operator(query, key, value, call, known, learns)


def launch(query: Any, key: Any, value: Any, call: Call, table: Any = None) -> tuple[torch.Tensor, ...]:
    """(out, *extra) by a compiled kernel. table: the mask, where it was given as a boolean tensor."""
    options = call.options
    if options.backend == "reference":
        return _reference(query, key, value, call, table)
    plans = driver().plans
    known = recall(plans, {"q": query, "k": key, "v": value, **call.held}, call)
    if known.plan is not None:
        return known.plan(known.tensors)
    problem, sums = _checked(query, key, value, call, table)
    placed = Placement.of(problem, *call.where, sums=sums)
    _check_backend(options.backend, problem)
    settings = (options.schedule, options.validate, call.softmax, placed, known.tensors)
    plan, values = prepare(problem, call.mask, call.score, call.scale, options.extra, *settings)
    found = plan(values)
    if known.key is not None and not options.validate and serves(values, known.tensors):
        plans.put(known.key, plan)
    return found


def _checked(query: Any, key: Any, value: Any, call: Call, table: Any) -> tuple[Problem, bool]:
    """The problem of a call whose shapes and dtypes fit, and whether column sums are asked for."""
    problem = Problem(query, key, value, call.options.enable_gqa, paged="block_table" in call.held)
    sums = "column_sums" in call.options.extra
    check_placement(problem, *call.where, sums=sums)
    problem.check_mask(table)
    check_sinks(problem, call.held.get("sinks"))
    return problem, sums


def _reference(query: Any, key: Any, value: Any, call: Call, table: Any) -> tuple[torch.Tensor, ...]:
    from .reference import reference_attention

    problem, sums = _checked(query, key, value, call, table)
    placed = Placement.of(problem, *call.where, sums=sums)
    if call.options.schedule is not None:
        raise InputError(
            "attention.schedule", 'None with backend="reference", which has none', repr(call.options.schedule)
        )
    placed.check_values(problem)
    check_reads(problem, placed, call.mask, call.score, call.prob)
    out, *rows = reference_attention(problem, call.mask, call.score, call.scale, call.softmax, placed)
    results: dict[str, torch.Tensor] = dict(zip(("lse", "column_sums"), rows, strict=True))
    return out, *(results[name] for name in call.options.extra)
