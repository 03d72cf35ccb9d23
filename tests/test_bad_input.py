"""Wrong arguments of the public functions: each error names what was expected, what came, and what to do."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import gossamer
from gossamer import masks
from gossamer.ir.errors import GossamerError, InputError, UnsupportedError

torch = pytest.importorskip("torch")
forward_ad = pytest.importorskip("torch.autograd.forward_ad")

Q, K, V = torch.randn(3, 1, 4, 20, 16)
TABLE = torch.zeros(3, 20)


def refuses(error: type[GossamerError], *words: str) -> Any:
    """Expects an error whose message holds these words in this order."""
    return pytest.raises(error, match=".*".join(map(re.escape, words)))


# ---- attention ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((Q[0], K, V), ("query: expected 4 dimensions (batch, heads, length, size)", "(4, 20, 16)")),
        ((Q, K[0], V), ("key: expected 4 dimensions", "(4, 20, 16)")),
        ((Q.numpy(), K, V), ("query: expected a torch.Tensor; got ndarray", "torch.from_numpy")),
        ((Q.int(), K, V), ("query: expected float16, bfloat16, float32 or float64; got torch.int32",)),
        ((Q, K.half(), V), ("key: expected the query's dtype torch.float32; got torch.float16", "Cast")),
        ((Q, K, V.to("meta")), ("value: expected a tensor on the CPU or a CUDA GPU; got meta",)),
        ((Q.to_sparse(), K, V), ("query: expected a strided tensor", "to_dense()")),
        ((Q[..., :0], K[..., :0], V), ("query: expected a head size from 1 to 1024; got 0",)),
        ((Q, K[..., :8], V), ("key: expected the query's head size 16", "got 8")),
        ((Q, K[:, :, :9], V), ("value: expected (B, Hk, kv_len, Dv) = (1, 4, 9)", "got (1, 4, 20, 16)")),
        ((Q.expand(2, -1, -1, -1), *(x.expand(3, -1, -1, -1) for x in (K, V))), ("batch 2", "got 3")),
        (
            (Q, K[:, :2], V[:, :2]),
            ("key: expected 4 heads", "got 2. Pass enable_gqa=True to share key heads"),
        ),
        ((Q.transpose(1, 2), K, V), ("key: expected 20 heads", "got 4", "pass as x.transpose(1, 2)")),
    ],
)
def test_tensors(arguments: tuple[Any, ...], words: tuple[str, ...]) -> None:
    with refuses(InputError, "attention.", *words):
        gossamer.attention(*arguments)


def test_heads_that_do_not_divide() -> None:
    with refuses(InputError, "attention.key: expected a number of heads that divides the query's 4; got 3"):
        gossamer.attention(Q, K[:, :3], V[:, :3], enable_gqa=True)
    one = Q[:, :, :1]  # as many queries as key heads: no exchanged layout
    assert gossamer.attention(one, K[:, :1], V[:, :1], enable_gqa=True).shape == one.shape


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"mask": 3},
            ("mask: expected a Mask, a mask_mod, a BlockMask, a boolean tensor or None; got int 3",),
        ),
        ({"mask": "causal"}, ("got str 'causal'",)),
        ({"mask": masks.causal}, ("expected a Mask; got the function masks.causal. Call it",)),
        ({"mask": torch.zeros(20, 20)}, ("a boolean tensor", "torch.float32", "score_mod")),
        ({"mask": torch.ones(20, 20).int()}, ("a boolean tensor", "torch.int32", "mask != 0")),
        ({"mask": torch.ones(20, 19) > 0}, ("broadcastable to (1, 4, 20, 20); got shape (20, 19)",)),
        ({"mask": torch.ones(30, 30) > 0}, ("broadcastable to (1, 4, 20, 20); got shape (30, 30)",)),
        ({"mask": torch.ones(3, 20, 20) > 0}, ("broadcastable to (1, 4, 20, 20)", "(3, 20, 20)")),
        ({"mask": torch.ones(1, 1, 1, 20, 20) > 0}, ("(1, 1, 1, 20, 20)",)),
        ({"scale": "small"}, ("attention.scale: expected a number; got 'small'",)),
        ({"scale": torch.ones(2)}, ("attention.scale: expected a number; got a tensor of shape (2,)",)),
        (
            {"backend": "fast"},
            ("attention.backend: expected one of auto, tvm, triton, reference; got 'fast'",),
        ),
        ({"backend": "triton"}, ("attention.backend: expected cuda tensors for 'triton'; got cpu",)),
        ({"schedule": "fast"}, ("attention.schedule: expected a gossamer.Schedule", "got 'fast'")),
        ({"sinks": [0.0]}, ("attention.sinks: expected a torch.Tensor", "got list")),
        ({"sinks": torch.zeros(5)}, ("attention.sinks: expected shape (4,)", "got (5,)")),
        ({"sinks": torch.zeros(4, 1)}, ("attention.sinks: expected shape (4,)", "got (4, 1)")),
        ({"sinks": torch.zeros(4, dtype=torch.int32)}, ("attention.sinks: expected float16", "torch.int32")),
        ({"sinks": torch.zeros(4, device="meta")}, ("attention.sinks: expected a tensor on cpu", "meta")),
        ({"dropout_p": 1.0}, ("attention.dropout_p: expected a number p with 0 <= p < 1; got 1.0",)),
        ({"dropout_p": -0.1}, ("attention.dropout_p", "0 <= p < 1; got -0.1")),
        ({"dropout_p": math.nan}, ("attention.dropout_p", "got nan")),
        ({"dropout_p": torch.zeros(2)}, ("attention.dropout_p", "got tensor([0., 0.])")),
        ({"dropout_p": 0.1, "dropout_seed": 2**64}, ("attention.dropout_seed: expected an integer",)),
        ({"dropout_p": 0.1, "dropout_seed": torch.zeros(2)}, ("attention.dropout_seed: expected an int64",)),
    ],
)
def test_options(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with refuses(InputError, *words):
        gossamer.attention(Q, K, V, **options)


@pytest.mark.parametrize(
    "flag", ["enable_gqa", "return_lse", "return_column_sums", "validate", "deterministic"]
)
@pytest.mark.parametrize("value", [1, "yes", 0.0])
def test_flags_are_truth_values(flag: str, value: Any) -> None:
    with refuses(InputError, f"attention.{flag}", "True", repr(value)):
        gossamer.attention(Q, K, V, **{flag: value})


@pytest.mark.parametrize("seed", ["one", 1.5, torch.zeros(2, dtype=torch.int64), 2**63])
def test_a_seed_is_checked_also_where_nothing_drops_out(seed: Any) -> None:
    with refuses(InputError, "attention.dropout_seed"):
        gossamer.attention(Q, K, V, dropout_seed=seed)


def test_the_reference_has_no_schedules() -> None:
    with refuses(InputError, "attention.schedule", "reference"):
        gossamer.attention(Q, K, V, backend="reference", schedule="tune")


@pytest.mark.parametrize("deterministic", [None, False, True])
def test_every_output_is_deterministic(deterministic: bool | None) -> None:
    out = gossamer.attention(Q, K, V, deterministic=deterministic)
    assert torch.equal(out, gossamer.attention(Q, K, V))


def test_keywords_that_ask_for_nothing_are_fine() -> None:
    out = gossamer.attention(Q, K, V, sinks=None, dropout_p=0.0, q_offset=0, deterministic=False)
    assert torch.equal(out, gossamer.attention(Q, K, V))


def test_a_scale_does_not_learn() -> None:
    scale = torch.tensor(0.3, requires_grad=True)
    with refuses(UnsupportedError, "attention.scale requires a gradient", "score_mod"):
        gossamer.attention(Q, K, V, scale=scale)
    with torch.no_grad():
        assert torch.equal(gossamer.attention(Q, K, V, scale=scale), gossamer.attention(Q, K, V, scale=0.3))


def test_a_mask_does_not_learn() -> None:
    least = torch.zeros(4, requires_grad=True)
    with refuses(UnsupportedError, "c0", "mask captured", "requires a gradient", "tensor.detach()"):
        gossamer.attention(Q, K, V, mask=lambda b, h, q, k: (q - k) * 1.0 >= least[h])


def test_the_reference_has_no_gradients() -> None:
    with refuses(UnsupportedError, 'backend="reference"', "gradient"):
        gossamer.attention(Q.clone().requires_grad_(), K, V, backend="reference")


def test_tangents_are_refused() -> None:
    with (
        forward_ad.dual_level(),
        refuses(UnsupportedError, "attention.key has a tangent", "unpack_dual(key)"),
    ):
        gossamer.attention(Q, forward_ad.make_dual(K, torch.ones_like(K)), V)
    with refuses(UnsupportedError, "attention.query has a tangent"):
        torch.func.jvp(lambda q: gossamer.attention(q, K, V), (Q,), (Q,))


def test_a_negation_that_torch_has_put_off_is_seen() -> None:
    lazy = torch.complex(torch.zeros_like(Q), Q).conj().imag
    assert lazy.is_neg()
    assert torch.equal(gossamer.attention(lazy, K, V), gossamer.attention(lazy.resolve_neg(), K, V))
    two = Q.expand(2, -1, -1, -1)
    assert torch.equal(gossamer.attention(two, lazy, V), gossamer.attention(two, lazy.resolve_neg(), V))


@pytest.mark.parametrize("use", ["gossamer.attention(1, 2, 3)", "gossamer.flex"])
def test_without_torch(use: str) -> None:
    code = f"import sys, gossamer; sys.modules['torch'] = None; {use}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (
        f"{use.partition('(')[0]} needs torch; install it with: pip install 'gossamer[torch]'" in done.stderr
    )


# ---- masks ----


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones(3), ("a matrix of shape (q_len, kv_len); got shape (3,)",)),
        (np.ones((1, 3, 3)), ("a matrix of shape (q_len, kv_len); got shape (1, 3, 3)",)),
        (np.full((3, 3), 2), ("of 0 and 1; got 2 among them. Compare it first",)),
        (torch.full((3, 3), float("nan")), ("of 0 and 1; got nan among them",)),
        (np.array([["a"]]), ("of 0 and 1; got dtype <U1",)),
    ],
)
def test_matrices(array: Any, words: tuple[str, ...]) -> None:
    with refuses(InputError, "from_dense: expected", *words):
        gossamer.Mask.from_dense(array)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: masks.axial((4, 4), "rows"), ("masks.axial.axis", "got 'rows'")),
        (lambda: masks.axial((4, 4), 2), ("an axis of the grid (4, 4); got 2",)),
        (lambda: masks.fixed(4, 5), ("masks.fixed.summary: expected at most the 4 keys of a block; got 5",)),
        (lambda: masks.from_block_mask(3), ("from_block_mask: expected a BlockMask; got int",)),
        (lambda: masks.causal().to_dense(-1, 3), ("Mask.to_dense.q_len: expected an integer", "got -1")),
        (lambda: masks.causal().to_dense(3, 3.5), ("Mask.to_dense.kv_len", "got 3.5")),
        (lambda: masks.causal().analyze(3, 3, b=-1), ("Mask.analyze.b", "got -1")),
    ],
)
def test_masks(make: Any, words: tuple[str, ...]) -> None:
    with refuses(InputError, *words):
        make()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"mask": masks.document(torch.zeros(9, dtype=torch.long))},
            (
                "c0[k] reads outside its tensor: expected c0.shape[0] >= kv_len",
                "got kv_len = 20, c0.shape[0] = 9",
            ),
        ),
        (
            {"mask": masks.document(torch.zeros(0, 30, dtype=torch.long))},
            ("expected c0.shape[0] >= B; got B = 1, c0.shape[0] = 0",),
        ),
        (
            {"mask": masks.causal(), "score_mod": lambda s, b, h, q, k: s + TABLE[h, q - k]},
            (
                "t0[h, q - k] reads outside its tensor: expected t0.shape[0] >= Hq",
                "got Hq = 4, t0.shape[0] = 3",
            ),
        ),
    ],
)
def test_captured_tensors_that_are_too_small(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with refuses(InputError, *words):
        gossamer.attention(Q, K, V, **options)


# ---- compile ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float32"}, ("dtype: expected one of f16, bf16, f32, f64; got 'float32'",)),
        ({"qk_size": "a"}, ("qk_size: expected a head size from 1 to 1024; got 'a'",)),
        ({"qk_size": 64.0}, ("qk_size", "got 64.0")),
        ({"v_size": 0}, ("v_size: expected a head size from 1 to 1024; got 0",)),
        ({"contiguous": True}, ("contiguous: expected three truth values", "got True")),
        ({"return_lse": "yes"}, ("return_lse: expected True or False; got 'yes'",)),
        ({"precision": "fp8"}, ("precision: expected one of ieee, tf32; got 'fp8'",)),
    ],
)
def test_specs(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with refuses(InputError, "AttentionSpec.", *words):
        gossamer.AttentionSpec(**options)


def test_compile_wants_a_spec() -> None:
    with refuses(InputError, "compile.spec: expected an AttentionSpec; got Mask. Write AttentionSpec(mask"):
        gossamer.compile(masks.causal())


@pytest.mark.parametrize("target", ["gpu", "cuda", "cuda:sm_1", "cpu:abacus", "", None])
def test_unknown_targets(target: Any) -> None:
    with refuses(InputError, "target: expected", f"got {target!r}" if target != "cpu:abacus" else "abacus"):
        gossamer.compile(gossamer.AttentionSpec(qk_size=16), target=target)
