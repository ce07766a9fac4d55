"""Stacked experts and files: a model's `experts.up_proj` (e,m,l) is `experts.0.up_proj.weight` (m,l), ... on disk.

Readers take both; writers write single experts, which every reader of such checkpoints knows.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tigon.modules.experts import PIECES

_STACKED = re.compile(r"(?:.*\.)?experts\.(?:" + "|".join(PIECES) + ")")


@dataclass(frozen=True)
class Piece:
    """Rows first to last - 1 of one expert in the parameter `whole`."""

    whole: str
    expert: int
    first: int
    last: int

    def of(self, stack: Tensor) -> Tensor:
        return stack[self.expert, self.first : self.last]


def pieces_of(whole: str, shape: tuple[int, ...]) -> dict[str, Piece]:
    """Name on disk -> place, of a tensor in a model; empty for one that is not stacked."""
    if len(shape) != 3 or not _STACKED.fullmatch(whole):
        return {}
    stem, _, leaf = whole.rpartition(".")
    rows = shape[1] // len(PIECES[leaf])
    return {
        f"{stem}.{j}.{part}.weight": Piece(whole, j, i * rows, (i + 1) * rows)
        for j in range(shape[0])
        for i, part in enumerate(PIECES[leaf])
    }


def split(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as it goes to disk: views of single experts in the places of the stacks."""
    result = {}
    for name, tensor in tensors.items():
        places = pieces_of(name, tuple(tensor.shape))
        result |= {piece: place.of(tensor) for piece, place in places.items()} or {name: tensor}
    return result


class Stacks:
    """The stacked parameters of a model, to be filled expert by expert."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.pieces: dict[str, Piece] = {}
        for name, p in model.named_parameters():
            self.pieces |= pieces_of(name, tuple(p.shape))
        self.names = {piece.whole for piece in self.pieces.values()}
        self._begun: set[str] = set()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the single experts' tensors."""
        width = {name: self.model.get_parameter(name).shape[2] for name in self.names}
        return {n: (p.last - p.first, width[p.whole]) for n, p in self.pieces.items()}

    def missing(self, found: set[str]) -> list[str]:
        """Pieces that are not among the `found` names though their stack is not; a stack's own name for all of its."""
        absent: dict[str, list[str]] = {name: [] for name in self.names - found}
        some = set()
        for name, piece in self.pieces.items():
            if name in found:
                some.add(piece.whole)
            elif piece.whole in absent:
                absent[piece.whole].append(name)
        return [n for whole, names in absent.items() for n in (names if whole in some else [whole])]

    @torch.no_grad()
    def put(self, name: str, value: Tensor) -> None:
        """Copy one expert's tensor to its place; the first one of a stack makes room for all, of its dtype."""
        piece = self.pieces[name]
        owner, _, leaf = piece.whole.rpartition(".")
        module = self.model.get_submodule(owner)
        old = getattr(module, leaf)
        if piece.whole not in self._begun:
            self._begun.add(piece.whole)
            room = torch.empty(old.shape, dtype=value.dtype, device=value.device)
            new = nn.Parameter(room, requires_grad=old.requires_grad)
            new.__dict__.update(old.__dict__)
            setattr(module, leaf, new)
        piece.of(getattr(module, leaf)).copy_(value)
