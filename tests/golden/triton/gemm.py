# gemm: emitted by gossamer
# plain GEMM: c = a @ b.T

import triton
import triton.language as tl


@triton.jit
def gemm(
    p_a: "*fp32", s_a_0: "i64",  # in a[M, K]
    p_b: "*fp32", s_b_0: "i64",  # in b[N, K]
    p_c: "*fp32", s_c_0: "i64",  # out c[M, N]
    M: "i32", K: "i32", N: "i32",
):
    pid = tl.program_id(0)
    n_m = (M + 15) // 16
    m = pid % n_m
    n = pid // n_m
    i_i = tl.arange(0, 16)
    i_j = tl.arange(0, 32)
    i_x = tl.arange(0, 32)
    m_x = i_x < 24
    r_a_0 = s_a_0.to(tl.int32)
    r_b_0 = s_b_0.to(tl.int32)
    r_c_0 = s_c_0.to(tl.int32)

    # b_C: f32[i 16, j 32]
    b_C = tl.full([16, 32], 0.0, tl.float32)
    for u in tl.range(0, (K + 23) // 24):
        # b_A: f32[i 16, x 32]
        b_A = tl.load(
            p_a + 16 * m * s_a_0 + 24 * u + (i_i[:, None] * r_a_0 + i_x[None, :]),
            mask=(16 * m + i_i[:, None] < M) & (24 * u + i_x[None, :] < K) & m_x[None, :],
            other=0.0,
        )
        # b_B: f32[j 32, x 32]
        b_B = tl.load(
            p_b + 32 * n * s_b_0 + 24 * u + (i_j[:, None] * r_b_0 + i_x[None, :]),
            mask=(24 * u + i_x[None, :] < K) & (32 * n + i_j[:, None] < N) & m_x[None, :],
            other=0.0,
        )
        b_C = tl.dot(b_A, tl.trans(b_B), acc=b_C, input_precision="ieee")
    tl.store(
        p_c + 16 * m * s_c_0 + 32 * n + (i_i[:, None] * r_c_0 + i_j[None, :]),
        b_C,
        mask=(16 * m + i_i[:, None] < M) & (32 * n + i_j[None, :] < N),
    )


kernel = gemm
OPTIONS = {"num_warps": 4, "num_stages": 2}
DIVISORS = {}


def grid(M, N, **_):
    return (((M + 15) // 16) * ((N + 31) // 32),)


def bind(a, b, c):
    if max(a.stride(0) * 15, b.stride(0) * 31, c.stride(0) * 15, 0) >= 2**31:
        raise OverflowError("gemm: a stride is so large that one tile spans 2**31 elements")
    return (
        a, a.stride(0),
        b, b.stride(0),
        c, c.stride(0),
        a.shape[0], a.shape[1], b.shape[0],
    )
