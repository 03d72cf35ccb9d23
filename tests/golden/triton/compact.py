# compact: emitted by gossamer
# the positive numbers of every row, in order, and how many there are

import triton
import triton.language as tl


@triton.jit
def compact(
    p_x: "*i32", s_x_0: "i64",  # in x[rows, cols]
    p_kept: "*i32", s_kept_0: "i64",  # out kept[rows, cols]
    p_counts: "*i32",  # out counts[rows]
    rows: "i32", cols: "i32",
):
    pid = tl.program_id(0)
    r = pid
    i_t = tl.arange(0, 16)

    # b_count: i32
    b_count = tl.cast(0, tl.int32)
    for u in tl.range(0, (cols + 15) // 16):
        # b_X: i32[t 16]
        b_X = tl.load(p_x + r * s_x_0 + 16 * u + i_t, mask=16 * u + i_t < cols, other=0)
        # b_rank: i32[t 16]
        b_rank = tl.cumsum(tl.where(b_X > 0, 1, 0), axis=0)
        tl.store(p_kept + r * s_kept_0 + b_count - 1 + b_rank, b_X, mask=b_X > 0)
        # b_found: i32
        b_found = tl.max(b_rank[:, None], axis=0).item()
        b_count = b_count + b_found
    tl.store(p_counts + r, b_count)


kernel = compact
OPTIONS = {"num_warps": 4, "num_stages": 2}
DIVISORS = {}


def grid(rows, **_):
    return (rows,)


def bind(x, kept, counts):
    return (
        x, x.stride(0),
        kept, kept.stride(0),
        counts,
        x.shape[0], x.shape[1],
    )
