# spans: emitted by gossamer

import triton
import triton.language as tl


@triton.jit
def spans(
    p_x: "*fp32", s_x_0: "i64",  # in x[n, 16]
    p_y: "*fp32",  # out y[16]
    n: "i32", a: "i32", b: "i32",
):
    t = 0
    i_d = tl.arange(0, 16)

    # b_S: f32[d 16]
    b_S = tl.full([16], 0.0, tl.float32)
    # u: 0 .. a, then a + 2 .. b, then b + 1 .. n
    n_u_0 = tl.maximum(a, 0)
    n_u_1 = n_u_0 + tl.maximum(b - (a + 2), 0)
    n_u_2 = n_u_1 + tl.maximum(n - (b + 1), 0)
    for n_u in tl.range(0, n_u_2):
        u = n_u + tl.where(n_u < n_u_0, 0, tl.where(n_u < n_u_1, a + 2 - n_u_0, b + 1 - n_u_1))
        # b_X: f32[d 16]
        b_X = tl.load(p_x + u * s_x_0 + i_d)
        b_S = b_X + 2.0 * b_S
    tl.store(p_y + i_d, b_S)


kernel = spans
OPTIONS = {"num_warps": 4, "num_stages": 2}
DIVISORS = {}


def grid(**_):
    return (1,)


def bind(x, y, a, b):
    return (
        x, x.stride(0),
        y,
        x.shape[0], a, b,
    )
