"""How a recurrent state is stored: fp32, bf16, fp16, or int8 and E4M3 codes with a scale a row of n.

    int8, e4m3:   scale = max |S| / 127 (/ 448) over n, code = round(S / scale), decoded value = code * scale

A row of zeros has scale 0 and codes 0; a row that holds a NaN or an infinity has a scale that is not finite and codes
0, so that it decodes to NaN. Nearest rounds ties to even. Stochastic rounding adds 16 random bits below the last
place that is kept and cuts: integer arithmetic on the bits of the fp32 number, the same in
csrc/common/state_format.cuh. A finite number stays finite, infinities and NaN stay what they are.

The random bits are Philox4x32-10: key = the request's seed; counter = (element // 8 in (h,p,n), absolute position of
the write low and high, 2 << 24 | layer); element e takes halfword e % 8, low half of a word first. The position of
the write is how many tokens of the request are folded into the state.
"""

import torch
from torch import Tensor

from tigon.reference.philox import MASK, philox

E4M3 = torch.float8_e4m3fn
LARGEST = {torch.int8: 127.0, E4M3: 448.0}  # of a code
PURPOSE = 2 << 24
# Of a 16-bit or 8-bit float: mantissa bits, biased fp32 exponent of its smallest normal, largest finite code.
_LAYOUT = {torch.float16: (10, 113, 0x7BFF), E4M3: (3, 121, 0x7E)}


def is_scaled(dtype: torch.dtype) -> bool:
    """Whether a state of this dtype has a scale beside it."""
    return dtype in LARGEST


def state_bits(seeds: Tensor, positions: Tensor, layer: int, shape: tuple[int, ...]) -> Tensor:
    """16 random bits for each element of the states (b, *shape), int64: one seed and one position of the write a
    row."""
    count = 1
    for size in shape:
        count *= size
    counter = torch.arange(-(-count // 8), device=seeds.device)
    seeds, positions = seeds.to(torch.int64)[:, None], positions.to(torch.int64)[:, None]
    key = (seeds & MASK, seeds >> 32 & MASK)
    words = philox((counter, positions & MASK, positions >> 32 & MASK, PURPOSE | layer), key)
    words = torch.stack(torch.broadcast_tensors(*words), -1)
    halves = torch.stack([words & 0xFFFF, words >> 16], -1)
    return halves.flatten(1)[:, :count].view(-1, *shape)


def encode_state(
    S: Tensor,
    dtype: torch.dtype,
    *,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    layer: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """S (b,h,p,n) as it is stored in `dtype`: (codes, scale (b,h,p) fp32 or None).

    seeds, positions (b): round stochastically; None: to nearest. fp32 and fp64 are kept as they are.
    """
    if dtype in (torch.float32, torch.float64):
        return S.to(dtype), None
    scale = None
    if dtype in LARGEST:
        S = S.float()
        scale = S.abs().amax(-1) / LARGEST[dtype]
        usable = ((scale > 0) & (scale < float("inf")))[..., None]
        S = torch.where(usable, S / scale[..., None], 0)
    if seeds is None:
        if dtype == torch.int8:
            S = S.round()
        if scale is not None:
            S = S.clamp(-LARGEST[dtype], LARGEST[dtype])
        return S.to(dtype), scale
    random = state_bits(seeds, positions, layer, tuple(S.shape[1:]))
    if dtype == torch.int8:
        lifted = (S * 65536).floor().to(torch.int64) + random
        return (lifted >> 16).clamp(-127, 127).to(dtype), scale
    return _cut(S.float(), random, dtype), scale


def decode_state(codes: Tensor, scale: Tensor | None, acc: torch.dtype) -> Tensor:
    """The numbers (b,h,p,n) that are stored, in `acc`."""
    if scale is None:
        return codes.to(acc)
    return (codes.float() * scale[..., None]).to(acc)


def raw(state: Tensor) -> Tensor:
    """The state's memory in a dtype that can be gathered and copied: FP8 as bytes."""
    return state.view(torch.uint8) if state.dtype == E4M3 else state


def _cut(S: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 numbers plus 16 random bits below the last place of `dtype`, cut there."""
    bits = S.view(torch.int32).to(torch.int64)
    magnitude = bits & 0x7FFFFFFF
    sign = bits >> 31 & 1
    if dtype == torch.bfloat16:
        code = (magnitude + random >> 16).clamp(max=0x7F7F)
        code = torch.where(magnitude < 0x7F800000, code, magnitude >> 16)
        # A NaN whose upper half has no mantissa bit would become an infinity.
        code = torch.where(magnitude > 0x7F800000, 0x7FC0, code)
        return _as_int16(sign << 15 | code).view(dtype)
    mantissa, lowest, largest = _LAYOUT[dtype]
    exponent = magnitude >> 23
    significand = (magnitude & 0x7FFFFF) | torch.where(exponent > 0, 0x800000, 0)
    # Below the smallest normal number the last place stands still, so more bits are dropped.
    dropped = 23 - mantissa + (lowest - exponent).clamp(min=0)
    right, left = (dropped - 16).clamp(0, 31), (16 - dropped).clamp(min=0)
    kept = ((significand << left >> right) + random) >> 16
    code = ((exponent.clamp(min=lowest) - lowest) << mantissa) + kept
    code = code.clamp(max=largest)
    if dtype == E4M3:
        return (sign << 7 | code).to(torch.uint8).view(dtype)
    code = torch.where(magnitude < 0x7F800000, code, 0x7C00)
    code = torch.where(magnitude > 0x7F800000, 0x7E00, code)
    return _as_int16(sign << 15 | code).view(dtype)


def _as_int16(code: Tensor) -> Tensor:
    """16 bits in int64 as int16."""
    return torch.where(code > 0x7FFF, code - 0x10000, code).to(torch.int16)
