"""The header of a safetensors file, read without trusting it.

A file is 8 bytes of header length (little endian), the header in JSON, then the tensors' bytes:

    {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, "__metadata__": {text: text}}

Offsets count from the header's end; tensors fill the rest of the file without gaps. Whatever breaks that is reported
as (tensor, fault), and the tensor is left out, so that nothing is read at an offset that the file does not have.
Standard library only. Source: github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LARGEST_HEADER = 100_000_000  # bytes; safetensors refuses more
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
}

Fault = tuple[str, str]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: bytes start to stop, counted from the file's beginning."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> tuple[dict[str, Stored], list[Fault]]:
    """The tensors of a file that can be read, by name, and what is wrong with the rest."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            return {}, [("", f"holds {size} bytes, not even the header's length")]
        (length,) = struct.unpack("<Q", prefix)
        if length > size - 8:
            return {}, [("", f"header of {length} bytes in a file of {size}")]
        if length > LARGEST_HEADER:
            return {}, [("", f"header of {length} bytes, more than {LARGEST_HEADER}")]
        text = file.read(length)
    repeated: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(name for name, _ in items)
        repeated.extend(name for name, count in counts.items() if count > 1)
        return dict(items)

    try:
        header = json.loads(text.decode(), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        return {}, [("", f"header is not JSON: {error}")]
    if not isinstance(header, dict):
        return {}, [("", "header is not a JSON object")]
    faults: list[Fault] = [(name, "is named twice in the header") for name in repeated]
    faults += _metadata_faults(header.pop("__metadata__", {}))
    found = {}
    for name, entry in header.items():
        stored = _entry(path, entry, 8 + length, size)
        if isinstance(stored, str):
            faults.append((name, stored))
        else:
            found[name] = stored
    return found, faults + _layout_faults(found, 8 + length, size, complete=not faults)


def _metadata_faults(values: Any) -> list[Fault]:
    if isinstance(values, dict) and all(isinstance(v, str) for v in values.values()):
        return []
    return [("__metadata__", "is not an object of texts")]


def _entry(path: Path, entry: Any, base: int, size: int) -> Stored | str:
    """The tensor, or what is wrong with it."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return "lacks dtype, shape or data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        return f"dtype {_short(dtype)} is not known"
    if not _whole(shape):
        return f"shape {_short(shape)} is not a list of sizes"
    if not _whole(offsets) or len(offsets) != 2:
        return f"data_offsets {_short(offsets)} are not two positions in the file"
    begin, end = offsets
    if begin > end:
        return f"begins at {begin}, after its end at {end}"
    if base + end > size:
        return f"ends at byte {base + end} of a file of {size}"
    needed = -(-math.prod(shape) * BITS[dtype] // 8)
    if needed != end - begin:
        return (
            f"{dtype} of shape {tuple(shape)} needs {needed} bytes, data_offsets hold {end - begin}"
        )
    return Stored(path, dtype, tuple(shape), base + begin, base + end)


def _whole(values: Any) -> bool:
    """A list of integers from 0 that fit 64 bits; True and 2.0 are none."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _short(value: Any) -> str:
    """For a message, however long the header made it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _layout_faults(found: dict[str, Stored], base: int, size: int, complete: bool) -> list[Fault]:
    """Overlaps, which are always wrong; gaps only where every entry was understood."""
    faults: list[Fault] = []
    reached, last = base, ""
    for name, t in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if t.start < reached:
            faults.append((name, f"overlaps {last}: begins at byte {t.start}, before {reached}"))
        elif t.start > reached and complete:
            faults.append((name, f"begins at byte {t.start}, {t.start - reached} after the last"))
        if t.stop > reached:
            reached, last = t.stop, name
    if complete and not faults and reached < size:
        faults.append(("", f"{size - reached} bytes after the last tensor belong to none"))
    return faults
