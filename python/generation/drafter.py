"""Drafts by multi-token prediction: the drafter's own cache, and what it has yet to read.

The drafter's position i takes the model's hidden state after token i and the embedding of token i+1, and guesses token
i+2. After each verification the hidden states of the tokens that stay, and those tokens, go to an inbox by slot; before
it drafts again the drafter reads its inbox in one call, and so its keys and values of accepted tokens come from
the model's hidden states, never from its own guesses. Guesses beyond are written behind what its cache counts, and
forgotten.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tigon.generation.tree import DraftTree
from tigon.modules.state import read_slots, write_slots

Choose = Callable[[Tensor, Tensor], Tensor]  # logits (b,V), positions (b) -> tokens (b)


class Drafter:
    """Args: model: a `HybridLM` with an MTP head. slots, max_length: of the model's cache. room: tokens of a slot that
    the inbox holds."""

    def __init__(self, model, slots: int, max_length: int, room: int):
        self.model = model
        weight = model.lm_head.weight
        width, device = model.config.hidden_size, weight.device
        dtype = model.backbone.norm_f.weight.dtype
        self.cache = model.mtp.allocate_cache(slots, max_length)
        self.room = room
        # The inbox; its last column is a dummy.
        self.hidden = torch.zeros(slots, room + 1, width, dtype=dtype, device=device)
        self.tokens = torch.zeros(slots, room + 1, dtype=torch.int64, device=device)
        self.count = torch.zeros(slots, dtype=torch.int64, device=device)
        self.bound = 0  # no slot's count is larger, as far as the host knows
        # Its newest output, by slot.
        self.last = torch.zeros(slots, width, dtype=dtype, device=device)

    def reset(self, slots: Tensor) -> None:
        """Forget what slots (i) int64 hold."""
        self.cache.reset(slots)
        self.count.index_fill_(0, slots, 0)

    def receive(self, slots: Tensor, hidden: Tensor, tokens: Tensor, num: Tensor) -> None:
        """Into the inbox: the first num (b) of hidden (b,m,d) and of the tokens (b,m) that follow them."""
        m = tokens.shape[1]
        if self.bound + m > self.room:
            self.catch_up(slots)
        before = read_slots(self.count, slots, slots.shape[0])
        token = torch.arange(m, device=tokens.device)
        real = (token < num[:, None]) & (slots[:, None] >= 0)
        place = torch.where(real, before[:, None] + token, self.room).clamp(max=self.room)
        slot = slots.clamp(min=0)[:, None].expand(-1, m)
        self.hidden[slot, place] = hidden.to(self.hidden.dtype)
        self.tokens[slot, place] = tokens
        write_slots(self.count, before + num, slots)
        self.bound += m

    @property
    def unread(self) -> int:
        """Columns of the inbox that may hold something, in few sizes: each is a graph of its own on a GPU."""
        width = self.bound if self.bound <= 8 else 1 << (self.bound - 1).bit_length()
        return min(width, self.room)

    def catch_up(self, slots: Tensor) -> None:
        """Read the inbox. All slots in use must be among `slots`."""
        if not self.bound:
            return
        rows, width = slots.shape[0], self.unread
        num = read_slots(self.count, slots, rows)
        hidden, tokens = (read_slots(t, slots, rows)[:, :width] for t in (self.hidden, self.tokens))
        self.read(slots, hidden, tokens, num)
        write_slots(self.count, torch.zeros_like(num), slots)
        self.bound = 0

    def read(self, slots: Tensor, hidden: Tensor, tokens: Tensor, num: Tensor) -> None:
        """hidden (b,l,d) after each token of the model, tokens (b,l) that follow each, num (b) real ones."""
        model = self.model
        out = model.mtp(
            hidden,
            model.backbone.embeddings(tokens),
            cache=self.cache,
            slots=slots,
            num_tokens=num,
        )
        row = torch.arange(num.shape[0], device=num.device)
        newest = out[row, (num - 1).clamp(min=0)].to(self.last.dtype)
        write_slots(self.last, newest, torch.where(num > 0, slots, -1))

    def draft(
        self,
        slots: Tensor,
        count: int,
        positions: Tensor,
        choose: Choose,
        keep_logits: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """`count` guesses a row, one after the other: tokens (b,count) int64 and their logits (b,count,V) in lm_head's
        dtype, or None.

        positions (b): of the first guess in its sequence.
        """
        self.catch_up(slots)
        model = self.model
        h = read_slots(self.last, slots, slots.shape[0])
        tokens, logits = [], []
        for i in range(count):
            if i:
                embedding = model.backbone.embeddings(tokens[-1][:, None])
                where = {"cache": self.cache, "slots": slots, "commit": False}
                h = model.mtp(h[:, None], embedding, first_node=i - 1, **where)[:, 0]
            found = model.lm_head(h)
            tokens.append(choose(found, positions + i).to(torch.int64))
            if keep_logits:
                logits.append(found)
        return torch.stack(tokens, 1), torch.stack(logits, 1) if keep_logits else None

    def draft_tree(
        self, slots: Tensor, tree: DraftTree, positions: Tensor, scores: Choose
    ) -> Tensor:
        """Guesses for a tree's nodes after the first, level by level: tokens (b,N-1) int64.

        scores: logits (r,V) and positions (r) to numbers whose largest are taken.
        """
        self.catch_up(slots)
        model, rows = self.model, slots.shape[0]
        h = read_slots(self.last, slots, rows)[:, None]  # (b, nodes of a level, d)
        levels: list[Tensor] = []
        written = 0
        for depth, branches in enumerate(tree.branches):
            width = h.shape[1]
            where = (positions + depth)[:, None].expand(-1, width).reshape(-1)
            found = scores(model.lm_head(h).flatten(0, 1), where).topk(branches, -1).indices
            levels.append(found.view(rows, width * branches))
            if depth + 1 == len(tree.branches):
                break
            parents = h.repeat_interleave(branches, 1)
            h = model.mtp(
                parents,
                model.backbone.embeddings(levels[-1]),
                cache=self.cache,
                slots=slots,
                commit=False,
                ancestors=tree.drafter_bits[depth].expand(rows, -1),
                first_node=written,
            )
            written += width * branches
        return torch.cat(levels, 1)
