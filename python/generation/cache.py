"""What a hybrid model remembers: by layer and slot, Mamba states or keys and values; by slot, the length."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tigon.modules import Attention, KVCache, Lengths, Mamba2, MambaCache


class HybridCache:
    """Slots for `slots` sequences of at most `max_length` tokens each.

    Args:
        layers: the model's mixers in order; an entry of `self.layers` is None where a layer remembers nothing.
        dtype: of keys, values and convolution windows; the weights' if None.
        ssm_dtype: of the recurrent states.

    `lengths` (slots) int64 lives on the device; `model(ids, cache=cache)` advances it.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        slots: int,
        max_length: int,
        *,
        dtype: torch.dtype | None = None,
        ssm_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        if slots < 1 or max_length < 1:
            raise ValueError(
                f"HybridCache: slots={slots} and max_length={max_length} must be positive"
            )
        device = next(layers[0].parameters()).device if device is None else torch.device(device)
        self.slots, self.max_length = slots, max_length
        tensor = torch.zeros(slots, dtype=torch.int64, device=device)
        self._lengths = Lengths(tensor, max_length)
        self.layers = [self._allocate(layer, dtype, ssm_dtype, device) for layer in layers]

    def _allocate(self, layer, dtype, ssm_dtype, device) -> MambaCache | KVCache | None:
        if isinstance(layer, Mamba2):
            return layer.allocate_cache(self.slots, dtype, ssm_dtype, device)
        if isinstance(layer, Attention):
            return layer.allocate_cache(self.slots, self.max_length, dtype, device, self._lengths)
        return None

    @property
    def lengths(self) -> Tensor:
        """(slots) int64: tokens that each slot holds."""
        return self._lengths.tensor

    def begin(self, rows: int, length: int, slots: Tensor | None, num_tokens, cu_seqlens) -> Tensor:
        """Real tokens of each row of a coming call, (rows) int64; raises where they have no room."""
        if slots is None and rows > self.slots:
            raise ValueError(f"cache: {rows} rows for {self.slots} slots; pass slots")
        if slots is not None and tuple(slots.shape) != (rows,):
            raise ValueError(f"cache: slots has shape {tuple(slots.shape)}, expected ({rows},)")
        if num_tokens is not None and tuple(num_tokens.shape) != (rows,):
            raise ValueError(
                f"cache: num_tokens has shape {tuple(num_tokens.shape)}, expected ({rows},)"
            )
        added = self._lengths.added(rows, length, num_tokens, cu_seqlens)
        self._lengths.check_room(slots, added, length)
        return added

    def finish(self, slots: Tensor | None, added: Tensor, length: int) -> None:
        """Count the tokens of a call, after the last layer."""
        self._lengths.advance(slots, added, length)

    def _tensors(self) -> Iterator[Tensor]:
        yield self._lengths.tensor
        for layer in self.layers:
            if layer is not None:
                yield from layer.tensors()

    def reset(self, slots: Tensor | None = None) -> None:
        """Forget what `slots` (i) int64 hold; all if None."""
        if slots is None:
            self._lengths.bound = 0
        for tensor in self._tensors():
            if slots is None:
                tensor.zero_()
            else:
                tensor.index_fill_(0, slots, 0)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Slot target[i] becomes a copy of slot source[i], both (i) int64; all sources are read first."""
        for tensor in self._tensors():
            tensor.index_copy_(0, target, tensor[source])

    def fork(self, slot: int, targets: Tensor) -> None:
        """Every slot of `targets` (i) int64 becomes a copy of one slot: beams, samples of one prompt."""
        self.copy(torch.full_like(targets, slot), targets)

    def select(self, slots: Tensor) -> "HybridCache":
        """A new cache whose slot i is a copy of slot slots[i]."""
        other = object.__new__(HybridCache)
        other.slots, other.max_length = slots.numel(), self.max_length
        other._lengths = Lengths(self.lengths[slots], self.max_length, self._lengths.bound)
        other.layers = [
            MambaCache(*(t[slots] for t in layer.tensors()))
            if isinstance(layer, MambaCache)
            else KVCache(*(t[slots] for t in layer.tensors()), other._lengths)
            if isinstance(layer, KVCache)
            else None
            for layer in self.layers
        ]
        return other
