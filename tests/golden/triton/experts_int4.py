# experts_h: emitted by gossamer
# 8 groups, [rows, 4096] x [4096, 14336] x 2; 16 rows, 64 columns

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


ASSEMBLY = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def field4_at0_less8_bf16(b):
    """4 bits of bytes from bit 0 up, minus 8."""
    if not ASSEMBLY:
        return (((b.to(tl.int32) >> 0) & 15).to(tl.float32) - 8.0).to(tl.bfloat16)
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, u, c;
        cvt.u32.u16 a, $1;
        prmt.b32 a, a, 0, 0x4140;
        lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;
        mov.b32 u, 0x3F803F80;
        mov.b32 c, 0xC308C308;
        fma.rn.bf16x2 $0, a, u, c;
        }
        """,
        "=r,h",
        [b],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def field4_at4_less8_bf16(b):
    """4 bits of bytes from bit 4 up, minus 8."""
    if not ASSEMBLY:
        return (((b.to(tl.int32) >> 4) & 15).to(tl.float32) - 8.0).to(tl.bfloat16)
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, u, c;
        cvt.u32.u16 a, $1;
        prmt.b32 a, a, 0, 0x4140;
        shr.b32 a, a, 4;
        lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;
        mov.b32 u, 0x3F803F80;
        mov.b32 c, 0xC308C308;
        fma.rn.bf16x2 $0, a, u, c;
        }
        """,
        "=r,h",
        [b],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def experts_h(
    p_x: "*bf16", s_x_0: "i64",  # in x[T, 4096]
    d_gate_up_codes: "tensordesc<u8[1, 64, 128]>",  # in gate_up_codes[8, 28672, 2048]
    p_gate_up_scales: "*bf16", s_gate_up_scales_0: "i64", s_gate_up_scales_1: "i64", s_gate_up_scales_2: "i64",  # in gate_up_scales[8, 28672, 32]
    p_bounds: "*i32",  # in bounds[9]
    p_tokens: "*i32",  # in tokens[entries]
    p_h: "*bf16", s_h_0: "i64",  # out h[entries, 14336]
    T: "i32", entries: "i32",
):
    pid = tl.program_id(0)
    n0 = pid % 224
    slot = pid // 224
    i_n = tl.arange(0, 64)
    i_i = tl.arange(0, 16)
    i_d = tl.arange(0, 128)
    i_z = tl.arange(0, 16)
    m_z = i_z < 8
    r_gate_up_scales_1 = s_gate_up_scales_1.to(tl.int32)
    r_h_0 = s_h_0.to(tl.int32)

    # b_bound: i32[z 16]
    b_bound = tl.load(p_bounds + i_z, mask=m_z, other=0)
    # b_begun: i32
    b_begun = tl.sum(
        (tl.where(m_z, tl.where(i_z + (b_bound >> 4) <= slot, 1, 0), 0))[:, None],
        axis=0,
    ).item()
    expert = tl.minimum(tl.maximum(b_begun - 1, 0), 7)
    start = tl.minimum(
        tl.maximum(tl.load(p_bounds + expert, mask=(expert < 9), other=0), 0),
        entries,
    )
    last = tl.minimum(
        tl.maximum(tl.load(p_bounds + expert + 1, mask=(expert + 1 < 9), other=0), 0),
        entries,
    )
    row0 = start + 16 * slot - 16 * expert - 16 * (start // 16)
    if row0 < last:
        # b_row: i32[i 16]
        b_row = tl.minimum(row0 + i_i, last - 1)
        # b_token: i32[i 16]
        b_token = tl.load(p_tokens + b_row)
        # b_col: i32[n 64]
        b_col = 64 * n0 + i_n
        # b_SW0_0: f32[n 64]
        b_SW0_0 = tl.load(
            p_gate_up_scales
            + expert * s_gate_up_scales_0
            + 64 * n0 * s_gate_up_scales_1
            + i_n * r_gate_up_scales_1,
        ).to(tl.float32)
        # b_SW0_1: f32[n 64]
        b_SW0_1 = tl.load(
            p_gate_up_scales
            + expert * s_gate_up_scales_0
            + 64 * n0 * s_gate_up_scales_1
            + 16 * s_gate_up_scales_2
            + i_n * r_gate_up_scales_1,
        ).to(tl.float32)
        # b_SW1_0: f32[n 64]
        b_SW1_0 = tl.load(
            p_gate_up_scales
            + expert * s_gate_up_scales_0
            + (64 * n0 + 14336) * s_gate_up_scales_1
            + i_n * r_gate_up_scales_1,
        ).to(tl.float32)
        # b_SW1_1: f32[n 64]
        b_SW1_1 = tl.load(
            p_gate_up_scales
            + expert * s_gate_up_scales_0
            + (64 * n0 + 14336) * s_gate_up_scales_1
            + 16 * s_gate_up_scales_2
            + i_n * r_gate_up_scales_1,
        ).to(tl.float32)
        # b_acc0: f32[n 64, i 16]
        b_acc0 = tl.full([64, 16], 0.0, tl.float32)
        # b_acc1: f32[n 64, i 16]
        b_acc1 = tl.full([64, 16], 0.0, tl.float32)
        for u in tl.range(0, 16):
            # b_SnextW0_0: f32[n 64]
            b_SnextW0_0 = tl.load(
                p_gate_up_scales
                + expert * s_gate_up_scales_0
                + 64 * n0 * s_gate_up_scales_1
                + (128 * u + 128) // 128 * s_gate_up_scales_2
                + i_n * r_gate_up_scales_1,
                mask=128 * u + 128 < 2048,
                other=0.0,
            ).to(tl.float32)
            # b_SnextW0_1: f32[n 64]
            b_SnextW0_1 = tl.load(
                p_gate_up_scales
                + expert * s_gate_up_scales_0
                + 64 * n0 * s_gate_up_scales_1
                + (128 * u + 2176) // 128 * s_gate_up_scales_2
                + i_n * r_gate_up_scales_1,
                mask=128 * u + 128 < 2048,
                other=0.0,
            ).to(tl.float32)
            # b_SnextW1_0: f32[n 64]
            b_SnextW1_0 = tl.load(
                p_gate_up_scales
                + expert * s_gate_up_scales_0
                + (64 * n0 + 14336) * s_gate_up_scales_1
                + (128 * u + 128) // 128 * s_gate_up_scales_2
                + i_n * r_gate_up_scales_1,
                mask=128 * u + 128 < 2048,
                other=0.0,
            ).to(tl.float32)
            # b_SnextW1_1: f32[n 64]
            b_SnextW1_1 = tl.load(
                p_gate_up_scales
                + expert * s_gate_up_scales_0
                + (64 * n0 + 14336) * s_gate_up_scales_1
                + (128 * u + 2176) // 128 * s_gate_up_scales_2
                + i_n * r_gate_up_scales_1,
                mask=128 * u + 128 < 2048,
                other=0.0,
            ).to(tl.float32)
            # b_A_0: bf16[i 16, d 128]
            b_A_0 = tl.load(
                p_x + 128 * u + (b_token[:, None].to(tl.int64) * s_x_0 + i_d[None, :]),
                mask=row0 + i_i[:, None] < last,
                other=0.0,
            )
            # b_A_1: bf16[i 16, d 128]
            b_A_1 = tl.load(
                p_x + 128 * u + 2048 + (b_token[:, None].to(tl.int64) * s_x_0 + i_d[None, :]),
                mask=row0 + i_i[:, None] < last,
                other=0.0,
            )
            # b_W0_c00: u8[n 64, d 128]
            b_W0_c00 = d_gate_up_codes.load([expert, 64 * n0, 128 * u]).reshape([64, 128])
            # b_W0_0: bf16[n 64, d 128]
            b_W0_0 = field4_at0_less8_bf16(b_W0_c00)
            # b_W0_1: bf16[n 64, d 128]
            b_W0_1 = field4_at4_less8_bf16(b_W0_c00)
            # b_W1_c00: u8[n 64, d 128]
            b_W1_c00 = d_gate_up_codes.load([expert, 64 * n0 + 14336, 128 * u]).reshape([64, 128])
            # b_W1_0: bf16[n 64, d 128]
            b_W1_0 = field4_at0_less8_bf16(b_W1_c00)
            # b_W1_1: bf16[n 64, d 128]
            b_W1_1 = field4_at4_less8_bf16(b_W1_c00)
            # b_PW0_0: f32[n 64, i 16]
            b_PW0_0 = tl.dot(b_W0_0, tl.trans(b_A_0))
            b_acc0 = b_acc0 + b_PW0_0 * b_SW0_0[:, None]
            # b_PW0_1: f32[n 64, i 16]
            b_PW0_1 = tl.dot(b_W0_1, tl.trans(b_A_1))
            b_acc0 = b_acc0 + b_PW0_1 * b_SW0_1[:, None]
            # b_PW1_0: f32[n 64, i 16]
            b_PW1_0 = tl.dot(b_W1_0, tl.trans(b_A_0))
            b_acc1 = b_acc1 + b_PW1_0 * b_SW1_0[:, None]
            # b_PW1_1: f32[n 64, i 16]
            b_PW1_1 = tl.dot(b_W1_1, tl.trans(b_A_1))
            b_acc1 = b_acc1 + b_PW1_1 * b_SW1_1[:, None]
            b_SW0_0 = b_SnextW0_0
            b_SW0_1 = b_SnextW0_1
            b_SW1_0 = b_SnextW1_0
            b_SW1_1 = b_SnextW1_1
        # b_R: f32[n 64, i 16]
        b_R = b_acc0 * b_acc1 * (1.0 / (1.0 + tl.exp(-b_acc0)))
        tl.store(
            p_h + row0 * s_h_0 + 64 * n0 + (i_i[None, :] * r_h_0 + i_n[:, None]),
            b_R.to(tl.bfloat16),
            mask=row0 + i_i[None, :] < last,
        )


kernel = experts_h
OPTIONS = {"num_warps": 4, "num_stages": 3}
DIVISORS = {"p_x": 16, "s_x_0": 8, "p_h": 16, "s_h_0": 8}


def grid(entries, **_):
    return (224 * (entries // 16 + 8),)


def bind(x, gate_up_codes, gate_up_scales, bounds, tokens, h):
    if max(gate_up_scales.stride(1) * 63, h.stride(0) * 15, 0) >= 2**31:
        raise OverflowError("experts_h: a stride is so large that one tile spans 2**31 elements")
    return (
        x, x.stride(0),
        TensorDescriptor.from_tensor(gate_up_codes, [1, 64, 128]),
        gate_up_scales, gate_up_scales.stride(0), gate_up_scales.stride(1), gate_up_scales.stride(2),
        bounds,
        tokens,
        h, h.stride(0),
        x.shape[0], tokens.shape[0],
    )
