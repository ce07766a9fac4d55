"""Which tokens of a prompt may be dropped, with the counts that the host needs to know.

A reduced call runs on shapes that the host knows: it must know how many tokens of a sequence are text and how many are
reducible ("visual"). `Reducible.of` reads a mask once; whoever prepares it beforehand makes the call itself wait for
nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tigon.modules.token_reducer import KeptTokens


@dataclass(frozen=True)
class Reducible:
    """Of s sequences whose tokens lie at `spans` of the flattened input.

    mask, alive (t) bool on the device: reducible, and there at all (None: all are). spans: (start, end) by sequence.
    text, visual: tokens of each sequence in layer 0. queries: tokens of each that ask. asks (t) bool: which, where they
    were given; None: the last `queries` ones, behind all reducible tokens. packed: whether layers are to see packed
    sequences even where all are equally long. asked_by: an earlier call's `KeptTokens`, whose queries ask here again.
    """

    mask: Tensor
    spans: tuple[tuple[int, int], ...]
    text: tuple[int, ...]
    visual: tuple[int, ...]
    queries: tuple[int, ...]
    alive: Tensor | None = None
    asks: Tensor | None = None
    packed: bool = False
    asked_by: "KeptTokens | None" = None

    @classmethod
    def of(
        cls,
        mask: Tensor,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        num_tokens: Tensor | Sequence[int] | None = None,
        *,
        keep: Tensor | None = None,
        queries: Tensor | None = None,
        asked_by: "KeptTokens | None" = None,
    ) -> "Reducible":
        """Read a mask once.

        Args:
            mask: (b,l) bool, True where a token may be dropped; packed sequences: (1,l) with cu_seqlens.
            cu_seqlens: (s+1) bounds of packed sequences. num_tokens: (b), real tokens of rows padded on the right.
            keep: (b,l) bool, what a query-free reducer leaves of the reducible tokens (`video_redundancy_mask`,
                `frame_difference_mask`): the others are gone before layer 0. Not looked at for text.
            queries: (b,l) bool, text tokens that ask, wherever they stand; None: those behind the last reducible token.
            asked_by: what an earlier call with `queries` returned (`KeptTokens`): those ask of this call's tokens too,
                for prompts that are read in chunks. As many sequences, in the same order.

        Raises:
            ValueError: masks that do not fit, and a sequence with reducible tokens and nobody to ask, by name.
        """
        _require(
            mask.dtype == torch.bool and mask.dim() == 2, f"must be a (b, l) bool, got {_say(mask)}"
        )
        for name, other in (("keep", keep), ("queries", queries)):
            fits = other is None or (other.shape == mask.shape and other.dtype == torch.bool)
            _require(fits, f"{name} must be a bool {tuple(mask.shape)}, got {_say(other)}")
        b, l = mask.shape
        _require(cu_seqlens is None or b == 1, f"has {b} rows; cu_seqlens needs (1, l)")
        _require(cu_seqlens is None or num_tokens is None, "num_tokens is for dense batches")
        if cu_seqlens is not None:
            spans = tuple(pairwise(_ints(cu_seqlens)))
        else:
            lengths = [l] * b if num_tokens is None else _ints(num_tokens)
            _require(len(lengths) == b, f"has {b} rows, num_tokens has {len(lengths)}")
            spans = tuple((i * l, i * l + n) for i, n in enumerate(lengths))
        if asked_by is not None:
            _require(queries is None, "queries and asked_by exclude each other")
            fits = len(asked_by.asking) == len(spans) and bool(asked_by.queries)
            _require(fits, f"asked_by must be of a call with queries for {len(spans)} sequences")
        host = mask.flatten().cpu()
        left = host if keep is None else host & keep.flatten().cpu()
        asked = None if queries is None else (queries & ~mask).flatten().cpu()
        text, visual, asking = [], [], []
        for r, (start, end) in enumerate(spans):
            here = host[start:end]
            among = int(here.sum())
            text.append(end - start - among)
            visual.append(int(left[start:end].sum()))
            if asked_by is not None:
                asking.append(asked_by.asking[r])
            elif asked is not None:
                asking.append(int(asked[start:end].sum()))
            else:
                asking.append(int(here.flip(0).to(torch.uint8).argmax()) if among else 0)
            _require(
                not visual[-1] or asking[-1] > 0,
                f"sequence {r} has no text behind its reducible tokens to score them; pass queries",
            )
        alive = None
        if keep is not None or sum(end - start for start, end in spans) < b * l:
            alive = torch.zeros(b * l, dtype=torch.bool)
            for start, end in spans:
                alive[start:end] = (left | ~host)[start:end]
            alive = alive.to(mask.device, non_blocking=True)
        asks = None if queries is None else (queries & ~mask).flatten()
        counts = (tuple(text), tuple(visual), tuple(asking))
        packed = cu_seqlens is not None
        return cls(mask.flatten(), spans, *counts, alive, asks, packed, asked_by)

    def to(self, device: torch.device | str) -> "Reducible":
        """The same on a device."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name in ("mask", "alive", "asks")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    @property
    def by_proxy(self) -> bool:
        """Whether tokens ask that do not stand behind what they score."""
        return self.asks is not None or self.asked_by is not None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence, dropped ones too."""
        return tuple(end - start for start, end in self.spans)


def bounds_of(counts: Sequence[int]) -> tuple[int, ...]:
    """(s+1) bounds of sequences of these lengths."""
    return tuple(accumulate(counts, initial=0))


def places(mask: Tensor, count: int) -> Tensor:
    """(count) int64: where a mask (t) bool with `count` True is True; waits for nothing."""
    target = torch.where(mask, mask.cumsum(0) - 1, count).clamp(max=count)
    found = torch.zeros(count + 1, dtype=torch.int64, device=mask.device)
    found.scatter_(0, target, torch.arange(mask.shape[0], device=mask.device))
    return found[:count]


def _ints(values: Tensor | Sequence[int]) -> list[int]:
    return values.tolist() if isinstance(values, Tensor) else [int(v) for v in values]


def _say(t: Tensor) -> str:
    return f"{tuple(t.shape)} {t.dtype}" if isinstance(t, Tensor) else type(t).__name__


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(f"reducible: {message}")
