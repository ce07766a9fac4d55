"""How tokens are chosen in a call of `generate`, by slot."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tigon.modules.state import read_slots
from tigon.ops import sample, verify_draft, verify_tree
from tigon.reference.sampling import Purpose, Settings, noise

RULES = ("token", "block", "strict", "greedy")


@dataclass
class Sampling:
    """temperature, top_k, top_p: one number for all rows, or (slots) tensors. seeds: (slots) int64. rule: of
    `verify_draft`; drafts are drawn so that it is lossless."""

    rule: str
    seeds: Tensor
    temperature: float | Tensor = 1.0
    top_k: int | Tensor = 0
    top_p: float | Tensor = 1.0

    @property
    def greedy(self) -> bool:
        """Whether every draw is an argmax."""
        hot = isinstance(self.temperature, Tensor) or self.temperature > 0
        return self.rule == "greedy" or not hot

    @property
    def rejects(self) -> bool:
        """Whether drafts are held against the distribution that they were drawn from."""
        return self.rule in ("token", "block") and not self.greedy

    def _of(self, slots: Tensor) -> dict:
        rows = slots.shape[0]

        def pick(value):
            return read_slots(value, slots, rows) if isinstance(value, Tensor) else value

        return {
            "temperature": pick(self.temperature),
            "top_k": pick(self.top_k),
            "top_p": pick(self.top_p),
            "seeds": read_slots(self.seeds, slots, rows),
        }

    def draft(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """A guess a row: logits (b,V), positions (b) -> (b)."""
        if self.greedy:
            return logits.argmax(-1)
        return sample(logits, positions=positions, purpose="draft", **self._of(slots))

    def verify(
        self, logits: Tensor, slots: Tensor, positions: Tensor, drafts: Tensor, draft_logits
    ) -> tuple[Tensor, Tensor]:
        """logits (b,K+1,V), drafts (b,K) -> tokens (b,K+1) padded with -1, num_accepted (b)."""
        return verify_draft(
            logits,
            drafts.to(torch.int32),
            draft_logits,
            rule=self.rule,
            positions=positions,
            **self._of(slots),
        )

    def verify_tree(self, logits, slots, positions, tokens, tree) -> tuple[Tensor, Tensor, Tensor]:
        """logits (b,N,V), tokens (b,N) -> path, tokens, num_accepted."""
        rows = slots.shape[0]
        links = (t.expand(rows, -1) for t in tree.links)
        rule = "greedy" if self.greedy else "strict"
        return verify_tree(
            logits,
            tokens.to(torch.int32),
            *links,
            rule=rule,
            max_depth=tree.depth,
            positions=positions,
            **self._of(slots),
        )

    def scores(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """(r,V) numbers whose largest is `draft`'s choice: logits, with the Gumbel noise of their position."""
        if self.greedy:
            return logits
        of = self._of(slots)
        settings = Settings(*(v for n in ("temperature", "top_k", "top_p") for v in _pair(of[n])))
        x = settings.scaled(logits[:, None])[:, 0]
        g = noise(of["seeds"], positions, Purpose.DRAFT, logits.shape[-1], x.dtype)
        if settings.maybe_greedy:
            g = g.masked_fill(settings.greedy(x.shape[0], x.device)[:, None], 0)
        return x + g


def _pair(value: float | Tensor) -> tuple[Tensor | None, float | Tensor]:
    return (value, value) if isinstance(value, Tensor) else (None, value)
