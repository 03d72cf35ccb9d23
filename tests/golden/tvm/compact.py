# compact
# the positive numbers of every row, in order, and how many there are
@T.prim_func
def compact(p_x: T.handle("int32"), p_kept: T.handle("int32"), p_counts: T.handle("int32"), rows: T.int64, cols: T.int64, x_s0: T.int64, kept_s0: T.int64, worker: T.int64, workers: T.int64, p_ws: T.handle("uint8")):
    T.func_attr({"global_symbol": "compact", "tirx.noalias": True})
    x = T.decl_buffer([rows, cols], "int32", data=p_x, strides=[x_s0, T.int64(1)], align=4, layout=None)
    kept = T.decl_buffer([rows, cols], "int32", data=p_kept, strides=[kept_s0, T.int64(1)], align=4, layout=None)
    counts = T.decl_buffer([rows], "int32", data=p_counts, strides=[T.int64(1)], align=4, layout=None)
    ws = T.decl_buffer((256,), "uint8", data=p_ws, align=64)
    b_count = T.decl_buffer((1,), "int32", data=ws.data, elem_offset=0)
    b_X = T.decl_buffer((16,), "int32", data=ws.data, elem_offset=16)
    b_rank = T.decl_buffer((16,), "int32", data=ws.data, elem_offset=32)
    b_found = T.decl_buffer((1,), "int32", data=ws.data, elem_offset=48)
    r_rank_sum = T.alloc_buffer((1,), "int32", scope="local", annotations={"disable_lower_builtin": True})
    r_found = T.alloc_buffer((16,), "int32", scope="local", annotations={"disable_lower_builtin": True})
    r_cells: T.let = rows
    for turn in range(T.truncdiv(r_cells - worker + workers - 1, workers)):
        cell: T.let = worker + turn * workers
        r: T.let = cell
        # count[]: 1 i32
        b_count[0] = 0
        u_lo: T.let = T.int64(0)
        u_hi: T.let = T.truncdiv(cols + 15, 16)
        for u_step in range(u_hi - u_lo):
            u: T.let = u_lo + u_step
            # X[t]: 16 i32 = x[...]
            c_0: T.let = 16 * u
            if c_0 < cols and c_0 + 15 < cols:
                for i_t in T.vectorized(T.int64(16)):
                    b_X[i_t] = x[r, i_t + 16 * u]
            else:
                for i_t in range(16):
                    b_X[i_t] = T.if_then_else(i_t + 16 * u < cols, x[r, i_t + 16 * u], 0)
            # rank[t]: 16 i32 = cumsum over t
            r_rank_sum[0] = T.int32(0)
            for i_t in range(16):
                r_rank_sum[0] = r_rank_sum[0] + T.Cast("int32", T.Select(b_X[i_t] > 0, T.int64(1), T.int64(0)))
                b_rank[i_t] = r_rank_sum[0]
            # kept[...] = 16 i32
            for i_t in range(16):
                if b_X[i_t] > 0:
                    kept[r, b_count[0] + b_rank[i_t] - 1] = b_X[i_t]
            # found[]: 1 i32 = max over t
            for i_t in T.vectorized(16):
                r_found[i_t] = T.min_value("int32")
            for i_t in T.vectorized(16):
                r_found[i_t] = T.max(r_found[i_t], b_rank[i_t])
            for i_t in T.vectorized(8):
                r_found[i_t] = T.max(r_found[i_t], r_found[i_t + 8])
            for i_t in T.vectorized(4):
                r_found[i_t] = T.max(r_found[i_t], r_found[i_t + 4])
            for i_t in T.vectorized(2):
                r_found[i_t] = T.max(r_found[i_t], r_found[i_t + 2])
            r_found[0] = T.max(r_found[0], r_found[1])
            b_found[0] = r_found[0]
            # count[]: 1 i32
            b_count[0] = b_count[0] + b_found[0]
        # counts[...] =  i32
        counts[r] = b_count[0]
