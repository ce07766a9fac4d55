"""RMSNorm and gated RMSNorm over groups of channels, forward and backward.

With u = x silu(z) (gate first) or u = x, and r = (mean(u^2 over the group) + eps)^(-1/2):

    y = u r weight                 gate first, or no z
    y = x r weight silu(z)         gate last

x, z, y (..., d) in fp32, bf16 or fp16, weight (d); a group is SIZE neighbouring channels. Statistics in fp32.
Leading dimensions are flattened to rows; the stride of a row is free, its channels are contiguous.

A program owns one group of a few rows at a time: a tile (ROWS, BLOCK), in CHUNKS pieces where the group is too wide for
registers (the second look at a piece then comes from L1). Every tensor is read once and written once.

Backward: with g the gradient of u r (dy weight, times silu(z) if the gate comes last), du = r (g - u r^2 mean(g u)).
r is computed again from x. Each program sums dweight over its rows, in registers; a second step adds up the fixed
number of programs in fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tigon.kernels.launch import plan, target
from tigon.kernels.ssd_common import INTERPRETED, narrow

# Triton compiles 1 and multiples of 16 into programs of their own; these share one.
WRITE_Y = tl.constexpr(2)
WRITE_R = tl.constexpr(3)


@triton.jit
def load_chunk(ptr, base, row, mask, column):
    """(ROWS, BLOCK) fp32 piece, 0 outside; base (ROWS): where the rows begin."""
    return tl.load(ptr + base[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def silu(z, INTERPRETED: tl.constexpr):
    """z sigmoid(z). csrc/common/math.cuh computes the same bits: on a GPU by the same instructions, and where both run
    on a CPU from an exponential rounded from fp64, which does not depend on whose it is."""
    if INTERPRETED:
        e = tl.exp2((z * -1.4426950408889634).to(tl.float64)).to(tl.float32)
        return z * (1 / (1 + e))
    return z * tl.sigmoid(z)


@triton.jit
def gated_norm(
    x_ptr, z_ptr, weight_ptr, y_ptr, r_ptr, outputs, rows, x_t, z_t, eps,
    GATE_LAST: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """outputs: WRITE_Y or WRITE_R (rows, GROUPS), known at run time only: one program sums in one order, whichever is
    wanted, so that a quantizer that multiplies with r gets the bits of y."""
    GROUPS: tl.constexpr = D // SIZE
    CHUNKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    group = program % GROUPS
    row = (program // GROUPS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    square = tl.zeros((ROWS,), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        place = chunk * BLOCK + tl.arange(0, BLOCK)
        column = group * SIZE + place
        mask = (row < rows)[:, None] & (place < SIZE)[None, :]
        x = load_chunk(x_ptr, row * x_t, row, mask, column)
        if z_ptr is not None:
            z = load_chunk(z_ptr, row * z_t, row, mask, column)
            gate = silu(z, UPCAST)
            if not GATE_LAST:
                x *= gate
        square += tl.sum(x * x, 1)
    r = tl.rsqrt(square / SIZE + eps)
    tl.store(r_ptr + (row * GROUPS + group), r, mask=row < tl.where(outputs == WRITE_R, rows, 0))
    wanted = row < tl.where(outputs == WRITE_Y, rows, 0)
    for chunk in tl.static_range(CHUNKS):
        place = chunk * BLOCK + tl.arange(0, BLOCK)
        column = group * SIZE + place
        mask = wanted[:, None] & (place < SIZE)[None, :]
        if CHUNKS > 1:
            x = load_chunk(x_ptr, row * x_t, row, mask, column)
            if z_ptr is not None:
                z = load_chunk(z_ptr, row * z_t, row, mask, column)
                gate = silu(z, UPCAST)
                if not GATE_LAST:
                    x *= gate
        weight = tl.load(weight_ptr + column, mask=place < SIZE, other=0.0).to(tl.float32)
        y = x * r[:, None] * weight[None, :]
        if GATE_LAST:
            y *= gate
        y = narrow(y, y_ptr.dtype.element_ty, UPCAST)
        tl.store(y_ptr + (row * D)[:, None] + column[None, :], y, mask=mask)


@triton.jit
def gradient_inputs(
    dy_ptr, x_ptr, z_ptr, weight_ptr, row, rows, dy_t, x_t, z_t, group, chunk,
    GATE_LAST: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(dy, x, u, gate, slope, weight) of a piece: slope is d silu(z) / dz; gate and slope are 1 and 0 without z."""
    place = chunk * BLOCK + tl.arange(0, BLOCK)
    column = group * SIZE + place
    mask = (row < rows)[:, None] & (place < SIZE)[None, :]
    dy = load_chunk(dy_ptr, row * dy_t, row, mask, column)
    x = load_chunk(x_ptr, row * x_t, row, mask, column)
    weight = tl.load(weight_ptr + column, mask=place < SIZE, other=0.0).to(tl.float32)[None, :]
    u, gate, slope = x, 1.0, 0.0
    if z_ptr is not None:
        z = load_chunk(z_ptr, row * z_t, row, mask, column)
        sig = tl.sigmoid(z)
        gate = z * sig
        slope = sig * (1 + z * (1 - sig))
        if not GATE_LAST:
            u = x * gate
    return dy, x, u, gate, slope, weight


@triton.jit
def gated_norm_backward(
    dy_ptr, x_ptr, z_ptr, weight_ptr, dx_ptr, dz_ptr, sums_ptr, rows, dy_t, x_t, z_t, eps,
    GATE_LAST: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ROW_BLOCKS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """sums (ROW_BLOCKS, d): each row block's share of dweight."""
    GROUPS: tl.constexpr = D // SIZE
    CHUNKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    group = program % GROUPS
    dweight = ()
    for _ in tl.static_range(CHUNKS):
        dweight += (tl.zeros((ROWS, BLOCK), tl.float32),)
    for first in range(program // GROUPS * ROWS, rows, ROW_BLOCKS * ROWS):
        row = tl.cast(first, tl.int64) + tl.arange(0, ROWS)
        square = tl.zeros((ROWS,), tl.float32)
        along = tl.zeros((ROWS,), tl.float32)
        for chunk in tl.static_range(CHUNKS):
            dy, x, u, gate, slope, weight = gradient_inputs(
                dy_ptr, x_ptr, z_ptr, weight_ptr, row, rows, dy_t, x_t, z_t, group, chunk,
                GATE_LAST, SIZE, BLOCK,
            )  # fmt: skip
            square += tl.sum(u * u, 1)
            along += tl.sum((dy * gate if GATE_LAST else dy) * weight * u, 1)
        # With eps 0 a row past the end would bring 0 * inf into dweight.
        r = tl.where(row < rows, tl.rsqrt(square / SIZE + eps), 0.0)
        shrink = (along / SIZE * r * r)[:, None]
        r = r[:, None]
        summed = ()
        for chunk in tl.static_range(CHUNKS):
            if CHUNKS > 1:
                dy, x, u, gate, slope, weight = gradient_inputs(
                    dy_ptr, x_ptr, z_ptr, weight_ptr, row, rows, dy_t, x_t, z_t, group, chunk,
                    GATE_LAST, SIZE, BLOCK,
                )  # fmt: skip
            place = chunk * BLOCK + tl.arange(0, BLOCK)
            out = (row * D)[:, None] + (group * SIZE + place)[None, :]
            mask = (row < rows)[:, None] & (place < SIZE)[None, :]
            normed = u * r
            outer = dy * gate if GATE_LAST else dy
            summed += (dweight[chunk] + outer * normed,)
            du = r * (outer * weight - u * shrink)
            if z_ptr is not None:
                if GATE_LAST:
                    dz = dy * normed * weight * slope
                else:
                    dz = du * x * slope
                    du *= gate
                tl.store(dz_ptr + out, narrow(dz, dz_ptr.dtype.element_ty, UPCAST), mask=mask)
            tl.store(dx_ptr + out, narrow(du, dx_ptr.dtype.element_ty, UPCAST), mask=mask)
        dweight = summed
    for chunk in tl.static_range(CHUNKS):
        place = chunk * BLOCK + tl.arange(0, BLOCK)
        share = sums_ptr + (program // GROUPS).to(tl.int64) * D + (group * SIZE + place)
        tl.store(share, tl.sum(dweight[chunk], 0), mask=place < SIZE)


def _rows(t: Tensor | None) -> Tensor | None:
    """(..., d) as (rows, d): a view wherever one row stride describes it, else one copy."""
    return None if t is None else t.reshape(-1, t.shape[-1])


def _options(op: str, x: Tensor, group_size: int, gate_last: bool) -> tuple[object, dict]:
    t, d = x.shape
    sizes = dict(t=t, d=d, group_size=group_size, itemsize=x.element_size())
    (config,) = plan(op, target(x.device)[0], **sizes).values()
    return config, dict(
        GATE_LAST=gate_last,
        D=d,
        SIZE=group_size,
        ROWS=config.rows,
        BLOCK=config.block,
        UPCAST=INTERPRETED,
        num_warps=config.warps,
    )


def norm_forward(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Tensor:
    """y like x."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        unused = torch.empty(1, dtype=torch.float32, device=x.device)
        _launch(WRITE_Y, x, z, weight, y, unused, eps, group_size, norm_before_gate)
    return y


def rms_statistics(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Tensor:
    """r (m, groups) fp32 of x (m,d), the bits that `norm_forward` with the same arguments multiplies with."""
    r = torch.empty(x.shape[0], x.shape[1] // group_size, dtype=torch.float32, device=x.device)
    if r.numel():
        unused = torch.empty(1, dtype=x.dtype, device=x.device)
        _launch(WRITE_R, x, z, weight, unused, r, eps, group_size, norm_before_gate)
    return r


def _launch(outputs, x, z, weight, y, r, eps, group_size, norm_before_gate) -> None:
    x, z = _rows(x), _rows(z)
    t, d = x.shape
    gate_last = z is not None and norm_before_gate
    config, options = _options("gated_rms_norm", x, group_size, gate_last)
    gated_norm[(triton.cdiv(t, config.rows) * (d // group_size),)](
        x, z, weight, y, r, outputs.value, t,
        x.stride(0), 0 if z is None else z.stride(0), eps, **options,
    )  # fmt: skip


def norm_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(dx, dz, dweight), each in its input's dtype."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
    if not dx.numel():
        return dx, dz, torch.zeros_like(weight)
    dy, x, z = _rows(dy), _rows(x), _rows(z)
    t, d = x.shape
    gate_last = z is not None and norm_before_gate
    config, options = _options("gated_rms_norm_backward", x, group_size, gate_last)
    sums = torch.empty(config.row_blocks, d, dtype=torch.float32, device=x.device)
    gated_norm_backward[(config.row_blocks * (d // group_size),)](
        dy, x, z, weight, dx, dz, sums, t,
        dy.stride(0), x.stride(0), 0 if z is None else z.stride(0), eps,
        ROW_BLOCKS=config.row_blocks, **options,
    )  # fmt: skip
    return dx, dz, sums.sum(0).to(weight.dtype)
