"""E2M1, the 4-bit number of NVFP4: sign, two bits of exponent, one of mantissa.

    code         0   1   2   3   4   5   6   7      bit 3 is the sign; there is no NaN and no infinity
    magnitude    0  0.5  1  1.5  2   3   4   6      a grid of 0.5 below 2, of 1 below 4, of 2 above

All passes over memory here are ones that torch vectorizes on a CPU (no `where`, no strided bytes): they, and not the
arithmetic, are the time of a quantizer. Views of neighbours as one word are little endian.

Source: OCP Microscaling Formats v1.0.
"""

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def nearest(a: Tensor) -> Tensor:
    """Code (0 to 7, as a float) of magnitudes, ties to the even code; NaN stays one.

    The code is the lowest of three lines over the magnitude, and rounding each to even rounds the code to even.
    """
    code = (a * 2).round_()
    torch.minimum(code, torch.round(a).add_(2), out=code)
    return torch.minimum(code, (a * 0.5).round_().add_(4), out=code).clamp_(max=7)


def rounded(v: Tensor) -> Tensor:
    """The E2M1 values nearest to v: the magnitude is the highest of three lines over the code."""
    code = nearest(v.abs())
    value = torch.maximum(code * 0.5, code - 2)
    return torch.maximum(value, code * 2 - 8).copysign_(v)


def _power(a: Tensor) -> Tensor:
    """The power of two at or below each of a >= 0, but at least 1 and at most 4: twice the step of the grid."""
    return (a.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(1, 4)


def stochastic(a: Tensor, bits: Tensor) -> Tensor:
    """Magnitudes in [0, 6] (fp32) after adding bits/256 of a step of the grid and cutting to the grid."""
    t = bits * _power(a).mul_(0.5 / 256) + a
    step = _power(t).mul_(0.5)
    return t.div_(step).floor_().mul_(step)


def encode(v: Tensor, bits: Tensor | None) -> Tensor:
    """uint8 codes of fp32 v (overwritten), nearest or with random bytes; saturating. Of NaN they mean nothing."""
    sign = (v.view(torch.int32) >> 28).bitwise_and_(8)
    a = v.abs_()
    if bits is not None:
        a = stochastic(a.clamp_(max=E2M1[-1]), bits)
    return nearest(a).int().bitwise_or_(sign).to(torch.uint8)


def pack(code: Tensor) -> Tensor:
    """Bytes (…, k/2) of contiguous codes (…, k), the first of two in the low nibble."""
    pair = code.view(torch.int16)
    return (pair | pair >> 4).to(torch.uint8)


def decode(codes: Tensor) -> Tensor:
    """fp32 values (m, 2w) of bytes (m,w): a table of what the 256 bytes stand for, two values a 64-bit word."""
    value = torch.tensor([*E2M1, *(-v for v in E2M1)], device=codes.device)
    table = torch.cartesian_prod(value, value).flip(-1).contiguous().view(torch.int64)
    pairs = table.flatten().index_select(0, codes.flatten().int())
    return pairs.view(torch.float32).view(codes.shape[0], 2 * codes.shape[1])
