"""Philox4x32-10: random bits that are a pure function of (key, counter). csrc/common/philox.cuh gives the same ones.

Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import torch
from torch import Tensor

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor | int, ...], key: tuple[Tensor | int, ...]) -> tuple[Tensor, ...]:
    """Four 32-bit words for a counter of four and a key of two words; int64 tensors in [0, 2^32) that broadcast."""
    # Words 0 and 2 side by side, and 1 and 3: one operation serves two. Products wrap at 64 bits, as wanted.
    device = next((t.device for t in (*counter, *key) if isinstance(t, Tensor)), None)

    def word(value: Tensor | int) -> Tensor:
        # Not torch.tensor: that would copy from the host.
        return (
            value
            if isinstance(value, Tensor)
            else torch.full((), value, dtype=torch.int64, device=device)
        )

    words = torch.broadcast_tensors(*(word(c) for c in (*counter, *key)))
    even, odd, keys = (torch.stack([words[i], words[j]]) for i, j in ((0, 2), (1, 3), (4, 5)))
    shape = (2, *[1] * words[0].dim())
    multiplier = torch.stack([word(M0), word(M1)]).view(shape)
    step = torch.stack([word(W0), word(W1)]).view(shape)
    for _ in range(10):
        product = even.mul_(multiplier)
        high = (product >> 32).bitwise_and_(MASK).flip(0)
        even, odd = high.bitwise_xor_(odd).bitwise_xor_(keys), product.bitwise_and_(MASK).flip(0)
        keys = keys.add_(step).bitwise_and_(MASK)
    return even[0], odd[0], even[1], odd[1]


def rounding_bytes(seed: Tensor, stream: int, rows: int, width: int, offset: int) -> Tensor:
    """The random byte of each element of a (rows, width) tensor, for rounding it: (rows, width) uint8.

    Element e = i width + j + offset takes byte e % 16 of philox(counter (e // 16, stream), key seed); the 16 bytes
    are the four words, each low byte first.
    """
    first, last = offset // 16, (offset + rows * width + 15) // 16
    block = torch.arange(first, last, device=seed.device)
    key = (seed & MASK, seed >> 32 & MASK)
    zero = torch.zeros_like(block)
    words = philox((block & MASK, block >> 32, zero + stream, zero), key)
    words = torch.stack(torch.broadcast_tensors(*words), -1)
    bits = torch.stack([words >> shift & 0xFF for shift in (0, 8, 16, 24)], -1).to(torch.uint8)
    start = offset - first * 16
    return bits.flatten()[start : start + rows * width].view(rows, width)
