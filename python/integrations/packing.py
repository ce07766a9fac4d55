"""Packed batches as other packages write them: an id for every token in place of sequence bounds.

    ids (b,l):  0 0 0 1 1 -1 -1      ->      cu_seqlens 0 3 5 7, tokens 5 and 6 are padding

A sequence is a run of equal ids within a row; a negative id is padding. Rows are laid end to end, since Tigon's
ops take packed sequences with b = 1.
"""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """cu_seqlens (s+1) int32 over the b*l tokens. first, last (b): each row's first and last sequence that is not
    padding. real (b): whether the row has one. padding (b,l) bool or None. overflow: 0-dim bool or None, whether
    there were more sequences than the bound that the caller gave."""

    cu_seqlens: Tensor
    first: Tensor
    last: Tensor
    real: Tensor
    padding: Tensor | None = None
    overflow: Tensor | None = None

    @property
    def sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    def tokens(self, t: Tensor | None) -> Tensor | None:
        """(b,l,...) -> (1, b*l, ...)."""
        return None if t is None else t.reshape(1, -1, *t.shape[2:])

    def rows(self, y: Tensor, like: Tensor) -> Tensor:
        """(1, b*l, ...) -> (b,l,...), zero at padding; NaN everywhere where the caller's bound was too small."""
        y = y.view(like.shape)
        extra = (1,) * (y.dim() - 2)
        if self.padding is not None:
            y = y.masked_fill(self.padding.view(*self.padding.shape, *extra), 0.0)
        return y if self.overflow is None else y.masked_fill(self.overflow, float("nan"))

    def enter(self, initial: Tensor | None) -> Tensor | None:
        """Initial states of rows (b,...) -> of sequences (s,...): zero for all but each row's first."""
        if initial is None:
            return None
        out = initial.new_zeros((self.sequences, *initial.shape[1:]))
        keep = self.real.view(-1, *(1,) * (initial.dim() - 1))
        return out.index_copy(0, self.first, torch.where(keep, initial, 0.0))

    def leave(self, final: Tensor, initial: Tensor | None) -> Tensor:
        """Final states of sequences (s,...) -> of rows (b,...): each row's last; one without any keeps its own."""
        keep = self.real.view(-1, *(1,) * (final.dim() - 1))
        kept = 0.0 if initial is None else initial.to(final.dtype)
        return torch.where(keep, final[self.last], kept)


def from_bounds(cu_seqlens: Tensor) -> Packing:
    """Packing of one row whose sequences have the given bounds; no padding."""
    first = cu_seqlens.new_zeros(1, dtype=torch.int64)
    last = torch.full_like(first, cu_seqlens.shape[0] - 2)
    return Packing(cu_seqlens, first, last, torch.ones_like(first, dtype=torch.bool))


_latest: tuple[weakref.ref, int, int | None, Packing] | None = None


def from_ids(ids: Tensor, max_sequences: int | None = None) -> Packing:
    """Packing of rows of token ids (b,l) int.

    How many sequences there are is a value on the device. Without `max_sequences` the host waits for it, once:
    the layers of a model pass one tensor, so the latest answer is kept. With it (a bound on the runs of ids in the
    whole batch, padding included) nothing waits, and outputs are NaN if it is exceeded.
    """
    global _latest
    if torch.compiler.is_compiling() or ids.is_inference():
        return _from_ids(ids, max_sequences)
    version = ids._version
    if _latest is not None and _latest[0]() is ids and _latest[1:3] == (version, max_sequences):
        return _latest[3]
    packing = _from_ids(ids, max_sequences)
    _latest = (weakref.ref(ids), version, max_sequences, packing)
    return packing


def _from_ids(ids: Tensor, max_sequences: int | None) -> Packing:
    b, length = ids.shape
    start = torch.ones_like(ids, dtype=torch.bool)
    start[:, 1:] = ids[:, 1:] != ids[:, :-1]
    sequence = start.flatten().cumsum(0) - 1  # of each token
    if max_sequences is None:
        bounds = start.flatten().nonzero().flatten()
        bounds = torch.cat([bounds, bounds.new_tensor([b * length])])
        overflow = None
    else:
        bounds = sequence.new_full((max_sequences + 1,), b * length)
        place = torch.where(start.flatten(), sequence, max_sequences).clamp(max=max_sequences)
        bounds.scatter_(0, place, torch.arange(b * length, device=ids.device))
        bounds[max_sequences] = b * length
        overflow = sequence[-1] >= max_sequences
    padding = ids < 0
    token = torch.arange(length, device=ids.device)
    first = torch.where(padding, length - 1, token).amin(1)
    last = torch.where(padding, 0, token).amax(1)
    sequence = sequence.view(b, length)
    if max_sequences is not None:
        sequence = sequence.clamp(max=max_sequences - 1)
    return Packing(
        bounds.to(torch.int32),
        sequence.gather(1, first[:, None])[:, 0],
        sequence.gather(1, last[:, None])[:, 0],
        ~padding.all(1),
        padding,
        overflow,
    )
