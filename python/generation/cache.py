"""What a hybrid model remembers: by layer and slot, Mamba states or keys and values; by slot, the length."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tigon.modules import Attention, KVCache, Lengths, Mamba2
from tigon.modules.mamba_cache import MambaCache, ReplayMambaCache, SnapshotCache
from tigon.ops.replay import ReplayCursor, replay_advance

FLUSH = 16  # tokens between two writes of a state
Reduced = dict[int, tuple[Tensor, int]]


class HybridCache:
    """Slots for `slots` sequences of at most `max_length` tokens each.

    Args:
        layers: the model's mixers in order; an entry of `self.layers` is None where a layer remembers nothing.
        dtype: of keys, values and convolution windows; the weights' if None.
        ssm_dtype: of the recurrent states: fp32, bf16, fp16, int8, e4m3 (fp64 on the CPU).
        rounding: of states to ssm_dtype, "nearest" or "stochastic"; `seeds` (slots) int64 name the random bits.
        rollback: how tokens of a call with commit=False are undone: None (no such calls), "replay" (Mamba layers keep
            their inputs and rewrite a state once in `flush` tokens), "snapshot" (a state a token).
        tokens: of a row in one such call, at most. flush: at least `tokens`; 16 if None, 32 for more tokens.
        attention_lengths: room of each attention layer in tokens, where a reduced prefill (`TokenReducer`) leaves them
            fewer than the sequence has; max_length if None.

    `lengths` (slots) int64 lives on the device; `model(ids, cache=cache)` advances it. With a rollback
    `model(ids, cache=cache, commit=False)` does not, and `commit` then says how many of the tokens stay. It counts the
    tokens of the sequences; after a reduced prefill an attention layer holds fewer, and counts its own.
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
        rounding: str = "nearest",
        rollback: str | None = None,
        tokens: int = 1,
        flush: int | None = None,
        attention_lengths: Sequence[int] | None = None,
    ):
        if rollback not in (None, "replay", "snapshot"):
            raise ValueError(f"rollback must be 'replay', 'snapshot' or None, got {rollback!r}")
        if slots < 1 or max_length < 1:
            raise ValueError(
                f"HybridCache: slots={slots} and max_length={max_length} must be positive"
            )
        device = next(layers[0].parameters()).device if device is None else torch.device(device)
        self.slots, self.max_length = slots, max_length
        self.rollback, self.tokens = rollback, tokens
        self._lengths = Lengths(torch.zeros(slots, dtype=torch.int64, device=device), max_length)
        self.seeds = torch.zeros(slots, dtype=torch.int64, device=device)
        self.cursor = None
        if rollback == "replay":
            if flush is None:
                flush = FLUSH if tokens <= FLUSH else 2 * FLUSH
            self.cursor = ReplayCursor.allocate(slots, flush, device)
            self.cursor.length = self._lengths.tensor
        options = {
            "rounding": rounding,
            "seeds": self.seeds,
            "rollback": rollback,
            "tokens": tokens,
            "cursor": self.cursor,
        }
        rooms = self._rooms(layers, attention_lengths)
        self.layers = [
            self._allocate(layer, room, dtype, ssm_dtype, device, options)
            for layer, room in zip(layers, rooms, strict=True)
        ]
        if attention_lengths is not None:
            self.separate()
        self._stepped, self._fed = False, 0

    def _rooms(self, layers: list[nn.Module], lengths: Sequence[int] | None) -> list[int]:
        """Tokens by layer that it has room for; only attention layers ask."""
        attention = [i for i, layer in enumerate(layers) if isinstance(layer, Attention)]
        rooms = [self.max_length] * len(layers)
        if lengths is None:
            return rooms
        if len(lengths) != len(attention) or any(n < 1 for n in lengths):
            raise ValueError(
                f"HybridCache: attention_lengths={tuple(lengths)} must be a positive number for each of the "
                f"{len(attention)} attention layers"
            )
        for i, room in zip(attention, lengths):
            rooms[i] = min(int(room), self.max_length)
        return rooms

    def _allocate(
        self, layer, room, dtype, ssm_dtype, device, options
    ) -> MambaCache | KVCache | None:
        if isinstance(layer, Mamba2):
            return layer.allocate_cache(
                self.slots, dtype, ssm_dtype, device, lengths=self._lengths, **options
            )
        if isinstance(layer, Attention):
            return layer.allocate_cache(self.slots, room, dtype, device, self._lengths)
        return None

    def separate(self) -> None:
        """From here on every attention layer counts its own tokens; done by the first reduced call."""
        for i, layer in enumerate(self.layers):
            if isinstance(layer, KVCache) and layer.lengths is self._lengths:
                lengths = replace(
                    self._lengths, tensor=self.lengths.clone(), capacity=layer.keys.shape[1] - 1
                )
                self.layers[i] = replace(layer, lengths=lengths)

    def _own(self) -> dict[int, Lengths]:
        """By layer, the lengths of those that count for themselves."""
        return {
            i: layer.lengths
            for i, layer in enumerate(self.layers)
            if isinstance(layer, KVCache) and layer.lengths is not self._lengths
        }

    @property
    def lengths(self) -> Tensor:
        """(slots) int64: tokens that each slot holds."""
        return self._lengths.tensor

    def begin(
        self,
        rows: int,
        length: int,
        slots: Tensor | None,
        num_tokens: Tensor | None,
        cu_seqlens: Tensor | None,
        commit: bool = True,
        reduced: Reduced | None = None,
    ) -> Tensor:
        """Real tokens of each row of a coming call, (rows) int64; raises where they have no room.

        reduced: by layer, (rows) int64 tokens that get there and how many a row has at most; a call that drops tokens.
        """
        if slots is None and rows > self.slots:
            raise ValueError(f"cache: {rows} rows for {self.slots} slots; pass slots")
        if slots is not None and tuple(slots.shape) != (rows,):
            raise ValueError(f"cache: slots has shape {tuple(slots.shape)}, expected ({rows},)")
        if num_tokens is not None and tuple(num_tokens.shape) != (rows,):
            raise ValueError(
                f"cache: num_tokens has shape {tuple(num_tokens.shape)}, expected ({rows},)"
            )
        self._stepped = self.rollback is not None and cu_seqlens is None and length <= self.tokens
        self._fed = length
        if not commit:
            self._check_undoable(length)
        if self._stepped and torch.is_grad_enabled():
            raise RuntimeError("cache: with a rollback, call the model under torch.no_grad()")
        added = self._lengths.added(rows, length, num_tokens, cu_seqlens)
        self._lengths.check_room(slots, added, length)
        if reduced is not None:
            self.separate()
        for i, lengths in self._own().items():
            lengths.check_room(slots, *(reduced[i] if reduced else (added, length)))
        return added

    def _check_undoable(self, length: int) -> None:
        if not any(isinstance(layer, MambaCache) for layer in self.layers):
            return  # keys and values are undone by not counting them
        if self.rollback is None:
            raise ValueError("cache: commit=False needs a cache with rollback='replay'|'snapshot'")
        if not self._stepped:
            raise ValueError(
                f"cache: a call that may be undone holds at most {self.tokens} tokens a row, dense; got {length}"
            )

    def finish(
        self, slots: Tensor | None, added: Tensor, length: int, reduced: Reduced | None = None
    ) -> None:
        """Count the tokens of a call, after the last layer."""
        if self._stepped:
            return self.commit(slots, added)
        self._lengths.advance(slots, added, length)
        for i, lengths in self._own().items():
            lengths.advance(slots, *(reduced[i] if reduced else (added, length)))
        if self.cursor is not None:
            rows = added.shape[0]
            if slots is None:
                slots = torch.arange(rows, device=added.device)
            self.cursor.start(slots, self.lengths[slots.clamp(min=0)])

    def commit(self, slots: Tensor | None, num_new: Tensor, path: Tensor | None = None) -> None:
        """Keep num_new (b) int64 tokens of a call with commit=False and forget the others.

        path: (b,j) int32, of a tree: the node that becomes token i + 1 (`verify_tree` gives it); token 0 is node 0.
        No row keeps more tokens than the call had.
        """
        num_new = num_new.clamp(max=self._fed)
        for layer in self.layers:
            if isinstance(layer, SnapshotCache):
                layer.keep(slots, num_new)
            elif path is not None and isinstance(layer, ReplayMambaCache | KVCache):
                layer.keep_path(slots, path, num_new)
        for lengths in self._own().values():
            lengths.advance(slots, num_new, self._fed)
        if self.cursor is None:
            return self._lengths.advance(slots, num_new, self._fed)
        if slots is None:
            slots = torch.arange(num_new.shape[0], device=num_new.device)
        replay_advance(self.cursor, slots, num_new)
        self._lengths.bound = min(self.max_length, self._lengths.bound + self._fed)

    def _all_lengths(self) -> tuple[Lengths, ...]:
        return (self._lengths, *self._own().values())

    def bound_lengths(self, longest: int) -> None:
        """Tell what the host knows: no slot holds more than `longest` tokens. Attention then reads fewer keys."""
        for lengths in self._all_lengths():
            lengths.bound = min(longest, lengths.capacity)

    def _tensors(self) -> Iterator[Tensor]:
        yield self._lengths.tensor
        yield self.seeds
        if self.cursor is not None:
            yield self.cursor.checkpoint
        for lengths in self._own().values():
            yield lengths.tensor
        for layer in self.layers:
            if layer is not None:
                yield from layer.tensors()

    def nbytes(self, kind: type | tuple[type, ...] = (MambaCache, KVCache)) -> int:
        """Bytes of the layers' caches of a kind, all slots together."""
        held = (t for layer in self.layers if isinstance(layer, kind) for t in layer.tensors())
        return sum(t.nbytes for t in held)

    def reset(self, slots: Tensor | None = None) -> None:
        """Forget what `slots` (i) int64 hold; all if None."""
        if slots is None:
            self.bound_lengths(0)
        for tensor in self._tensors():
            if slots is None:
                tensor.zero_()
            else:
                tensor.index_fill_(0, slots, 0)

    def copy(self, source: Tensor, target: Tensor, other: "HybridCache | None" = None) -> None:
        """Slot target[i] becomes a copy of slot source[i], both (i) int64; all sources are read first.

        other: the cache of the sources, made alike (`select` makes one); this one if None.
        """
        other = self if other is None else other
        mine, theirs = list(self._tensors()), list(other._tensors())
        alike = [a.shape[1:] == b.shape[1:] and a.dtype == b.dtype for a, b in zip(mine, theirs)]
        if len(mine) != len(theirs) or not all(alike):
            raise ValueError("cache: copy is between caches that were allocated alike")
        for a, b in zip(mine, theirs):
            a.index_copy_(0, target, b[source])
        pairs = zip(self._all_lengths(), other._all_lengths())
        for lengths, there in pairs:
            lengths.bound = max(lengths.bound, there.bound)

    def fork(self, slot: int, targets: Tensor) -> None:
        """Every slot of `targets` (i) int64 becomes a copy of one slot: beams, samples of one prompt."""
        self.copy(torch.full_like(targets, slot), targets)

    def select(self, slots: Tensor) -> "HybridCache":
        """A new cache whose slot i is a copy of slot slots[i]: a preempted sequence that is to come back (`copy`)."""
        other = object.__new__(HybridCache)
        other.__dict__.update(self.__dict__)
        other.slots = slots.numel()
        other._lengths = Lengths(self.lengths[slots], self.max_length, self._lengths.bound)
        other.seeds = self.seeds[slots]
        if self.cursor is not None:
            other.cursor = ReplayCursor(
                self.cursor.checkpoint[slots], other._lengths.tensor, self.cursor.flush
            )
        shared = {"lengths": other._lengths, "seeds": other.seeds}
        other.layers = []
        for layer in self.layers:
            if isinstance(layer, ReplayMambaCache):
                layer = layer.selected(slots, cursor=other.cursor, **shared)
            elif isinstance(layer, MambaCache):
                layer = layer.selected(slots, **shared)
            elif isinstance(layer, KVCache):
                keys, values = (t[slots] for t in layer.tensors())
                lengths = layer.lengths
                if lengths is self._lengths:
                    lengths = other._lengths
                else:
                    lengths = replace(lengths, tensor=lengths.tensor[slots])
                layer = replace(layer, keys=keys, values=values, lengths=lengths)
            other.layers.append(layer)
        return other
