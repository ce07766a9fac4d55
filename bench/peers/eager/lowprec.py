"""Plain torch for the low-precision ops: the formulas of the formats, and the dense product of what the operands stand
for."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tigon.bench.peers.eager.parts import Parts, named
from tigon.bench.peers.find import once
from tigon.bench.workloads import Workload
from tigon.reference.quantize import unswizzle

E4M3 = torch.float8_e4m3fn
MOST = 448.0  # of E4M3
# Between neighbours of E2M1's 0, 0.5, 1, 1.5, 2, 3, 4, 6; ties go to even codes, so every other bound is a little less.
BELOW = 1 - 2.0**-24
BOUNDS = (0.25, 0.75 * BELOW, 1.25, 1.75 * BELOW, 2.5, 3.5 * BELOW, 5.0)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _padded(x: Tensor, *multiples: int) -> Tensor:
    widths = [w for m, size in zip(multiples, reversed(x.shape)) for w in (0, -size % m)]
    return F.pad(x, widths) if any(widths) else x


def _nvfp4(x: Tensor, square: bool, bounds: Tensor) -> tuple[Tensor, ...]:
    rows = x.shape[0]
    x = _padded(x, 16, 16 if square else 1).float()
    most = x.abs().amax()
    encode, tensor_scale = 2688.0 / most, most / 2688.0
    blocks = x.unflatten(-1, (-1, 16))
    largest = blocks.abs().amax(-1)
    if square:
        tiles = largest.unflatten(0, (-1, 16)).amax(1, keepdim=True)
        largest = tiles.expand(-1, 16, -1).flatten(0, 1)
    scale = (largest * (encode / 6)).clamp(max=MOST).to(E4M3)
    v = (blocks * (1 / (scale.float() / encode))[..., None]).flatten(-2)
    codes = torch.bucketize(v.abs(), bounds, out_int32=True) | v.signbit().int() << 3
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return (low | high << 4).to(torch.uint8)[:rows], scale[:rows], tensor_scale


def quantize_nvfp4(work: Workload) -> Parts:
    if work.variant not in ("row", "both", "weight"):
        raise NotImplementedError(f"models in plain torch have no {work.variant} rounding")
    square = work.variant == "weight"
    bounds = torch.tensor(BOUNDS, device=work.inputs["x"].device)

    def compute(x):
        row = _nvfp4(x, square, bounds)
        return row if work.variant == "row" else (*row, *_nvfp4(x.T.contiguous(), square, bounds))

    return named("x"), compute


def _mxfp8(x: Tensor) -> tuple[Tensor, Tensor]:
    blocks = _padded(x, 32).float().unflatten(-1, (-1, 32))
    mantissa, exponent = torch.frexp(blocks.abs().amax(-1) / MOST)
    exponent = (exponent - (mantissa == 0.5).int()).clamp(-127, 127)
    codes = (blocks * torch.exp2(-exponent.float())[..., None]).clamp(-MOST, MOST).to(E4M3)
    return codes.flatten(-2)[:, : x.shape[1]], (exponent + 127).to(torch.uint8)


def quantize_mxfp8(work: Workload) -> Parts:
    def compute(x):
        row = _mxfp8(x)
        return row if work.variant == "row" else (*row, *_mxfp8(x.T.contiguous()))

    return named("x"), compute


def _granules(granularity: str, m: int, k: int) -> tuple[int, int]:
    return {"tensor": (m, k), "row": (1, k), "1x128": (1, 128), "128x128": (128, 128)}[granularity]


def quantize_fp8(work: Workload) -> Parts:
    def compute(x):
        m, k = x.shape
        high, wide = _granules(work.variant, m, k)
        tiles = _padded(x, wide, high).float().unflatten(1, (-1, wide)).unflatten(0, (-1, high))
        encode = MOST / tiles.abs().amax((1, 3), keepdim=True)
        codes = (tiles * encode).clamp(-MOST, MOST).to(E4M3)
        shapes = {"tensor": (), "row": (m,)}
        scale = (1 / encode).view(shapes.get(work.variant, (encode.shape[0], encode.shape[2])))
        return codes.flatten(2, 3).flatten(0, 1)[:m, :k], scale

    return named("x"), compute


def _linear(q) -> Tensor:
    """Block scales (m, blocks), as models in plain torch keep them."""
    if q.scale_layout == "linear":
        return q.block_scale
    return unswizzle(q.block_scale, q.shape[0], -(-q.shape[1] // (16 if _is_fp4(q) else 32)))


def _is_fp4(q) -> bool:
    return q.codes.dtype == torch.uint8


def dequantize(work: Workload) -> Parts:
    dtype, format = work.options["dtype"], work.variant
    m, k = work.inputs["q"].shape

    table = torch.tensor([*E2M1, *(-v for v in E2M1)], device=work.inputs["q"].codes.device)

    def nvfp4(codes, scale, tensor_scale):
        nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        values = table[nibbles.int()].unflatten(-1, (-1, 16))
        values = values * (scale.float() * tensor_scale)[..., None]
        return (values.flatten(-2)[:, :k].to(dtype),)

    def mxfp8(codes, scale):
        values = _padded(codes.float(), 32).unflatten(-1, (-1, 32))
        values = values * torch.exp2(scale.float() - 127)[..., None]
        return (values.flatten(-2)[:, :k].to(dtype),)

    def fp8(codes, scale):
        high, wide = _granules(format.removeprefix("fp8-"), m, k)
        tiles = _padded(codes.float(), wide, high)
        tiles = tiles.unflatten(1, (-1, wide)).unflatten(0, (-1, high))
        tiles = tiles * scale.view(tiles.shape[0], 1, tiles.shape[2], 1)
        return (tiles.flatten(2, 3).flatten(0, 1)[:m, :k].to(dtype),)

    tensors = {
        "nvfp4": lambda q: (q.codes, _linear(q), q.tensor_scale),
        "mxfp8": lambda q: (q.codes, _linear(q)),
    }
    take = once(lambda inputs: tensors.get(format, lambda q: (q.codes, q.scale))(inputs["q"]))
    return take, {"nvfp4": nvfp4, "mxfp8": mxfp8}.get(format, fp8)


def scaled_mm(work: Workload) -> Parts:
    """The dense product, cuBLAS's on a GPU. The operands are dequantized before the clock runs."""

    def dense(inputs):
        dtype = work.dtype
        return tuple(t if isinstance(t, Tensor) else t.dequantize(dtype) for t in inputs.values())

    return once(dense), lambda a, b: (a @ b.T,)


PARTS = {
    part.__name__: part
    for part in (quantize_nvfp4, quantize_mxfp8, quantize_fp8, dequantize, scaled_mm)
}
