"""What the numbers in a checkpoint's scales give away: NaN bytes, signs, zeros, scales stored upside down.

Tensors are read one at a time, from the places that their headers name; large ones in pieces.

A decode scale of a weight is its amax over 2688 or 448. An amax above `LARGEST` is not a weight's: a scale that implies
one is taken for its reciprocal, the encode scale that compressed-tensors and some kernels use.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tigon.integrations.checkpoint_files import Files
from tigon.integrations.safetensors_header import Stored

LARGEST = 2.0**11  # of a weight's amax; trained weights stay below 100
LARGEST_INPUT = 2.0**18  # of an activation's: massive activations reach 10^4, ReLU² squares
PIECE = 1 << 26  # bytes
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
CALIBRATE = "calibrate and export again"


def read_bytes(stored: Stored) -> Iterator[torch.Tensor]:
    """The tensor's bytes, uint8, in pieces of 64 MiB."""
    with stored.file.open("rb") as file:
        file.seek(stored.start)
        left = stored.stop - stored.start
        while left:
            data = bytearray(file.read(min(left, PIECE)))
            if not data:
                return
            left -= len(data)
            yield torch.frombuffer(data, dtype=torch.uint8)


def read_floats(stored: Stored) -> torch.Tensor:
    """A small tensor's values, flat, in fp64."""
    data = list(read_bytes(stored))
    if not data:
        return torch.empty(0, dtype=torch.float64)
    return torch.cat(data).view(DTYPES[stored.dtype]).double()


def check_block_scales(name: str, stored: Stored, files: Files) -> None:
    """E4M3 or E8M0 scales: NaN bytes and negative ones."""
    nan = negative = 0
    for data in read_bytes(stored):
        if stored.dtype == "U8":
            nan += int((data == 255).sum())
        else:
            nan += int(((data & 0x7F) == 0x7F).sum())
            negative += int(((data >= 0x80) & (data != 0x80) & (data != 0xFF)).sum())
    count = stored.stop - stored.start
    if nan:
        byte = "255" if stored.dtype == "U8" else "0x7F"
        fault = f"{nan} of {count} scales are NaN (byte {byte}): those blocks become NaN"
        fix = f"clamp block scales to 448 before the cast to E4M3, then export again ({CALIBRATE})"
        files.error(name, fault, fix if stored.dtype != "U8" else CALIBRATE, stored.file)
    if negative:
        fault = f"{negative} of {count} scales are negative: hardware ignores the sign"
        files.error(name, fault, CALIBRATE, stored.file)


def check_scale(
    name: str, stored: Stored, reach: float, files: Files, *, encodes: bool, activation: bool
) -> None:
    """fp32 scales of a tensor, row or block. reach: the code range, so that amax = scale * reach.

    encodes: the scale is reach/amax, as compressed-tensors stores it.
    """
    values = read_floats(stored)
    if values.isnan().any():
        files.error(name, "is NaN", CALIBRATE, stored.file)
        return
    if (values < 0).any():
        files.error(name, f"is negative: {values.min().item():g}", CALIBRATE, stored.file)
        return
    if encodes:
        if ((values == 0) | values.isinf()).any():
            fault = f"is {values[0].item():g}: the layer or its input was all zeros in calibration"
            fix = "Tigon takes it for 0 when decoding; engines that divide by it produce NaN"
            files.warning(name, fault, fix, stored.file)
            return
        values = 1 / values
    elif values.isinf().any():
        fault = "is infinite: the reciprocal of a zero scale, stored as a decode scale"
        files.error(name, fault, "store amax/range; 0 for a layer of zeros", stored.file)
        return
    elif (values == 0).any():
        _zero(name, activation, stored, files)
        return
    amax = values.max().item() * reach
    if amax > (LARGEST_INPUT if activation else LARGEST):
        _upside_down(
            name, values.max().item(), reach, stored, files, encodes=encodes, activation=activation
        )


def _zero(name: str, activation: bool, stored: Stored, files: Files) -> None:
    if activation:
        fault = "is 0: activations never seen in calibration; dividing by it gives inf and NaN"
        files.error(name, fault, CALIBRATE, stored.file)
    else:
        files.warning(name, "is 0: the whole weight is zero", "", stored.file)


def _upside_down(
    name: str,
    decode: float,
    reach: float,
    stored: Stored,
    files: Files,
    *,
    encodes: bool,
    activation: bool,
) -> None:
    """decode: the decode scale, whichever of the two is stored."""
    kinds = ("encode", "decode") if encodes else ("decode", "encode")
    shown = 1 / decode if encodes else decode
    fault = (
        f"{shown:g} taken as {kinds[0]} scale means an amax of {decode * reach:g}, "
        f"as {kinds[1]} scale one of {reach / decode:g}: probably stored as the reciprocal"
    )
    report = files.warning if activation else files.error
    report(name, fault, f"store 1/{shown:g}", stored.file)


def check_numbers(name: str, stored: Stored, files: Files) -> None:
    """NaN and infinite values of any other tensor."""
    nan = infinite = 0
    for data in read_bytes(stored):
        if stored.dtype == "F8_E4M3":
            nan += int(((data & 0x7F) == 0x7F).sum())
        elif stored.dtype in DTYPES:
            values = data.view(DTYPES[stored.dtype])
            nan += int(values.isnan().sum())
            infinite += int(values.isinf().sum())
    if nan or infinite:
        files.error(name, f"{nan} NaN and {infinite} infinite values", CALIBRATE, stored.file)
