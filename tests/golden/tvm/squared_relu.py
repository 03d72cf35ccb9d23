# squared_relu_attention
# causal attention whose weights are max(q.k * scale, 0) ** 2: no softmax, no normalisation
@T.prim_func
def squared_relu_attention(p_q: T.handle("float32"), p_k: T.handle("float32"), p_v: T.handle("float32"), p_o: T.handle("float32"), B: T.int64, H: T.int64, q_len: T.int64, kv_len: T.int64, q_s0: T.int64, q_s1: T.int64, q_s2: T.int64, k_s0: T.int64, k_s1: T.int64, k_s2: T.int64, v_s0: T.int64, v_s1: T.int64, v_s2: T.int64, o_s0: T.int64, o_s1: T.int64, o_s2: T.int64, scale: T.float32, worker: T.int64, workers: T.int64, p_ws: T.handle("uint8")):
    T.func_attr({"global_symbol": "squared_relu_attention", "tirx.noalias": True})
    q = T.decl_buffer([B, H, q_len, T.int64(32)], "float32", data=p_q, strides=[q_s0, q_s1, q_s2, T.int64(1)], align=4, layout=None)
    k = T.decl_buffer([B, H, kv_len, T.int64(32)], "float32", data=p_k, strides=[k_s0, k_s1, k_s2, T.int64(1)], align=4, layout=None)
    v = T.decl_buffer([B, H, kv_len, T.int64(32)], "float32", data=p_v, strides=[v_s0, v_s1, v_s2, T.int64(1)], align=4, layout=None)
    o = T.decl_buffer([B, H, q_len, T.int64(32)], "float32", data=p_o, strides=[o_s0, o_s1, o_s2, T.int64(1)], align=4, layout=None)
    ws = T.decl_buffer((7296,), "uint8", data=p_ws, align=64)
    b_row = T.decl_buffer((16,), "int32", data=ws.data, elem_offset=0)
    b_Q = T.decl_buffer((32, 16), "float32", data=ws.data, elem_offset=16)
    b_O = T.decl_buffer((32, 16), "float32", data=ws.data, elem_offset=528)
    b_col = T.decl_buffer((8,), "int32", data=ws.data, elem_offset=1040)
    b_K = T.decl_buffer((8, 32), "float32", data=ws.data, elem_offset=1056)
    b_S = T.decl_buffer((8, 16), "float32", data=ws.data, elem_offset=1312)
    b_P = T.decl_buffer((8, 16), "float32", data=ws.data, elem_offset=1440)
    b_V = T.decl_buffer((8, 32), "float32", data=ws.data, elem_offset=1568)
    r_S = T.alloc_buffer((8, 16), "float32", scope="local", annotations={"disable_lower_builtin": True})
    r_O = T.alloc_buffer((16, 16), "float32", scope="local", annotations={"disable_lower_builtin": True})
    t_cells: T.let = T.truncdiv(q_len + 15, 16)
    h_cells: T.let = H
    b_cells: T.let = B
    for turn in range(T.truncdiv(t_cells * h_cells * b_cells - worker + workers - 1, workers)):
        cell: T.let = worker + turn * workers
        t: T.let = T.truncmod(cell, t_cells)
        h: T.let = T.truncmod(T.truncdiv(cell, t_cells), h_cells)
        b: T.let = T.truncdiv(T.truncdiv(cell, t_cells), h_cells)
        # row[i]: 16 i32
        for i_i in T.vectorized(16):
            b_row[i_i] = T.Cast("int32", 16 * t) + i_i
        # Q[d, i]: 32 x 16 f32 = q[...]
        for i_i in range(16):
            for i_d in range(32):
                b_Q[i_d, i_i] = q[b, h, T.min(T.Cast("int64", b_row[i_i]), q_len - 1), i_d]
        # O[e, i]: 32 x 16 f32
        for i_e in range(32):
            for i_i in T.vectorized(16):
                b_O[i_e, i_i] = T.float32(0.0)
        u_lo: T.let = T.int64(0)
        u_hi: T.let = T.min(2 * t + 2, T.truncdiv(kv_len + 7, 8))
        for u_step in range(u_hi - u_lo):
            u: T.let = u_lo + u_step
            # col[j]: 8 i32
            for i_j in T.vectorized(8):
                b_col[i_j] = T.Cast("int32", 8 * u) + i_j
            # K[j, d]: 8 x 32 f32 = k[...]
            for i_j in range(8):
                if T.Cast("int64", b_col[i_j]) < kv_len:
                    for i_d in T.vectorized(T.int64(32)):
                        b_K[i_j, i_d] = k[b, h, b_col[i_j], i_d]
                else:
                    for i_d in T.vectorized(32):
                        b_K[i_j, i_d] = T.float32(0.0)
            # S[j, i]: 8 x 16 f32 = dot(Q, K) over d
            for i_j in T.unroll(8):
                for i_i in T.vectorized(16):
                    r_S[i_j, i_i] = T.float32(0.0)
            for i_d in range(32):
                for i_j in T.unroll(8):
                    for i_i in T.vectorized(16):
                        r_S[i_j, i_i] = r_S[i_j, i_i] + b_K[i_j, i_d] * b_Q[i_d, i_i]
            for i_j in T.unroll(8):
                for i_i in T.vectorized(16):
                    b_S[i_j, i_i] = r_S[i_j, i_i]
            # P[j, i]: 8 x 16 f32
            for i_j in range(8):
                for i_i in T.vectorized(16):
                    x_0: T.let = T.max(T.float32(0.0), b_S[i_j, i_i] * scale)
                    b_P[i_j, i_i] = T.Select(b_col[i_j] <= b_row[i_i], x_0 * x_0, T.float32(0.0))
            # V[j, e]: 8 x 32 f32 = v[...]
            for i_j in range(8):
                if T.Cast("int64", b_col[i_j]) < kv_len:
                    for i_e in T.vectorized(T.int64(32)):
                        b_V[i_j, i_e] = v[b, h, b_col[i_j], i_e]
                else:
                    for i_e in T.vectorized(32):
                        b_V[i_j, i_e] = T.float32(0.0)
            # O[e, i]: 32 x 16 f32 += dot(P, V) over j
            for i_e0 in range(2):
                for i_e in T.unroll(16):
                    for i_i in T.vectorized(16):
                        r_O[i_e, i_i] = T.float32(0.0)
                for i_j in range(8):
                    for i_e in T.unroll(16):
                        for i_i in T.vectorized(16):
                            r_O[i_e, i_i] = r_O[i_e, i_i] + b_V[i_j, i_e0 * 16 + i_e] * b_P[i_j, i_i]
                for i_e in T.unroll(16):
                    for i_i in T.vectorized(16):
                        b_O[i_e0 * 16 + i_e, i_i] = b_O[i_e0 * 16 + i_e, i_i] + r_O[i_e, i_i]
        # o[...] = 32x16 f32
        for i_i in range(16):
            if T.Cast("int64", b_row[i_i]) < q_len:
                for i_e in range(32):
                    o[b, h, b_row[i_i], i_e] = b_O[i_e, i_i]
