# window_attention: emitted by gossamer
# softmax attention within abs(q - k) <= p0, grouped heads, output and log-sum-exp

import triton
import triton.language as tl


@triton.jit
def window_attention(
    p_q: "*fp32", s_q_0: "i64", s_q_1: "i64", s_q_2: "i64",  # in q[B, Hq, q_len, 40]
    p_k: "*fp32", s_k_0: "i64", s_k_1: "i64", s_k_2: "i64",  # in k[B, Hk, kv_len, 40]
    p_v: "*fp32", s_v_0: "i64", s_v_1: "i64", s_v_2: "i64",  # in v[B, Hk, kv_len, 24]
    p_o: "*fp32", s_o_0: "i64", s_o_1: "i64", s_o_2: "i64",  # out o[B, Hq, q_len, 24]
    p_lse: "*fp32", s_lse_0: "i64", s_lse_1: "i64",  # out lse[B, Hq, q_len]
    B: "i32", Hq: "i32", q_len: "i32", Hk: "i32", kv_len: "i32", p0: "i32", scale: "fp32",
):
    pid = tl.program_id(0)
    n_t = (q_len + 15) // 16
    t = pid % n_t
    h = pid // n_t % Hq
    b = pid // (n_t * Hq)
    i_i = tl.arange(0, 16)
    i_j = tl.arange(0, 8)
    i_d = tl.arange(0, 64)
    m_d = i_d < 40
    i_e = tl.arange(0, 32)
    m_e = i_e < 24
    r_k_2 = s_k_2.to(tl.int32)
    r_o_2 = s_o_2.to(tl.int32)
    r_v_2 = s_v_2.to(tl.int32)

    hk = h // (Hq // Hk)
    # b_row: i32[i 16]
    b_row = 16 * t + i_i
    # b_Q: f32[i 16, d 64]
    b_Q = tl.load(
        p_q
        + b * s_q_0
        + h * s_q_1
        + (tl.minimum(b_row[:, None], q_len - 1).to(tl.int64) * s_q_2 + i_d[None, :]),
        mask=m_d[None, :],
        other=0.0,
    )
    b_Q = 1.4426950408889634 * scale * b_Q
    # b_m: f32[i 16]
    b_m = tl.full([16], float("-inf"), tl.float32)
    # b_l: f32[i 16]
    b_l = tl.full([16], 0.0, tl.float32)
    # b_O: f32[i 16, e 32]
    b_O = tl.full([16, 32], 0.0, tl.float32)
    for u in tl.range(
        tl.maximum(0, 16 * t - p0 >> 3),
        tl.minimum(p0 + 16 * t + 23 >> 3, (kv_len + 7) // 8),
    ):
        # b_col: i32[j 8]
        b_col = 8 * u + i_j
        # b_K: f32[j 8, d 64]
        b_K = tl.load(
            p_k + b * s_k_0 + hk * s_k_1 + 8 * u * s_k_2 + (i_j[:, None] * r_k_2 + i_d[None, :]),
            mask=(b_col[:, None] < kv_len) & m_d[None, :],
            other=0.0,
        )
        # b_S: f32[i 16, j 8]
        b_S = tl.dot(tl.where(m_d[None, :], b_Q, 0), tl.trans(b_K), input_precision="ieee")
        if (16 * t + 15 - 8 * u > p0) | (8 * u + 7 - 16 * t > p0) | (8 * u + 8 > kv_len):
            b_S = tl.where(
                (b_col[None, :] < kv_len) & (tl.abs(b_col[None, :] - b_row[:, None]) <= p0),
                b_S,
                float("-inf"),
            )
        # b_peak: f32[i 16]
        b_peak = tl.max(b_S, axis=1)
        b_peak = tl.maximum(b_m, b_peak)
        # b_safe: f32[i 16]
        b_safe = tl.where(b_peak == float("-inf"), 0.0, b_peak)
        # b_alpha: f32[i 16]
        b_alpha = tl.exp2(b_m - b_safe)
        b_m = b_peak
        # b_P: f32[i 16, j 8]
        b_P = tl.exp2(b_S - b_safe[:, None])
        # b_gain: f32[i 16]
        b_gain = tl.sum(b_P, axis=1)
        b_l = b_gain + b_alpha * b_l
        b_O = b_O * b_alpha[:, None]
        # b_V: f32[j 8, e 32]
        b_V = tl.load(
            p_v + b * s_v_0 + hk * s_v_1 + 8 * u * s_v_2 + (i_j[:, None] * r_v_2 + i_e[None, :]),
            mask=(b_col[:, None] < kv_len) & m_e[None, :],
            other=0.0,
        )
        b_O = (b_O + tl.sum(b_P[:, :, None] * b_V[None, :, :], axis=1))
    # b_norm: f32[i 16]
    b_norm = tl.where(b_l == 0.0, 1.0, b_l)
    tl.store(
        p_o + b * s_o_0 + h * s_o_1 + 16 * t * s_o_2 + (i_i[:, None] * r_o_2 + i_e[None, :]),
        b_O / b_norm[:, None],
        mask=(b_row[:, None] < q_len) & m_e[None, :],
    )
    tl.store(
        p_lse + b * s_lse_0 + h * s_lse_1 + 16 * t + i_i,
        tl.where(
            b_l == 0.0,
            float("-inf"),
            0.6931471805599453 * b_m + 0.6931471805599453 * tl.log2(b_norm),
        ),
        mask=b_row < q_len,
    )


kernel = window_attention
OPTIONS = {"num_warps": 4, "num_stages": 2}
DIVISORS = {}


def grid(B, Hq, q_len, **_):
    return (((q_len + 15) // 16) * Hq * B,)


def bind(q, k, v, o, lse, p0, scale):
    if max(k.stride(2) * 7, o.stride(2) * 15, v.stride(2) * 7, 0) >= 2**31:
        raise OverflowError(
            "window_attention: a stride is so large that one tile spans 2**31 elements",
        )
    return (
        q, q.stride(0), q.stride(1), q.stride(2),
        k, k.stride(0), k.stride(1), k.stride(2),
        v, v.stride(0), v.stride(1), v.stride(2),
        o, o.stride(0), o.stride(1), o.stride(2),
        lse, lse.stride(0), lse.stride(1),
        q.shape[0], q.shape[1], q.shape[2], k.shape[1], k.shape[2], p0, scale,
    )
