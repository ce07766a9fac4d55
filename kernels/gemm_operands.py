"""Tiles of the operands of `scaled_mm`: codes and block scales from memory, widened to what the MMA takes.

An operand is a matrix of `rows` rows along k. Its FORMAT is "plain", "fp8", "nvfp4" or "mxfp8". Rows past the end are
read as the last row or as 0 (their results are not stored); k past the end is 0: masked, unless WHOLE says that tiles
end where k ends, or by TMA. Padding of codes and of scales is never taken for data.

Block scales are (rows, blocks), or SWIZZLED to 128x4 tiles of 512 bytes (rows padded to 128, blocks to 4):

    offset(row, block) = (row/128 * blocks/4 + block/4) * 512 + row%32 * 16 + row%128/32 * 4 + block%4
"""

import triton
import triton.language as tl

from tigon.kernels.gemm_decode import decode_fp8, decode_mxfp8, decode_nvfp4, quad_order


@triton.jit
def codes_source(
    ptr,
    rows,
    k,
    pitch,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """Where tiles of codes come from: a descriptor, or the bare pointer."""
    if not TMA:
        return ptr
    elif FORMAT == "nvfp4":
        columns = (k + 15) // 16 * 8
        return tl.make_tensor_descriptor(ptr, [rows, columns], [pitch, 1], [ROWS, BLOCK_K // 2])
    else:
        return tl.make_tensor_descriptor(ptr, [rows, k], [pitch, 1], [ROWS, BLOCK_K])


@triton.jit
def load_codes(
    source, row, tile, pitch, k0, k,
    FORMAT: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr, QUADS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """(ROWS, BLOCK_K) as stored, or (ROWS, BLOCK_K/2) pairs; row (ROWS) int64, tile: its index."""
    PACK: tl.constexpr = 2 if FORMAT == "nvfp4" else 1
    if TMA:
        return source.load([tile * row.shape[0], k0 // PACK])
    else:
        columns = (k + 15) // 16 * 8 if FORMAT == "nvfp4" else k
        order = quad_order(BLOCK_K) if QUADS and PACK == 1 else tl.arange(0, BLOCK_K // PACK)
        column = k0 // PACK + order
        at = source + (row * pitch)[:, None] + column[None, :]
        return tl.load(at) if WHOLE else tl.load(at, mask=(column < columns)[None, :], other=0.0)


@triton.jit
def load_scales(
    ptr, row, pitch, first, blocks, COUNT: tl.constexpr, SWIZZLED: tl.constexpr, WHOLE: tl.constexpr
):
    """(ROWS, COUNT) bytes from block `first` on, of `blocks` in all; row (ROWS) int64."""
    block = first + tl.arange(0, COUNT)
    if SWIZZLED:
        start = row // 128 * ((blocks + 3) // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4
        at = ptr + start[:, None] + (block // 4 * 512 + block % 4)[None, :]
    else:
        at = ptr + (row * pitch)[:, None] + block[None, :]
    return tl.load(at) if WHOLE else tl.load(at, mask=(block < blocks)[None, :], other=0.0)


@triton.jit
def scale_tiles_source(
    ptr, rows, blocks, ROWS: tl.constexpr, COUNT: tl.constexpr, TMA: tl.constexpr
):
    """Where whole 128x4 tiles of scales come from: a descriptor, or the bare pointer."""
    if TMA:
        tiles, groups = (rows + 127) // 128, (blocks + 3) // 4
        return tl.make_tensor_descriptor(
            ptr, [tiles, groups, 2, 256], [groups.to(tl.int64) * 512, 512, 256, 1],
            [ROWS // 128, COUNT // 4, 2, 256],
        )  # fmt: skip
    else:
        return ptr


@triton.jit
def load_scale_tiles(
    source, tile, rows, first, blocks,
    ROWS: tl.constexpr, COUNT: tl.constexpr, WHOLE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """(ROWS, COUNT) bytes of whole 128x4 tiles. Through TMA, sm_100 copies them to tensor memory as they are
    (tcgen05.cp); through pointers they pass the registers."""
    if TMA:
        scales = source.load([tile * (ROWS // 128), first // 4, 0, 0])
    else:
        high = tile.to(tl.int64) * (ROWS // 128) + tl.arange(0, ROWS // 128)
        high = tl.minimum(high, (rows - 1) // 128)[:, None, None]
        wide = (first // 4 + tl.arange(0, COUNT // 4))[None, :, None]
        groups = (blocks + 3) // 4
        at = source + (high * groups + wide) * 512 + tl.arange(0, 512)[None, None, :]
        scales = tl.load(at) if WHOLE else tl.load(at, mask=wide < groups, other=0.0)
    scales = scales.reshape(ROWS // 128, COUNT // 4, 32, 4, 4)
    return scales.trans(0, 3, 2, 1, 4).reshape(ROWS, COUNT)


@triton.jit
def load_operand(
    source, scale_ptr, row, tile, pitch, scale_pitch, k0, k,
    FORMAT: tl.constexpr, E5M2: tl.constexpr, SWIZZLED: tl.constexpr, DTYPE: tl.constexpr, BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr, QUADS: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(ROWS, BLOCK_K) of DTYPE; E4M3 or E5M2 codes stay what they are if DTYPE is None."""
    codes = load_codes(source, row, tile, pitch, k0, k, FORMAT, BLOCK_K, WHOLE, QUADS, TMA)
    if FORMAT == "plain" or DTYPE is None:
        return codes
    elif FORMAT == "fp8":
        return decode_fp8(codes, E5M2)
    else:
        GROUP: tl.constexpr = 16 if FORMAT == "nvfp4" else 32
        scale = load_scales(
            scale_ptr, row, scale_pitch, k0 // GROUP, (k + (GROUP - 1)) // GROUP,
            BLOCK_K // GROUP, SWIZZLED, WHOLE,
        )  # fmt: skip
        if FORMAT == "nvfp4":
            return decode_nvfp4(codes, scale, DTYPE, QUADS, UPCAST)
        else:
            value = decode_mxfp8(codes, scale, E5M2)
            return value if UPCAST else value.to(DTYPE)


@triton.jit
def scaled_scale_source(
    ptr, scale_ptr, rows, k,
    FORMAT: tl.constexpr, SWIZZLED: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Where `load_scaled_operand` takes scales from: E4M3 of 16 beside 4-bit codes, E8M0 of 32 beside fp8.

    The other pairings are refused: fp8 codes with E4M3 scales compile on sm_120 to an instruction that reads
    those bytes as exponents, of blocks of 32.
    """
    tl.static_assert(FORMAT == "nvfp4" or FORMAT == "mxfp8", "dot_scaled takes nvfp4 and mxfp8")
    tl.static_assert(
        (FORMAT == "nvfp4") == (ptr.dtype.element_ty == tl.uint8),
        "E4M3 scales go with 4-bit codes, E8M0 scales with 8-bit ones",
    )
    GROUP: tl.constexpr = 16 if FORMAT == "nvfp4" else 32
    if FORMAT == "nvfp4":
        scale_ptr = scale_ptr.to(tl.pointer_type(tl.float8e4nv))
    if SWIZZLED and ROWS % 128 == 0:
        blocks = (k + (GROUP - 1)) // GROUP
        return scale_tiles_source(scale_ptr, rows, blocks, ROWS, BLOCK_K // GROUP, TMA)
    else:
        return scale_ptr


@triton.jit
def load_scaled_operand(
    source, scales, row, tile, rows, pitch, scale_pitch, k0, k,
    FORMAT: tl.constexpr, SWIZZLED: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """(codes, scales) as `tl.dot_scaled` takes them."""
    ROWS: tl.constexpr = row.shape[0]
    GROUP: tl.constexpr = 16 if FORMAT == "nvfp4" else 32
    COUNT: tl.constexpr = BLOCK_K // GROUP
    blocks = (k + (GROUP - 1)) // GROUP
    codes = load_codes(source, row, tile, pitch, k0, k, FORMAT, BLOCK_K, WHOLE, False, TMA)
    if SWIZZLED and ROWS % 128 == 0:
        return codes, load_scale_tiles(
            scales, tile, rows, k0 // GROUP, blocks, ROWS, COUNT, WHOLE, TMA
        )
    else:
        return codes, load_scales(
            scales, row, scale_pitch, k0 // GROUP, blocks, COUNT, SWIZZLED, WHOLE
        )
