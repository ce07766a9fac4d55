"""The shape of a tree of drafts: every node of depth d has branches[d] children."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tigon.ops import tree_ancestors

MOST_NODES = 32


@dataclass(frozen=True)
class DraftTree:
    """branches: children of the last token, of each of those, ... Nodes are numbered level by level; node 0 is the
    last token, and a node's children stand together. device: where its tensors are."""

    branches: tuple[int, ...]
    device: torch.device | str = "cpu"

    def __post_init__(self):
        branches = tuple(int(b) for b in self.branches)
        object.__setattr__(self, "branches", branches)
        if not branches or min(branches) < 1 or self.nodes > MOST_NODES:
            raise ValueError(
                f"tree={branches}: positive branches with at most {MOST_NODES} nodes, the last token among them"
            )

    @cached_property
    def widths(self) -> list[int]:
        """Nodes of each level, the last token's first."""
        widths = [1]
        for branches in self.branches:
            widths.append(widths[-1] * branches)
        return widths

    @property
    def nodes(self) -> int:
        return sum(self.widths)

    @property
    def depth(self) -> int:
        return len(self.branches)

    @cached_property
    def links(self) -> tuple[Tensor, Tensor]:
        """first_child and next_sibling, each (1,N) int32, -1 for none."""
        child, sibling = [-1] * self.nodes, [-1] * self.nodes
        start = 0
        for width, branches in zip(self.widths, self.branches):
            below = start + width
            for i in range(width):
                first = below + i * branches
                child[start + i] = first
                for j in range(branches - 1):
                    sibling[first + j] = first + j + 1
            start = below
        rows = torch.tensor([child, sibling], dtype=torch.int32).to(self.device)
        return rows[:1], rows[1:]

    @cached_property
    def bits(self) -> Tensor:
        """(N) int32: bit j of a node's is set for every node j on the way from node 0 to it, itself included."""
        return tree_ancestors(*self.links)[0][0]

    @cached_property
    def drafter_bits(self) -> list[Tensor]:
        """The same for the nodes of each level after the first, counted from node 1: the drafter has read node 0."""
        # A logical shift: node 31's bit is the sign.
        shifted = (self.bits.to(torch.int64) & 0xFFFFFFFF) >> 1
        return [t.to(torch.int32)[None] for t in shifted.split(self.widths)[1:]]
