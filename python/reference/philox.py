"""Philox4x32-10: random bits that are a pure function of (key, counter). csrc/common/philox.cuh gives the same ones.

Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import torch
from torch import Tensor

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF


def _product(m: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of m x, both below 2^32; int64 has no unsigned product, so x goes in halves."""
    low = m * (x & 0xFFFF)
    high = m * (x >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | (low & 0xFFFF)


def philox(counter: tuple[Tensor | int, ...], key: tuple[Tensor | int, ...]) -> tuple[Tensor, ...]:
    """Four 32-bit words for a counter of four and a key of two words; int64 tensors in [0, 2^32) that broadcast."""
    c0, c1, c2, c3 = (torch.as_tensor(c) for c in counter)
    k0, k1 = key
    for _ in range(10):
        h0, l0 = _product(M0, c0)
        h1, l1 = _product(M1, c2)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return c0, c1, c2, c3


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
