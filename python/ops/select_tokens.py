"""Which tokens stay, and the move of everything that belongs to them.

    selection = select_tokens(scores, keep, cu_seqlens=cu_seqlens, protected=is_text, capacity=…)
    hidden, residual, positions = compact_tokens((hidden, residual, positions), selection)

How many stay is known to the device alone; the host knows a capacity. So nothing waits, and a CUDA graph can hold it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tigon.ops.checks import INDEX, Check, readable
from tigon.ops.dispatch import call, inner, run
from tigon.ops.library import differentiable, once_differentiable, register
from tigon.ops.token_scores import check_bounds


@dataclass(frozen=True)
class Selection:
    """Tokens that stay. index (capacity) int32: their rows, ascending, -1 past the last. cu_kept (s+1) int32: bounds of
    each sequence's share of it. inverse (t) int32: a token's place in index, -1 for one that is dropped."""

    index: Tensor
    cu_kept: Tensor
    inverse: Tensor

    TENSORS = ("index", "cu_kept", "inverse")


def _select_fake(scores, keep, cu_seqlens, protected, multiple, capacity):
    sizes = (capacity, keep.shape[0] + 1, scores.shape[0])
    return tuple(scores.new_empty(n, dtype=torch.int32) for n in sizes)


register(
    "select_tokens(Tensor scores, Tensor keep, Tensor cu_seqlens, Tensor? protected, int multiple, int capacity) "
    "-> (Tensor, Tensor, Tensor)",
    lambda scores, *rest: run("select_tokens", scores, scores, *rest),
    _select_fake,
)


def select_tokens(
    scores: Tensor,
    keep: Tensor,
    *,
    cu_seqlens: Tensor,
    protected: Tensor | None = None,
    multiple: int = 1,
    capacity: int,
) -> Selection:
    """The best tokens of each sequence, in their order.

    A sequence of length l keeps min(l, max(keep, p) rounded up to `multiple`) tokens, p of which are protected; then
    the highest scores, equal ones by lower index. NaN counts as -inf, -0 as 0. A sequence's choice does not depend on
    the others.

    Args:
        scores: (t) fp32 (fp64 on the reference). keep: (s) int32 or int64, protected tokens included; below 0 is 0.
        cu_seqlens: (s+1) int32 or int64 bounds of the sequences; tokens past the last one are padding and dropped.
        protected: (t) bool, tokens that stay whatever their score: text, the first frame.
        multiple: for the sake of tiles and graph buckets. A sequence that is shorter stays whole.
        capacity: length of the index, at least what all sequences keep. Where the values are free to look at (see
            TIGON_CHECK), less is refused; elsewhere the last sequences lose their last tokens, and cu_kept says so.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range, by name.
    """
    check = Check("select_tokens")
    check.tensor("scores", scores, "t", dtypes=(torch.float32, torch.float64))
    check.tensor("keep", keep, "s", dtypes=INDEX)
    t, s = scores.shape[0], keep.shape[0]
    check.size("s", 2**31 - 2)
    check.require(cu_seqlens is not None, "cu_seqlens must be given")
    check_bounds(check, "cu_seqlens", cu_seqlens, t, "t")
    bounds = cu_seqlens.shape[0]
    check.require(bounds == s + 1, f"cu_seqlens has {bounds} bounds, keep's s={s} needs {s + 1}")
    check.tensor("protected", protected, "t", dtypes=(torch.bool,), optional=True)
    check.require(multiple >= 1, f"multiple={multiple} must be 1 or more")
    check.require(multiple <= 2**20, f"multiple={multiple} must be {2**20} or less")
    check.require(0 <= capacity < 2**31, f"capacity={capacity} must lie in 0 to 2^31 - 1")
    if all(readable(v) for v in (keep, cu_seqlens, protected) if v is not None):
        from tigon.reference.select_tokens import kept_counts

        needed = int(kept_counts(t, keep, cu_seqlens, protected, multiple).sum())
        check.require(capacity >= needed, f"capacity={capacity} is too small: {needed} tokens stay")
    args = (
        inner("scores", scores, 1).detach(),
        keep.contiguous(),
        cu_seqlens.contiguous(),
        None if protected is None else inner("protected", protected, 1),
        multiple,
        capacity,
    )
    sizes = {"t": t, "s": s, "capacity": capacity, "itemsize": scores.element_size()}
    return Selection(*call("select_tokens", scores, args, sizes))


def _moved_fake(tensors, index, inverse, fills):
    return [t.new_empty((index.shape[0], *t.shape[1:])) for t in tensors]


def _moved_backward_fake(grads, index, inverse):
    return [g.new_empty((inverse.shape[0], *g.shape[1:])) for g in grads]


def _compact(tensors, index, inverse, fills):
    return run("compact_tokens", index, tensors, index, fills)


def _compact_backward(grads, index, inverse):
    """A scatter by the index is a gather by the inverse map: every row is written once, dropped ones with zeros."""
    return run("compact_tokens", inverse, grads, inverse, [0.0] * len(grads))


def _setup(ctx, inputs, output):
    _, index, inverse, _ = inputs
    ctx.save_for_backward(index, inverse)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grads):
    index, inverse = ctx.saved_tensors
    given = [i for i, g in enumerate(grads) if g is not None]
    slopes = [None] * len(grads)
    if given:
        rows = [_rows_contiguous(grads[i]) for i in given]
        found = torch.ops.tigon.compact_tokens_backward(rows, index, inverse)
        for i, slope in zip(given, found, strict=True):
            slopes[i] = slope
    return slopes, None, None, None


register(
    "compact_tokens(Tensor[] tensors, Tensor index, Tensor inverse, float[] fills) -> Tensor[]",
    _compact,
    _moved_fake,
)
register(
    "compact_tokens_backward(Tensor[] grads, Tensor index, Tensor inverse) -> Tensor[]",
    _compact_backward,
    _moved_backward_fake,
)
differentiable("compact_tokens", _autograd, _setup)
once_differentiable("compact_tokens_backward")


def _rows_contiguous(t: Tensor, name: str = "grad") -> Tensor:
    """Contiguous within a row; an expanded gradient becomes a copy."""
    return inner(name, t, t.dim() - 1) if t.dim() > 1 else t


def compact_tokens(
    tensors: Sequence[Tensor],
    selection: Selection,
    *,
    slot_map: Tensor | None = None,
    fill: float = 0,
) -> tuple[Tensor, ...]:
    """Row index[i] of each tensor, in one launch for up to eight of them.

    Args:
        tensors: each (t,…) of any dtype of up to 8 bytes, a row contiguous, rows strided at will.
        selection: of `select_tokens`, over the same t tokens.
        slot_map: (t) int32 or int64, one more tensor: cache slots, padded with -1 (no slot) instead of `fill`.
        fill: what the rows past the last kept one hold.

    Returns:
        As many tensors, each (capacity,…); the slot map last. Differentiable: gradients of dropped tokens are zeros.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device, by name.
    """
    check = Check("compact_tokens")
    if not isinstance(selection, Selection):
        kind = type(selection).__name__
        check.fail(f"selection must be a Selection of select_tokens, got {kind}", TypeError)
    check.tensor("selection.inverse", selection.inverse, "t", dtypes=(torch.int32,))
    check.tensor("selection.index", selection.index, "capacity", dtypes=(torch.int32,))
    given = [*tensors] if slot_map is None else [*tensors, slot_map]
    names = [f"tensors[{i}]" for i in range(len(tensors))]
    check.require(bool(given), "tensors is empty")
    for name, t in zip(names, tensors):
        if not isinstance(t, Tensor):
            check.fail(f"{name} must be a Tensor, got {type(t).__name__}", TypeError)
        dims = " ".join(["t", *(f"{name}.{i}" for i in range(1, t.dim()))])
        check.require(t.dim() > 0, f"{name} has no rows")
        check.tensor(name, t, dims, dtypes=(t.dtype,))
        check.require(t.element_size() <= 8, f"{name} has elements of over 8 bytes")
    check.tensor("slot_map", slot_map, "t", dtypes=INDEX, optional=True)
    fills = [float(fill)] * len(tensors) + ([] if slot_map is None else [-1.0])
    rows = [_rows_contiguous(t, n) for t, n in zip(given, [*names, "slot_map"])]
    args = (rows, selection.index, selection.inverse, fills)
    sizes = {"t": selection.inverse.shape[0], "capacity": selection.index.shape[0]}
    sizes |= {"bytes": max(t[:1].numel() * t.element_size() for t in given), "tensors": len(given)}
    return tuple(call("compact_tokens", selection.index, args, sizes))
