"""The demo's text and what a language model has to beat on it.

The text is the `pydoc_data` topics that every CPython carries: some 0.4 MB of English about Python. Topics repeat each
other, so a paragraph is kept only where it comes first; then whole topics are held out.
"""

import lzma
import math
import random
from collections import Counter, defaultdict

HELD_OUT = 0.08  # share of the bytes, in whole topics
MODEL_ORDER = 2


def split_text(seed: int = 0) -> tuple[bytes, bytes]:
    """(training, held-out) text, the same for one seed and one Python version."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept = []
    for name in sorted(topics):
        paragraphs = [p for p in topics[name].strip("\n").split("\n\n") if p.strip()]
        new = [p for p in dict.fromkeys(paragraphs) if p.strip() not in seen]
        seen.update(p.strip() for p in new)
        if new:
            kept.append("\n\n".join(new).encode() + b"\n\n\n")
    random.Random(seed).shuffle(kept)
    wanted, held_out = HELD_OUT * sum(map(len, kept)), b""
    while len(held_out) < wanted:
        held_out += kept.pop()
    return b"".join(kept), held_out


def order_2_bits(training: bytes, held_out: bytes) -> float:
    """Bits per byte of an order-2 model counted on `training`: orders 2, 1, 0 and uniform, blended after Witten
    and Bell 1991: each order's weight is n / (n + u), n its context's count and u how many bytes followed it."""
    counts: list[dict[bytes, Counter]] = [defaultdict(Counter) for _ in range(MODEL_ORDER + 1)]
    for i, byte in enumerate(training):
        for order in range(min(i, MODEL_ORDER) + 1):
            counts[order][training[i - order : i]][byte] += 1
    bits = 0.0
    text = training[-MODEL_ORDER:] + held_out
    for i in range(MODEL_ORDER, len(text)):
        p = 1 / 256
        for order in range(MODEL_ORDER + 1):
            seen = counts[order].get(text[i - order : i])
            if seen:
                n, u = seen.total(), len(seen)
                p = (seen[text[i]] + u * p) / (n + u)
        bits -= math.log2(p)
    return bits / len(held_out)


def lzma_bits(training: bytes, held_out: bytes) -> float:
    """Bits per byte that `held_out` adds to the lzma of `training`: 8 (size(training + held_out) - size(training))
    / bytes. So lzma, like the models, knows the training text; its window holds all of it."""
    preset = 9 | lzma.PRESET_EXTREME
    with_it = len(lzma.compress(training + held_out, preset=preset))
    return 8 * (with_it - len(lzma.compress(training, preset=preset))) / len(held_out)
