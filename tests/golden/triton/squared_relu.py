# squared_relu_attention: emitted by gossamer
# causal attention whose weights are max(q.k * scale, 0) ** 2: no softmax, no normalisation

import triton
import triton.language as tl


@triton.jit
def squared_relu_attention(
    p_q: "*fp32", s_q_0: "i64", s_q_1: "i64", s_q_2: "i64",  # in q[B, H, q_len, 32]
    p_k: "*fp32", s_k_0: "i64", s_k_1: "i64", s_k_2: "i64",  # in k[B, H, kv_len, 32]
    p_v: "*fp32", s_v_0: "i64", s_v_1: "i64", s_v_2: "i64",  # in v[B, H, kv_len, 32]
    p_o: "*fp32", s_o_0: "i64", s_o_1: "i64", s_o_2: "i64",  # out o[B, H, q_len, 32]
    B: "i32", H: "i32", q_len: "i32", kv_len: "i32", scale: "fp32",
):
    pid = tl.program_id(0)
    n_t = (q_len + 15) // 16
    t = pid % n_t
    h = pid // n_t % H
    b = pid // (n_t * H)
    i_i = tl.arange(0, 16)
    i_j = tl.arange(0, 8)
    i_d = tl.arange(0, 32)
    i_e = tl.arange(0, 32)
    r_k_2 = s_k_2.to(tl.int32)
    r_o_2 = s_o_2.to(tl.int32)
    r_v_2 = s_v_2.to(tl.int32)

    # b_row: i32[i 16]
    b_row = 16 * t + i_i
    # b_Q: f32[i 16, d 32]
    b_Q = tl.load(
        p_q
        + b * s_q_0
        + h * s_q_1
        + (tl.minimum(b_row[:, None], q_len - 1).to(tl.int64) * s_q_2 + i_d[None, :]),
    )
    # b_O: f32[i 16, e 32]
    b_O = tl.full([16, 32], 0.0, tl.float32)
    for u in tl.range(0, tl.minimum(2 * t + 2, (kv_len + 7) // 8)):
        # b_col: i32[j 8]
        b_col = 8 * u + i_j
        # b_K: f32[j 8, d 32]
        b_K = tl.load(
            p_k + b * s_k_0 + h * s_k_1 + 8 * u * s_k_2 + (i_j[:, None] * r_k_2 + i_d[None, :]),
            mask=b_col[:, None] < kv_len,
            other=0.0,
        )
        # b_S: f32[i 16, j 8]
        b_S = tl.dot(b_Q, tl.trans(b_K), input_precision="ieee")
        # b_P: f32[i 16, j 8]
        b_P = tl.where(
            b_col[None, :] <= b_row[:, None],
            tl.maximum(scale * b_S, 0.0) * tl.maximum(scale * b_S, 0.0),
            0.0,
        )
        # b_V: f32[j 8, e 32]
        b_V = tl.load(
            p_v + b * s_v_0 + h * s_v_1 + 8 * u * s_v_2 + (i_j[:, None] * r_v_2 + i_e[None, :]),
            mask=b_col[:, None] < kv_len,
            other=0.0,
        )
        b_O = (b_O + tl.sum(b_P[:, :, None] * b_V[None, :, :], axis=1))
    tl.store(
        p_o + b * s_o_0 + h * s_o_1 + 16 * t * s_o_2 + (i_i[:, None] * r_o_2 + i_e[None, :]),
        b_O,
        mask=b_row[:, None] < q_len,
    )


kernel = squared_relu_attention
OPTIONS = {"num_warps": 4, "num_stages": 2}
DIVISORS = {}


def grid(B, H, q_len, **_):
    return (((q_len + 15) // 16) * H * B,)


def bind(q, k, v, o, scale):
    if max(k.stride(2) * 7, o.stride(2) * 15, v.stride(2) * 7, 0) >= 2**31:
        raise OverflowError(
            "squared_relu_attention: a stride is so large that one tile spans 2**31 elements",
        )
    return (
        q, q.stride(0), q.stride(1), q.stride(2),
        k, k.stride(0), k.stride(1), k.stride(2),
        v, v.stride(0), v.stride(1), v.stride(2),
        o, o.stride(0), o.stride(1), o.stride(2),
        q.shape[0], q.shape[1], q.shape[2], k.shape[2], scale,
    )
