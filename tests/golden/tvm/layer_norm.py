# layer_norm
# y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, a row at a time
@T.prim_func
def layer_norm(p_x: T.handle("float32"), p_weight: T.handle("float32"), p_bias: T.handle("float32"), p_y: T.handle("float32"), rows: T.int64, x_s0: T.int64, y_s0: T.int64, eps: T.float32, worker: T.int64, workers: T.int64, p_ws: T.handle("uint8")):
    T.func_attr({"global_symbol": "layer_norm", "tirx.noalias": True})
    x = T.decl_buffer([rows, T.int64(96)], "float32", data=p_x, strides=[x_s0, T.int64(1)], align=4, layout=None)
    weight = T.decl_buffer([T.int64(96)], "float32", data=p_weight, strides=[T.int64(1)], align=4, layout=None)
    bias = T.decl_buffer([T.int64(96)], "float32", data=p_bias, strides=[T.int64(1)], align=4, layout=None)
    y = T.decl_buffer([rows, T.int64(96)], "float32", data=p_y, strides=[y_s0, T.int64(1)], align=4, layout=None)
    ws = T.decl_buffer((7104,), "uint8", data=p_ws, align=64)
    b_X = T.decl_buffer((96, 8), "float32", data=ws.data, elem_offset=0)
    b_mean = T.decl_buffer((8,), "float32", data=ws.data, elem_offset=768)
    b_var = T.decl_buffer((8,), "float32", data=ws.data, elem_offset=784)
    b_scale = T.decl_buffer((8,), "float32", data=ws.data, elem_offset=800)
    b_W = T.decl_buffer((96,), "float32", data=ws.data, elem_offset=816)
    b_C = T.decl_buffer((96,), "float32", data=ws.data, elem_offset=912)
    b_y_out = T.decl_buffer((96, 8), "float32", data=ws.data, elem_offset=1008)
    r_mean = T.alloc_buffer((4, 8), "float32", scope="local", annotations={"disable_lower_builtin": True})
    r_var = T.alloc_buffer((4, 8), "float32", scope="local", annotations={"disable_lower_builtin": True})
    t_cells: T.let = T.truncdiv(rows + 7, 8)
    for turn in range(T.truncdiv(t_cells - worker + workers - 1, workers)):
        cell: T.let = worker + turn * workers
        t: T.let = cell
        first: T.let = 8 * t
        # X[d, i]: 96 x 8 f32 = x[...]
        for i_i in range(8):
            if first + i_i < rows:
                for i_d in range(96):
                    b_X[i_d, i_i] = x[first + i_i, i_d]
            else:
                for i_d in range(96):
                    b_X[i_d, i_i] = T.float32(0.0)
        # mean[i]: 8 f32 = sum over d
        for i_i in T.vectorized(8):
            r_mean[0, i_i] = T.float32(0.0)
            r_mean[1, i_i] = T.float32(0.0)
            r_mean[2, i_i] = T.float32(0.0)
            r_mean[3, i_i] = T.float32(0.0)
        for i_d in range(24):
            for i_i in T.vectorized(8):
                r_mean[0, i_i] = r_mean[0, i_i] + b_X[i_d * 4 + 0, i_i] / T.float32(96.0)
            for i_i in T.vectorized(8):
                r_mean[1, i_i] = r_mean[1, i_i] + b_X[i_d * 4 + 1, i_i] / T.float32(96.0)
            for i_i in T.vectorized(8):
                r_mean[2, i_i] = r_mean[2, i_i] + b_X[i_d * 4 + 2, i_i] / T.float32(96.0)
            for i_i in T.vectorized(8):
                r_mean[3, i_i] = r_mean[3, i_i] + b_X[i_d * 4 + 3, i_i] / T.float32(96.0)
        for i_i in T.vectorized(8):
            r_mean[0, i_i] = r_mean[0, i_i] + r_mean[1, i_i]
            r_mean[0, i_i] = r_mean[0, i_i] + r_mean[2, i_i]
            r_mean[0, i_i] = r_mean[0, i_i] + r_mean[3, i_i]
            b_mean[i_i] = r_mean[0, i_i]
        # var[i]: 8 f32 = sum over d
        for i_i in T.vectorized(8):
            r_var[0, i_i] = T.float32(0.0)
            r_var[1, i_i] = T.float32(0.0)
            r_var[2, i_i] = T.float32(0.0)
            r_var[3, i_i] = T.float32(0.0)
        for i_d in range(24):
            for i_i in T.vectorized(8):
                x_0: T.let = b_X[i_d * 4 + 0, i_i] - b_mean[i_i]
                r_var[0, i_i] = r_var[0, i_i] + x_0 * x_0 / T.float32(96.0)
            for i_i in T.vectorized(8):
                x_0: T.let = b_X[i_d * 4 + 1, i_i] - b_mean[i_i]
                r_var[1, i_i] = r_var[1, i_i] + x_0 * x_0 / T.float32(96.0)
            for i_i in T.vectorized(8):
                x_0: T.let = b_X[i_d * 4 + 2, i_i] - b_mean[i_i]
                r_var[2, i_i] = r_var[2, i_i] + x_0 * x_0 / T.float32(96.0)
            for i_i in T.vectorized(8):
                x_0: T.let = b_X[i_d * 4 + 3, i_i] - b_mean[i_i]
                r_var[3, i_i] = r_var[3, i_i] + x_0 * x_0 / T.float32(96.0)
        for i_i in T.vectorized(8):
            r_var[0, i_i] = r_var[0, i_i] + r_var[1, i_i]
            r_var[0, i_i] = r_var[0, i_i] + r_var[2, i_i]
            r_var[0, i_i] = r_var[0, i_i] + r_var[3, i_i]
            b_var[i_i] = r_var[0, i_i]
        # scale[i]: 8 f32
        for i_i in T.vectorized(8):
            b_scale[i_i] = T.float32(1.0) / T.sqrt(eps + b_var[i_i])
        # W[d]: 96 f32 = weight[...]
        for i_d0 in range(3):
            for i_d in T.vectorized(T.int64(32)):
                b_W[i_d0 * 32 + i_d] = weight[i_d0 * 32 + i_d]
        # C[d]: 96 f32 = bias[...]
        for i_d0 in range(3):
            for i_d in T.vectorized(T.int64(32)):
                b_C[i_d0 * 32 + i_d] = bias[i_d0 * 32 + i_d]
        # y_out[d, i]: 96 x 8 f32
        for i_d in range(96):
            for i_i in T.vectorized(8):
                b_y_out[i_d, i_i] = b_C[i_d] + b_W[i_d] * b_scale[i_i] * (b_X[i_d, i_i] - b_mean[i_i])
        # y[...] = 96x8 f32
        for i_i in range(8):
            if first + i_i < rows:
                for i_d in range(96):
                    y[first + i_i, i_d] = b_y_out[i_d, i_i]
