"""A Linear in NVFP4, with the published training recipe.

    product        left                                     right
    y  = x W^T     x, 1x16, nearest                         W, 16x16, nearest
    dx = dy W      dy, 1x16, stochastic                     W, 16x16: its transpose has the same values
    dW = dy^T x    dy^T, 1x16, Hadamard, stochastic         x^T, 1x16, Hadamard, nearest

Blocks lie along each product's contraction: for dW along the tokens, in groups of 16 that a Hadamard matrix with fixed
signs mixes before they are quantized; on both sides, so it cancels. Stochastic rounding keeps gradients unbiased.

Sources: "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149); the signs are TransformerEngine's.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tigon.modules.quantized_linear import QuantizedLinear
from tigon.ops import NVFP4Tensor, quantize_fp8, quantize_nvfp4
from tigon.ops.dispatch import is_batch_invariant
from tigon.ops.quantized import QuantizedTensor

SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
ACTIVATIONS = ("nvfp4", "bf16", "fp8")
ACTIVATION_MAX = {"nvfp4": 2688.0, "fp8": 448.0}  # what input_scale is the amax over


@dataclass(frozen=True)
class NVFP4Quantizers:
    """The operands of an NVFP4 layer's products (`tigon.modules.quantized_linear.Quantizers`)."""

    four_over_six: str | None
    row_scaled: bool

    def activation(self, x, transposed, signs=None):
        if self.row_scaled:
            column = quantize_nvfp4(x, hadamard=signs, axis="column") if transposed else None
            return quantize_nvfp4(x, amax="row"), column
        if transposed:
            return quantize_nvfp4(x, hadamard=signs, axis="both")
        return quantize_nvfp4(x), None

    def weight(self, weight):
        return quantize_nvfp4(weight, block="16x16", four_over_six=self.four_over_six)

    def weight_transposed(self, weight):
        return quantize_nvfp4(
            weight, block="16x16", four_over_six=self.four_over_six, axis="column"
        )

    def gradient(self, dy, row, transposed, seed, signs):
        options = {"rounding": "stochastic", "seed": seed}
        if row and transposed:
            return quantize_nvfp4(dy, **options, hadamard=signs, axis="both")
        return (
            quantize_nvfp4(dy, **options) if row else None,
            quantize_nvfp4(dy, **options, hadamard=signs, axis="column") if transposed else None,
        )


class NVFP4Linear(QuantizedLinear):
    """y = x W^T + bias on NVFP4 operands, trained straight through (table at the top of the module).

    Args:
        in_features (k), out_features (n), bias, device, dtype: as in nn.Linear; any sizes.
        activation: "nvfp4" (W4A4); frozen also "bf16" (W4A16: x as it comes) and "fp8" (W4A8: a scale a row).
        frozen: hold the weight as codes, for inference or beside an adapter: gradients reach x, not the weight. x's
            scales are found at each call, unless `input_scale` () fp32, amax/2688 ("fp8": amax/448), is set.
        four_over_six: None, "mae" or "mse": choose each weight block's range, 6 or 4, by its error.
        row_scaled: a tensor scale for each row of x in place of one for all, so that rows do not feel each other.
            Always so in batch-invariant mode, unless the scale is static.

    Parameters: weight (n,k), bias (n). Frozen, as nvidia-modelopt stores them, K = k rounded up to 16: weight uint8
    (n, K/2), weight_scale e4m3 (n, K/16), weight_scale_2 () fp32. `from_linear(frozen=True)` quantizes in 1x16 blocks,
    `freeze()` keeps the training form's 16x16.

    x (..., k) may be fp32, bf16 or fp16; so is y. A seed is drawn from torch's generator in each forward that trains:
    `torch.manual_seed` makes a run reproducible, and activation checkpointing gives the same gradients.
    weight.main_grad (n,k) fp32, where there is one, takes dW in place of weight.grad.

    Raises:
        ValueError: an unknown option, one that needs frozen=True, a wrong last size of x.
        RuntimeError: double backward.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        activation: Literal["nvfp4", "bf16", "fp8"] = "nvfp4",
        frozen: bool = False,
        four_over_six: Literal["mae", "mse"] | None = None,
        row_scaled: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        def require(holds: bool, message: str) -> None:
            if not holds:
                raise ValueError(f"NVFP4Linear: {message}")

        known = ", ".join(ACTIVATIONS)
        require(activation in ACTIVATIONS, f"activation={activation!r} is not one of {known}")
        require(frozen or activation == "nvfp4", f"activation={activation!r} needs frozen=True")
        require(
            four_over_six in (None, "mae", "mse"),
            f"four_over_six={four_over_six!r} is not one of None, mae, mse",
        )
        factory = {"frozen": frozen, "device": device, "dtype": dtype}
        super().__init__(in_features, out_features, bias, **factory)
        self.activation, self.four_over_six = activation, four_over_six
        self.row_scaled = row_scaled
        if frozen:
            self._hold_zeros(device)
        else:
            self._move_constants(self.weight.device)

    @property
    def input_range(self):
        return None if self.row_scaled else ACTIVATION_MAX.get(self.activation)

    def _options(self):
        return {
            "activation": self.activation,
            "four_over_six": self.four_over_six,
            "row_scaled": self.row_scaled,
        }

    def _quantizers(self) -> NVFP4Quantizers:
        return NVFP4Quantizers(self.four_over_six, self.row_scaled or is_batch_invariant())

    def _quantize_weight(self, weight, as_trained=False):
        if as_trained:
            q = self._quantizers().weight(weight)
        else:
            q = quantize_nvfp4(weight, four_over_six=self.four_over_six)
        return {
            "weight": q.codes,
            "weight_scale": q.block_scale,
            "weight_scale_2": q.tensor_scale,
        }

    def _activation(self, x: Tensor) -> Tensor | QuantizedTensor:
        if self.activation == "bf16":
            return x
        amax = None
        if self.input_scale is not None:
            amax = self.input_scale * self.input_range
        if self.activation == "fp8":
            return quantize_fp8(x, granularity="tensor" if amax is not None else "row", amax=amax)
        if amax is not None:
            return quantize_nvfp4(x, amax=amax)
        return self._quantizers().activation(x, False)[0]

    @property
    def quantized_weight(self) -> NVFP4Tensor:
        shape = (self.out_features, self.in_features)
        return NVFP4Tensor(self.weight, self.weight_scale, self.weight_scale_2, shape)

    def _randomness(self, x):
        # In training always: reentrant checkpointing runs forward without gradients, then again with the generator's
        # state of before. Had the first run not drawn, every layer and every step would get the same bits.
        wanted = self.training or (
            torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        )
        seed = torch.randint(-(2**63), 2**63 - 1, (), device=x.device) if wanted else None
        return seed, self.signs

    def _move_constants(self, device):
        # Made anew wherever the layer goes, so that one which began on the meta device has them too.
        signs = torch.tensor(SIGNS, dtype=torch.float32, device=device)
        self.register_buffer("signs", signs, persistent=False)
