"""A Linear in FP8: per-tensor, per-row or block scales, or MXFP8.

    scaling    x, dy (t, .)         W (n,k)      operands of dW = dy^T x
    tensor     one scale            one scale    one scale each               current scaling
    row        one a row            one a row    one a row: n of dy^T, k of x^T
    block      1x128                128x128      1x128 along the tokens       DeepSeek-V3's, Jet-RL's
    mxfp8      1x32, powers of 2    1x32         1x32 along the tokens

All three products run on FP8 operands, x and W in E4M3; scales are those of the very tensors (no history).

Sources: "FP8 Formats for Deep Learning" (arXiv 2209.05433); "DeepSeek-V3" (arXiv 2412.19437), section 3.3; "Jet-RL"
(arXiv 2601.14243); OCP Microscaling Formats v1.0.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tigon.modules.quantized_linear import QuantizedLinear
from tigon.ops import FP8Tensor, MXFP8Tensor, quantize_fp8, quantize_mxfp8
from tigon.ops.dispatch import is_batch_invariant
from tigon.ops.quantized import FP8_DTYPES, QuantizedTensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
GRANULARITIES = {"tensor": ("tensor", "tensor"), "row": ("row", "row"), "block": ("1x128", "128x128")}  # fmt: skip
SCALINGS = (*GRANULARITIES, "mxfp8")


@dataclass(frozen=True)
class FP8Quantizers:
    """The operands of an FP8 layer's products (`tigon.modules.quantized_linear.Quantizers`)."""

    scaling: str
    gradient_dtype: torch.dtype

    def _tokens(self, t: Tensor, dtype: torch.dtype, axis: str):
        if self.scaling == "mxfp8":
            return quantize_mxfp8(t, dtype=dtype, axis=axis)
        granularity = GRANULARITIES[self.scaling][0]
        if granularity == "tensor" and is_batch_invariant():
            granularity = "row"  # a scale of the whole tensor lets the rows feel each other
        return quantize_fp8(t, granularity=granularity, dtype=dtype, axis=axis)

    def _weight(self, weight: Tensor, axis: str):
        if self.scaling == "mxfp8":
            return quantize_mxfp8(weight, axis=axis)
        return quantize_fp8(weight, granularity=GRANULARITIES[self.scaling][1], axis=axis)

    def activation(self, x, transposed, signs=None):
        if transposed:
            return self._tokens(x, E4M3, "both")
        return self._tokens(x, E4M3, "row"), None

    def weight(self, weight):
        return self._weight(weight, "row")

    def weight_transposed(self, weight):
        return self._weight(weight, "column")

    def gradient(self, dy, row, transposed, seed=None, signs=None):
        dtype = self.gradient_dtype
        if row and transposed:
            return self._tokens(dy, dtype, "both")
        return (
            self._tokens(dy, dtype, "row") if row else None,
            self._tokens(dy, dtype, "column") if transposed else None,
        )


class FP8Linear(QuantizedLinear):
    """y = x W^T + bias on FP8 operands, trained straight through (table at the top of the module).

    Args:
        in_features (k), out_features (n), bias, device, dtype: as in nn.Linear; any sizes.
        scaling: "tensor", "row", "block" or "mxfp8".
        gradient_dtype: of dy's codes, float8_e4m3fn if None, or float8_e5m2.
        frozen: hold the weight as codes, for inference or beside an adapter: gradients reach x, not the weight. x's
            scales are found at each call, unless `input_scale` () fp32, amax/448, is set ("tensor" only).

    Parameters: weight (n,k), bias (n). Frozen, as nvidia-modelopt stores them: weight e4m3 (n,k) and weight_scale fp32
    () | (n) | (ceil(n/128), ceil(k/128)), or uint8 E8M0 (n, ceil(k/32)) for "mxfp8".

    x (..., k) may be fp32, bf16 or fp16; so is y. In batch-invariant mode "tensor" gives x a scale a row instead,
    unless it is static. weight.main_grad (n,k) fp32, where there is one, takes dW in place of weight.grad.

    Raises:
        ValueError: an unknown scaling or gradient_dtype, a wrong last size of x. RuntimeError: double backward.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        scaling: Literal["tensor", "row", "block", "mxfp8"] = "tensor",
        gradient_dtype: torch.dtype | None = None,
        frozen: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if scaling not in SCALINGS:
            raise ValueError(f"FP8Linear: scaling={scaling!r} is not one of {', '.join(SCALINGS)}")
        if gradient_dtype is not None and gradient_dtype not in FP8_DTYPES:
            raise ValueError(f"FP8Linear: gradient_dtype={gradient_dtype} is not an FP8 dtype")
        factory = {"frozen": frozen, "device": device, "dtype": dtype}
        super().__init__(in_features, out_features, bias, **factory)
        self.scaling, self.gradient_dtype = scaling, gradient_dtype
        if frozen:
            self._hold_zeros(device)

    @property
    def input_range(self):
        return E4M3_MAX if self.scaling == "tensor" else None

    def _options(self):
        return {"scaling": self.scaling, "gradient_dtype": self.gradient_dtype}

    def _quantizers(self) -> FP8Quantizers:
        return FP8Quantizers(self.scaling, self.gradient_dtype or E4M3)

    def _quantize_weight(self, weight, as_trained=False):
        q = self._quantizers().weight(weight)
        scale = q.block_scale if self.scaling == "mxfp8" else q.scale
        return {"weight": q.codes, "weight_scale": scale}

    def _activation(self, x: Tensor) -> QuantizedTensor:
        if self.input_scale is None:
            return self._quantizers().activation(x, False)[0]
        return quantize_fp8(x, granularity="tensor", amax=self.input_scale * self.input_range)

    @property
    def quantized_weight(self) -> FP8Tensor | MXFP8Tensor:
        shape = (self.out_features, self.in_features)
        if self.scaling == "mxfp8":
            return MXFP8Tensor(self.weight, self.weight_scale, shape)
        granularity = GRANULARITIES[self.scaling][1]
        return FP8Tensor(self.weight, self.weight_scale, shape, granularity)
