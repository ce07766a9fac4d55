"""Launchers of the two decode kernels: csrc/ssd_update.cu and csrc/conv1d_update.cu."""

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

if TYPE_CHECKING:
    from torch import Tensor

# struct SsdUpdate in csrc/ssd_update.cu: 15 pointers, 16 sizes and strides, 13 ints, 2 floats, the layer.
SSD_UPDATE = struct.Struct("=15Q16q13i2fi")
# struct Conv1dUpdate in csrc/conv1d_update.cu: 7 pointers, 6 sizes and strides, 7 ints, padding.
CONV1D_UPDATE = struct.Struct("=7Q6q8i")


def lanes_of(n: int) -> int:
    """Lanes that share a row of the state: 16 elements each, a power of two."""
    return 1 << (ceil_div(n, 16) - 1).bit_length()


REPLAY_BYTES = 16 << 20


def replay_flush(batch: int, tokens: int, heads: int, p: int, n: int, state_itemsize: int) -> int:
    """Tokens between two writes of a state for decoding with replay: 1 (no use of it), 16, or 32 for long steps.

    By reasoning, not measured: replay saves a write of the states a step. Where one token a call meets states of less
    than 16 MiB together (a write of 5 us at 3.3 TB/s), the rings cost about what they save. Above, 16 tokens take the
    write from half of the bytes to a thirtieth; more would make every output look through a longer window.
    """
    if tokens > 16:
        return 32
    small = batch * heads * p * n * state_itemsize < REPLAY_BYTES
    return 1 if tokens == 1 and small else 16


@functools.lru_cache(maxsize=1024)
def plan_ssd_update(
    b: int, m: int, h: int, p: int, n: int, io: str, state: str, vectors: bool
) -> Launch:
    """The launch of ``ssd_update``: 16 elements of n a lane, two rows of p a lane, at most 128 threads.

    Lanes depend on n alone and rows on p and n, so that a row's bits depend on neither batch nor m.
    vectors: the state is read and written in 16-byte accesses.
    """
    lanes = lanes_of(n)
    block = min(128, ceil_div(ceil_div(p, 2) * lanes, 32) * 32)
    rows = block // lanes * 2
    blocks = b * h
    if blocks > MAX_BLOCKS:
        raise ValueError(f"ssd_update: b*h = {blocks} is over {MAX_BLOCKS}")
    instance = f"tigon::ssd_update<tigon::{io}, tigon::{state}, {'true' if vectors else 'false'}>"
    # struct Staged: B, C, x, gate, dt, decay of m tokens; D.
    floats = m * (2 * ceil_div(n, 16) * 16 + 2 * rows + 2) + rows
    return Launch("ssd_update.cu", instance, (blocks, ceil_div(p, rows)), block, 4 * floats)


@functools.lru_cache(maxsize=1024)
def plan_conv1d_update(b: int, d: int, io: str, state: str) -> Launch:
    """The launch of ``conv1d_update``: one thread a row and channel."""
    block = min(128, ceil_div(d, 32) * 32)
    if b > MAX_BLOCKS or ceil_div(d, block) > 65535:
        raise ValueError(f"conv1d_update: {b} rows of {d} channels are over the size of a grid")
    instance = f"tigon::conv1d_update<tigon::{io}, tigon::{state}>"
    return Launch("conv1d_update.cu", instance, (b, ceil_div(d, block)), block, 0)


def _names(sizes: dict[str, int]) -> tuple[str, str]:
    """Formats of the activations and the state; two bytes an element are shown as bf16, whose launch fp16 shares, one
    byte as int8, whose launch E4M3 shares."""
    known = {1: "i8", 2: "bf16", 4: "f32"}
    itemsize = sizes["itemsize"]
    return known[itemsize], known[sizes.get("state_itemsize", itemsize)]


def _explain_conv1d_update(**sizes: int) -> dict[str, Launch]:
    return {"conv1d_update": plan_conv1d_update(sizes["b"], sizes["d"], *_names(sizes))}


def _explain_ssd_update(**sizes: int) -> dict[str, Launch]:
    b, m, h, p, n = (sizes[name] for name in "bmhpn")
    io, held = _names(sizes)
    vectors = n * sizes["state_itemsize"] % 16 == 0
    return {"ssd_update": plan_ssd_update(b, m, h, p, n, io, held, vectors)}


PLANS = {"ssd_update": _explain_ssd_update, "causal_conv1d_update": _explain_conv1d_update}


def ssd_update(
    state: Tensor,
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
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    state_scale: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    layer: int = 0,
) -> Tensor:
    """m steps of the recurrence on slot-indexed states, in place: the launcher of csrc/ssd_update.cu.

    state (slots,h,p,n), its slots strided at will; x, z (b,m,h,p), B, C (b,m,g,n): batch and tokens strided at
    will; dt (b,m,h) and D (h)|(h,p): any strides; A, dt_bias (h); state_indices, num_tokens (b). Returns y
    (b,m,h,p), zeros for padding. Activations and state are fp32, bf16 or fp16, each of dt, A, D, dt_bias any
    of them; an int8 or float8_e4m3fn state has state_scale (slots,h,p) fp32, its slots strided at will. seeds and
    positions (b): the state is rounded stochastically. Two rows must not share a slot. Raises RuntimeError where no
    kernel can be reached or launched.
    """
    import torch

    b, m, h, p = x.shape
    slots, _, _, n = state.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not y.numel():
        return y
    codes = dtype_codes()
    io, held = FORMATS[codes[x.dtype]], state_format(state.dtype)
    size = state.element_size()
    vectors = not (state.data_ptr() | state.stride(0) * size | n * size) & 15
    launch = plan_ssd_update(b, m, h, p, n, io, held, vectors)
    lanes = lanes_of(n)

    xs, zs, Bs, Cs = x.stride(), z.stride() if z is not None else (0, 0), B.stride(), C.stride()
    Ds = (0, 0) if D is None else (*D.stride(), 0)[:2]
    A, dt_bias = packed(A), packed(dt_bias)
    state_indices, num_tokens = indices(state_indices), indices(num_tokens)
    seeds, positions = wide(seeds), wide(positions)
    offsets = (Bs[0] | Bs[1] | Cs[0] | Cs[1] | n) * x.element_size()
    arguments = SSD_UPDATE.pack(
        state.data_ptr(),
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
        y.data_ptr(),
        pointer(state_scale),
        pointer(seeds),
        pointer(positions),
        slots,
        state.stride(0),
        0 if state_scale is None else state_scale.stride(0),
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
        lanes,
        launch.block // lanes * 2,
        codes[dt.dtype],
        codes[A.dtype],
        0 if D is None else codes[D.dtype],
        0 if dt_bias is None else codes[dt_bias.dtype],
        dt_softplus,
        not (B.data_ptr() | C.data_ptr() | offsets) & 15,
        dt_min,
        dt_max,
        layer,
    )
    run(launch, x.device, arguments)
    return y


def conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state_indices: Tensor | None,
    num_tokens: Tensor | None,
    silu: bool,
) -> Tensor:
    """m steps of the causal convolution on slot-indexed windows, in place: csrc/conv1d_update.cu.

    x (b,m,d), batch and tokens strided at will; conv_state (slots,d,W >= width-1), any strides; weight
    (d,width), width 2 to 8; bias (d); state_indices, num_tokens (b). Returns y (b,m,d), zeros for padding.
    x and conv_state are fp32, bf16 or fp16, each of weight and bias any of them. Raises as ssd_update does.
    """
    import torch

    b, m, d = x.shape
    slots, _, window = conv_state.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not y.numel():
        return y
    codes = dtype_codes()
    launch = plan_conv1d_update(b, d, FORMATS[codes[x.dtype]], FORMATS[codes[conv_state.dtype]])
    weight, bias = weight.contiguous(), packed(bias)
    state_indices, num_tokens = indices(state_indices), indices(num_tokens)
    arguments = CONV1D_UPDATE.pack(
        conv_state.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        pointer(bias),
        pointer(state_indices),
        pointer(num_tokens),
        y.data_ptr(),
        slots,
        *conv_state.stride(),
        *x.stride()[:2],
        m,
        d,
        weight.shape[1],
        window,
        codes[weight.dtype],
        0 if bias is None else codes[bias.dtype],
        silu,
        0,
    )
    run(launch, x.device, arguments)
    return y
