"""NVFP4, MXFP8 and FP8 quantizers and their inverse, in plain PyTorch: the definition, bit for bit.

Everything is fp32, rounded to nearest even after every operation, in the order written here; csrc/quantize.cu does
the same, so codes and scales are equal byte for byte on every device. x is (m,k); "t" marks the column-wise copy, the
quantized transpose. With b the largest magnitude of a block and g that of the tensor (or row):

    NVFP4   s_enc = 2688 / g;  block scale s = e4m3(b s_enc / 6);  code = e2m1(x / (s / s_enc));  tensor scale g / 2688
    MXFP8   e = ceil(log2(b / 448));  code = e4m3(x 2^-e)
    FP8     code = e4m3(x 448 / b);  scale b / 448

Sources: "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149), appendix B; OCP Microscaling Formats v1.0;
"Four Over Six" (arXiv 2512.02010). The order of operations is TransformerEngine's.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tigon.reference import e2m1
from tigon.reference.elementwise import silu
from tigon.reference.philox import rounding_bytes

FLT_MAX = torch.finfo(torch.float32).max
# What 6 x (largest block scale) is made to be: four-over-six leaves room for a block scale of 1.5 times, unbiased
# rounding for block scales that E4M3 rounds down by up to 1/17.
RANGE = {"": 2688.0, "mae": 1536.0, "mse": 1536.0}
HEADROOM = 16 / 17
CHUNK = 2**17  # elements worked on at a time, so that what they become stays in a core's cache


def _f32(value: float, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=like.device)


def prologue_output(
    x: Tensor, z: Tensor | None, weight: Tensor | None, rstd: Tensor | None, prologue: str
) -> Tensor:
    """What is quantized, (m,k) in x's dtype: the prologue's result, rounded as its own op would."""
    if prologue == "none":
        return x
    if prologue == "relu2":
        return F.relu(x.float()).square().to(x.dtype)
    groups = (rstd.shape[1], -1)
    u = x.float().unflatten(-1, groups)
    gate = None if z is None else silu(z.float().unflatten(-1, groups))
    if prologue == "gate_first":
        u = u * gate
    y = u * rstd[..., None] * weight.float().unflatten(-1, groups)
    if prologue == "gate_last":
        y = y * gate
    return y.flatten(-2).to(x.dtype)


def hadamard_16(y: Tensor, signs: Tensor) -> Tensor:
    """Blocks of 16 along the last dimension times diag(signs) H16 / 4, H16 Sylvester's; size a multiple of 16."""
    v = y.unflatten(-1, (-1, 16)) * signs
    for step in (1, 2, 4, 8):
        a, b = v.unflatten(-1, (-1, 2, step)).unbind(-2)
        v = torch.stack([a + b, a - b], -2).flatten(-3)
    return (v * 0.25).flatten(-2)


def pad_to(y: Tensor, *multiples: int) -> Tensor:
    """The trailing dimensions padded with zeros to multiples."""
    widths = [w for size, m in zip(reversed(y.shape), reversed(multiples)) for w in (0, -size % m)]
    return F.pad(y, widths) if any(widths) else y


def chunks(y: Tensor) -> Iterator[slice]:
    """Slices of the rows of y, CHUNK elements or so each and a multiple of 128 rows; none if y is empty."""
    rows = max(1, CHUNK // max(1, y.shape[1] * 128)) * 128
    return (slice(i, i + rows) for i in range(0, y.shape[0] if y.numel() else 0, rows))


def largest(y: Tensor, *dims: int) -> Tensor:
    """max |y| over the dimensions (all if none); 0 of nothing, NaN if there is one."""
    if not y.numel():
        keep = [s for i, s in enumerate(y.shape) if dims and i not in [d % y.dim() for d in dims]]
        return y.new_zeros(keep)
    if not dims:  # one read, and no |y|
        return torch.stack(torch.aminmax(y)).abs().amax()
    return torch.maximum(y.amax(dims), -y.amin(dims)).abs()


def block_largest(y: Tensor, size: int) -> Tensor:
    """max |y| of blocks of `size` along the last dimension of y (m,k). A pooling is several times faster than amax."""
    return F.max_pool1d(y.abs(), size)


def to_fp8(v: Tensor, dtype: torch.dtype) -> Tensor:
    """Saturating cast; a NaN stays one."""
    most = torch.finfo(dtype).max
    return v.clamp(-most, most).to(dtype)


def swizzle(scale: Tensor) -> Tensor:
    """(m, blocks) -> flat "128x4": tiles of 128 rows by 4 blocks, 512 bytes each, row r of a tile at
    (r % 32) 16 + (r / 32) 4; tiles row by row, zeros for what is not there."""
    padded = pad_to(scale.view(torch.uint8), 128, 4)
    tiles = padded.view(padded.shape[0] // 128, 4, 32, padded.shape[1] // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).flatten().view(scale.dtype)


def unswizzle(scale: Tensor, m: int, blocks: int) -> Tensor:
    """The inverse of `swizzle`: (m, blocks)."""
    high, wide = -(-m // 128), -(-blocks // 4)
    tiles = scale.view(torch.uint8).view(high, wide, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(high * 128, wide * 4)[:m, :blocks].contiguous().view(scale.dtype)


def _encode_scales(g: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """(s_enc, tensor scale) for the largest magnitude g and what it is mapped to."""
    s_enc = (most / g).clamp(max=FLT_MAX)
    s_enc = torch.where((g == 0) | (s_enc == 0), 1.0, s_enc)
    return s_enc, torch.where(g == 0, 1.0, torch.clamp(g / most, min=1 / FLT_MAX))


def _multiplier(s: Tensor, s_enc: Tensor) -> Tensor:
    return (1 / (s.float() * (1 / s_enc))).clamp(max=FLT_MAX)


def _block_error(y: Tensor, s: Tensor, s_enc: Tensor, mode: str, square: bool) -> Tensor:
    """The error (m, k/16) of the blocks of y (m, k/16, 16) quantized with s, summed in the order of the kernel: along
    16 neighbours one by one, then over a tile's 16 rows as a binary tree."""
    q = e2m1.rounded(y * _multiplier(s, s_enc)[..., None])
    d = y - q * s.float()[..., None] * (1 / s_enc)[..., None]
    d = d.abs_() if mode == "mae" else d.square_()
    error, *others = d.movedim(-1, 0).contiguous()
    for one in others:
        error = error + one
    if square:  # (rows / 16, 16, blocks)
        tree = error.unflatten(0, (-1, 16))
        while tree.shape[1] > 1:
            tree = tree[:, ::2] + tree[:, 1::2]
        error = _spread_rows(tree)
    return error


def _spread_rows(tile: Tensor) -> Tensor:
    """(m/16, 1, blocks) -> (m, blocks): what a tile of 16 rows shares."""
    return tile.expand(-1, 16, -1).flatten(0, 1)


def _nvfp4_rows(y, s_enc, sixth, bits, square, four_over_six) -> tuple[Tensor, Tensor]:
    """(codes (m, k/2), scale (m, k/16)) of y (m,k) fp32. s_enc () or (m,1); sixth: what b s_enc is multiplied by."""
    b = block_largest(y, 16)
    if square:
        b = _spread_rows(b.unflatten(0, (-1, 16)).amax(1, keepdim=True))
    p = b * (s_enc * sixth)
    s = to_fp8(p, torch.float8_e4m3fn)
    y = y.unflatten(-1, (-1, 16))
    if four_over_six:
        s4 = to_fp8(p * 1.5, torch.float8_e4m3fn)
        e6 = _block_error(y, s, s_enc, four_over_six, square)
        e4 = _block_error(y, s4, s_enc, four_over_six, square)
        s = torch.where(e4 < e6, s4.float(), s.float()).to(torch.float8_e4m3fn)
    v = y * _multiplier(s, s_enc)[..., None]
    codes = e2m1.pack(e2m1.encode(v.flatten(-2), bits))
    # v is NaN where the block's scale is (there is a NaN in the block or in the amax). Such codes are 7, +6.
    nan = (s.view(torch.uint8) == 0x7F)[..., None]
    return codes.unflatten(-1, (-1, 8)).masked_fill_(nan, 0x77).flatten(-2), s


def _nvfp4(y: Tensor, g: Tensor, bits, square, rounding, four_over_six) -> tuple[Tensor, ...]:
    """(codes (m, k/2), scale (m, k/16), tensor scale) of y (m,k), k a multiple of 16 (and m, if square)."""
    unbiased = rounding == "stochastic_unbiased"
    most = _f32(RANGE[four_over_six] * (HEADROOM if unbiased else 1), y)
    sixth = _f32(17 / 96 if unbiased else 1 / 6, y)
    s_enc, tensor_scale = _encode_scales(g, most)
    m, k = y.shape
    codes = y.new_empty((m, k // 2), dtype=torch.uint8)
    scale = y.new_empty((m, k // 16), dtype=torch.float8_e4m3fn)
    for rows in chunks(y):
        own = s_enc[rows, None] if s_enc.dim() else s_enc
        random = None if bits is None else bits[rows]
        codes[rows], scale[rows] = _nvfp4_rows(
            y[rows].float(), own, sixth, random, square, four_over_six
        )
    return codes, scale, tensor_scale


def quantize_nvfp4(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    rstd: Tensor | None,
    prologue: str,
    seed: Tensor | None,
    offset: int,
    hadamard: Tensor | None,
    amax: Tensor | None,
    per_row: bool,
    square: bool,
    rounding: str,
    four_over_six: str,
    row: bool,
    column: bool,
    swizzled: bool,
) -> tuple[Tensor, ...]:
    """(codes (m, kp/2), scale (m, kp/16), tensor_scale, codes_t (k, mp/2), scale_t (k, mp/16), tensor_scale_t).

    kp, mp: k and m rounded up to 16. x, z (m,k); weight (k); rstd (m, groups). prologue: "none", "relu2", "norm",
    "gate_first", "gate_last". seed () int64; hadamard (16,) signs, for the column copy if both are made; amax (),
    (m,) for the rows, (2,) for both copies; per_row: an amax for each row. square: 16x16 blocks. rounding:
    "nearest", "stochastic", "stochastic_unbiased". four_over_six: "", "mae", "mse". Copies that were not asked for
    are empty. swizzled: scales flat, "128x4".
    """
    m, k = x.shape
    y = prologue_output(x, z, weight, rstd, prologue)
    results = []
    for wanted, stream in ((row, 0), (column, 1)):
        if not wanted:
            empty = [x.new_empty(0, dtype=d) for d in (torch.uint8, torch.float8_e4m3fn)]
            results += [*empty, x.new_empty(0, dtype=torch.float32)]
            continue
        bits = None
        if rounding != "nearest":
            bits = rounding_bytes(seed, stream, m, k, offset)
        v = y
        if stream == 1:
            v, bits = y.T.contiguous(), None if bits is None else bits.T.contiguous()
        count = v.shape[0]
        v = pad_to(v, 16 if square else 1, 16)
        bits = None if bits is None else pad_to(bits, 16 if square else 1, 16)
        if hadamard is not None and (stream == 1 or not column):
            v = hadamard_16(v.float(), hadamard)
        if amax is None:
            g = (largest(v, -1) if per_row else largest(v)).float()
        else:
            g = amax[stream] if row and column else amax
        codes, scale, tensor_scale = _nvfp4(v, g, bits, square, rounding, four_over_six)
        codes, scale = codes[:count], scale[:count]
        results += [codes, swizzle(scale) if swizzled else scale, tensor_scale]
    return tuple(results)


def _e8m0(v: Tensor) -> Tensor:
    """The exponent (0 to 255, int32) of the power of two at or above v >= 0; NaN is 255."""
    bits = v.view(torch.int32)
    exponent, mantissa = bits >> 23 & 0xFF, bits & 0x7FFFFF
    up = (mantissa != 0) & (exponent != 254) & ~((exponent == 0) & (mantissa <= 0x400000))
    exponent = torch.where(v.isinf(), 254, exponent + up)
    return torch.where(v.isnan(), 255, exponent)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^(exponent - 127) in fp32 for 0 to 254, NaN for 255."""
    bits = torch.where(exponent == 0, 0x400000, exponent << 23)
    return torch.where(exponent == 255, 0x7FC00000, bits).int().view(torch.float32)


def _mxfp8(y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(codes (m,k), scale (m, ceil(k/32)) uint8) of y (m,k)."""
    m, k = y.shape
    y = pad_to(y, 32)
    codes = y.new_empty(y.shape, dtype=dtype)
    scale = y.new_empty((m, y.shape[1] // 32), dtype=torch.uint8)
    for rows in chunks(y):
        part = y[rows].float().contiguous()
        e = _e8m0(block_largest(part, 32) * _f32(1 / torch.finfo(dtype).max, y))
        inverse = torch.where(e == 255, torch.nan, _power_of_two((254 - e).clamp(min=0)))
        codes[rows] = to_fp8(part.unflatten(-1, (-1, 32)) * inverse[..., None], dtype).flatten(-2)
        scale[rows] = e
    return codes.view(torch.uint8)[:, :k].contiguous().view(dtype), scale


def quantize_mxfp8(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    rstd: Tensor | None,
    prologue: str,
    e5m2: bool,
    row: bool,
    column: bool,
    swizzled: bool,
) -> tuple[Tensor, ...]:
    """(codes (m,k), scale (m, ceil(k/32)) uint8, codes_t (k,m), scale_t (k, ceil(m/32))); arguments as above."""
    dtype = torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
    y = prologue_output(x, z, weight, rstd, prologue)
    results = []
    for wanted, v in ((row, y), (column, y.T)):
        if wanted:
            codes, scale = _mxfp8(v, dtype)
            results += [codes, swizzle(scale) if swizzled else scale]
        else:
            results += [x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=torch.uint8)]
    return tuple(results)


def _fp8_blocks(granularity: str) -> tuple[int, int]:
    """Rows and columns of a granule."""
    return {"1x128": (1, 128), "128x128": (128, 128)}[granularity]


def _spread(scale: Tensor, granularity: str, m: int, k: int) -> Tensor:
    """Scales beside the elements (m,k) that they belong to, by broadcasting or repeating."""
    if granularity == "tensor":
        return scale
    if granularity == "row":
        return scale[:, None]
    high, wide = _fp8_blocks(granularity)
    return scale.repeat_interleave(high, 0)[:m].repeat_interleave(wide, 1)[:, :k]


def _rows_of(scale: Tensor, rows: slice, format: str) -> Tensor:
    """The scales of a slice of rows that starts at a multiple of 128."""
    if format == "fp8-128x128":
        return scale[rows.start // 128 : -(-rows.stop // 128)]
    return scale[rows] if scale.dim() else scale


def _fp8_largest(y: Tensor, granularity: str) -> Tensor:
    """max |y| of each granule of y (m,k), fp32."""
    if granularity in ("tensor", "row"):
        return largest(y, *((-1,) if granularity == "row" else ())).float()
    b = y.new_zeros((y.shape[0], -(-y.shape[1] // 128)), dtype=torch.float32)
    for rows in chunks(y):
        b[rows] = block_largest(pad_to(y[rows].float().contiguous(), 128), 128)
    return b if granularity == "1x128" else pad_to(b, 128, 1).unflatten(0, (-1, 128)).amax(1)


def _fp8(y, amax, granularity, dtype, power_of_two) -> tuple[Tensor, Tensor]:
    """(codes, scale) of y (m,k)."""
    b = _fp8_largest(y, granularity) if amax is None else amax
    enc = _f32(torch.finfo(dtype).max, y) / b
    enc = torch.where((b == 0) | ~b.isfinite(), 1.0, enc.clamp(max=FLT_MAX))
    if power_of_two:
        enc = (enc.view(torch.int32) & 0x7F800000).view(torch.float32)
    codes = y.new_empty(y.shape, dtype=dtype)
    for rows in chunks(y):
        part = y[rows].float()
        own = _rows_of(enc, rows, f"fp8-{granularity}")
        codes[rows] = to_fp8(part * _spread(own, granularity, *part.shape), dtype)
    return codes, 1 / enc


def quantize_fp8(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    rstd: Tensor | None,
    prologue: str,
    amax: Tensor | None,
    granularity: str,
    e5m2: bool,
    power_of_two: bool,
    row: bool,
    column: bool,
) -> tuple[Tensor, ...]:
    """(codes (m,k), scale, codes_t (k,m), scale_t); granularity "tensor", "row", "1x128", "128x128".

    amax (): the tensor's, where it is known. power_of_two: scales are powers of two, rounded up. Others as above.
    """
    dtype = torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
    y = prologue_output(x, z, weight, rstd, prologue)
    results = []
    for wanted, v in ((row, y), (column, y.T)):
        if wanted:
            results += _fp8(v.contiguous(), amax, granularity, dtype, power_of_two)
        else:
            results += [x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=torch.float32)]
    return tuple(results)


def _fp8_values(codes: Tensor) -> Tensor:
    """fp32 values of FP8 codes (m,k), by a table of all bytes: on a CPU several times faster than a cast."""
    table = torch.arange(256, device=codes.device).to(torch.uint8).view(codes.dtype).float()
    return table.index_select(0, codes.view(torch.uint8).flatten().int()).view(codes.shape)


def block_values(codes: Tensor, scale: Tensor, format: str, k: int, swizzled: bool) -> Tensor:
    """(m,k) fp32: codes times their block scales, exact for NVFP4; the plain codes for FP8 of a tensor or row."""
    m = codes.shape[0]
    if format == "nvfp4":
        if swizzled:
            scale = unswizzle(scale, m, -(-k // 16))
        values = e2m1.decode(codes)
        values.unflatten(-1, (-1, 16)).mul_(scale.float()[..., None])
        return values[:, :k]
    values = _fp8_values(codes)
    if format == "mxfp8":
        if swizzled:
            scale = unswizzle(scale, m, -(-k // 32))
        scale = _power_of_two(scale.int())
        if k % 32:
            return values * scale.repeat_interleave(32, 1)[:, :k]
        values.unflatten(-1, (-1, 32)).mul_(scale[..., None])
        return values
    if format in ("fp8-1x128", "fp8-128x128"):
        return values * _spread(scale, format[4:], m, k)
    return values


def dequantize(
    codes: Tensor,
    scale: Tensor,
    tensor_scale: Tensor | None,
    format: str,
    k: int,
    swizzled: bool,
    dtype: torch.dtype,
) -> Tensor:
    """(m,k) of `dtype`. format: "nvfp4", "mxfp8", "fp8-tensor", "fp8-row", "fp8-1x128", "fp8-128x128"."""
    if swizzled:
        scale = unswizzle(scale, codes.shape[0], -(-k // (16 if format == "nvfp4" else 32)))
    outer = {"nvfp4": tensor_scale, "fp8-tensor": scale, "fp8-row": scale}.get(format)
    out = codes.new_empty((codes.shape[0], k), dtype=dtype)
    for rows in chunks(out):
        values = block_values(codes[rows], _rows_of(scale, rows, format), format, k, False)
        if outer is not None:
            values = values.mul_(outer[rows, None] if outer.dim() else outer)
        out[rows] = values
    return out
