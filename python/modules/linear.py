"""Linear layers whose rows do not feel each other in batch-invariant mode.

A BLAS picks its blocking, and with it the order of a row's sums, by the shape of the whole product. In
batch-invariant mode (`tigon.batch_invariant()`) the rows are therefore multiplied in tiles of one fixed shape, the
last one padded: every row sees the same kernel, whatever stands beside it and however many rows there are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tigon.ops.dispatch import is_batch_invariant

ROWS = 16  # of a tile: small enough that decoding one row wastes little, large enough to be a matrix product


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., k) @ weight (n, k).T + bias (n); in row tiles in batch-invariant mode."""
    if not is_batch_invariant():
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    rows = F.pad(rows, (0, 0, 0, -count % ROWS))
    tiles = [F.linear(tile, weight, bias) for tile in rows.split(ROWS)] if count else [rows]
    if not count:
        return F.linear(x, weight, bias)
    return torch.cat(tiles)[:count].view(*x.shape[:-1], weight.shape[0])


def activation_dtype(layer: nn.Linear) -> torch.dtype:
    """The dtype that a Linear computes for: its weight's, unless that is codes (`QuantizedLinear.dtype`)."""
    return getattr(layer, "dtype", layer.weight.dtype)


class Linear(nn.Linear):
    """torch's Linear, with `linear` above as its product."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
