"""One decode step: draft, let the model verify, keep what is right. Nothing in it waits for the device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tigon.generation.cache import HybridCache
from tigon.generation.drafter import Drafter
from tigon.generation.report import Clock
from tigon.generation.sampling import Sampling
from tigon.generation.tree import DraftTree
from tigon.modules import Reducible, TokenReducer
from tigon.ops.replay import MAX_FLUSH

MOST_STEPPED = MAX_FLUSH  # tokens of a row that any cache takes by the decode ops


@dataclass
class Step:
    """tokens (b,m) int64, the new tokens of each row, padded with -1; accepted (b): drafts among them, -1 where the
    logits were NaN; logprobs (b,m) fp32 of the model's own distribution at temperature 1, or None."""

    tokens: Tensor
    accepted: Tensor
    logprobs: Tensor | None = None


class Decoder:
    """The model, its cache, and a drafter or None.

    longest: tokens of the fullest slot, as the host knows them. settled: whether the last step took the time that such
    a step takes (a graph's first two do not).
    """

    def __init__(
        self,
        model,
        cache: HybridCache,
        sampling: Sampling,
        drafter: Drafter | None,
        *,
        tree: DraftTree | None = None,
        logprobs: bool = False,
        clock: Clock | None = None,
    ):
        self.model, self.cache, self.sampling, self.drafter = model, cache, sampling, drafter
        self.tree, self.logprobs = tree, logprobs
        self.clock = clock or Clock(None)
        self.longest = 0
        self.settled = True

    def bound_lengths(self, longest: int) -> None:
        """Tell what the host knows: no slot holds more than `longest` tokens. Attention then reads fewer keys."""
        self.cache.bound_lengths(longest)
        if self.drafter is not None:
            self.drafter.cache.bound_lengths(longest)

    def prefill(
        self,
        slots: Tensor,
        ids: Tensor,
        num_tokens: Tensor,
        reduction: TokenReducer | None = None,
        reducible: Reducible | None = None,
    ) -> Step:
        """Read prompts ids (b,l), padded on the right, into empty slots, and choose the first new token of each."""
        model, rows, positions = self.model, ids.shape[0], num_tokens
        with self.clock.part("prefill"):
            if reduction is None:
                # Wide enough for the scan: a prompt's bits must not depend on which others are read with it.
                ids = torch.nn.functional.pad(ids, (0, max(0, MOST_STEPPED + 1 - ids.shape[1])))
                hidden = model.backbone(ids, cache=self.cache, slots=slots, num_tokens=num_tokens)
            else:
                hidden, ids, num_tokens = self._reduced(slots, ids, reduction, reducible)
            row = torch.arange(rows, device=ids.device)
            logits = model.lm_head(hidden[row, num_tokens - 1])[:, None]
            drafts = ids.new_empty(rows, 0)
            tokens, accepted = self.sampling.verify(logits, slots, positions, drafts, None)
            if self.drafter is not None:
                following = ids.roll(-1, 1)
                following[row, num_tokens - 1] = tokens[:, 0].to(ids.dtype).clamp(min=0)
                self.drafter.read(slots, hidden, following, num_tokens)
        return self._result(logits, tokens, accepted)

    def _reduced(
        self, slots: Tensor, ids: Tensor, reduction: TokenReducer, reducible: Reducible
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states and ids of the tokens that the last layer kept, padded on the right, and how many they are."""
        hidden, kept = self.model.backbone(
            *(ids, None, self.cache),
            slots=slots,
            reduction=reduction,
            reducible=reducible,
            return_plan=True,
        )
        counts, starts = kept.counts[-1], kept.bounds()[:-1]
        place = [[s + min(i, n - 1) for i in range(max(counts))] for s, n in zip(starts, counts)]
        place = torch.tensor(place).to(ids.device, non_blocking=True)
        num_tokens = torch.tensor(counts).to(ids.device, non_blocking=True)
        origin = kept.index[-1][place]
        return hidden[0][place], ids.flatten()[origin], num_tokens

    def step(self, slots: Tensor, last: Tensor, drafts: int) -> Step:
        """From the last token (b) of each row, which the model has not read: at most drafts + 1 new ones."""
        positions = self.cache.lengths[slots.clamp(min=0)] + 1
        if self.tree is not None and drafts:
            return self._tree_step(slots, last, positions)
        guessed, guess_logits = last.new_empty(last.shape[0], 0), None
        if drafts:
            with self.clock.part("draft"):
                guessed, guess_logits = self.drafter.draft(
                    *(slots, drafts, positions),
                    lambda t, at: self.sampling.draft(t, slots, at),
                    keep_logits=self.sampling.rejects,
                )
        ids = torch.cat([last[:, None], guessed], 1)
        hidden, logits = self._pass(slots, ids)
        with self.clock.part("accept"):
            tokens, accepted = self.sampling.verify(logits, slots, positions, guessed, guess_logits)
        with self.clock.part("commit"):
            new = (accepted + 1).to(torch.int64)
            if self.cache.rollback is not None:
                self.cache.commit(slots, new)
            if self.drafter is not None:
                self.drafter.receive(slots, hidden, tokens.to(ids.dtype).clamp(min=0), new)
        return self._result(logits, tokens, accepted)

    def _pass(self, slots: Tensor, ids: Tensor, **tree) -> tuple[Tensor, Tensor]:
        undoable = {"commit": False} if self.cache.rollback is not None else {}
        with self.clock.part("model"):
            hidden = self.model.backbone(ids, cache=self.cache, slots=slots, **undoable, **tree)
            return hidden, self.model.lm_head(hidden)

    def _tree_step(self, slots: Tensor, last: Tensor, positions: Tensor) -> Step:
        tree, rows = self.tree, last.shape[0]
        with self.clock.part("draft"):
            guessed = self.drafter.draft_tree(slots, tree, positions, self._scores(slots))
        ids = torch.cat([last[:, None], guessed], 1)
        bits = tree.bits.expand(rows, -1)
        hidden, logits = self._pass(slots, ids, ancestors=bits)
        with self.clock.part("accept"):
            found = self.sampling.verify_tree(logits, slots, positions, ids, tree)
            path, tokens, accepted = found
        with self.clock.part("commit"):
            new = (accepted + 1).to(torch.int64)
            self.cache.commit(slots, new, path)
            kept = torch.cat([torch.zeros_like(path[:, :1]), path.clamp(min=0)], 1).to(torch.int64)
            row = torch.arange(rows, device=kept.device)[:, None]
            following = tokens.to(ids.dtype).clamp(min=0)
            self.drafter.receive(slots, hidden[row, kept], following, new)
        return self._result(logits[row, kept], tokens, accepted)

    def _scores(self, slots: Tensor):
        def scores(logits: Tensor, positions: Tensor) -> Tensor:
            each = logits.shape[0] // slots.shape[0]
            return self.sampling.scores(logits, slots.repeat_interleave(each), positions)

        return scores

    def _result(self, logits: Tensor, tokens: Tensor, accepted: Tensor) -> Step:
        tokens, found = tokens.to(torch.int64), None
        if self.logprobs:
            wide = logits.to(torch.float32)
            chosen = wide.gather(-1, tokens.clamp(min=0)[..., None])[..., 0]
            found = chosen - wide.logsumexp(-1)
        return Step(tokens, accepted, found)
