# linear_o
# linear_values, forward: 16 features by 16 values
# 32 rows a chunk
@T.prim_func
def linear_o(p_q: T.handle("float32"), p_k: T.handle("float32"), p_v: T.handle("float32"), p_o: T.handle("float32"), B: T.int64, Hq: T.int64, L: T.int64, Hk: T.int64, q_s0: T.int64, q_s1: T.int64, q_s2: T.int64, k_s0: T.int64, k_s1: T.int64, k_s2: T.int64, v_s0: T.int64, v_s1: T.int64, v_s2: T.int64, o_s0: T.int64, o_s1: T.int64, o_s2: T.int64, worker: T.int64, workers: T.int64, p_ws: T.handle("uint8")):
    T.func_attr({"global_symbol": "linear_o", "tirx.noalias": True})
    q = T.decl_buffer([B, Hq, L, T.int64(16)], "float32", data=p_q, strides=[q_s0, q_s1, q_s2, T.int64(1)], align=4, layout=None)
    k = T.decl_buffer([B, Hk, L, T.int64(16)], "float32", data=p_k, strides=[k_s0, k_s1, k_s2, T.int64(1)], align=4, layout=None)
    v = T.decl_buffer([B, Hk, L, T.int64(16)], "float32", data=p_v, strides=[v_s0, v_s1, v_s2, T.int64(1)], align=4, layout=None)
    o = T.decl_buffer([B, Hq, L, T.int64(16)], "float32", data=p_o, strides=[o_s0, o_s1, o_s2, T.int64(1)], align=4, layout=None)
    ws = T.decl_buffer((25344,), "uint8", data=p_ws, align=64)
    b_S0 = T.decl_buffer((16, 16), "float32", data=ws.data, elem_offset=0)
    b_Z0 = T.decl_buffer((16,), "float32", data=ws.data, elem_offset=256)
    b_row = T.decl_buffer((32,), "int32", data=ws.data, elem_offset=272)
    b_X_rows = T.decl_buffer((32, 16), "float32", data=ws.data, elem_offset=304)
    b_X0 = T.decl_buffer((32, 16), "float32", data=ws.data, elem_offset=816)
    b_O = T.decl_buffer((32, 16), "float32", data=ws.data, elem_offset=1328)
    b_den0 = T.decl_buffer((32,), "float32", data=ws.data, elem_offset=1840)
    b_D = T.decl_buffer((32,), "float32", data=ws.data, elem_offset=1872)
    b_col = T.decl_buffer((32,), "int32", data=ws.data, elem_offset=1904)
    b_F_rows = T.decl_buffer((32, 16), "float32", data=ws.data, elem_offset=1936)
    b_F0 = T.decl_buffer((32, 16), "float32", data=ws.data, elem_offset=2448)
    b_G = T.decl_buffer((32, 16), "float32", data=ws.data, elem_offset=2960)
    b_P = T.decl_buffer((32, 32), "float32", data=ws.data, elem_offset=3472)
    b_O_more1 = T.decl_buffer((32, 16), "float32", data=ws.data, elem_offset=4496)
    b_D_more = T.decl_buffer((32,), "float32", data=ws.data, elem_offset=5008)
    b_S0_more2 = T.decl_buffer((16, 16), "float32", data=ws.data, elem_offset=5040)
    b_Z0_more = T.decl_buffer((16,), "float32", data=ws.data, elem_offset=5296)
    b_R = T.decl_buffer((32, 16), "float32", data=ws.data, elem_offset=5312)
    b_F0_by_j = T.decl_buffer((16, 32), "float32", data=ws.data, elem_offset=5824)
    r_O = T.alloc_buffer((16, 16), "float32", scope="local", annotations={"disable_lower_builtin": True})
    r_den0 = T.alloc_buffer((16,), "float32", scope="local", annotations={"disable_lower_builtin": True})
    r_P = T.alloc_buffer((8, 32), "float32", scope="local", annotations={"disable_lower_builtin": True})
    r_O_more1 = T.alloc_buffer((16, 16), "float32", scope="local", annotations={"disable_lower_builtin": True})
    r_D_more = T.alloc_buffer((32,), "float32", scope="local", annotations={"disable_lower_builtin": True})
    r_S0_more2 = T.alloc_buffer((16, 16), "float32", scope="local", annotations={"disable_lower_builtin": True})
    r_Z0_more = T.alloc_buffer((4, 16), "float32", scope="local", annotations={"disable_lower_builtin": True})
    h_cells: T.let = Hq
    b_cells: T.let = B
    for turn in range(T.truncdiv(h_cells * b_cells - worker + workers - 1, workers)):
        cell: T.let = worker + turn * workers
        h: T.let = T.truncmod(cell, h_cells)
        b: T.let = T.truncdiv(cell, h_cells)
        # S0[m, e]: 16 x 16 f32
        for i_m in range(16):
            for i_e in T.vectorized(16):
                b_S0[i_m, i_e] = T.float32(0.0)
        # Z0[m]: 16 f32
        for i_m in T.vectorized(16):
            b_Z0[i_m] = T.float32(0.0)
        u_lo: T.let = T.int64(0)
        u_hi: T.let = T.truncdiv(L + 31, 32)
        for u_step in range(u_hi - u_lo):
            u: T.let = u_lo + u_step
            chunk: T.let = u
            # row[i]: 32 i32
            for i_i in T.vectorized(32):
                b_row[i_i] = T.Cast("int32", 32 * chunk) + i_i
            # X_rows[i, m]: 32 x 16 f32 = q[...]
            for i_i in range(32):
                if T.Cast("int64", b_row[i_i]) < L:
                    for i_m in T.vectorized(T.int64(16)):
                        b_X_rows[i_i, i_m] = q[b, h, b_row[i_i], i_m]
                else:
                    for i_m in T.vectorized(16):
                        b_X_rows[i_i, i_m] = T.float32(0.0)
            # X0[i, m]: 32 x 16 f32
            for i_i in range(32):
                for i_m in T.vectorized(16):
                    x_0: T.let = T.min(T.float32(88.722839111673), T.max(T.float32(-88.02969193111305), b_X_rows[i_i, i_m]))
                    b_1: T.let = T.reinterpret("int32", x_0 * T.float32(1.4426950408889634) + T.float32(12583039.0))
                    n_2: T.let = T.reinterpret("float32", b_1) - T.float32(12583039.0)
                    p_3: T.let = T.reinterpret("float32", T.shift_left(b_1, T.int32(23)))
                    r_4: T.let = x_0 - n_2 * T.float32(0.693115234375) - n_2 * T.float32(3.1946184945309415e-05)
                    b_X0[i_i, i_m] = T.Select(b_row[i_i] < T.Cast("int32", L), T.Select(b_X_rows[i_i, i_m] > T.float32(0.0), b_X_rows[i_i, i_m] + T.float32(1.0), ((((((T.float32(0.0013933641031986701) * r_4 + T.float32(0.008369148490856347)) * r_4 + T.float32(0.04166646500604005)) * r_4 + T.float32(0.16666505260408124)) * r_4 + T.float32(0.5000000013457727)) * r_4 + T.float32(1.00000001077157)) * r_4 + T.float32(1.0)) * p_3), T.float32(0.0))
            # O[i, e]: 32 x 16 f32 = dot(X0, S0) over m
            for i_i0 in range(2):
                for i_i in T.unroll(16):
                    for i_e in T.vectorized(16):
                        r_O[i_i, i_e] = T.float32(0.0)
                for i_m in range(16):
                    for i_i in T.unroll(16):
                        for i_e in T.vectorized(16):
                            r_O[i_i, i_e] = r_O[i_i, i_e] + b_X0[i_i0 * 16 + i_i, i_m] * b_S0[i_m, i_e]
                for i_i in T.unroll(16):
                    for i_e in T.vectorized(16):
                        b_O[i_i0 * 16 + i_i, i_e] = r_O[i_i, i_e]
            # den0[i]: 32 f32 = sum over m
            for i_i in range(32):
                for i_m in T.vectorized(16):
                    r_den0[i_m] = T.float32(0.0)
                for i_m in T.vectorized(16):
                    r_den0[i_m] = r_den0[i_m] + b_X0[i_i, i_m] * b_Z0[i_m]
                for i_m in T.vectorized(8):
                    r_den0[i_m] = r_den0[i_m] + r_den0[i_m + 8]
                for i_m in T.vectorized(4):
                    r_den0[i_m] = r_den0[i_m] + r_den0[i_m + 4]
                for i_m in T.vectorized(2):
                    r_den0[i_m] = r_den0[i_m] + r_den0[i_m + 2]
                r_den0[0] = r_den0[0] + r_den0[1]
                b_den0[i_i] = r_den0[0]
            # D[i]: 32 f32
            for i_i in T.vectorized(32):
                b_D[i_i] = b_den0[i_i]
            # col[j]: 32 i32
            for i_j in T.vectorized(32):
                b_col[i_j] = T.Cast("int32", 32 * chunk) + i_j
            giver: T.let = h
            # F_rows[j, m]: 32 x 16 f32 = k[...]
            for i_j in range(32):
                if T.Cast("int64", b_col[i_j]) < L:
                    for i_m in T.vectorized(T.int64(16)):
                        b_F_rows[i_j, i_m] = k[b, giver, b_col[i_j], i_m]
                else:
                    for i_m in T.vectorized(16):
                        b_F_rows[i_j, i_m] = T.float32(0.0)
            # F0[j, m]: 32 x 16 f32
            for i_j in range(32):
                for i_m in T.vectorized(16):
                    x_0: T.let = T.min(T.float32(88.722839111673), T.max(T.float32(-88.02969193111305), b_F_rows[i_j, i_m]))
                    b_1: T.let = T.reinterpret("int32", x_0 * T.float32(1.4426950408889634) + T.float32(12583039.0))
                    n_2: T.let = T.reinterpret("float32", b_1) - T.float32(12583039.0)
                    p_3: T.let = T.reinterpret("float32", T.shift_left(b_1, T.int32(23)))
                    r_4: T.let = x_0 - n_2 * T.float32(0.693115234375) - n_2 * T.float32(3.1946184945309415e-05)
                    b_F0[i_j, i_m] = T.Select(b_col[i_j] < T.Cast("int32", L), T.Select(b_F_rows[i_j, i_m] > T.float32(0.0), b_F_rows[i_j, i_m] + T.float32(1.0), ((((((T.float32(0.0013933641031986701) * r_4 + T.float32(0.008369148490856347)) * r_4 + T.float32(0.04166646500604005)) * r_4 + T.float32(0.16666505260408124)) * r_4 + T.float32(0.5000000013457727)) * r_4 + T.float32(1.00000001077157)) * r_4 + T.float32(1.0)) * p_3), T.float32(0.0))
            # G[j, e]: 32 x 16 f32 = v[...]
            for i_j in range(32):
                if T.Cast("int64", b_col[i_j]) < L:
                    for i_e in T.vectorized(T.int64(16)):
                        b_G[i_j, i_e] = v[b, giver, b_col[i_j], i_e]
                else:
                    for i_e in T.vectorized(16):
                        b_G[i_j, i_e] = T.float32(0.0)
            # P[i, j]: 32 x 32 f32 = dot(X0, F0) over m
            # F0_by_j[m, j]: 16 x 32 f32
            for i_j in range(32):
                for i_m in range(16):
                    b_F0_by_j[i_m, i_j] = b_F0[i_j, i_m]
            for i_i0 in range(4):
                for i_i in T.unroll(8):
                    for i_j in T.vectorized(32):
                        r_P[i_i, i_j] = T.float32(0.0)
                for i_m in range(16):
                    for i_i in T.unroll(8):
                        for i_j in T.vectorized(32):
                            r_P[i_i, i_j] = r_P[i_i, i_j] + b_X0[i_i0 * 8 + i_i, i_m] * b_F0_by_j[i_m, i_j]
                for i_i in T.unroll(8):
                    for i_j in T.vectorized(32):
                        b_P[i_i0 * 8 + i_i, i_j] = r_P[i_i, i_j]
            # P[i, j]: 32 x 32 f32
            for i_i in range(32):
                for i_j in T.vectorized(32):
                    b_P[i_i, i_j] = T.Select(b_col[i_j] <= b_row[i_i], b_P[i_i, i_j], T.float32(0.0))
            # O_more1[i, e]: 32 x 16 f32 = dot(P, G) over j
            for i_i0 in range(2):
                for i_i in T.unroll(16):
                    for i_e in T.vectorized(16):
                        r_O_more1[i_i, i_e] = T.float32(0.0)
                for i_j in range(32):
                    for i_i in T.unroll(16):
                        for i_e in T.vectorized(16):
                            r_O_more1[i_i, i_e] = r_O_more1[i_i, i_e] + b_P[i_i0 * 16 + i_i, i_j] * b_G[i_j, i_e]
                for i_i in T.unroll(16):
                    for i_e in T.vectorized(16):
                        b_O_more1[i_i0 * 16 + i_i, i_e] = r_O_more1[i_i, i_e]
            # O[i, e]: 32 x 16 f32
            for i_i in range(32):
                for i_e in T.vectorized(16):
                    b_O[i_i, i_e] = b_O[i_i, i_e] + b_O_more1[i_i, i_e]
            # D_more[i]: 32 f32 = sum over j
            for i_i in range(32):
                for i_j in T.vectorized(32):
                    r_D_more[i_j] = T.float32(0.0)
                for i_j in T.vectorized(32):
                    r_D_more[i_j] = r_D_more[i_j] + b_P[i_i, i_j]
                for i_j in T.vectorized(16):
                    r_D_more[i_j] = r_D_more[i_j] + r_D_more[i_j + 16]
                for i_j in T.vectorized(8):
                    r_D_more[i_j] = r_D_more[i_j] + r_D_more[i_j + 8]
                for i_j in T.vectorized(4):
                    r_D_more[i_j] = r_D_more[i_j] + r_D_more[i_j + 4]
                for i_j in T.vectorized(2):
                    r_D_more[i_j] = r_D_more[i_j] + r_D_more[i_j + 2]
                r_D_more[0] = r_D_more[0] + r_D_more[1]
                b_D_more[i_i] = r_D_more[0]
            # D[i]: 32 f32
            for i_i in T.vectorized(32):
                b_D[i_i] = b_D[i_i] + b_D_more[i_i]
            # S0_more2[m, e]: 16 x 16 f32 = dot(F0, G) over j
            for i_m in T.unroll(16):
                for i_e in T.vectorized(16):
                    r_S0_more2[i_m, i_e] = T.float32(0.0)
            for i_j in range(32):
                for i_m in T.unroll(16):
                    for i_e in T.vectorized(16):
                        r_S0_more2[i_m, i_e] = r_S0_more2[i_m, i_e] + b_F0[i_j, i_m] * b_G[i_j, i_e]
            for i_m in T.unroll(16):
                for i_e in T.vectorized(16):
                    b_S0_more2[i_m, i_e] = r_S0_more2[i_m, i_e]
            # S0[m, e]: 16 x 16 f32
            for i_m in range(16):
                for i_e in T.vectorized(16):
                    b_S0[i_m, i_e] = b_S0[i_m, i_e] + b_S0_more2[i_m, i_e]
            # Z0_more[m]: 16 f32 = sum over j
            for i_m in T.vectorized(16):
                r_Z0_more[0, i_m] = T.float32(0.0)
                r_Z0_more[1, i_m] = T.float32(0.0)
                r_Z0_more[2, i_m] = T.float32(0.0)
                r_Z0_more[3, i_m] = T.float32(0.0)
            for i_j in range(8):
                for i_m in T.vectorized(16):
                    r_Z0_more[0, i_m] = r_Z0_more[0, i_m] + b_F0[i_j * 4 + 0, i_m]
                for i_m in T.vectorized(16):
                    r_Z0_more[1, i_m] = r_Z0_more[1, i_m] + b_F0[i_j * 4 + 1, i_m]
                for i_m in T.vectorized(16):
                    r_Z0_more[2, i_m] = r_Z0_more[2, i_m] + b_F0[i_j * 4 + 2, i_m]
                for i_m in T.vectorized(16):
                    r_Z0_more[3, i_m] = r_Z0_more[3, i_m] + b_F0[i_j * 4 + 3, i_m]
            for i_m in T.vectorized(16):
                r_Z0_more[0, i_m] = r_Z0_more[0, i_m] + r_Z0_more[1, i_m]
                r_Z0_more[0, i_m] = r_Z0_more[0, i_m] + r_Z0_more[2, i_m]
                r_Z0_more[0, i_m] = r_Z0_more[0, i_m] + r_Z0_more[3, i_m]
                b_Z0_more[i_m] = r_Z0_more[0, i_m]
            # Z0[m]: 16 f32
            for i_m in T.vectorized(16):
                b_Z0[i_m] = b_Z0[i_m] + b_Z0_more[i_m]
            # R[i, e]: 32 x 16 f32
            for i_i in range(32):
                for i_e in T.vectorized(16):
                    b_R[i_i, i_e] = b_O[i_i, i_e] / b_D[i_i]
            # o[...] = 32x16 f32
            for i_i in range(32):
                if L > T.Cast("int64", b_row[i_i]):
                    for i_e in T.vectorized(T.int64(16)):
                        o[b, h, b_row[i_i], i_e] = b_R[i_i, i_e]
