"""Depthwise causal convolution, forward and backward.

    y[t, c] = act( bias[c] + sum_{i < width} weight[c, i] * u[t - (width-1) + i, c] )     act = SiLU or identity

u is the sequence preceded by `initial_state` (its last width-1 inputs, newest last; zeros if None).
x, y (b,l,d) in fp32, bf16 or fp16, channels contiguous, batch and token strides free; weight (d,width), bias (d);
states (b or s, d, width-1); cu_seqlens (s+1) packs sequences into b = 1. Sums in fp32.

A program owns a stretch of tokens for a tile of channels and walks it token by token. The *window*, the last `width`
inputs of its channels, stays in registers, oldest first: x is read once and y written once, with 16-byte accesses, and
nothing passes from thread to thread. Packed sequences are found by a binary search of cu_seqlens at the start of the
stretch; at each boundary the window is filled anew from that sequence's initial state.

Backward walks the same way and recomputes what came before SiLU. Step t knows the gradients g of the last `width`
outputs, hence dx[t - (width-1)]; before the first token that is the gradient of the initial state, and the last
width-1 inputs also take up dfinal. dweight and dbias are sums over each stretch, then over stretches in fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tigon.kernels.launch import plan, target
from tigon.kernels.ssd_common import INTERPRETED, narrow


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK_D: tl.constexpr):
    """COUNT channel vectors of zeros."""
    out = ()
    for _ in tl.static_range(COUNT):
        out += (tl.zeros((BLOCK_D,), tl.float32),)
    return out


@triton.jit
def inside_if(condition, channel, D: tl.constexpr):
    """channel < D where the scalar condition holds, else nowhere (one scalar select, one vector compare)."""
    return channel < tl.where(condition, D, 0)


@triton.jit
def columns(ptr, channel, inside, COUNT: tl.constexpr):
    """The COUNT columns of (d,COUNT) as channel vectors."""
    out = ()
    for i in tl.static_range(COUNT):
        place = ptr + (channel * COUNT + i)
        out += (tl.load(place, mask=inside, other=0.0).to(tl.float32),)
    return out


@triton.jit
def owned_tokens(length, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr):
    """(channels, batch, stretch, first token, last token + 1) of this program; neighbours share tokens."""
    TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    channel = program % TILES * BLOCK_D + tl.arange(0, BLOCK_D)
    stretch = (program // TILES).to(tl.int64)
    stretches = tl.cdiv(length, TOKENS)
    first = stretch % stretches * TOKENS
    return channel, stretch // stretches, stretch, first, tl.minimum(first + TOKENS, length)


@triton.jit
def sequences_from(bounds_ptr, sequences, batch, token):
    """(the sequence that holds `token`, the number after the last that this batch row may touch)."""
    if bounds_ptr is None:
        return batch, batch + 1
    else:
        low = tl.cast(0, tl.int64)
        high = tl.cast(sequences, tl.int64)
        while high - low > 1:
            middle = (low + high) // 2
            before = tl.load(bounds_ptr + middle) <= token
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        return low, tl.cast(sequences, tl.int64)


@triton.jit
def sequence_bounds(bounds_ptr, sequence, token, length):
    """(start, end) of a sequence with start <= token <= end <= length, whatever cu_seqlens holds."""
    if bounds_ptr is None:
        return token * 0, token * 0 + length
    else:
        start = tl.load(bounds_ptr + sequence).to(tl.int64)
        end = tl.load(bounds_ptr + (sequence + 1)).to(tl.int64)
        return tl.minimum(tl.maximum(start, 0), token), tl.minimum(tl.maximum(end, token), length)


@triton.jit
def history(
    x_row, x_t, initial_ptr, sequence, token, start, channel,
    WIDTH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The WIDTH-1 inputs before `token`, oldest first: of the sequence, then of its initial state."""
    STATE: tl.constexpr = D * (WIDTH - 1)
    out = ()
    for i in tl.static_range(WIDTH - 1):
        earlier = token - (WIDTH - 1) + i
        u = tl.load(
            x_row + earlier * x_t + channel, mask=inside_if(earlier >= start, channel, D), other=0.0
        )
        u = u.to(tl.float32)
        if initial_ptr is not None:
            column = earlier - start + (WIDTH - 1)
            place = initial_ptr + sequence * STATE + column + channel * (WIDTH - 1)
            before = inside_if(earlier < start, channel, D)
            u += tl.load(place, mask=before, other=0.0).to(tl.float32)
        out += (u,)
    return out


@triton.jit
def preactivation(window, weight, bias, WIDTH: tl.constexpr):
    pre = bias
    for i in tl.static_range(WIDTH):
        pre += weight[i] * window[i]
    return pre


@triton.jit
def load_bias(bias_ptr, channel, inside, BLOCK_D: tl.constexpr):
    if bias_ptr is None:
        return tl.zeros((BLOCK_D,), tl.float32)
    else:
        return tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def convolve(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, bounds_ptr, y_ptr, final_ptr,
    length, sequences, x_b, x_t,
    SILU: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    STATE: tl.constexpr = D * (WIDTH - 1)
    channel, batch, _, token, stop = owned_tokens(length, TOKENS, BLOCK_D, D)
    inside = channel < D
    weight = columns(weight_ptr, channel, inside, WIDTH)
    bias = load_bias(bias_ptr, channel, inside, BLOCK_D)
    x_row = x_ptr + batch * x_b
    y_row = y_ptr + batch * length * D
    sequence, after = sequences_from(bounds_ptr, sequences, batch, token)
    while (token < stop) & (sequence < after):
        start, end = sequence_bounds(bounds_ptr, sequence, token, length)
        last = tl.minimum(stop, end)
        window = history(x_row, x_t, initial_ptr, sequence, token, start, channel, WIDTH, D)
        for step in range(0, (last - token).to(tl.int32)):
            t = token + step
            x = tl.load(x_row + t * x_t + channel, mask=inside, other=0.0).to(tl.float32)
            window += (x,)
            y = preactivation(window, weight, bias, WIDTH)
            if SILU:
                y *= tl.sigmoid(y)
            y = narrow(y, y_ptr.dtype.element_ty, UPCAST)
            tl.store(y_row + t * D + channel, y, mask=inside)
            window = window[1:]
        if last == end:
            for i in tl.static_range(WIDTH - 1):
                place = final_ptr + sequence * STATE + (channel * (WIDTH - 1) + i)
                tl.store(place, narrow(window[i], final_ptr.dtype.element_ty, UPCAST), mask=inside)
        token = last
        sequence += 1


@triton.jit
def convolve_backward(
    dy_ptr, dfinal_ptr, x_ptr, weight_ptr, bias_ptr, initial_ptr, bounds_ptr,
    dx_ptr, sums_ptr, dinitial_ptr,
    length, sequences, dy_b, dy_t, x_b, x_t,
    SILU: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """sums (stretches, WIDTH + 1, d): each stretch's share of dweight, then of dbias."""
    STATE: tl.constexpr = D * (WIDTH - 1)
    channel, batch, stretch, token, stop = owned_tokens(length, TOKENS, BLOCK_D, D)
    inside = channel < D
    weight = columns(weight_ptr, channel, inside, WIDTH)
    bias = load_bias(bias_ptr, channel, inside, BLOCK_D)
    dweight = zeros(WIDTH, BLOCK_D)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    x_row = x_ptr + batch * x_b
    dy_row = dy_ptr + batch * dy_b
    dx_row = dx_ptr + batch * length * D
    sequence, after = sequences_from(bounds_ptr, sequences, batch, token)
    while (token < stop) & (sequence < after):
        start, end = sequence_bounds(bounds_ptr, sequence, token, length)
        last = tl.minimum(stop, end)
        window = history(x_row, x_t, initial_ptr, sequence, token, start, channel, WIDTH, D)
        later = zeros(WIDTH - 1, BLOCK_D)  # g of the last WIDTH - 1 steps, oldest first
        for step in range(0, (last - token).to(tl.int32) + WIDTH - 1):
            t = token + step
            live = inside_if(t < end, channel, D)
            x = tl.load(x_row + t * x_t + channel, mask=live, other=0.0).to(tl.float32)
            g = tl.load(dy_row + t * dy_t + channel, mask=live, other=0.0).to(tl.float32)
            window += (x,)
            if SILU:
                pre = preactivation(window, weight, bias, WIDTH)
                sig = tl.sigmoid(pre)
                g *= sig * (1 + pre * (1 - sig))
                g = tl.where(live, g, 0.0)
            own = tl.where(t < last, g, 0.0)
            dbias += own
            summed = ()
            for k in tl.static_range(WIDTH):
                summed += (dweight[k] + own * window[k],)
            dweight = summed
            later += (g,)
            dx = tl.zeros((BLOCK_D,), tl.float32)
            for k in tl.static_range(WIDTH):
                dx += weight[WIDTH - 1 - k] * later[k]
            if dfinal_ptr is not None:
                if t >= end:
                    place = dfinal_ptr + sequence * STATE + (t - end) + channel * (WIDTH - 1)
                    dx += tl.load(place, mask=inside, other=0.0).to(tl.float32)
            u = t - (WIDTH - 1)
            tl.store(
                dx_row + u * D + channel,
                narrow(dx, dx_ptr.dtype.element_ty, UPCAST),
                mask=inside_if(u >= token, channel, D),
            )
            if dinitial_ptr is not None:
                if (u < start) & (token == start):
                    place = dinitial_ptr + sequence * STATE + (t - start) + channel * (WIDTH - 1)
                    tl.store(place, narrow(dx, dinitial_ptr.dtype.element_ty, UPCAST), mask=inside)
            window = window[1:]
            later = later[1:]
        token = last
        sequence += 1
    sums_row = sums_ptr + stretch * ((WIDTH + 1) * D) + channel
    for k in tl.static_range(WIDTH):
        tl.store(sums_row + k * D, dweight[k], mask=inside)
    tl.store(sums_row + WIDTH * D, dbias, mask=inside)


def _launch(name: str, op: str, x: Tensor, width: int, **sizes: int) -> tuple[int, int, dict]:
    """(stretches, programs, the launch options that both kernels share)."""
    b, l, d = x.shape
    sizes |= dict(b=b, l=l, d=d, width=width, itemsize=x.element_size())
    config = plan(op, target(x.device)[0], **sizes)[name]
    stretches = b * triton.cdiv(l, config.tokens)
    options = dict(
        WIDTH=width,
        D=d,
        TOKENS=config.tokens,
        BLOCK_D=config.block,
        UPCAST=INTERPRETED,
        num_warps=config.warps,
    )
    return stretches, stretches * triton.cdiv(d, config.block), options


def conv1d_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """(y, final_state): final_state (b or s, d, width-1) holds each sequence's last width-1 inputs, in x's dtype."""
    b, l, d = x.shape
    width = weight.shape[1]
    sequences = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = torch.empty(b, l, d, dtype=x.dtype, device=x.device)
    final = torch.zeros(sequences, d, width - 1, dtype=x.dtype, device=x.device)
    if initial_state is not None:
        final.copy_(initial_state)  # what an empty sequence keeps
    if y.numel():
        _, programs, options = _launch("convolve", "causal_conv1d", x, width)
        convolve[(programs,)](
            x, weight, bias, initial_state, cu_seqlens, y, final,
            l, sequences, *x.stride()[:2], SILU=silu, **options,
        )  # fmt: skip
    return y, final


def conv1d_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of `conv1d_forward`: (dx, dweight, dbias, dinitial), each in its input's dtype."""
    b, l, d = x.shape
    width = weight.shape[1]
    sequences = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dx = torch.empty(b, l, d, dtype=x.dtype, device=x.device)
    sums = torch.zeros(1, width + 1, d, device=x.device)
    dinitial = None
    if initial_state is not None:
        dinitial = torch.zeros(initial_state.shape, dtype=initial_state.dtype, device=x.device)
        if dfinal is not None:
            dinitial.copy_(dfinal)  # what an empty sequence hands through
    if dx.numel():
        states = dinitial is not None or dfinal is not None
        stretches, programs, options = _launch(
            "convolve_backward", "causal_conv1d_backward", x, width, states=states
        )
        sums = torch.empty(stretches, width + 1, d, device=x.device)
        convolve_backward[(programs,)](
            dy, dfinal, x, weight, bias, initial_state, cu_seqlens, dx, sums, dinitial,
            l, sequences, *dy.stride()[:2], *x.stride()[:2], SILU=silu, **options,
        )  # fmt: skip
    sums = sums.sum(0)
    dweight = sums[:width].t().to(weight.dtype).contiguous()
    return dx, dweight, None if bias is None else sums[width].to(bias.dtype), dinitial
