"""Kernels for GPUs under XLA: what is lowered, and what jaxlib would launch, on Triton's interpreter."""

import math

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("triton")

import jax.numpy as jnp  # noqa: E402

import gossamer.jax  # noqa: E402
from gossamer import feature_maps, masks  # noqa: E402
from gossamer.frontend.jax import cpu as jax_cpu  # noqa: E402
from gossamer.frontend.jax import gpu as jax_gpu  # noqa: E402
from gossamer.frontend.jax import kernels as jax_kernels  # noqa: E402
from gossamer.frontend.jax import layer as jax_layer  # noqa: E402
from gossamer.frontend.jax import linear as jax_linear  # noqa: E402
from gossamer.frontend.jax.attention import call_of  # noqa: E402
from gossamer.frontend.jax.call import GradientCall  # noqa: E402
from gossamer.frontend.jax.gradient import _shapes  # noqa: E402
from gossamer.frontend.jax.primitive import shapes_of  # noqa: E402
from gossamer.frontend.mask import Mask  # noqa: E402
from gossamer.frontend.moe.activation import activation_term  # noqa: E402
from gossamer.frontend.score import ScoreMod  # noqa: E402
from gossamer.ir.errors import InputError, UnsupportedError  # noqa: E402
from gossamer.runtime import xla_gpu  # noqa: E402
from gossamer.runtime.driver import reset  # noqa: E402
from gossamer.tests import fake_jaxlib as FAKE  # noqa: E402

TARGET = "cuda:sm_90"


@pytest.fixture(params=["Library", "Described"])
def library(request, monkeypatch, tmp_path):
    """jaxlib without and with tensor descriptors; kernels are compiled anew, so that it learns their text."""
    monkeypatch.setenv("GOSSAMER_CACHE_DIR", str(tmp_path))
    reset()
    made = FAKE.install(monkeypatch, getattr(FAKE, request.param)())
    with gossamer.jax.lowering_for(TARGET):
        yield made
    reset()


@pytest.fixture
def launched(library, monkeypatch):
    """The same, and what is lowered runs at once."""

    def launch(target, *args, **options):
        return library.launch(*args, **options)

    def bind(*operands, call):
        results = jax_kernels._shapes(call, operands)
        return jax_gpu.run(jax_kernels.KERNELS.prepare, call, operands, results)

    monkeypatch.setattr(jax_gpu, "_ffi_call", launch)
    monkeypatch.setattr(jax_kernels.kernels_p, "bind", bind)
    return library


def arrays(q_len, kv_len, heads=2, kv_heads=1, size=32, batch=2, dtype=np.float16):
    g = np.random.default_rng()
    shapes = (batch, q_len, heads, size), *((batch, kv_len, kv_heads, size),) * 2
    return tuple(g.standard_normal(shape).astype(dtype) for shape in shapes)


def exact(q, k, v, mask, score=lambda s: s):
    """(out, lse) in float64 by the formula; mask: an array, or a function of query and key."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = score(np.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[-1]))
    if callable(mask):
        mask = mask(np.arange(q.shape[1])[:, None], np.arange(k.shape[1]))
    scores = np.where(mask, scores, -np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        top = scores.max(-1, keepdims=True)
        top = np.where(np.isfinite(top), top, 0)
        p = np.exp(scores - top)
        total = p.sum(-1, keepdims=True)
        p = np.where(total > 0, p / total, 0)
        return np.einsum("bnts,bsnh->btnh", p, v), (np.log(total) + top)[..., 0], p


def run(q, k, v, mask, score=None, **options):
    call, operands = call_of((q, k, v), Mask.of(mask), ScoreMod.of(score), return_lse=True, **options)
    return jax_gpu.run(jax_cpu.ATTENTION.prepare, call.text, operands, shapes_of(call, operands))


def near(found, wanted, dtype):
    """Within what rounding of the products and the result may do to numbers of about one."""
    tolerance = {np.float16: 1e-2, np.float32: 1e-4}[dtype]
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, atol=tolerance, rtol=tolerance)


MASKS = {
    "window": (masks.sliding_window(7, 2), lambda q, k: (q - 7 <= k) & (k <= q + 2)),
    "strided": (masks.strided(4, 6), lambda q, k: (abs(q - k) < 6) | ((q - k) % 4 == 0)),
    "longformer": (masks.longformer(5, 3), lambda q, k: (abs(q - k) <= 5) | (q < 3) | (k < 3)),
}


@pytest.mark.parametrize("name, dtype", [("strided", np.float32), ("longformer", np.float16)])
def test_forward(launched, name, dtype):
    q, k, v = arrays(43, 57, dtype=dtype)
    mask, dense = MASKS[name]
    out, lse = run(q, k, v, mask)
    wanted = exact(q, k, v, dense)
    assert out.dtype == dtype and launched.launched
    near(out, wanted[0], dtype)
    near(lse, wanted[1], dtype)


def test_captured_arrays_lengths_and_offsets(launched):
    q, k, v = arrays(5, 40, dtype=np.float32)
    allowed = jnp.asarray(np.random.default_rng().random((2, 40)) < 0.7)
    slope = jnp.array([0.5, 0.25])
    lens, offset = np.array([40, 11]), np.array([35, 6])
    options = dict(where={"kv_lens": jnp.asarray(lens, jnp.int32)}, q_offset=jnp.asarray(offset, jnp.int32))
    out, _ = run(
        q, k, v,
        lambda b, h, i, j: (i >= j) & allowed[b, j],
        lambda s, b, h, i, j: s + slope[h] * j,
        **options,
    )  # fmt: skip
    at, key = np.arange(5)[:, None] + offset[:, None, None], np.arange(40)
    mask = (at >= key) & (key < lens[:, None, None]) & np.asarray(allowed)[:, None]
    bias = np.asarray(slope)[:, None, None] * key
    near(out, exact(q, k, v, mask[:, None], lambda s: s + bias)[0], np.float32)


def test_gradients(launched, dtype=np.float16):
    q, k, v = arrays(37, 37, dtype=dtype)
    do = np.random.default_rng().standard_normal(q.shape).astype(dtype)
    mask, dense = MASKS["window"]
    slope = jnp.array([0.5, 0.25])
    score = ScoreMod.of(lambda s, b, h, i, j: s + slope[h] * (j - i))
    call, operands = call_of((q, k, v), Mask.of(mask), score, return_lse=True)
    out, lse = jax_gpu.run(jax_cpu.ATTENTION.prepare, call.text, operands, shapes_of(call, operands))
    asked = GradientCall(call, ("k", "q", "t0", "v"), False)
    given = (*operands, out, lse, jnp.asarray(do))
    dk, dq, dt, dv = jax_gpu.run(jax_cpu.GRADIENT.prepare, asked.text, given, _shapes(asked.text, given))
    far = np.arange(37) - np.arange(37)[:, None]
    _, _, p = exact(q, k, v, dense, lambda s: s + np.asarray(slope)[:, None, None] * far)
    wide = [x.astype(np.float64) for x in (q, k, v, do)]
    dp = np.einsum("btnh,bsmh->bnts", wide[3], wide[2])
    ds = p * (dp - (p * dp).sum(-1, keepdims=True))
    scale = 1 / math.sqrt(q.shape[-1])
    near(dq, np.einsum("bnts,bsmh->btnh", ds, wide[1]) * scale, dtype)
    near(dk, np.einsum("bnts,btnh->bsh", ds, wide[0])[:, :, None] * scale, dtype)
    near(dv, np.einsum("bnts,btnh->bsh", p, wide[3])[:, :, None], dtype)
    near(dt.sum(0), np.einsum("bnts,ts->n", ds, far), dtype)
    assert len(launched.launched) >= 3


@pytest.mark.parametrize("library", ["Library"], indirect=True)
def test_experts_and_their_gradients(launched):
    """At once, as they would be lowered."""
    experts, hidden, inner, tokens = 4, 32, 16, 21
    g = np.random.default_rng(0)
    up, down = g.standard_normal((experts, 2 * inner, hidden)), g.standard_normal((experts, hidden, inner))
    x, do = g.standard_normal((2, tokens, hidden))
    ids, w = g.integers(-1, experts + 1, (tokens, 2)), g.random((tokens, 2))
    term = activation_term("swiglu", gated=True)
    sizes = jax_layer.Sizes(experts, hidden, inner, True, False, False, False, term)
    names = {"x": x, "weights": w, "gate_up": up / 6, "down": down / 4}
    inputs = {name: jnp.asarray(a, jnp.float32) for name, a in names.items()}
    arrays = inputs | jax_layer.groups(jnp.asarray(ids, jnp.int32), experts)
    found = jax_layer._forward(sizes, arrays, keeps=True)

    def plain(x, weights, gate_up, down):
        gate, value = jnp.split(jnp.einsum("th,ech->tec", x, gate_up), 2, -1)
        y = jnp.einsum("tei,ehi->teh", jax.nn.silu(gate) * value, down)
        return jnp.einsum("tk,tke,teh->th", weights, jax.nn.one_hot(ids, experts), y)

    out, back = jax.vjp(lambda given: plain(**given), inputs)
    near(found["o"], out, np.float32)
    do = jnp.asarray(do, jnp.float32)
    made = jax_layer._gradients(sizes, arrays, found["g"], do, tuple(sorted(names)))
    for name, true in back(do)[0].items():
        near(made[name], true, np.float32)
    assert len(launched.launched) >= 7


@pytest.mark.parametrize("library", ["Library"], indirect=True)
@pytest.mark.parametrize("causal", [True, False])
def test_linear_attention_and_its_gradients(launched, causal):
    """At once, as they would be lowered."""
    q, k, v = (jnp.asarray(x) for x in arrays(45, 45, 2, 2, 16, dtype=np.float32))
    maps = feature_maps.NAMED["elu"].key
    form = ("BTNH", maps, maps, causal, 1e-3, False, False)

    def plain(q, k, v):
        fq, fk = (jax.nn.elu(x) + 1 for x in (q, k))
        scores = jnp.einsum("btnf,bsnf->bnts", fq, fk)
        scores = jnp.tril(scores) if causal else scores
        return jnp.einsum("bnts,bsnh->btnh", scores / (scores.sum(-1, keepdims=True) + 1e-3), v)

    operands = {"q": q, "k": k, "v": v}
    found = jax_linear._forward(form, operands, keeps=True)
    out, back = jax.vjp(plain, q, k, v)
    near(found["o"], out, np.float32)
    kept = {n: x for n, x in found.items() if n in jax_linear._settings(form).kept}
    made = jax_linear._gradients(form, operands, kept, [q], ("q", "k", "v"))
    for name, true in zip(("q", "k", "v"), back(q), strict=True):
        near(made[name], true, np.float32)
    assert len(launched.launched) >= 3


def test_the_lowered_program_holds_our_calls(library):
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((2, 512, 8, 64), *((2, 512, 2, 64),) * 2)]

    def loss(q, k, v):
        return gossamer.jax.attention(q, k, v, mask=masks.sliding_window(100, 0)).astype(jnp.float32).sum()

    text = _lowered(jax.grad(loss, argnums=(0, 1, 2)), *shapes)
    assert text.count(f"@{xla_gpu.TARGET}(") == 3
    assert "(%arg0, %arg1, %arg2)" in text
    assert "(tensor<2x512x8x64xbf16>, tensor<2x8x512xf32>)" in text, "output and LSE"
    assert "transpose" not in text, "kernels index arrays as they lie"
    layer = gossamer.jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True))
    lowered = layer.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count(f"@{xla_gpu.TARGET}(") == 1 and "dot_general" not in lowered


def _lowered(function, *shapes):
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def test_under_vmap_and_scan(library):
    x = jax.ShapeDtypeStruct((3, 1, 128, 2, 64), jnp.bfloat16)

    def layer(x, _):
        return gossamer.jax.attention(x, x, x, mask=masks.causal()), None

    text = _lowered(jax.vmap(lambda x: jax.lax.scan(layer, x, length=4)[0]), x)
    assert text.count(f"@{xla_gpu.TARGET}(") == 1 and "tensor<3x128x2x64xbf16>" in text


def test_without_programs_nothing_is_launched(launched):
    q, k, v = arrays(0, 16)
    out, lse = run(q, k, v, masks.causal())
    assert out.shape == q.shape and lse.shape == (2, 2, 0) and not launched.launched


def test_what_is_missing_is_named(monkeypatch):
    x = jax.ShapeDtypeStruct((1, 64, 2, 32), jnp.float32)

    def layer(x):
        return gossamer.jax.attention(x, x, x)

    with pytest.raises(UnsupportedError, match=r"no GPU is here .*lowering_for"):
        _lowered(layer, x)
    with (
        pytest.raises(InputError, match="lowering_for: expected one of cuda:sm_80"),
        gossamer.jax.lowering_for("cpu"),
    ):
        pass

    class Bare:
        pass

    monkeypatch.setattr("jaxlib.gpu_triton.TritonKernel", Bare, raising=False)
    monkeypatch.delattr("jaxlib.gpu_triton.TritonKernel")
    with gossamer.jax.lowering_for(TARGET), pytest.raises(UnsupportedError, match="CUDA plugin"):
        _lowered(layer, x)
