"""Mixture of experts: `moe_route` chooses, `moe_experts` computes, `grouped_mm` is their product.

    s = sigmoid(z) or softmax(z);  top k of s + bias;  w = scale s / (sum s + eps);  y_t = sum_j w_tj D_e act(U_e x_t)

Nothing of size tokens x experts is kept for backward unless an auxiliary loss is on, rows are gathered where they are
multiplied, and no count is read by the host.

Sources: "DeepSeek-V3" (arXiv 2412.19437), section 2.1.2; "Nemotron 3" (arXiv 2512.20856), section 2.2.
"""

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from tigon.ops.checks import INDEX, Check, activation_dtypes, readable
from tigon.ops.dispatch import call, inner, is_batch_invariant, run
from tigon.ops.library import differentiable, once_differentiable, register
from tigon.ops.quantize import check_quantized, one_of
from tigon.ops.quantized import FP8Tensor, NVFP4Tensor, QuantizedTensor
from tigon.ops.routing import Routing

MAX_K, MAX_EXPERTS = 64, 4096
ACTIVATIONS = ("relu2", "swiglu")
SAVES = ("hidden", "relu", "nothing")
_RULE = "float scale, str score, bool normalize, float eps"
_PLACES = "Tensor indices, Tensor offsets, Tensor order, Tensor inverse"


def _route(logits, *rest):
    return run("moe_route", logits, logits, *rest)


def _route_fake(logits, bias, k, scale, score, normalize, eps, groups, top, sums, z_loss, cu, mask):
    t, e = logits.shape
    s = 1 if cu is None else cu.shape[0] - 1

    def made(*shape, dtype=torch.int32):
        return logits.new_empty(shape, dtype=dtype)

    return (
        made(t, k),
        made(t, k, dtype=logits.dtype),
        made(t, k, dtype=logits.dtype),
        made(e),
        made(e + 1),
        made(t * k),
        made(t * k),
        made(*((s, e) if sums else (0,)), dtype=logits.dtype),
        made(*((s, e) if sums else (0,))),
        made(*(() if z_loss else (0,)), dtype=logits.dtype),
    )


def _route_backward(dweights, *rest):
    return run("moe_route_backward", dweights, dweights, *rest)


def _route_backward_fake(dweights, dsums, dz, logits, indices, scores, e, *rest):
    return dweights.new_empty((indices.shape[0], e))


def _route_setup(ctx, inputs, output):
    logits, _, _, scale, score, normalize, eps, _, _, sums, z_loss, cu_seqlens, mask = inputs
    indices, _, scores = output[:3]
    needs_logits = sums or z_loss or (score == "softmax" and not normalize)
    ctx.save_for_backward(logits if needs_logits else None, indices, scores, cu_seqlens, mask)
    ctx.rule = (logits.shape[1], scale, score, normalize, eps)
    ctx.losses = (sums, z_loss)
    ctx.mark_non_differentiable(indices, scores, *output[3:7], output[8])
    ctx.set_materialize_grads(False)


def _route_autograd(ctx, *grads):
    dweights, dsums, dz = grads[1], grads[7], grads[9]
    logits, indices, scores, cu_seqlens, mask = ctx.saved_tensors
    dweights = torch.zeros_like(scores) if dweights is None else dweights.contiguous()
    dsums = dsums.contiguous() if ctx.losses[0] and dsums is not None else None
    dz = dz if ctx.losses[1] else None
    dlogits = torch.ops.tigon.moe_route_backward(
        dweights, dsums, dz, logits, indices, scores, *ctx.rule, cu_seqlens, mask
    )
    return (dlogits, *[None] * 12)


register(
    f"moe_route(Tensor logits, Tensor? bias, int top_k, {_RULE}, int groups, int top_groups, bool sums, bool z_loss, "
    "Tensor? cu_seqlens, Tensor? mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _route,
    _route_fake,
)
register(
    "moe_route_backward(Tensor dweights, Tensor? dscore_sums, Tensor? dz_sum, Tensor? logits, Tensor indices, "
    f"Tensor scores, int e, {_RULE}, Tensor? cu_seqlens, Tensor? mask) -> Tensor",
    _route_backward,
    _route_backward_fake,
)
register(
    "moe_sort(Tensor indices, int e) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda indices, e: run("moe_sort", indices, indices, e),
    lambda indices, e: tuple(
        indices.new_empty(n, dtype=torch.int32)
        for n in (e, e + 1, indices.numel(), indices.numel())
    ),
)
differentiable("moe_route", _route_autograd, _route_setup)
once_differentiable("moe_route_backward")


def moe_route(
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    top_k: int,
    scale: float = 1.0,
    score: Literal["sigmoid", "softmax"] = "sigmoid",
    normalize: bool = True,
    eps: float = 1e-20,
    groups: int = 1,
    top_groups: int = 1,
    scale_placement: Literal["weights", "output"] = "weights",
    aux: Literal["sequence", "batch"] | None = None,
    z_loss: bool = False,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> Routing:
    """Choose experts for tokens (formula at the top of the module) and sort the choices by expert.

    Args:
        logits: (t,e) fp32 (fp64 on the reference), up to 4,096 experts.
        bias: (e) fp32, added to the scores for the choice only; it has no gradient (aux-loss-free balancing).
        top_k: choices a token, up to 64. Ties go to the lower index.
        scale: of the weights; with scale_placement="output" it is left to the caller (`Routing.output_scale`).
        score: of the logits; softmax runs over all experts. normalize: whether the k weights are divided by their sum
            plus `eps`.
        groups, top_groups: experts in equal groups, of which the best top_groups stay, by the sum of their two best.
        aux: sum the normalized scores, and count the choices that would be made without the bias, over each sequence or
            the whole batch (`Routing.aux_loss`). z_loss: sum logsumexp(logits)^2 (`Routing.z_loss`).
        cu_seqlens: (s+1) int32 or int64 bounds of the sequences, for aux="sequence".
        mask: (t) bool, False for padding: such a token chooses expert e, which is none, and is in no count.

    Returns:
        Routing, whose weights, score_sums and z_sum are differentiable.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range, by name.

    A NaN logit is never preferred, and makes its token's weights NaN; no other token feels it.
    """
    check = Check("moe_route")
    check.tensor("logits", logits, "t e", dtypes=(torch.float32, torch.float64))
    check.tensor("bias", bias, "e", dtypes=(torch.float32, torch.float64), optional=True)
    t, e = logits.shape
    check.size("e", MAX_EXPERTS)
    one_of(check, "score", score, ("sigmoid", "softmax"))
    one_of(check, "scale_placement", scale_placement, ("weights", "output"))
    one_of(check, "aux", aux, (None, "sequence", "batch"))
    check.require(groups >= 1 and e % groups == 0, f"groups={groups} must divide e={e}")
    check.require(
        1 <= top_groups <= groups, f"top_groups={top_groups} must lie in 1 to groups={groups}"
    )
    room = e // groups * top_groups
    check.require(
        1 <= top_k <= min(MAX_K, room),
        f"top_k={top_k} must lie in 1 to {min(MAX_K, room)} (64, or the experts of the chosen groups)",
    )
    check.require(t * top_k < 2**31, f"{t} tokens x top_k={top_k} pass the 2^31 choices of a call")
    if aux == "sequence":
        check.require(cu_seqlens is not None, "aux='sequence' needs cu_seqlens")
    check.tensor("cu_seqlens", cu_seqlens, "bounds", dtypes=INDEX, optional=True)
    if cu_seqlens is not None:
        check.require(cu_seqlens.shape[0] > 1, "cu_seqlens must hold two bounds or more")
        check.cu_seqlens(cu_seqlens, t)
    check.tensor("mask", mask, "t", dtypes=(torch.bool,), optional=True)
    on_weights = scale_placement == "weights"
    args = (
        inner("logits", logits, 1),
        None if bias is None else inner("bias", bias.detach(), 1),
        top_k,
        float(scale) if on_weights else 1.0,
        score,
        normalize,
        float(eps),
        groups,
        top_groups,
        aux is not None,
        z_loss,
        cu_seqlens if aux == "sequence" else None,
        mask,
    )
    sequences = 0 if aux is None else 1 if aux == "batch" else cu_seqlens.shape[0] - 1
    sizes = {"t": t, "e": e, "k": top_k, "groups": groups, "sequences": sequences}
    out = call("moe_route", logits, args, sizes | {"itemsize": logits.element_size()})
    indices, weights, _, counts, offsets, order, inverse, score_sums, aux_counts, z_sum = out
    return Routing(
        *(indices, weights, counts, offsets, order, inverse),
        score_sums=score_sums if aux else None,
        aux_counts=aux_counts if aux else None,
        z_sum=z_sum if z_loss else None,
        output_scale=1.0 if on_weights else float(scale),
    )


def moe_sort(indices: Tensor, weights: Tensor, *, experts: int) -> Routing:
    """The Routing of choices that were made elsewhere: counts, offsets and the order by expert.

    Args:
        indices: (t,k) int32 or int64; one outside 0 to experts - 1 is a skipped choice.
        weights: (t,k) fp32 (fp64 on the reference). experts: up to 4,096.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range, by name.
    """
    check = Check("moe_sort")
    check.tensor("indices", indices, "t k", dtypes=INDEX)
    check.tensor("weights", weights, "t k", dtypes=(torch.float32, torch.float64))
    check.require(1 <= experts <= MAX_EXPERTS, f"experts={experts} must lie in 1 to {MAX_EXPERTS}")
    check.require(indices.numel() < 2**31, f"{indices.numel()} choices pass the 2^31 of a call")
    if indices.dtype == torch.int64:  # beyond int32 means skipped: it must not wrap into an expert
        indices = indices.clamp(-1, experts).to(torch.int32)
    indices = inner("indices", indices, 2)
    sizes = {"t": indices.shape[0], "e": experts, "k": indices.shape[1], "itemsize": 4}
    return Routing(indices, weights, *call("moe_sort", indices, (indices, experts), sizes))


def _grouped(x, *rest):
    return run("grouped_mm", x, x, *rest, is_batch_invariant())


def _grouped_backward(dy, x, *rest):
    return run("grouped_mm_backward", x, dy, x, *rest, is_batch_invariant())


def _contiguous_like(t):
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _grouped_autograd(ctx, dy):
    x, w, offsets = ctx.saved_tensors
    grads = torch.ops.tigon.grouped_mm_backward(inner("dy", dy, 1), x, w, offsets)
    return *grads, None


register(
    "grouped_mm(Tensor x, Tensor w, Tensor offsets) -> Tensor",
    _grouped,
    lambda x, w, offsets: x.new_empty((x.shape[0], w.shape[1])),
    autocast=("x", "w"),
)
register(
    "grouped_mm_backward(Tensor dy, Tensor x, Tensor w, Tensor offsets) -> (Tensor, Tensor)",
    _grouped_backward,
    lambda dy, x, w, offsets: (_contiguous_like(x), _contiguous_like(w)),
)
differentiable(
    "grouped_mm",
    _grouped_autograd,
    lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
once_differentiable("grouped_mm_backward")


def grouped_mm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """y = x w[e].T, rows offsets[e] to offsets[e+1] of x with the matrix of expert e.

    Args:
        x: (rows,k) fp32, bf16 or fp16 in expert order, rows strided at will. w: (e,n,k) of x's dtype.
        offsets: (e+1) int32, not falling, from 0 on (`Routing.offsets`).

    Returns:
        (rows,n); rows past offsets[e] are zeros.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or (on the CPU) values, by name.
    """
    check = Check("grouped_mm")
    check.tensor("x", x, "rows k")
    check.tensor("w", w, "e n k", dtypes=activation_dtypes(x))
    _check_offsets(check, offsets, w.shape[0], x.shape[0])
    args = (inner("x", x, 1), inner("w", w, 3), offsets)
    sizes = {"rows": x.shape[0], "e": w.shape[0], "n": w.shape[1], "k": w.shape[2]}
    return call("grouped_mm", x, args, sizes | {"itemsize": x.element_size()})


def _check_offsets(check: Check, offsets: Tensor, experts: int, rows: int) -> None:
    check.tensor("offsets", offsets, str(experts + 1), dtypes=(torch.int32,))
    if readable(offsets):
        bounds = offsets.tolist()
        rising = all(a <= b for a, b in pairwise(bounds))
        check.require(
            bounds[0] == 0 and rising and bounds[-1] <= rows,
            f"offsets must rise from 0 to at most {rows}, got {bounds[:8]}",
        )


_UP = "Tensor up, Tensor? up_scale, Tensor? up_outer, str up_format"
_DOWN = "Tensor down, Tensor? down_scale, Tensor? down_outer, str down_format"
_MLP = "str activation, bool before_down, str save, int first, int last"


def _experts(*args):
    # The buffers are for backward alone.
    return run("moe_experts", args[0], *args[:-3], batch_invariant=is_batch_invariant())


def _experts_fake(x, up, us, uo, uf, down, ds, do, df, weights, indices, *rest):
    save = rest[5]
    kept = (indices.numel(), up.shape[1]) if save != "nothing" else (0,)
    return _contiguous_like(x), x.new_empty(kept)


def _run_backward(dy, x, *rest):
    return run("moe_experts_backward", x, dy, x, *rest, batch_invariant=is_batch_invariant())


def _experts_backward(*args):
    return _run_backward(*args, None, None, False)


def _experts_backward_into(*args):
    dx, _, _, dweights = _run_backward(*args)
    return dx, dweights


def _experts_backward_fake(dy, x, up, down, weights, *rest):
    return tuple(_contiguous_like(t) for t in (x, up, down, weights))


def _experts_backward_into_fake(dy, x, up, down, weights, *rest):
    return _contiguous_like(x), _contiguous_like(weights)


def _experts_setup(ctx, inputs, output):
    (
        x,
        up,
        _,
        _,
        up_format,
        down,
        _,
        _,
        down_format,
        weights,
        indices,
        offsets,
        order,
        inverse,
        *mlp,
    ) = inputs
    *ctx.mlp, up_buffer, down_buffer, ctx.accumulate = mlp
    ctx.formats = (up_format, down_format)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for what was kept would be as large as that
    # The buffers are written, not read: saved as they are, without a version check.
    ctx.buffers = (up_buffer, down_buffer)
    ctx.save_for_backward(x, up, down, weights, indices, offsets, order, inverse, output[1])


def _experts_autograd(ctx, dy, _):
    if ctx.formats != ("plain", "plain"):
        raise RuntimeError("moe_experts: quantized experts have no backward")
    x, up, down, weights, *places, kept = ctx.saved_tensors
    args = (inner("dy", dy, 1), x, up, down, weights, *places, kept, *ctx.mlp)
    dup = ddown = None
    if ctx.buffers[0] is None:
        dx, dup, ddown, dweights = torch.ops.tigon.moe_experts_backward(*args)
    else:
        into = torch.ops.tigon.moe_experts_backward_into
        dx, dweights = into(*args, *ctx.buffers, ctx.accumulate)
    return (dx, dup, None, None, None, ddown, None, None, None, dweights, *[None] * 12)


register(
    f"moe_experts(Tensor x, {_UP}, {_DOWN}, Tensor weights, {_PLACES}, {_MLP}, Tensor? up_buffer, Tensor? down_buffer, "
    "bool accumulate) -> (Tensor, Tensor)",
    _experts,
    _experts_fake,
    autocast=("x", "up", "down"),
)
_BACKWARD = (
    f"Tensor dy, Tensor x, Tensor up, Tensor down, Tensor weights, {_PLACES}, Tensor kept, {_MLP}"
)
register(
    f"moe_experts_backward({_BACKWARD}) -> (Tensor, Tensor, Tensor, Tensor)",
    _experts_backward,
    _experts_backward_fake,
)
register(
    f"moe_experts_backward_into({_BACKWARD}, Tensor(a!) up_buffer, Tensor(b!) down_buffer, bool accumulate) "
    "-> (Tensor, Tensor)",
    _experts_backward_into,
    _experts_backward_into_fake,
)
differentiable("moe_experts", _experts_autograd, _experts_setup)
once_differentiable("moe_experts_backward")


def moe_experts(
    x: Tensor,
    up: Tensor | QuantizedTensor,
    down: Tensor | QuantizedTensor,
    routing: Routing,
    *,
    activation: Literal["relu2", "swiglu"] = "relu2",
    weight_placement: Literal["after_down", "before_down"] = "after_down",
    save: Literal["hidden", "relu", "nothing"] = "hidden",
    expert_range: tuple[int, int] | None = None,
    grad_buffers: tuple[Tensor, Tensor] | None = None,
    accumulate: bool = False,
) -> Tensor:
    """y_t = sum over the choices j of token t of w_tj down[e] act(up[e] x_t), e = routing.indices[t,j].

    Args:
        x: (t,l) fp32, bf16 or fp16, rows strided at will.
        up: (e,m,l); for SwiGLU (e,2m,l), gate rows first. down: (e,l,m). Of x's dtype, or NVFP4Tensor or FP8Tensor
            ("tensor" or "row" scales), which are decoded where they are read and have no gradient.
        routing: of the t tokens.
        activation: "relu2", relu(h)^2, or "swiglu", silu(gate) up.
        weight_placement: where w multiplies: the expert's output (transformers), or its activation (Megatron); the
            same in exact arithmetic, rounded otherwise.
        save: what is kept for backward: h = up x (t k, m), relu(h) (ReLU^2 only), or nothing but x and the routing:
            then h is computed again. Without a gradient to come nothing is kept in any case.
        expert_range: (first, last): up and down hold these experts; choices of others contribute nothing.
        grad_buffers: fp32 (like up, like down) that take the weights' gradients; up.grad and down.grad then stay None.
            accumulate: add to them; otherwise they are overwritten.

    Returns:
        y like x, contiguous. Multiply with routing.output_scale if that is not 1.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range, by name. RuntimeError: a gradient through
            quantized experts.

    Rounding: h, act(h), each expert's output and their fp32 sum over j are rounded to x's dtype; a row's sum runs over
    j in order, so it does not depend on other tokens.
    """
    check = Check("moe_experts")
    check.tensor("x", x, "t l")
    if not isinstance(routing, Routing):
        check.fail(f"routing must be a Routing, got {type(routing).__name__}", TypeError)
    one_of(check, "activation", activation, ACTIVATIONS)
    one_of(check, "weight_placement", weight_placement, ("after_down", "before_down"))
    one_of(check, "save", save, SAVES)
    check.require(save != "relu" or activation == "relu2", "save='relu' is for activation='relu2'")
    first, last = (0, routing.experts) if expert_range is None else expert_range
    check.require(
        0 <= first <= last <= routing.experts,
        f"expert_range=({first}, {last}) must lie in 0 to {routing.experts}",
    )
    t, l = x.shape
    check.require(routing.tokens == t, f"routing is of {routing.tokens} tokens, x has {t}")
    _check_routing(check, routing)
    gates = 2 if activation == "swiglu" else 1
    up_parts, up_shape = _weights(check, "up", up, x)
    down_parts, down_shape = _weights(check, "down", down, x)
    m = down_shape[2]
    for name, shape, wanted in (
        ("up", up_shape, (last - first, gates * m, l)),
        ("down", down_shape, (last - first, l, m)),
    ):
        check.require(tuple(shape) == wanted, f"{name} has shape {tuple(shape)}, expected {wanted}")
    buffers = (None, None)
    if grad_buffers is not None:
        check.require(isinstance(up, Tensor), "grad_buffers are for weights that are not quantized")
        buffers = grad_buffers
        for name, buffer, like in zip(("up", "down"), buffers, (up_shape, down_shape), strict=True):
            dims = " ".join(map(str, like))
            check.tensor(f"grad_buffers[{name}]", buffer, dims, dtypes=(torch.float32,))
            check.require(buffer.is_contiguous(), f"grad_buffers[{name}] must be contiguous")
    given = (x, routing.weights, *(w for w in (up, down) if isinstance(w, Tensor)))
    if not (torch.is_grad_enabled() and any(v.requires_grad for v in given)):
        save = "nothing"
    args = (
        inner("x", x, 1),
        *up_parts,
        *down_parts,
        inner("weights", routing.weights, 2),
        routing.indices,
        routing.offsets,
        routing.order,
        routing.inverse,
        activation,
        weight_placement == "before_down",
        save,
        first,
        last,
        *buffers,
        accumulate,
    )
    sizes = {"t": t, "k": routing.top_k, "e": last - first, "m": m, "l": l}
    sizes |= {"itemsize": x.element_size(), "format": up_parts[3], "gates": gates}
    return call("moe_experts", x, args, sizes)[0]


def _check_routing(check: Check, routing: Routing) -> None:
    t, k, e = routing.tokens, routing.top_k, routing.experts
    check.tensor("routing.indices", routing.indices, f"{t} {k}", dtypes=(torch.int32,))
    check.tensor(
        "routing.weights", routing.weights, f"{t} {k}", dtypes=(torch.float32, torch.float64)
    )
    check.tensor("routing.offsets", routing.offsets, str(e + 1), dtypes=(torch.int32,))
    check.tensor("routing.order", routing.order, str(t * k), dtypes=(torch.int32,))
    check.tensor("routing.inverse", routing.inverse, str(t * k), dtypes=(torch.int32,))
    _check_offsets(check, routing.offsets, e, t * k)
    check.within("routing.order", routing.order, -1, t * k - 1)
    check.within("routing.inverse", routing.inverse, -1, t * k - 1)


def _weights(check: Check, name: str, w: Tensor | QuantizedTensor, x: Tensor):
    """((codes, scale, outer, format), logical shape) of expert weights."""
    if isinstance(w, Tensor):
        check.tensor(
            name,
            w,
            " ".join(map(str, w.shape)) if w.dim() == 3 else "e n k",
            dtypes=activation_dtypes(x),
        )
        return (inner(name, w, 3), None, None, "plain"), w.shape
    known = isinstance(w, NVFP4Tensor) or (
        isinstance(w, FP8Tensor) and w.granularity in ("tensor", "row")
    )
    if not known or len(w.shape) != 3:
        check.fail(
            f"{name} must be a Tensor, an NVFP4Tensor or an FP8Tensor with tensor or row scales, (e, rows, width); "
            f"got {w!r}"
            if isinstance(w, QuantizedTensor)
            else f"{name} must be a Tensor, got {type(w).__name__}",
            TypeError,
        )
    check_quantized(check, name, w)
    if isinstance(w, FP8Tensor):
        return (w.codes.contiguous(), w.scale.contiguous(), None, f"fp8-{w.granularity}"), w.shape
    check.require(w.scale_layout == "linear", f"{name} must have the linear scale layout")
    parts = (w.codes.contiguous(), w.block_scale.contiguous(), w.tensor_scale.contiguous())
    return (*parts, "nvfp4"), w.shape
