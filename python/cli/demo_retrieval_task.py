"""The task of `tigon demo --token-reduction`: two-hop retrieval among frames of distractors.

A sequence is frames, then questions. A frame is three tokens, a filler and a record:

    ~ key pointer        or        ~ pointer value

Each key leads through one pointer to one value, and the two records of such a chain lie anywhere among the others. A
question is one token after the frames, a key, and the answer its value. The key says nothing of the record that holds
the value: within one pass the model has to read the pointer first.
As in a film, some frames repeat the one before.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

KEYS = POINTERS = 32
VALUES = 16
FILLERS = 8
FIRST_POINTER = KEYS
FIRST_VALUE = FIRST_POINTER + POINTERS
FIRST_FILLER = FIRST_VALUE + VALUES
VOCABULARY = FIRST_FILLER + FILLERS
FRAME = 3  # tokens
REPEATS = 1 / 3  # frames that repeat the one before, to one that does not
GRID = (1, 3)  # of a frame, for what compares frames
PAYLOAD = (
    2  # place in a frame of the token that a question needs, the one that follows what is looked up
)


@dataclass(frozen=True)
class Retrieval:
    """A batch. ids (b,l) int64: `visual` tokens of frames, then q questions. pointers, values (b,q): what each question
    leads to in one hop and in two. needles (b,q,2,frames) bool: the frames that hold its first and its second record,
    repeats among them."""

    ids: Tensor
    pointers: Tensor
    values: Tensor
    needles: Tensor

    @property
    def visual(self) -> int:
        return self.needles.shape[-1] * FRAME

    def needle_tokens(self, hop: int) -> Tensor:
        """(b,q,visual) bool: the tokens that tell what is looked for in hop 0 or 1, repeats among them."""
        told = torch.arange(FRAME) == PAYLOAD
        return (self.needles[:, :, hop, :, None] & told).flatten(2)


def draw(batch: int, chains: int, questions: int, generator: torch.Generator) -> Retrieval:
    """`batch` sequences of `chains` chains, `questions` of which are asked."""
    b, c, q = batch, chains, questions
    if not 1 <= q <= c <= min(KEYS, POINTERS):
        raise ValueError(f"draw: questions={q} and chains={c} must rise from 1 to {KEYS}")

    def some(count: int, size: int) -> Tensor:
        """(b,size) numbers below count, none twice in a row."""
        return torch.rand(b, count, generator=generator).argsort(1)[:, :size]

    keys = some(KEYS, c)
    pointers = some(POINTERS, c) + FIRST_POINTER
    values = torch.randint(FIRST_VALUE, FIRST_FILLER, (b, c), generator=generator)
    records = torch.stack(
        [torch.cat([keys, pointers], 1), torch.cat([pointers, values], 1)], 2
    )  # (b,2c,2): first hops, then second hops
    shown = _shown(b, 2 * c, round(2 * c * (1 + REPEATS)), generator)  # (b,frames) record of each
    frames = torch.randint(FIRST_FILLER, VOCABULARY, (b, 2 * c, FRAME), generator=generator)
    frames[:, :, PAYLOAD - 1 : PAYLOAD + 1] = records
    visual = frames.gather(1, shown[..., None].expand(-1, -1, FRAME)).flatten(1)
    asked = some(c, q)
    key, pointer, value = (t.gather(1, asked) for t in (keys, pointers, values))
    hops = torch.stack([asked, asked + c], 2)  # (b,q,2) record numbers
    return Retrieval(
        ids=torch.cat([visual, key], 1),
        pointers=pointer,
        values=value,
        needles=shown[:, None, None] == hops[..., None],
    )


def _shown(b: int, records: int, frames: int, generator: torch.Generator) -> Tensor:
    """(b,frames) record of each frame: every record in random order, some of them more than once in a row."""
    order = torch.rand(b, records, generator=generator).argsort(1)
    again = torch.rand(b, frames - 1, generator=generator).argsort(1) < frames - records
    step = torch.cat([torch.zeros(b, 1, dtype=torch.int64), (~again).long()], 1).cumsum(1)
    return order.gather(1, step)
