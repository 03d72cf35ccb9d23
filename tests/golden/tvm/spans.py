# spans
@T.prim_func
def spans(p_x: T.handle("float32"), p_y: T.handle("float32"), n: T.int64, x_s0: T.int64, a: T.int64, b: T.int64, worker: T.int64, workers: T.int64, p_ws: T.handle("uint8")):
    T.func_attr({"global_symbol": "spans", "tirx.noalias": True})
    x = T.decl_buffer([n, T.int64(16)], "float32", data=p_x, strides=[x_s0, T.int64(1)], align=4, layout=None)
    y = T.decl_buffer([T.int64(16)], "float32", data=p_y, strides=[T.int64(1)], align=4, layout=None)
    ws = T.decl_buffer((128,), "uint8", data=p_ws, align=64)
    b_S = T.decl_buffer((16,), "float32", data=ws.data, elem_offset=0)
    b_X = T.decl_buffer((16,), "float32", data=ws.data, elem_offset=16)
    t_cells: T.let = T.int64(1)
    for turn in range(T.truncdiv(t_cells - worker + workers - 1, workers)):
        cell: T.let = worker + turn * workers
        t: T.let = cell
        # S[d]: 16 f32
        for i_d in T.vectorized(16):
            b_S[i_d] = T.float32(0.0)
        u_lo0: T.let = T.int64(0)
        u_hi0: T.let = a
        u_lo1: T.let = a + 2
        u_hi1: T.let = b
        u_lo2: T.let = b + 1
        u_hi2: T.let = n
        for u_span in range(3):
            u_lo: T.let = T.Select(u_span == 0, u_lo0, T.Select(u_span == 1, u_lo1, u_lo2))
            u_hi: T.let = T.Select(u_span == 0, u_hi0, T.Select(u_span == 1, u_hi1, u_hi2))
            for u_step in range(u_hi - u_lo):
                u: T.let = u_lo + u_step
                # X[d]: 16 f32 = x[...]
                for i_d in T.vectorized(T.int64(16)):
                    b_X[i_d] = x[u, i_d]
                # S[d]: 16 f32
                for i_d in T.vectorized(16):
                    b_S[i_d] = T.float32(2.0) * b_S[i_d] + b_X[i_d]
        # y[...] = 16 f32
        for i_d in T.vectorized(T.int64(16)):
            y[i_d] = b_S[i_d]
