"""Launchers of the quantizers: csrc/amax.cu, quantize_nvfp4.cu, quantize_fp8.cu and dequantize.cu.

Arguments and results are those of the functions of the same names in tigon.reference.quantize, byte for byte (for the
gates of a norm: those of the fused kernel, whose exp is not torch's). Where the largest magnitude of a tensor or row
is not given, a pass over x finds it first. Nothing is read back to the host.
"""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING

from tigon.native.arguments import FORMATS, ceil_div, dtype_codes, packed, pointer
from tigon.native.loader import MAX_BLOCKS, Launch, run

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# struct Source in csrc/common/source.cuh: 4 pointers, 2 strides, 7 ints, padding.
SOURCE = "4Q2q8i"
# struct Amax in csrc/amax.cu: Source, 3 pointers, 5 ints, padding.
AMAX = struct.Struct(f"={SOURCE}3Q6i")
# struct QuantizeNvfp4 in csrc/quantize_nvfp4.cu: Source, 10 pointers, an offset, 2 floats, 8 ints.
QUANTIZE_NVFP4 = struct.Struct(f"={SOURCE}10Qq2f8i")
# struct QuantizeFp8 in csrc/quantize_fp8.cu: Source, 6 pointers, 7 ints, padding.
QUANTIZE_FP8 = struct.Struct(f"={SOURCE}6Q8i")
# struct Dequantize in csrc/dequantize.cu: 4 pointers, 2 strides, 7 ints, padding.
DEQUANTIZE = struct.Struct("=4Q2q8i")

TILE, THREADS, RUN = 128, 256, 16  # common/tile.cuh
TILE_MEMORY = 4 * (128 + 16 + 8) + 2 * 64  # struct TileMemory
PIECE, ROWS = 8, 4  # elements and rows of a thread in dequantize.cu
LONGEST = 2**31 - 2 * TILE  # rows or columns: they are 32-bit, offsets are not

PROLOGUES = {name: i for i, name in enumerate(("none", "relu2", "norm", "gate_first", "gate_last"))}
ROUNDINGS = {"nearest": 0, "stochastic": 1, "stochastic_unbiased": 1}
FOUR_OVER_SIX = 2  # the instance for nearest rounding with four_over_six
GRANULARITIES = {name: i for i, name in enumerate(("tensor", "row", "1x128", "128x128", "mx"))}
FP8 = ("E4M3", "E5M2")
# What the amax is mapped to (6 x the largest block scale) and a block's amax to 6, as in the reference.
RANGE = {"": 2688.0, "mae": 1536.0, "mse": 1536.0}
UNBIASED_RANGE, UNBIASED_SIXTH = 2688.0 * 16 / 17, 17 / 96


def _tiles(op: str, m: int, k: int, least: int) -> int:
    blocks = max(least, ceil_div(m, TILE)) * max(least, ceil_div(k, TILE))
    if max(m, k) > LONGEST or blocks > MAX_BLOCKS:
        raise ValueError(
            f"{op}: ({m}, {k}) is over {LONGEST} rows or columns or {MAX_BLOCKS} tiles"
        )
    return blocks


def _size(io: str) -> int:
    return 4 if io == "f32" else 2


@functools.lru_cache(maxsize=1024)
def plan_amax(m: int, k: int, io: str) -> Launch:
    """The launch of ``amax``: a block a tile of 128x128."""
    shared = TILE_MEMORY + TILE * TILE * _size(io)
    return Launch(
        "amax.cu", f"tigon::amax<tigon::{io}>", (_tiles("amax", m, k, 0), 1), THREADS, shared
    )


@functools.lru_cache(maxsize=1024)
def plan_quantize_nvfp4(
    m: int, k: int, io: str, rounding: int, square: bool = False, column: bool = False
) -> Launch:
    """The launch of ``quantize_nvfp4``: a block a tile of 128x128.

    Beside the tile lie the amax and errors of 16x16 blocks, or the random bytes of a column-wise copy.
    """
    scratch = TILE * TILE // RUN * 4 * (2 if rounding == FOUR_OVER_SIX else 1) if square else 0
    if rounding == ROUNDINGS["stochastic"] and column:
        scratch = max(scratch, TILE * TILE)
    shared = TILE_MEMORY + TILE * TILE * _size(io) + scratch
    instance = f"tigon::quantize_nvfp4<tigon::{io}, {rounding}>"
    grid = (_tiles("quantize_nvfp4", m, k, 1), 1)
    return Launch("quantize_nvfp4.cu", instance, grid, THREADS, shared)


@functools.lru_cache(maxsize=1024)
def plan_quantize_fp8(m: int, k: int, io: str, e5m2: bool) -> Launch:
    """The launch of ``quantize_fp8``, MXFP8 included: a block a tile of 128x128."""
    shared = TILE_MEMORY + TILE * TILE * _size(io)
    instance = f"tigon::quantize_fp8<tigon::{io}, tigon::{FP8[e5m2]}>"
    return Launch(
        "quantize_fp8.cu", instance, (_tiles("quantize_fp8", m, k, 1), 1), THREADS, shared
    )


@functools.lru_cache(maxsize=1024)
def plan_dequantize(m: int, k: int, out: str, codes: str) -> Launch:
    """The launch of ``dequantize``: 8 elements of 4 rows a thread, up to a block's width of a row."""
    lanes = lanes_of(k)
    blocks = ceil_div(k, lanes * PIECE) * ceil_div(m, THREADS // lanes * ROWS)
    longest = 2**31 - THREADS * PIECE  # what a block reaches past the end is counted in 32 bits
    if max(m, k) > longest or blocks > MAX_BLOCKS:
        raise ValueError(f"dequantize: ({m}, {k}) is over {longest} rows or columns")
    instance = f"tigon::dequantize<tigon::{out}, tigon::{codes}>"
    return Launch("dequantize.cu", instance, (blocks, 1), THREADS, 0)


def lanes_of(k: int) -> int:
    """Threads of a row in dequantize.cu, a power of two."""
    return min(THREADS, 1 << (ceil_div(k, PIECE) - 1).bit_length())


def _io(sizes: dict) -> str:
    """Two bytes an element are shown as bf16, whose launch fp16 shares."""
    return "f32" if sizes["itemsize"] == 4 else "bf16"


def _explain_nvfp4(**sizes) -> dict[str, Launch]:
    m, k, io = sizes["m"], sizes["k"], _io(sizes)
    kind = ROUNDINGS.get(sizes.get("rounding", "nearest"), FOUR_OVER_SIX)
    plan = plan_quantize_nvfp4(
        m, k, io, kind, sizes.get("square", False), sizes.get("column", False)
    )
    known = {} if sizes.get("static") else {"amax": plan_amax(m, k, io)}
    return known | {"quantize_nvfp4": plan}


def _explain_fp8(**sizes) -> dict[str, Launch]:
    m, k, io = sizes["m"], sizes["k"], _io(sizes)
    first = not sizes.get("static") and sizes.get("granularity", "tensor") in ("tensor", "row")
    plan = plan_quantize_fp8(m, k, io, sizes.get("e5m2", False))
    return ({"amax": plan_amax(m, k, io)} if first else {}) | {"quantize_fp8": plan}


def _explain_mxfp8(**sizes) -> dict[str, Launch]:
    return _explain_fp8(**sizes, granularity="mx")


def _explain_dequantize(**sizes) -> dict[str, Launch]:
    """An E5M2 launch is that of E4M3 with another name."""
    codes = "Nvfp4" if sizes.get("format", "nvfp4") == "nvfp4" else "E4M3"
    return {"dequantize": plan_dequantize(sizes["m"], sizes["k"], _io(sizes), codes)}


PLANS = {
    "quantize_nvfp4": _explain_nvfp4,
    "quantize_mxfp8": _explain_mxfp8,
    "quantize_fp8": _explain_fp8,
    "dequantize": _explain_dequantize,
}


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a kernel to write, every byte of it."""
    import torch

    return torch.empty(shape, dtype=dtype, device=device)


class _Source:
    """The matrix that is read and what comes before quantization: packed, and kept alive until the launch."""

    def __init__(self, x, z, weight, rstd, prologue):
        self.x, self.m, self.k = x, *x.shape
        self.z = z if prologue.startswith("gate") else None
        self.weight = packed(weight) if PROLOGUES[prologue] >= PROLOGUES["norm"] else None
        self.rstd = None if self.weight is None else rstd.contiguous()
        self.codes = dtype_codes()
        self.io = FORMATS[self.codes[x.dtype]]
        groups = 1 if self.rstd is None else max(1, self.rstd.shape[1])
        aligned = x.data_ptr() | x.stride(0) * x.element_size()
        if self.z is not None:
            aligned |= self.z.data_ptr() | self.z.stride(0) * x.element_size()
        self.fields = (
            x.data_ptr(),
            pointer(self.z),
            pointer(self.weight),
            pointer(self.rstd),
            x.stride(0),
            0 if self.z is None else self.z.stride(0),
            self.m,
            self.k,
            PROLOGUES[prologue],
            0 if self.weight is None else self.codes[self.weight.dtype],
            max(1, self.k // groups),
            groups,
            not aligned & 15,
            0,
        )

    def amax(self, row, column, hadamard, hadamard_row, hadamard_column, per_line):
        """fp32 () of the rows and of the columns, or (m) and (k) with per_line; None where not asked for."""
        import torch

        sizes = (self.m, self.k) if per_line else (1, 1)
        count = row * sizes[0] + column * sizes[1]
        found = allocate((count,), torch.float32, self.x.device).zero_()
        rows, columns = found[: row * sizes[0]], found[row * sizes[0] :]
        if self.m and self.k:
            arguments = AMAX.pack(
                *self.fields,
                rows.data_ptr() if row else 0,
                columns.data_ptr() if column else 0,
                pointer(hadamard),
                row,
                column,
                per_line,
                hadamard_row,
                hadamard_column,
                0,
            )
            run(plan_amax(self.m, self.k, self.io), self.x.device, arguments)
        return rows if row else None, columns if column else None


def _scale_shape(lines: int, blocks: int, swizzled: bool) -> tuple[int, ...]:
    if swizzled:
        return (ceil_div(lines, 128) * 128 * (ceil_div(blocks, 4) * 4),)
    return (lines, blocks)


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
    """(codes, scale, tensor_scale, codes_t, scale_t, tensor_scale_t) as in the reference, which names the arguments.

    x, z (m,k) with any row stride, fp32, bf16 or fp16. Raises ValueError for more than 2^31 - 256 rows or columns,
    RuntimeError where no kernel can be reached or launched.
    """
    import torch

    source = _Source(x, z, weight, rstd, prologue)
    m, k = source.m, source.k
    kind = FOUR_OVER_SIX if four_over_six else ROUNDINGS[rounding]
    launch = plan_quantize_nvfp4(m, k, source.io, kind, square, column)
    hadamard_column = hadamard is not None and column
    hadamard_row = hadamard is not None and not column
    hadamard = packed(hadamard)
    if amax is None:
        same = not hadamard_column  # one amax serves both copies
        rows, columns = source.amax(
            row or same, column and not same, hadamard, hadamard_row, hadamard_column, per_row
        )
        columns = rows if columns is None else columns
    elif row and column:
        amax = amax.contiguous()
        rows, columns = amax[0], amax[1]
    else:
        rows = columns = amax.contiguous()

    def outputs(wanted: bool, lines: int, length: int, scales: tuple[int, ...]):
        e4m3, f32 = torch.float8_e4m3fn, torch.float32
        if not wanted:
            return [torch.empty(0, dtype=d, device=x.device) for d in (torch.uint8, e4m3, f32)]
        blocks = ceil_div(length, 16)
        shapes = [(lines, blocks * 8), _scale_shape(lines, blocks, swizzled), scales]
        return [allocate(s, d, x.device) for s, d in zip(shapes, (torch.uint8, e4m3, f32))]

    results = [*outputs(row, m, k, (m,) if per_row else ()), *outputs(column, k, m, ())]
    unbiased = rounding == "stochastic_unbiased"
    arguments = QUANTIZE_NVFP4.pack(
        *source.fields,
        *(t.data_ptr() for t in results),
        pointer(rows),
        pointer(columns),
        pointer(hadamard),
        pointer(seed),
        offset,
        UNBIASED_RANGE if unbiased else RANGE[four_over_six],
        UNBIASED_SIXTH if unbiased else 1 / 6,
        row,
        column,
        per_row,
        square,
        hadamard_row,
        hadamard_column,
        four_over_six == "mse",
        swizzled,
    )
    run(launch, x.device, arguments)
    return tuple(results)


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
    """(codes, scale, codes_t, scale_t) as in the reference, which names the arguments. Raises as quantize_nvfp4."""
    import torch

    source = _Source(x, z, weight, rstd, prologue)
    m, k = source.m, source.k
    shapes = [
        _scale_shape(m, ceil_div(k, 32), swizzled),
        _scale_shape(k, ceil_div(m, 32), swizzled),
    ]
    amax = [None, None]
    return _fp8(source, "mx", torch.uint8, shapes, amax, e5m2, False, row, column, swizzled)


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
    """(codes, scale, codes_t, scale_t) as in the reference, which names the arguments. Raises as quantize_nvfp4."""
    import torch

    source = _Source(x, z, weight, rstd, prologue)
    m, k = source.m, source.k
    high, wide = ceil_div(m, 128), ceil_div(k, 128)
    shapes = {
        "tensor": [(), ()],
        "row": [(m,), (k,)],
        "1x128": [(m, wide), (k, high)],
        "128x128": [(high, wide), (wide, high)],
    }[granularity]
    known = [amax, amax]
    if amax is None and granularity == "tensor":
        known[0], _ = source.amax(True, False, None, False, False, False)
        known[1] = known[0]
    elif amax is None and granularity == "row":
        known = source.amax(row, column, None, False, False, True)
    return _fp8(
        source, granularity, torch.float32, shapes, known, e5m2, power_of_two, row, column, False
    )  # fmt: skip


def _fp8(
    source, granularity, scale_dtype, shapes, amax, e5m2, power_of_two, row, column, swizzled
) -> tuple[Tensor, ...]:
    import torch

    m, k, device = source.m, source.k, source.x.device
    dtype = torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
    results = []
    for wanted, lines, shape in ((row, (m, k), shapes[0]), (column, (k, m), shapes[1])):
        make = (
            allocate if wanted else lambda _, *rest: torch.empty(0, dtype=rest[0], device=rest[1])
        )
        results += [make(lines, dtype, device), make(shape, scale_dtype, device)]
    codes, _, codes_t, _ = results
    arguments = QUANTIZE_FP8.pack(
        *source.fields,
        *(t.data_ptr() for t in results),
        pointer(amax[0]),
        pointer(amax[1]),
        row,
        column,
        GRANULARITIES[granularity],
        power_of_two,
        swizzled,
        not (codes.data_ptr() | k) & 15,
        not (codes_t.data_ptr() | m) & 15,
        0,
    )
    run(plan_quantize_fp8(m, k, source.io, e5m2), device, arguments)
    return tuple(results)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    tensor_scale: Tensor | None,
    format: str,
    k: int,
    swizzled: bool,
    dtype: torch.dtype,
) -> Tensor:
    """(m,k) of `dtype`: fp32, bf16 or fp16. format: "nvfp4", "mxfp8", "fp8-tensor", "fp8-row", "fp8-1x128",
    "fp8-128x128". Raises as quantize_nvfp4, for more than 2^31 - 2048 rows or columns."""
    import torch

    m = codes.shape[0]
    y = allocate((m, k), dtype, codes.device)
    if not y.numel():
        return y
    nvfp4 = format == "nvfp4"
    kind = "Nvfp4" if nvfp4 else FP8[codes.dtype == torch.float8_e5m2]
    # A piece's codes are read as one word, of 4 bytes (always) or 8.
    if codes.stride(-1) != 1 or (nvfp4 and (codes.data_ptr() | codes.stride(0)) & 3):
        codes = codes.clone(memory_format=torch.contiguous_format)
    if scale.dim() > 1 and scale.stride(-1) != 1:
        scale = scale.contiguous()
    out = FORMATS[dtype_codes()[dtype]]
    scaling = "mx" if format == "mxfp8" else "tensor" if nvfp4 else format.removeprefix("fp8-")
    aligned = (y.data_ptr() | k * y.element_size()) & 15 == 0
    if not nvfp4:
        aligned = aligned and not (codes.data_ptr() | codes.stride(0)) & 7
    per_row = tensor_scale is not None and tensor_scale.dim() > 0
    if per_row:
        tensor_scale = packed(tensor_scale)
    arguments = DEQUANTIZE.pack(
        codes.data_ptr(),
        scale.data_ptr(),
        pointer(tensor_scale),
        y.data_ptr(),
        codes.stride(0),
        scale.stride(0) if scale.dim() else 0,
        m,
        k,
        GRANULARITIES[scaling],
        per_row,
        swizzled,
        aligned,
        lanes_of(k),
        0,
    )
    run(plan_dequantize(m, k, out, kind), codes.device, arguments)
    return y
