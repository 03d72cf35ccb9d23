# window_attention
# softmax attention within abs(q - k) <= p0, grouped heads, output and log-sum-exp
@T.prim_func
def window_attention(p_q: T.handle("float32"), p_k: T.handle("float32"), p_v: T.handle("float32"), p_o: T.handle("float32"), p_lse: T.handle("float32"), B: T.int64, Hq: T.int64, q_len: T.int64, Hk: T.int64, kv_len: T.int64, q_s0: T.int64, q_s1: T.int64, q_s2: T.int64, k_s0: T.int64, k_s1: T.int64, k_s2: T.int64, v_s0: T.int64, v_s1: T.int64, v_s2: T.int64, o_s0: T.int64, o_s1: T.int64, o_s2: T.int64, lse_s0: T.int64, lse_s1: T.int64, p0: T.int64, scale: T.float32, worker: T.int64, workers: T.int64, p_ws: T.handle("uint8")):
    T.func_attr({"global_symbol": "window_attention", "tirx.noalias": True})
    q = T.decl_buffer([B, Hq, q_len, T.int64(40)], "float32", data=p_q, strides=[q_s0, q_s1, q_s2, T.int64(1)], align=4, layout=None)
    k = T.decl_buffer([B, Hk, kv_len, T.int64(40)], "float32", data=p_k, strides=[k_s0, k_s1, k_s2, T.int64(1)], align=4, layout=None)
    v = T.decl_buffer([B, Hk, kv_len, T.int64(24)], "float32", data=p_v, strides=[v_s0, v_s1, v_s2, T.int64(1)], align=4, layout=None)
    o = T.decl_buffer([B, Hq, q_len, T.int64(24)], "float32", data=p_o, strides=[o_s0, o_s1, o_s2, T.int64(1)], align=4, layout=None)
    lse = T.decl_buffer([B, Hq, q_len], "float32", data=p_lse, strides=[lse_s0, lse_s1, T.int64(1)], align=4, layout=None)
    ws = T.decl_buffer((9280,), "uint8", data=p_ws, align=64)
    b_row = T.decl_buffer((16,), "int32", data=ws.data, elem_offset=0)
    b_Q = T.decl_buffer((40, 16), "float32", data=ws.data, elem_offset=16)
    b_m = T.decl_buffer((16,), "float32", data=ws.data, elem_offset=656)
    b_l = T.decl_buffer((16,), "float32", data=ws.data, elem_offset=672)
    b_O = T.decl_buffer((24, 16), "float32", data=ws.data, elem_offset=688)
    b_col = T.decl_buffer((8,), "int32", data=ws.data, elem_offset=1072)
    b_K = T.decl_buffer((8, 40), "float32", data=ws.data, elem_offset=1088)
    b_S = T.decl_buffer((8, 16), "float32", data=ws.data, elem_offset=1408)
    b_peak = T.decl_buffer((16,), "float32", data=ws.data, elem_offset=1536)
    b_safe = T.decl_buffer((16,), "float32", data=ws.data, elem_offset=1552)
    b_alpha = T.decl_buffer((16,), "float32", data=ws.data, elem_offset=1568)
    b_P = T.decl_buffer((8, 16), "float32", data=ws.data, elem_offset=1584)
    b_gain = T.decl_buffer((16,), "float32", data=ws.data, elem_offset=1712)
    b_V = T.decl_buffer((8, 24), "float32", data=ws.data, elem_offset=1728)
    b_norm = T.decl_buffer((16,), "float32", data=ws.data, elem_offset=1920)
    b_o_out = T.decl_buffer((24, 16), "float32", data=ws.data, elem_offset=1936)
    r_S = T.alloc_buffer((8, 16), "float32", scope="local", annotations={"disable_lower_builtin": True})
    r_peak = T.alloc_buffer((4, 16), "float32", scope="local", annotations={"disable_lower_builtin": True})
    r_gain = T.alloc_buffer((4, 16), "float32", scope="local", annotations={"disable_lower_builtin": True})
    r_O = T.alloc_buffer((12, 16), "float32", scope="local", annotations={"disable_lower_builtin": True})
    t_cells: T.let = T.truncdiv(q_len + 15, 16)
    h_cells: T.let = Hq
    b_cells: T.let = B
    for turn in range(T.truncdiv(t_cells * h_cells * b_cells - worker + workers - 1, workers)):
        cell: T.let = worker + turn * workers
        t: T.let = T.truncmod(cell, t_cells)
        h: T.let = T.truncmod(T.truncdiv(cell, t_cells), h_cells)
        b: T.let = T.truncdiv(T.truncdiv(cell, t_cells), h_cells)
        hk: T.let = T.truncdiv(h, T.truncdiv(Hq, Hk))
        # row[i]: 16 i32
        for i_i in T.vectorized(16):
            b_row[i_i] = T.Cast("int32", 16 * t) + i_i
        # Q[d, i]: 40 x 16 f32 = q[...]
        for i_i in range(16):
            for i_d in range(40):
                b_Q[i_d, i_i] = q[b, h, T.min(T.Cast("int64", b_row[i_i]), q_len - 1), i_d]
        # Q[d, i]: 40 x 16 f32
        for i_d in range(40):
            for i_i in T.vectorized(16):
                b_Q[i_d, i_i] = T.float32(1.4426950408889634) * b_Q[i_d, i_i] * scale
        # m[i]: 16 f32
        for i_i in T.vectorized(16):
            b_m[i_i] = T.float32("-inf")
        # l[i]: 16 f32
        for i_i in T.vectorized(16):
            b_l[i_i] = T.float32(0.0)
        # O[e, i]: 24 x 16 f32
        for i_e in range(24):
            for i_i in T.vectorized(16):
                b_O[i_e, i_i] = T.float32(0.0)
        u_lo: T.let = T.max(0, (16 * t - p0) // 8)
        u_hi: T.let = T.min((p0 + 16 * t + 23) // 8, T.truncdiv(kv_len + 7, 8))
        for u_step in range(u_hi - u_lo):
            u: T.let = u_lo + u_step
            # col[j]: 8 i32
            for i_j in T.vectorized(8):
                b_col[i_j] = T.Cast("int32", 8 * u) + i_j
            # K[j, d]: 8 x 40 f32 = k[...]
            for i_j in range(8):
                if T.Cast("int64", b_col[i_j]) < kv_len:
                    for i_d0 in range(2):
                        for i_d in T.vectorized(T.int64(16)):
                            b_K[i_j, i_d0 * 16 + i_d] = k[b, hk, b_col[i_j], i_d0 * 16 + i_d]
                    for i_d in T.vectorized(T.int64(8)):
                        b_K[i_j, 32 + i_d] = k[b, hk, b_col[i_j], 32 + i_d]
                else:
                    for i_d0 in range(2):
                        for i_d in T.vectorized(16):
                            b_K[i_j, i_d0 * 16 + i_d] = T.float32(0.0)
                    for i_d in T.vectorized(8):
                        b_K[i_j, 32 + i_d] = T.float32(0.0)
            # S[j, i]: 8 x 16 f32 = dot(Q, K) over d
            for i_j in T.unroll(8):
                for i_i in T.vectorized(16):
                    r_S[i_j, i_i] = T.float32(0.0)
            for i_d in range(40):
                for i_j in T.unroll(8):
                    for i_i in T.vectorized(16):
                        r_S[i_j, i_i] = r_S[i_j, i_i] + b_K[i_j, i_d] * b_Q[i_d, i_i]
            for i_j in T.unroll(8):
                for i_i in T.vectorized(16):
                    b_S[i_j, i_i] = r_S[i_j, i_i]
            c_0: T.let = 8 * u
            if not (c_0 + 8 <= kv_len and c_0 + 7 - 16 * t <= p0 and 16 * t + 15 - c_0 <= p0):
                # S[j, i]: 8 x 16 f32
                for i_j in range(8):
                    for i_i in T.vectorized(16):
                        b_S[i_j, i_i] = T.Select(T.abs(b_col[i_j] - b_row[i_i]) <= T.Cast("int32", p0) and b_col[i_j] < T.Cast("int32", kv_len), b_S[i_j, i_i], T.float32("-inf"))
            # peak[i]: 16 f32 = max over j
            for i_i in T.vectorized(16):
                r_peak[0, i_i] = T.float32("-inf")
                r_peak[1, i_i] = T.float32("-inf")
                r_peak[2, i_i] = T.float32("-inf")
                r_peak[3, i_i] = T.float32("-inf")
            for i_j in range(2):
                for i_i in T.vectorized(16):
                    r_peak[0, i_i] = T.Select(r_peak[0, i_i] <= T.float32("inf"), T.max(r_peak[0, i_i], b_S[i_j * 4 + 0, i_i]), r_peak[0, i_i])
                for i_i in T.vectorized(16):
                    r_peak[1, i_i] = T.Select(r_peak[1, i_i] <= T.float32("inf"), T.max(r_peak[1, i_i], b_S[i_j * 4 + 1, i_i]), r_peak[1, i_i])
                for i_i in T.vectorized(16):
                    r_peak[2, i_i] = T.Select(r_peak[2, i_i] <= T.float32("inf"), T.max(r_peak[2, i_i], b_S[i_j * 4 + 2, i_i]), r_peak[2, i_i])
                for i_i in T.vectorized(16):
                    r_peak[3, i_i] = T.Select(r_peak[3, i_i] <= T.float32("inf"), T.max(r_peak[3, i_i], b_S[i_j * 4 + 3, i_i]), r_peak[3, i_i])
            for i_i in T.vectorized(16):
                r_peak[0, i_i] = T.Select(r_peak[0, i_i] <= T.float32("inf"), T.max(r_peak[0, i_i], r_peak[1, i_i]), r_peak[0, i_i])
                r_peak[0, i_i] = T.Select(r_peak[0, i_i] <= T.float32("inf"), T.max(r_peak[0, i_i], r_peak[2, i_i]), r_peak[0, i_i])
                r_peak[0, i_i] = T.Select(r_peak[0, i_i] <= T.float32("inf"), T.max(r_peak[0, i_i], r_peak[3, i_i]), r_peak[0, i_i])
                b_peak[i_i] = r_peak[0, i_i]
            # peak[i]: 16 f32
            for i_i in T.vectorized(16):
                x_1: T.let = b_m[i_i]
                x_2: T.let = b_peak[i_i]
                b_peak[i_i] = T.Select(x_1 <= T.float32("inf"), T.max(x_1, x_2), x_1)
            # safe[i]: 16 f32
            for i_i in T.vectorized(16):
                b_safe[i_i] = T.Select(b_peak[i_i] == T.float32("-inf"), T.float32(0.0), b_peak[i_i])
            # alpha[i]: 16 f32
            for i_i in T.vectorized(16):
                x_1: T.let = T.min(T.float32(128.0), T.max(T.float32(-127.0), (b_m[i_i] - b_safe[i_i])))
                b_2: T.let = T.reinterpret("int32", x_1 + T.float32(12583039.0))
                n_3: T.let = T.reinterpret("float32", b_2) - T.float32(12583039.0)
                p_4: T.let = T.reinterpret("float32", T.shift_left(b_2, T.int32(23)))
                r_5: T.let = x_1 - n_3
                b_alpha[i_i] = ((((((T.float32(0.0001545316294512069) * r_5 + T.float32(0.0013390863364671234)) * r_5 + T.float32(0.009618082557277852)) * r_5 + T.float32(0.05550357114219078)) * r_5 + T.float32(0.24022650760568126)) * r_5 + T.float32(0.6931471880262288)) * r_5 + T.float32(1.0)) * p_4
            # m[i]: 16 f32
            for i_i in T.vectorized(16):
                b_m[i_i] = b_peak[i_i]
            # P[j, i]: 8 x 16 f32
            for i_j in range(8):
                for i_i in T.vectorized(16):
                    x_1: T.let = T.min(T.float32(128.0), T.max(T.float32(-127.0), (b_S[i_j, i_i] - b_safe[i_i])))
                    b_2: T.let = T.reinterpret("int32", x_1 + T.float32(12583039.0))
                    n_3: T.let = T.reinterpret("float32", b_2) - T.float32(12583039.0)
                    p_4: T.let = T.reinterpret("float32", T.shift_left(b_2, T.int32(23)))
                    r_5: T.let = x_1 - n_3
                    b_P[i_j, i_i] = ((((((T.float32(0.0001545316294512069) * r_5 + T.float32(0.0013390863364671234)) * r_5 + T.float32(0.009618082557277852)) * r_5 + T.float32(0.05550357114219078)) * r_5 + T.float32(0.24022650760568126)) * r_5 + T.float32(0.6931471880262288)) * r_5 + T.float32(1.0)) * p_4
            # gain[i]: 16 f32 = sum over j
            for i_i in T.vectorized(16):
                r_gain[0, i_i] = T.float32(0.0)
                r_gain[1, i_i] = T.float32(0.0)
                r_gain[2, i_i] = T.float32(0.0)
                r_gain[3, i_i] = T.float32(0.0)
            for i_j in range(2):
                for i_i in T.vectorized(16):
                    r_gain[0, i_i] = r_gain[0, i_i] + b_P[i_j * 4 + 0, i_i]
                for i_i in T.vectorized(16):
                    r_gain[1, i_i] = r_gain[1, i_i] + b_P[i_j * 4 + 1, i_i]
                for i_i in T.vectorized(16):
                    r_gain[2, i_i] = r_gain[2, i_i] + b_P[i_j * 4 + 2, i_i]
                for i_i in T.vectorized(16):
                    r_gain[3, i_i] = r_gain[3, i_i] + b_P[i_j * 4 + 3, i_i]
            for i_i in T.vectorized(16):
                r_gain[0, i_i] = r_gain[0, i_i] + r_gain[1, i_i]
                r_gain[0, i_i] = r_gain[0, i_i] + r_gain[2, i_i]
                r_gain[0, i_i] = r_gain[0, i_i] + r_gain[3, i_i]
                b_gain[i_i] = r_gain[0, i_i]
            # l[i]: 16 f32
            for i_i in T.vectorized(16):
                b_l[i_i] = b_alpha[i_i] * b_l[i_i] + b_gain[i_i]
            # O[e, i]: 24 x 16 f32
            for i_e in range(24):
                for i_i in T.vectorized(16):
                    b_O[i_e, i_i] = b_O[i_e, i_i] * b_alpha[i_i]
            # V[j, e]: 8 x 24 f32 = v[...]
            for i_j in range(8):
                if T.Cast("int64", b_col[i_j]) < kv_len:
                    for i_e in T.vectorized(T.int64(16)):
                        b_V[i_j, i_e] = v[b, hk, b_col[i_j], i_e]
                    for i_e in T.vectorized(T.int64(8)):
                        b_V[i_j, 16 + i_e] = v[b, hk, b_col[i_j], 16 + i_e]
                else:
                    for i_e in T.vectorized(16):
                        b_V[i_j, i_e] = T.float32(0.0)
                    for i_e in T.vectorized(8):
                        b_V[i_j, 16 + i_e] = T.float32(0.0)
            # O[e, i]: 24 x 16 f32 += dot(P, V) over j
            for i_e0 in range(2):
                for i_e in T.unroll(12):
                    for i_i in T.vectorized(16):
                        r_O[i_e, i_i] = T.float32(0.0)
                for i_j in range(8):
                    for i_e in T.unroll(12):
                        for i_i in T.vectorized(16):
                            r_O[i_e, i_i] = r_O[i_e, i_i] + b_V[i_j, i_e0 * 12 + i_e] * b_P[i_j, i_i]
                for i_e in T.unroll(12):
                    for i_i in T.vectorized(16):
                        b_O[i_e0 * 12 + i_e, i_i] = b_O[i_e0 * 12 + i_e, i_i] + r_O[i_e, i_i]
        # norm[i]: 16 f32
        for i_i in T.vectorized(16):
            b_norm[i_i] = T.Select(b_l[i_i] == T.float32(0.0), T.float32(1.0), b_l[i_i])
        # o_out[e, i]: 24 x 16 f32
        for i_e in range(24):
            for i_i in T.vectorized(16):
                b_o_out[i_e, i_i] = b_O[i_e, i_i] / b_norm[i_i]
        # o[...] = 24x16 f32
        for i_i in range(16):
            if T.Cast("int64", b_row[i_i]) < q_len:
                for i_e in range(24):
                    o[b, h, b_row[i_i], i_e] = b_o_out[i_e, i_i]
        # lse[...] = 16 f32
        c_0: T.let = 16 * t
        if c_0 < q_len and c_0 + 15 < q_len:
            for i_i in T.vectorized(T.int64(16)):
                x_1: T.let = b_norm[i_i]
                b_2: T.let = T.reinterpret("int32", T.Select(x_1 < T.float32(1.1754943508222875e-38), x_1 * T.float32(16777216.0), x_1))
                n_3: T.let = T.shift_right(b_2 - T.int32(1060439283), T.int32(23))
                m_4: T.let = T.reinterpret("float32", b_2 - T.shift_left(n_3, T.int32(23)))
                e_5: T.let = T.Cast("float32", n_3) - T.Select(x_1 < T.float32(1.1754943508222875e-38), T.float32(24.0), T.float32(0.0))
                s_6: T.let = (m_4 - T.float32(1.0)) / (m_4 + T.float32(1.0))
                z_7: T.let = s_6 * s_6
                h_8: T.let = (((T.float32(0.23330467216303835) * z_7 + T.float32(0.28550820815960665)) * z_7 + T.float32(0.40000121839806124)) * z_7 + T.float32(0.6666666655449709)) * z_7 * s_6
                v_9: T.let = e_5 + (h_8 + s_6 * T.float32(2.0)) * T.float32(1.4426950408889634)
                lse[b, h, i_i + 16 * t] = T.Select(b_l[i_i] == T.float32(0.0), T.float32("-inf"), T.float32(0.6931471805599453) * b_m[i_i] + T.float32(0.6931471805599453) * (T.Select(x_1 <= T.float32(0.0), T.Select(x_1 < T.float32(0.0), T.float32("nan"), T.float32("-inf")), T.Select(x_1 < T.float32("inf"), v_9, x_1))))
        else:
            for i_i in range(16):
                if T.Cast("int64", b_row[i_i]) < q_len:
                    x_1: T.let = b_norm[i_i]
                    b_2: T.let = T.reinterpret("int32", T.Select(x_1 < T.float32(1.1754943508222875e-38), x_1 * T.float32(16777216.0), x_1))
                    n_3: T.let = T.shift_right(b_2 - T.int32(1060439283), T.int32(23))
                    m_4: T.let = T.reinterpret("float32", b_2 - T.shift_left(n_3, T.int32(23)))
                    e_5: T.let = T.Cast("float32", n_3) - T.Select(x_1 < T.float32(1.1754943508222875e-38), T.float32(24.0), T.float32(0.0))
                    s_6: T.let = (m_4 - T.float32(1.0)) / (m_4 + T.float32(1.0))
                    z_7: T.let = s_6 * s_6
                    h_8: T.let = (((T.float32(0.23330467216303835) * z_7 + T.float32(0.28550820815960665)) * z_7 + T.float32(0.40000121839806124)) * z_7 + T.float32(0.6666666655449709)) * z_7 * s_6
                    v_9: T.let = e_5 + (h_8 + s_6 * T.float32(2.0)) * T.float32(1.4426950408889634)
                    lse[b, h, i_i + 16 * t] = T.Select(b_l[i_i] == T.float32(0.0), T.float32("-inf"), T.float32(0.6931471805599453) * b_m[i_i] + T.float32(0.6931471805599453) * (T.Select(x_1 <= T.float32(0.0), T.Select(x_1 < T.float32(0.0), T.float32("nan"), T.float32("-inf")), T.Select(x_1 < T.float32("inf"), v_9, x_1))))
