"""Depthwise causal convolution of Mamba layers: `causal_conv1d` over sequences, `causal_conv1d_update` for decode.

    y[t, c] = act( bias[c] + sum_{j < width} weight[c, width-1-j] * u[t-j, c] )        act = SiLU or identity

u is the sequence preceded by the initial state. Source: Gu and Dao 2023, "Mamba" (arXiv 2312.00752), section 3.4.
"""

import torch
from torch import Tensor

from tigon.ops.checks import INDEX, Check, beside_dtypes, inner_is_strided
from tigon.ops.dispatch import call, inner, run
from tigon.ops.library import differentiable, once_differentiable, register
from tigon.ops.replay import check_ancestors, check_conv_ring, check_slots, unpack
from tigon.ops.ssd import MAX_STEP

MAX_WIDTH = 8
_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, bool silu"
)


def _conv(x, *rest):
    return run("causal_conv1d", x, x, *rest)


def _conv_fake(x, weight, bias, initial, cu_seqlens, silu):
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty((sequences, x.shape[2], weight.shape[1] - 1))


def _conv_backward(dy, dfinal, x, *rest):
    grads = run("causal_conv1d_backward", x, dy, dfinal, x, *rest)
    return tuple(x.new_empty(0) if g is None else g for g in grads)


def _conv_backward_fake(dy, dfinal, x, weight, bias, initial, *rest):
    return tuple(
        x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (x, weight, bias, initial)
    )


def _conv_setup(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _conv_autograd(ctx, dy, dfinal):
    x, weight, bias, initial, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else inner("dy", dy, 1)
    dfinal = None if dfinal is None else dfinal.contiguous()
    grads = torch.ops.tigon.causal_conv1d_backward(
        dy, dfinal, x, weight, bias, initial, cu_seqlens, ctx.silu
    )
    given = (x, weight, bias, initial)
    return (*(g if t is not None else None for g, t in zip(grads, given, strict=True)), None, None)


register(f"causal_conv1d({_ARGUMENTS}) -> (Tensor, Tensor)", _conv, _conv_fake, autocast=("x",))
register(
    f"causal_conv1d_backward(Tensor dy, Tensor? dfinal, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _conv_backward,
    _conv_backward_fake,
)
differentiable("causal_conv1d", _conv_autograd, _conv_setup)
once_differentiable("causal_conv1d_backward")


def _check_weights(check, x, weight, bias, activation, cast: bool) -> None:
    check.tensor("weight", weight, "d width", dtypes=beside_dtypes(x, cast))
    check.tensor("bias", bias, "d", dtypes=beside_dtypes(x, cast), optional=True)
    width = weight.shape[1]
    check.require(1 <= width <= MAX_WIDTH, f"weight has width={width}, allowed: 1 to {MAX_WIDTH}")
    if activation not in ("silu", "swish", None):
        check.fail(f"activation must be 'silu' or None, got {activation!r}")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution (formula at the top of the module), differentiable in every float input.

    Args:
        x: (b,l,d) fp32, bf16 or fp16 (fp64 on the reference); channels contiguous, other strides free.
        weight: (d,width), width 1 to 8, newest tap last. bias: (d). In x's dtype or fp32.
        activation: "silu" ("swish" is the same) or None.
        initial_state: (b,d,width-1), or (s,d,width-1) with cu_seqlens: the inputs before the first, newest last.
        cu_seqlens: (s+1) int32 or int64 bounds of packed sequences; then b = 1.
        return_final_state: also return each sequence's last width-1 inputs.

    Returns:
        y like x; then, if asked for, the final state (b or s, d, width-1) in x's dtype.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range, by name.
    """
    check = Check("causal_conv1d")
    check.tensor("x", x, "b l d")
    _check_weights(check, x, weight, bias, activation, cast=True)
    b, length, d = x.shape
    if cu_seqlens is not None:
        check.tensor("cu_seqlens", cu_seqlens, "s+1", dtypes=INDEX)
        check.require(
            cu_seqlens.shape[0] > 1, "cu_seqlens must hold at least 2 bounds (1 sequence)"
        )
        check.require(
            b == 1, f"x has b={b}; with cu_seqlens the sequences are packed and b must be 1"
        )
        check.cu_seqlens(cu_seqlens, length)
        check.sizes["s"], check.source["s"] = cu_seqlens.shape[0] - 1, "cu_seqlens"
    check.sizes["width-1"], check.source["width-1"] = weight.shape[1] - 1, "weight"
    rows = "b" if cu_seqlens is None else "s"
    check.tensor(
        "initial_state", initial_state, f"{rows} d width-1", dtypes=beside_dtypes(x), optional=True
    )
    args = (
        inner("x", x, 1),
        inner("weight", weight, 2),
        None if bias is None else inner("bias", bias, 1),
    )
    args += (
        inner("initial_state", initial_state, 3),
        inner("cu_seqlens", cu_seqlens, 1),
        activation is not None,
    )
    sizes = {"b": b, "l": length, "d": d, "width": weight.shape[1], "itemsize": x.element_size()}
    y, final = call("causal_conv1d", x, args, sizes)
    return (y, final) if return_final_state else y


def _update(x, *rest):
    return run("causal_conv1d_update", x, x, *rest)


def _update_fake(x, *rest):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


register(
    "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, Tensor? state_indices, "
    "Tensor? num_tokens, bool silu) -> Tensor",
    _update,
    _update_fake,
)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    state_indices: Tensor | None = None,
    num_tokens: Tensor | None = None,
    replay: tuple | None = None,
    ancestors: Tensor | None = None,
) -> Tensor:
    """Decode: convolve 1 to 16 new tokens a row and advance its window, in place.

    Args:
        x: (b,d) for one token a row, or (b,m,d) with 1 <= m <= 16, or m <= flush <= 32 with replay.
        conv_state: (slots,d,W), W >= width-1: the last W inputs, newest last, fp32, bf16 or fp16. Updated in place.
        weight: (d,width). bias: (d). activation: as in causal_conv1d.
        state_indices: (b) int32 or int64, the slot of each row; negative: padding, zeros come out, nothing is touched.
        num_tokens: (b) int32 or int64, tokens of the row that are real; the others give zeros.
        replay: (ReplayCache of the layer, ReplayCursor), see `tigon.ops.replay`: the window before the call is that at
            cursor.length in the ring cache.conv (zeros before position 0), and x goes to the ring behind it.
            conv_state is None then, or cache.conv itself.
        ancestors: (b,m) int32 with replay, as in ssd_update: the taps of a node are its ancestors, then the window.

    Returns:
        y like x.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range, by name.
        RuntimeError: an argument requires a gradient; causal_conv1d has gradients.
    """
    check = Check("causal_conv1d_update")
    check.one_of("x", x, "b d", "b m d")
    single = x.dim() == 2
    _check_weights(check, x, weight, bias, activation, cast=False)
    b, m = x.shape[0], 1 if single else x.shape[1]
    width = weight.shape[1]
    if replay is None:
        check.tensor("conv_state", conv_state, "slots d W")
        window = conv_state.shape[2]
        check.require(
            window >= width - 1,
            f"conv_state holds W={window} inputs, at least width-1={width - 1} are needed",
        )
        check.require(
            1 <= m <= MAX_STEP,
            f"x has m={m} tokens a row, allowed: 1 to {MAX_STEP}; use causal_conv1d for more",
        )
    else:
        cache, cursor = unpack(check, replay, m)
        if conv_state is not None and conv_state is not cache.conv:
            check.fail("conv_state must be None or cache.conv with replay")
        check_conv_ring(check, cache.conv, x, width, m)
        conv_state, window = cache.conv, cache.conv.shape[2]
    check.no_gradient("causal_conv1d", x=x, conv_state=conv_state, weight=weight, bias=bias)
    slots = conv_state.shape[0]
    check.tensor("state_indices", state_indices, "b", dtypes=INDEX, optional=True)
    check.tensor("num_tokens", num_tokens, "b", dtypes=INDEX, optional=True)
    check_slots(check, "conv_state has", slots, b, state_indices)
    check.within("num_tokens", num_tokens, 0, m)
    if inner_is_strided(conv_state):
        check.fail("conv_state must be contiguous in (d, W): it is updated in place")
    if ancestors is not None and replay is None:
        check.fail("ancestors say which tokens of a tree see which; they need replay")
    ancestors = check_ancestors(check, ancestors, single)
    rows = inner("x", x[:, None] if single else x, 1)
    filters = (inner("weight", weight, 2), None if bias is None else inner("bias", bias, 1))
    where = (inner("state_indices", state_indices, 1), inner("num_tokens", num_tokens, 1))
    sizes = {"b": b, "m": m, "d": x.shape[-1], "width": width, "window": window}
    sizes |= {"itemsize": x.element_size()}
    if replay is None:
        args = (rows, conv_state, *filters, *where, activation is not None)
        y = call("causal_conv1d_update", rows, args, sizes)
    else:
        args = (
            rows,
            conv_state,
            cursor.length,
            *filters,
            *where,
            ancestors,
            activation is not None,
        )
        y = call("conv1d_replay", rows, args, sizes)
    return y[:, 0] if single else y
