# gemm
# plain GEMM: c = a @ b.T
@T.prim_func
def gemm(p_a: T.handle("float32"), p_b: T.handle("float32"), p_c: T.handle("float32"), M: T.int64, K: T.int64, N: T.int64, a_s0: T.int64, b_s0: T.int64, c_s0: T.int64, worker: T.int64, workers: T.int64, p_ws: T.handle("uint8")):
    T.func_attr({"global_symbol": "gemm", "tirx.noalias": True})
    a = T.decl_buffer([M, K], "float32", data=p_a, strides=[a_s0, T.int64(1)], align=4, layout=None)
    b = T.decl_buffer([N, K], "float32", data=p_b, strides=[b_s0, T.int64(1)], align=4, layout=None)
    c = T.decl_buffer([M, N], "float32", data=p_c, strides=[c_s0, T.int64(1)], align=4, layout=None)
    ws = T.decl_buffer((6656,), "uint8", data=p_ws, align=64)
    b_C = T.decl_buffer((16, 32), "float32", data=ws.data, elem_offset=0)
    b_A = T.decl_buffer((16, 24), "float32", data=ws.data, elem_offset=512)
    b_B = T.decl_buffer((24, 32), "float32", data=ws.data, elem_offset=896)
    r_C = T.alloc_buffer((8, 32), "float32", scope="local", annotations={"disable_lower_builtin": True})
    m_cells: T.let = T.truncdiv(M + 15, 16)
    n_cells: T.let = T.truncdiv(N + 31, 32)
    for turn in range(T.truncdiv(m_cells * n_cells - worker + workers - 1, workers)):
        cell: T.let = worker + turn * workers
        m: T.let = T.truncmod(cell, m_cells)
        n: T.let = T.truncdiv(cell, m_cells)
        # C[i, j]: 16 x 32 f32
        for i_i in range(16):
            for i_j in T.vectorized(32):
                b_C[i_i, i_j] = T.float32(0.0)
        u_lo: T.let = T.int64(0)
        u_hi: T.let = T.truncdiv(K + 23, 24)
        for u_step in range(u_hi - u_lo):
            u: T.let = u_lo + u_step
            # A[i, x]: 16 x 24 f32 = a[...]
            for i_i in range(16):
                if i_i + 16 * m < M:
                    c_0: T.let = 24 * u
                    if c_0 < K and c_0 + 23 < K:
                        for i_x in T.vectorized(T.int64(16)):
                            b_A[i_i, i_x] = a[i_i + 16 * m, 24 * u + i_x]
                        for i_x in T.vectorized(T.int64(8)):
                            b_A[i_i, 16 + i_x] = a[i_i + 16 * m, 24 * u + (16 + i_x)]
                    else:
                        for i_x in range(24):
                            b_A[i_i, i_x] = T.if_then_else(24 * u + i_x < K, a[i_i + 16 * m, 24 * u + i_x], T.float32(0.0))
                else:
                    for i_x in T.vectorized(16):
                        b_A[i_i, i_x] = T.float32(0.0)
                    for i_x in T.vectorized(8):
                        b_A[i_i, 16 + i_x] = T.float32(0.0)
            # B[x, j]: 24 x 32 f32 = b[...]
            for i_j in range(32):
                if i_j + 32 * n < N:
                    for i_x in range(24):
                        b_B[i_x, i_j] = T.if_then_else(24 * u + i_x < K, b[i_j + 32 * n, 24 * u + i_x], T.float32(0.0))
                else:
                    for i_x in range(24):
                        b_B[i_x, i_j] = T.float32(0.0)
            # C[i, j]: 16 x 32 f32 += dot(A, B) over x
            for i_i0 in range(2):
                for i_i in T.unroll(8):
                    for i_j in T.vectorized(32):
                        r_C[i_i, i_j] = T.float32(0.0)
                for i_x in range(24):
                    for i_i in T.unroll(8):
                        for i_j in T.vectorized(32):
                            r_C[i_i, i_j] = r_C[i_i, i_j] + b_A[i_i0 * 8 + i_i, i_x] * b_B[i_x, i_j]
                for i_i in T.unroll(8):
                    for i_j in T.vectorized(32):
                        b_C[i_i0 * 8 + i_i, i_j] = b_C[i_i0 * 8 + i_i, i_j] + r_C[i_i, i_j]
        # c[...] = 16x32 f32
        for i_i in range(16):
            if i_i + 16 * m < M:
                c_0: T.let = 32 * n
                if c_0 < N and c_0 + 31 < N:
                    for i_j in T.vectorized(T.int64(32)):
                        c[i_i + 16 * m, i_j + 32 * n] = b_C[i_i, i_j]
                else:
                    for i_j in range(32):
                        if i_j + 32 * n < N:
                            c[i_i + 16 * m, i_j + 32 * n] = b_C[i_i, i_j]
