"""Quantized tensors: what the quantizers return and `scaled_mm` takes.

    NVFP4Tensor   x = e2m1(code) block_scale tensor_scale   blocks of 16, E4M3 scales, an fp32 scale a tensor or row
    MXFP8Tensor   x = code 2^(block_scale - 127)            blocks of 32, E8M0 scales
    FP8Tensor     x = code scale                            fp32 scales: a tensor, a row, 1x128 or 128x128

Each is a frozen dataclass of plain tensors with the logical shape beside them. Blocks lie along the last dimension; a
column-wise copy is the quantized transpose, of logical shape (K, M). They are pytree nodes (so torch.compile takes and
returns them), `torch.load(weights_only=True)` reads them, and they work on the meta device. No registered op takes
one: the public functions unpack them.

Sources: OCP Microscaling Formats v1.0 (MXFP8); "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor

NVFP4_BLOCK, MXFP8_BLOCK, FP8_BLOCK = 16, 32, 128
LAYOUTS = ("linear", "128x4")
GRANULARITIES = ("tensor", "row", "1x128", "128x128")
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def scale_shape(lead: tuple[int, ...], blocks: int, layout: str) -> tuple[int, ...]:
    """Shape of the block scales of rows `lead` with `blocks` blocks each."""
    if layout == "linear":
        return (*lead, blocks)
    return (round_up(math.prod(lead), 128) * round_up(blocks, 4),)


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """What the three have in common: a shape, tensors that move together, rows that can be picked."""

    TENSORS: ClassVar[tuple[str, ...]] = ()

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def rows(self) -> int:
        """Product of the leading sizes."""
        return math.prod(self.shape[:-1])

    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and scales together."""
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name."""
        return {name: getattr(self, name) for name in self.TENSORS}

    def map(self, function) -> QuantizedTensor:
        """The same with `function` applied to each tensor."""
        return replace(self, **{name: function(t) for name, t in self.tensors().items()})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> QuantizedTensor:
        """On another device. The formats stay: `dequantize(dtype)` changes the dtype."""
        if isinstance(device, torch.dtype):
            raise TypeError(
                f"{type(self).__name__}.to takes a device; dequantize({device}) converts"
            )
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def cpu(self) -> QuantizedTensor:
        return self.to("cpu")

    def cuda(self, device: int | str | None = None) -> QuantizedTensor:
        return self.to("cuda" if device is None else torch.device("cuda", device))

    def clone(self) -> QuantizedTensor:
        return self.map(Tensor.clone)

    def detach(self) -> QuantizedTensor:
        return self.map(Tensor.detach)

    def __len__(self) -> int:
        return self.shape[0]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor of shape `shape` that the codes and scales stand for."""
        from tigon.ops.quantize import dequantize

        return dequantize(self, dtype)

    def __getitem__(self, index: Any) -> QuantizedTensor:
        """Rows: an int, slice, mask or index tensor, or a tuple of them, over the leading dimensions.

        Raises IndexError for an index into the last dimension, ValueError where scales are shared or swizzled across
        the rows in question.
        """
        index = index if isinstance(index, tuple) else (index,)
        if any(i is None or i is Ellipsis for i in index):
            raise IndexError("quantized tensors are indexed by rows: no ... and no None")
        if len(index) >= self.ndim:
            raise IndexError(
                f"{len(index)} indices for the {self.ndim - 1} leading dimensions of {self.shape}; "
                "the last dimension is not indexed"
            )
        picked = {name: self._pick(name, t, index) for name, t in self.tensors().items()}
        # A scale a tensor and shared scales keep their shape, codes always show the leading one.
        return replace(self, shape=(*picked["codes"].shape[:-1], self.shape[-1]), **picked)

    def _pick(self, name: str, t: Tensor, index: tuple) -> Tensor:
        if t.dim() == 0:
            return t
        # Indexing kernels know no fp8; a view of bytes has the same rows.
        small = t.element_size() == 1
        return t.view(torch.uint8)[index].view(t.dtype) if small else t[index]

    def __repr__(self) -> str:
        shown = [f"shape={tuple(self.shape)}", *self._details(), f"device='{self.device}'"]
        return f"{type(self).__name__}({', '.join(shown)})"

    def _details(self) -> list[str]:
        return []


@dataclass(frozen=True, eq=False, repr=False)
class NVFP4Tensor(QuantizedTensor):
    """E2M1 codes in blocks of 16 along K with E4M3 scales under fp32 scales.

    codes: uint8 (..., Kp/2), Kp = K rounded up to 16; element 2i in the low nibble. Padding is zero.
    block_scale: float8_e4m3fn (..., Kp/16), or with scale_layout "128x4" flat, round_up(M, 128) * round_up(Kp/16, 4).
    tensor_scale: fp32 () or one a row (...). Decode scale: the amax over 2688, unless quantized four-over-six.
    shape: (..., K). block: "1x16" or "16x16" (the scales of 16 rows are then equal).
    """

    TENSORS = ("codes", "block_scale", "tensor_scale")

    codes: Tensor
    block_scale: Tensor
    tensor_scale: Tensor
    shape: tuple[int, ...]
    scale_layout: str = "linear"
    block: str = "1x16"

    def _details(self) -> list[str]:
        per_row = self.tensor_scale.dim() > 0
        return [f"block='{self.block}'", f"scale_layout='{self.scale_layout}'"] + (
            ["tensor_scale='row'"] if per_row else []
        )

    def _pick(self, name, t, index):
        _refuse_swizzled(self, name)
        return super()._pick(name, t, index)


@dataclass(frozen=True, eq=False, repr=False)
class MXFP8Tensor(QuantizedTensor):
    """E4M3 or E5M2 codes in blocks of 32 along K with power-of-two scales.

    codes: float8_e4m3fn or float8_e5m2 (..., K). block_scale: uint8, E8M0 (value 2^(s-127), 255 is NaN),
    (..., ceil(K/32)), or with scale_layout "128x4" flat. shape: (..., K).
    """

    TENSORS = ("codes", "block_scale")

    codes: Tensor
    block_scale: Tensor
    shape: tuple[int, ...]
    scale_layout: str = "linear"

    def _details(self) -> list[str]:
        return [_dtype(self), f"scale_layout='{self.scale_layout}'"]

    def _pick(self, name, t, index):
        _refuse_swizzled(self, name)
        return super()._pick(name, t, index)


@dataclass(frozen=True, eq=False, repr=False)
class FP8Tensor(QuantizedTensor):
    """E4M3 or E5M2 codes with fp32 decode scales.

    codes: float8_e4m3fn or float8_e5m2 (..., K). shape: (..., K).
    scale: by granularity, "tensor" (), "row" (...), "1x128" (..., ceil(K/128)), "128x128" (ceil(M/128), ceil(K/128)).
    """

    TENSORS = ("codes", "scale")

    codes: Tensor
    scale: Tensor
    shape: tuple[int, ...]
    granularity: str = "tensor"

    def _details(self) -> list[str]:
        return [_dtype(self), f"granularity='{self.granularity}'"]

    def _pick(self, name, t, index):
        if name == "scale" and self.granularity == "128x128":
            row = index[0]
            if self.ndim != 2 or not isinstance(row, slice) or row.step not in (None, 1):
                raise ValueError("128x128 blocks are picked by a slice of whole blocks of a matrix")
            start, stop, _ = row.indices(self.shape[0])
            if start % FP8_BLOCK:
                raise ValueError(
                    f"a slice of 128x128 blocks starts at a multiple of 128, got {start}"
                )
            return t[start // FP8_BLOCK : -(-max(stop, start) // FP8_BLOCK)]
        return super()._pick(name, t, index)


def _refuse_swizzled(q: QuantizedTensor, name: str) -> None:
    if name == "block_scale" and q.scale_layout != "linear":
        raise ValueError(f"rows of a tensor in the {q.scale_layout} scale layout cannot be picked")


def _dtype(q: QuantizedTensor) -> str:
    return f"dtype={q.codes.dtype}"


def _flatten(q: QuantizedTensor) -> tuple[list[Tensor], tuple]:
    static = {f.name: getattr(q, f.name) for f in fields(q) if f.name not in q.TENSORS}
    return list(q.tensors().values()), tuple(static.items())


for _kind in (NVFP4Tensor, MXFP8Tensor, FP8Tensor):

    def _unflatten(tensors, static, kind=_kind):
        return kind(**dict(zip(kind.TENSORS, tensors, strict=True)), **dict(static))

    pytree.register_pytree_node(
        _kind, _flatten, _unflatten, serialized_type_name=f"tigon.{_kind.__name__}"
    )
    torch.serialization.add_safe_globals([_kind])
