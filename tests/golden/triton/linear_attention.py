# linear_o: emitted by gossamer
# linear_values, forward: 64 features by 64 values
# 64 rows a chunk

import triton
import triton.language as tl


@triton.jit
def floor_div(a, b):
    """a / b rounded down; Triton's // rounds towards zero."""
    return (a - (a % b + b) % b) // b


@triton.jit
def linear_o(
    p_before_k_v_forward: "*fp32", s_before_k_v_forward_0: "i64", s_before_k_v_forward_1: "i64", s_before_k_v_forward_2: "i64", s_before_k_v_forward_3: "i64",  # in before_k_v_forward[B, Hk, segments, 64, 64]
    p_before_k_v_forward_sums: "*fp32", s_before_k_v_forward_sums_0: "i64", s_before_k_v_forward_sums_1: "i64", s_before_k_v_forward_sums_2: "i64",  # in before_k_v_forward_sums[B, Hk, segments, 64]
    p_q: "*bf16", s_q_0: "i64", s_q_1: "i64", s_q_2: "i64",  # in q[B, Hq, L, 64]
    p_k: "*bf16", s_k_0: "i64", s_k_1: "i64", s_k_2: "i64",  # in k[B, Hk, L, 64]
    p_v: "*bf16", s_v_0: "i64", s_v_1: "i64", s_v_2: "i64",  # in v[B, Hk, L, 64]
    p_o: "*bf16", s_o_0: "i64", s_o_1: "i64", s_o_2: "i64",  # out o[B, Hq, L, 64]
    B: "i32", Hk: "i32", segments: "i32", Hq: "i32", L: "i32", span_L: "i32",
):
    pid = tl.program_id(0)
    n_s = floor_div(span_L + (L + 63) // 64 - 1, span_L)
    s = pid % n_s
    h = pid // n_s % Hq
    b = pid // (n_s * Hq)
    i_i = tl.arange(0, 64)
    i_j = tl.arange(0, 64)
    i_m = tl.arange(0, 64)
    i_e = tl.arange(0, 64)
    r_before_k_v_forward_3 = s_before_k_v_forward_3.to(tl.int32)
    r_k_2 = s_k_2.to(tl.int32)
    r_o_2 = s_o_2.to(tl.int32)
    r_q_2 = s_q_2.to(tl.int32)
    r_v_2 = s_v_2.to(tl.int32)

    # b_S0: f32[m 64, e 64]
    b_S0 = tl.load(
        p_before_k_v_forward
        + b * s_before_k_v_forward_0
        + h * s_before_k_v_forward_1
        + s * s_before_k_v_forward_2
        + (i_m[:, None] * r_before_k_v_forward_3 + i_e[None, :]),
    )
    # b_Z0: f32[m 64]
    b_Z0 = tl.load(
        p_before_k_v_forward_sums
        + b * s_before_k_v_forward_sums_0
        + h * s_before_k_v_forward_sums_1
        + s * s_before_k_v_forward_sums_2
        + i_m,
    )
    for u in tl.range(s * span_L, tl.minimum(span_L + s * span_L, (L + 63) // 64)):
        chunk = u
        # b_row: i32[i 64]
        b_row = 64 * chunk + i_i
        # b_X_rows: f32[i 64, m 64]
        b_X_rows = tl.load(
            p_q
            + b * s_q_0
            + h * s_q_1
            + 64 * chunk * s_q_2
            + (i_i[:, None] * r_q_2 + i_m[None, :]),
            mask=b_row[:, None] < L,
            other=0.0,
        ).to(tl.float32)
        # b_X0: bf16[i 64, m 64]
        b_X0 = tl.where(
            b_row[:, None] < L,
            tl.where(b_X_rows > 0.0, 1.0 + b_X_rows, tl.exp(b_X_rows)),
            0.0,
        ).to(tl.bfloat16)
        # b_S0_n: bf16[m 64, e 64]
        b_S0_n = b_S0.to(tl.bfloat16)
        # b_O: f32[i 64, e 64]
        b_O = tl.dot(b_X0, b_S0_n)
        # b_den0: f32[i 64]
        b_den0 = tl.sum(b_X0.to(tl.float32) * b_Z0[None, :], axis=1)
        # b_D: f32[i 64]
        b_D = b_den0
        # b_col: i32[j 64]
        b_col = 64 * chunk + i_j
        giver = h
        # b_F_rows: f32[j 64, m 64]
        b_F_rows = tl.load(
            p_k
            + b * s_k_0
            + giver * s_k_1
            + 64 * chunk * s_k_2
            + (i_j[:, None] * r_k_2 + i_m[None, :]),
            mask=b_col[:, None] < L,
            other=0.0,
        ).to(tl.float32)
        # b_F0: bf16[j 64, m 64]
        b_F0 = tl.where(
            b_col[:, None] < L,
            tl.where(b_F_rows > 0.0, 1.0 + b_F_rows, tl.exp(b_F_rows)),
            0.0,
        ).to(tl.bfloat16)
        # b_G: bf16[j 64, e 64]
        b_G = tl.load(
            p_v
            + b * s_v_0
            + giver * s_v_1
            + 64 * chunk * s_v_2
            + (i_j[:, None] * r_v_2 + i_e[None, :]),
            mask=b_col[:, None] < L,
            other=0.0,
        )
        # b_P: f32[i 64, j 64]
        b_P = tl.dot(b_X0, tl.trans(b_F0))
        b_P = tl.where(b_col[None, :] <= b_row[:, None], b_P, 0.0)
        # b_P_n: bf16[i 64, j 64]
        b_P_n = b_P.to(tl.bfloat16)
        b_O = tl.dot(b_P_n, b_G, acc=b_O)
        # b_D_more: f32[i 64]
        b_D_more = tl.sum(b_P, axis=1)
        b_D = b_D + b_D_more
        b_S0 = tl.dot(tl.trans(b_F0), b_G, acc=b_S0)
        # b_Z0_more: f32[m 64]
        b_Z0_more = tl.sum(b_F0.to(tl.float32), axis=0)
        b_Z0 = b_Z0 + b_Z0_more
        # b_R: f32[i 64, e 64]
        b_R = b_O / b_D[:, None]
        tl.store(
            p_o
            + b * s_o_0
            + h * s_o_1
            + 64 * chunk * s_o_2
            + (i_i[:, None] * r_o_2 + i_e[None, :]),
            b_R.to(tl.bfloat16),
            mask=L > b_row[:, None],
        )


kernel = linear_o
OPTIONS = {"num_warps": 4, "num_stages": 2}
DIVISORS = {
    "p_before_k_v_forward": 16,
    "s_before_k_v_forward_0": 4,
    "s_before_k_v_forward_1": 4,
    "s_before_k_v_forward_2": 4,
    "s_before_k_v_forward_3": 4,
    "p_before_k_v_forward_sums": 16,
    "s_before_k_v_forward_sums_0": 4,
    "s_before_k_v_forward_sums_1": 4,
    "s_before_k_v_forward_sums_2": 4,
    "p_q": 16,
    "s_q_0": 8,
    "s_q_1": 8,
    "s_q_2": 8,
    "p_k": 16,
    "s_k_0": 8,
    "s_k_1": 8,
    "s_k_2": 8,
    "p_v": 16,
    "s_v_0": 8,
    "s_v_1": 8,
    "s_v_2": 8,
    "p_o": 16,
    "s_o_0": 8,
    "s_o_1": 8,
    "s_o_2": 8,
}


def grid(B, Hq, L, span_L, **_):
    return ((((L + 63) // 64 + span_L - 1) // span_L) * Hq * B,)


def bind(before_k_v_forward, before_k_v_forward_sums, q, k, v, o, span_L):
    if max(
        before_k_v_forward.stride(3) * 63,
        k.stride(2) * 63,
        o.stride(2) * 63,
        q.stride(2) * 63,
        v.stride(2) * 63,
        0,
    ) >= 2**31:
        raise OverflowError("linear_o: a stride is so large that one tile spans 2**31 elements")
    return (
        before_k_v_forward, before_k_v_forward.stride(0), before_k_v_forward.stride(1), before_k_v_forward.stride(2), before_k_v_forward.stride(3),
        before_k_v_forward_sums, before_k_v_forward_sums.stride(0), before_k_v_forward_sums.stride(1), before_k_v_forward_sums.stride(2),
        q, q.stride(0), q.stride(1), q.stride(2),
        k, k.stride(0), k.stride(1), k.stride(2),
        v, v.stride(0), v.stride(1), v.stride(2),
        o, o.stride(0), o.stride(1), o.stride(2),
        before_k_v_forward.shape[0], before_k_v_forward.shape[1], before_k_v_forward.shape[2], q.shape[1], q.shape[2], span_L,
    )
