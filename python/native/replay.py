"""Launchers of the decode kernels with rollback by replay: csrc/ssd_replay.cu and csrc/conv1d_replay.cu."""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING

from tigon.native.arguments import (
    FORMATS,
    ceil_div,
    dtype_codes,
    indices,
    packed,
    pointer,
    state_format,
    wide,
)
from tigon.native.loader import MAX_BLOCKS, Launch, run
from tigon.native.mamba2 import lanes_of

if TYPE_CHECKING:
    from torch import Tensor

# struct SsdReplay in csrc/ssd_replay.cu: 20 pointers, 19 sizes and strides, 17 ints, 2 floats, padding.
SSD_REPLAY = struct.Struct("=20Q19q17i2fi")
# struct Conv1dReplay in csrc/conv1d_replay.cu: 9 pointers, 4 sizes and strides, 7 ints, padding.
CONV1D_REPLAY = struct.Struct("=9Q4q8i")
SHARED_BYTES = (
    48 * 1024
)  # what a block gets without asking; rows of p are given up before more is asked for


@functools.lru_cache(maxsize=1024)
def plan_ssd_replay(
    b: int,
    m: int,
    h: int,
    p: int,
    n: int,
    flush: int,
    tree: bool,
    io: str,
    state: str,
    vectors: bool,
) -> Launch:
    """The launch of ``ssd_replay``: lanes and rows as in ``plan_ssd_update``, fewer rows where shared memory is short.

    Lanes depend on n alone; how many rows a block has changes no bit.
    """
    lanes = lanes_of(n)
    block = min(128, ceil_div(ceil_div(p, 2) * lanes, 32) * 32)
    while block > 32 and 4 * _floats(m, n, flush, tree, block // lanes * 2) > SHARED_BYTES:
        block = ceil_div(block // 2, 32) * 32
    rows = block // lanes * 2
    if b * h > MAX_BLOCKS:
        raise ValueError(f"ssd_update: b*h = {b * h} is over {MAX_BLOCKS}")
    instance = f"tigon::ssd_replay<tigon::{io}, tigon::{state}, {'true' if vectors else 'false'}>"
    shared = 4 * _floats(m, n, flush, tree, rows)
    return Launch("ssd_replay.cu", instance, (b * h, ceil_div(p, rows)), block, shared)


def _window(m: int, flush: int, tree: bool) -> int:
    """Tokens that a pass of the kernel has in sight."""
    return flush - 1 + m if tree else flush


def _floats(m: int, n: int, flush: int, tree: bool, rows: int) -> int:
    """struct Staged of csrc/ssd_replay.cu."""
    stride, window = ceil_div(n, 16) * 16 + 4, _window(m, flush, tree)
    return (16 + m) * stride + (window + 2 * m + 1) * rows + (3 + m) * window + m + 1


@functools.lru_cache(maxsize=1024)
def plan_conv1d_replay(b: int, d: int, io: str) -> Launch:
    """The launch of ``conv1d_replay``: one thread a row and channel."""
    block = min(128, ceil_div(d, 32) * 32)
    if b > MAX_BLOCKS or ceil_div(d, block) > 65535:
        raise ValueError(
            f"causal_conv1d_update: {b} rows of {d} channels are over the size of a grid"
        )
    instance = f"tigon::conv1d_replay<tigon::{io}>"
    return Launch("conv1d_replay.cu", instance, (b, ceil_div(d, block)), block, 0)


def _explain_ssd_replay(**sizes: int) -> dict[str, Launch]:
    known = {1: "i8", 2: "bf16", 4: "f32"}
    names = (known[sizes["itemsize"]], known[sizes["state_itemsize"]])
    vectors = sizes["n"] * sizes["state_itemsize"] % 16 == 0
    shape = (sizes[name] for name in ("b", "m", "h", "p", "n", "flush"))
    return {"ssd_replay": plan_ssd_replay(*shape, bool(sizes.get("tree")), *names, vectors)}


def _explain_conv1d_replay(**sizes: int) -> dict[str, Launch]:
    io = "f32" if sizes["itemsize"] == 4 else "bf16"
    return {"conv1d_replay": plan_conv1d_replay(sizes["b"], sizes["d"], io)}


PLANS = {"ssd_replay": _explain_ssd_replay, "conv1d_replay": _explain_conv1d_replay}


def ssd_replay(
    state: Tensor,
    state_scale: Tensor | None,
    ring_x: Tensor,
    ring_B: Tensor,
    ring_dt: Tensor,
    checkpoint: Tensor,
    length: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_indices: Tensor | None,
    num_tokens: Tensor | None,
    ancestors: Tensor | None,
    seeds: Tensor | None,
    flush: int,
    layer: int,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    batch_invariant: bool = False,
) -> Tensor:
    """m tokens a row, x (b,m,h,p) -> y, beside slot-indexed states and rings: the launcher of csrc/ssd_replay.cu.

    state, state_scale, x, dt, A, B, C, D, z, dt_bias, state_indices, num_tokens as in `ssd_update`, m at most 32. The
    rings (slots,L,h,p), (slots,L,g,n) in x's dtype and (slots,L,h) fp32 are contiguous inside a slot; checkpoint and
    length (slots) int64; ancestors (b,m) int32 contiguous. seeds (b): the state is rounded stochastically. Bits never
    depend on how many tokens come together, so batch_invariant changes nothing. Raises as ssd_update does.
    """
    import torch

    b, m, h, p = x.shape
    slots, _, _, n = state.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not y.numel():
        return y
    codes = dtype_codes()
    io, held = FORMATS[codes[x.dtype]], state_format(state.dtype)
    size, tree = state.element_size(), ancestors is not None
    vectors = not (state.data_ptr() | state.stride(0) * size | n * size) & 15
    launch = plan_ssd_replay(b, m, h, p, n, flush, tree, io, held, vectors)
    lanes = lanes_of(n)

    xs, zs, Bs, Cs = x.stride(), z.stride() if z is not None else (0, 0), B.stride(), C.stride()
    Ds = (0, 0) if D is None else (*D.stride(), 0)[:2]
    A, dt_bias, seeds = packed(A), packed(dt_bias), wide(seeds)
    state_indices, num_tokens = indices(state_indices), indices(num_tokens)
    offsets = Bs[0] | Bs[1] | Cs[0] | Cs[1] | ring_B.stride(0) | n
    addresses = B.data_ptr() | C.data_ptr() | ring_B.data_ptr()
    checkpoint, length = packed(checkpoint), packed(length)
    arguments = SSD_REPLAY.pack(
        state.data_ptr(),
        pointer(state_scale),
        ring_x.data_ptr(),
        ring_B.data_ptr(),
        ring_dt.data_ptr(),
        checkpoint.data_ptr(),
        length.data_ptr(),
        x.data_ptr(),
        dt.data_ptr(),
        A.data_ptr(),
        B.data_ptr(),
        C.data_ptr(),
        pointer(D),
        pointer(z),
        pointer(dt_bias),
        pointer(state_indices),
        pointer(num_tokens),
        pointer(ancestors),
        pointer(seeds),
        y.data_ptr(),
        slots,
        state.stride(0),
        0 if state_scale is None else state_scale.stride(0),
        ring_x.stride(0),
        ring_B.stride(0),
        ring_dt.stride(0),
        *xs[:2],
        *zs[:2],
        *Bs[:2],
        *Cs[:2],
        *dt.stride(),
        *Ds,
        m,
        h,
        B.shape[2],
        p,
        n,
        ring_x.shape[1],
        flush,
        _window(m, flush, tree),
        lanes,
        launch.block // lanes * 2,
        codes[dt.dtype],
        codes[A.dtype],
        0 if D is None else codes[D.dtype],
        0 if dt_bias is None else codes[dt_bias.dtype],
        dt_softplus,
        not (addresses | offsets * x.element_size()) & 15,
        layer,
        dt_min,
        dt_max,
        0,
    )
    run(launch, x.device, arguments)
    return y


def conv1d_replay(
    x: Tensor,
    ring: Tensor,
    length: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state_indices: Tensor | None,
    num_tokens: Tensor | None,
    ancestors: Tensor | None,
    silu: bool,
) -> Tensor:
    """m tokens a row, x (b,m,d) -> y, beside a ring of inputs (slots,d,Lc): the launcher of csrc/conv1d_replay.cu.

    x, weight, bias, state_indices, num_tokens as in `conv1d_update`, m at most 32; the ring in x's dtype, contiguous
    inside a slot; length (slots) int64; ancestors (b,m) int32 contiguous. Raises as ssd_update does.
    """
    import torch

    b, m, d = x.shape
    slots, _, places = ring.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not y.numel():
        return y
    codes = dtype_codes()
    launch = plan_conv1d_replay(b, d, FORMATS[codes[x.dtype]])
    weight, bias, length = weight.contiguous(), packed(bias), packed(length)
    state_indices, num_tokens = indices(state_indices), indices(num_tokens)
    arguments = CONV1D_REPLAY.pack(
        ring.data_ptr(),
        length.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        pointer(bias),
        pointer(state_indices),
        pointer(num_tokens),
        pointer(ancestors),
        y.data_ptr(),
        slots,
        ring.stride(0),
        *x.stride()[:2],
        m,
        d,
        weight.shape[1],
        places,
        codes[weight.dtype],
        0 if bias is None else codes[bias.dtype],
        silu,
        0,
    )
    run(launch, x.device, arguments)
    return y
