"""What a packed argument struct is made of: addresses, dtype codes, vectors with stride 1."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORMATS = ("f32", "bf16", "f16")  # by the codes of csrc/common/types.cuh


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def packed(t: Tensor | None) -> Tensor | None:
    """A vector with stride 1."""
    return t if t is None or t.stride(0) == 1 else t.contiguous()


def indices(t: Tensor | None) -> Tensor | None:
    """int32 with stride 1; the caller keeps the copy alive until the launch is on its stream."""
    if t is None or (t.element_size() == 4 and t.stride(0) == 1):
        return t
    import torch

    # Beyond int32 means padding: it must not wrap into a slot.
    return t.clamp(-1, 2**31 - 1).to(torch.int32).contiguous()


def wide(t: Tensor | None) -> Tensor | None:
    """int64 with stride 1; kept alive likewise."""
    import torch

    return None if t is None else t.to(torch.int64).contiguous()


@functools.cache
def _state_formats() -> dict[torch.dtype, str]:
    import torch

    formats = {dtype: FORMATS[code] for dtype, code in dtype_codes().items()}
    return formats | {torch.int8: "i8", torch.float8_e4m3fn: "e4m3"}


def state_format(dtype: torch.dtype) -> str:
    """The type of csrc/common/state_format.cuh in which a recurrent state is kept."""
    return _state_formats()[dtype]


@functools.cache
def dtype_codes() -> dict[torch.dtype, int]:
    import torch

    return {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
