"""Device functions that widen 4- and 8-bit codes to what an MMA of wider operands takes, exactly.

    E2M1   s ee m        0 .5 1 1.5 2 3 4 6, two a byte, the even k in the low nibble
    E4M3   s eeee mmm    codes, and block scales (then not negative); 0x7F is NaN
    E5M2   s eeeee mm    the high byte of an fp16
    E8M0   eeeeeeee      block scales 2^(byte - 127); 255 is NaN

Fields are shifted to where the wider type has them, which leaves a power of two between the exponents' biases: one
multiplication repairs it. NVFP4 values (code times block scale, 6 significant bits, 2^-10 to 2688) come out times
2^-8, so that this factor and the block scale are one number in fp16 as in bf16; the epilogue undoes it (`FOLD`).
All of it works on a GPU without fp8 instructions. UPCAST: in the interpreter, which has no bf16 arithmetic.
"""

import triton
import triton.language as tl

FOLD = tl.constexpr(256.0)  # of an NVFP4 operand


@triton.jit
def e4m3_scale(byte):
    """Block scales as fp32; the sign is not looked at, as in hardware."""
    magnitude = (byte & 0x7F).to(tl.uint32)
    value = (magnitude << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return tl.where(magnitude == 0x7F, float("nan"), value)


@triton.jit
def e8m0_scale(byte):
    """2^(byte - 127) as fp32, NaN for 255; 2^-127 is a subnormal number."""
    exponent = byte.to(tl.uint32) << 23
    bits = tl.where(byte == 0, 0x00400000, tl.where(byte == 255, 0x7FC00000, exponent))
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def e2m1_bits(codes, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """(even, odd) of bytes, as numbers that are the value times 2^-14 (fp16) or 2^-126 (bf16, fp32). WIDE: as fp32.

    A pair is shifted into its places as one word, which is what an MMA operand's register holds.
    """
    word = codes.to(tl.uint32) * 0x1001
    if tl.float16 == DTYPE:
        word = ((word << 9) & 0x0E000E00) | ((word << 12) & 0x80008000)
    else:
        word = ((word << 6) & 0x01C001C0) | ((word << 12) & 0x80008000)
    if WIDE and tl.float16 != DTYPE:
        even, odd = word << 16, word & 0xFFFF0000
        return even.to(tl.float32, bitcast=True), odd.to(tl.float32, bitcast=True)
    else:
        even, odd = word.to(tl.uint16), (word >> 16).to(tl.uint16)
        even, odd = even.to(DTYPE, bitcast=True), odd.to(DTYPE, bitcast=True)
        return (even.to(tl.float32), odd.to(tl.float32)) if WIDE else (even, odd)


@triton.jit
def e2m1_scale(byte, DTYPE: tl.constexpr):
    """E4M3 block scales as the factor that turns `e2m1_bits` into value / FOLD."""
    if tl.float16 == DTYPE:
        return e4m3_scale(byte) * 64.0
    else:
        return e4m3_scale(byte) * 3.323069989462290e35  # 2^118


@triton.jit
def spread(scale, WIDTH: tl.constexpr):
    """(rows, blocks) -> (rows, blocks * WIDTH), every scale WIDTH times."""
    ROWS: tl.constexpr = scale.shape[0]
    BLOCKS: tl.constexpr = scale.shape[1]
    wide = tl.broadcast_to(scale[:, :, None], (ROWS, BLOCKS, WIDTH))
    return wide.reshape(ROWS, BLOCKS * WIDTH)


@triton.jit
def quad_order(BLOCK_K: tl.constexpr):
    """Where in a tile the k of each place lies, where four lanes shall each read a quarter of a row of codes.

    Place (r, lane, parity) takes k (lane, r, parity). wgmma wants neighbouring pairs of k in four neighbouring lanes;
    in this order each finds its pairs side by side, 16 bytes at a time and not single ones, and a quarter of the
    scales. A sum over k has no order, as long as both operands agree. For 128 x 128 codes and 128 threads on sm_90,
    757 instructions in place of 1,199 and 119 registers of 222. mma.sync on sm_80 and sm_120, whose operands Triton
    orders so itself, gets worse (1,047 of 839); sm_100, where the operand goes to tensor memory, does not change.
    """
    place = tl.arange(0, BLOCK_K)
    return place // 2 % 4 * (BLOCK_K // 4) + place // 8 * 2 + place % 2


@triton.jit
def decode_nvfp4(codes, scale, DTYPE: tl.constexpr, QUADS: tl.constexpr, UPCAST: tl.constexpr):
    """(rows, K) values / FOLD from codes (rows, K/2) and E4M3 bytes (rows, K/16). DTYPE fp16, bf16 or fp32.

    QUADS: K in `quad_order`.
    """
    ROWS: tl.constexpr = codes.shape[0]
    PAIRS: tl.constexpr = codes.shape[1]
    factor = e2m1_scale(scale, DTYPE)
    WIDE: tl.constexpr = UPCAST or tl.float32 == DTYPE
    even, odd = e2m1_bits(codes, DTYPE, WIDE)
    factor = spread(factor if WIDE else factor.to(DTYPE), 8)
    value = tl.join(even, odd) * factor[:, :, None]
    if QUADS:
        value = value.reshape(ROWS, 4, PAIRS // 4, 2).trans(0, 2, 1, 3)
    return value.reshape(ROWS, 2 * PAIRS)


@triton.jit
def decode_fp8(codes, E5M2: tl.constexpr):
    """fp16 values of E4M3 or E5M2 codes; of bytes by their bits, of fp8 by the instruction."""
    if codes.dtype != tl.uint8:
        return codes.to(tl.float16)
    else:
        byte = codes.to(tl.int16)
        if E5M2:
            return (byte << 8).to(tl.float16, bitcast=True)
        else:
            bits = ((byte & 0x7F) << 7) | ((byte & 0x80) << 8)
            value = bits.to(tl.float16, bitcast=True) * 256.0
            return tl.where((byte & 0x7F) == 0x7F, float("nan"), value).to(tl.float16)


@triton.jit
def decode_mxfp8(codes, scale, E5M2: tl.constexpr):
    """fp32 values of codes (rows, K) with E8M0 bytes (rows, K/32), exact."""
    return decode_fp8(codes, E5M2).to(tl.float32) * spread(e8m0_scale(scale), 32)
