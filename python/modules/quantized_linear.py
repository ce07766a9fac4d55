"""What `FP8Linear` and `NVFP4Linear` share: their two forms, and products with straight-through gradients.

    training   y = q(x) q(W)^T + bias     dx = q'(dy) q(W)     dW = q'(dy)^T q(x)     each q a quantizer
    frozen     y = q(x) W^T + bias        dx = dy W            W held as codes and scales

x (..., k), W (n,k), y (..., n) in x's dtype, or autocast's. dW is summed in fp32. What a quantizer does is said by the
module; a `Quantizers` object carries it into the backward pass. W is kept for it as it is and quantized anew, so
that FSDP2 can drop it in between; of x only the quantized column-wise copy is kept.
"""

import math
from typing import Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tigon.modules.linear import linear
from tigon.ops import dequantize, scaled_mm
from tigon.ops.quantized import QuantizedTensor


class Quantizers(Protocol):
    """The operands of the three products. A "transposed" copy is the quantized transpose (`axis="column"`)."""

    def activation(self, x: Tensor, transposed: bool, signs: Tensor | None) -> tuple:
        """x (t,k) -> (x of y = x W^T, x^T of dW = dy^T x or None)."""

    def weight(self, weight: Tensor) -> QuantizedTensor:
        """W (n,k) of y = x W^T."""

    def weight_transposed(self, weight: Tensor) -> QuantizedTensor:
        """W^T (k,n) of dx = dy W."""

    def gradient(
        self, dy: Tensor, row: bool, transposed: bool, seed: Tensor | None, signs: Tensor | None
    ) -> tuple:
        """dy (t,n) -> (dy of dx = dy W or None, dy^T of dW = dy^T x or None)."""


class TrainingProduct(torch.autograd.Function):
    """x (..., k), weight (n,k), bias (n) or None -> (..., n) in `dtype`, to which both operands are cast first.

    main_grad: fp32 (n,k), to which dW is added instead of returning it. seed, signs: what `gradient` draws from.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, quantizers, dtype, main_grad, seed, signs):
        rows = _rows(x).to(dtype)
        operand, kept = quantizers.activation(rows, ctx.needs_input_grad[1], signs)
        y = scaled_mm(operand, quantizers.weight(weight.to(dtype)), bias=bias, out_dtype=dtype)
        kept, ctx.kept = pytree.tree_flatten(kept)
        ctx.save_for_backward(weight, seed, signs, *kept)
        ctx.quantizers, ctx.dtype, ctx.main_grad = quantizers, dtype, main_grad
        ctx.dtypes = (x.dtype, None if bias is None else bias.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        weight, seed, signs, *kept = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        dx = dweight = dbias = None
        lead, dy = dy.shape[:-1], _rows(dy)
        row, transposed = ctx.quantizers.gradient(dy, wants_x, wants_weight, seed, signs)
        if wants_x:
            w = ctx.quantizers.weight_transposed(weight.to(ctx.dtype))
            dx = (
                scaled_mm(row, w, out_dtype=ctx.dtype)
                .to(ctx.dtypes[0])
                .view(*lead, weight.shape[1])
            )
        if wants_weight:
            x = pytree.tree_unflatten(kept, ctx.kept)
            if ctx.main_grad is None:
                dweight = scaled_mm(transposed, x, out_dtype=torch.float32).to(weight.dtype)
            else:
                scaled_mm(
                    transposed, x, out_dtype=torch.float32, out=ctx.main_grad, accumulate=True
                )
        if wants_bias:
            dbias = dy.sum(0, dtype=torch.float32).to(ctx.dtypes[1])
        return dx, dweight, dbias, None, None, None, None, None


class FrozenProduct(torch.autograd.Function):
    """y = operand W^T + bias, where `operand` (t,k) stands for x (..., k): dx = dy W, W dequantized to dy's dtype.

    leaves: the tensors of operand and W, `specs` how they make them up, `split` where those of W begin.
    """

    @staticmethod
    def forward(ctx, x, bias, dtype, specs, split, *leaves):
        operand = pytree.tree_unflatten(leaves[:split], specs[0])
        weight = pytree.tree_unflatten(leaves[split:], specs[1])
        ctx.save_for_backward(*leaves[split:])
        ctx.spec, ctx.others = specs[1], 3 + len(leaves)
        ctx.dtypes = (x.dtype, None if bias is None else bias.dtype)
        y = scaled_mm(operand, weight, bias=bias, out_dtype=dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            weight = pytree.tree_unflatten(ctx.saved_tensors, ctx.spec)
            dx = linear(dy, dequantize(weight, dy.dtype).t()).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            dbias = _rows(dy).sum(0, dtype=torch.float32).to(ctx.dtypes[1])
        return (dx, dbias, *[None] * ctx.others)


class QuantizedLinear(nn.Linear):
    """A Linear whose products run on quantized operands; the base of `FP8Linear` and `NVFP4Linear`.

    Training form: `weight` is the high-precision Parameter. Frozen form: `weight` holds codes, `weight_scale` (and
    `weight_scale_2`) their scales, none of them trained; `input_scale` is None or an activation's static scale.
    Scales of one value are buffers, the others Parameters, so that FSDP2 shards them. The names, shapes and dtypes are
    nvidia-modelopt's. Codes and scales keep their dtype under `.to(dtype)`, which changes `dtype` and the bias.
    """

    CODES = ("weight", "weight_scale", "weight_scale_2", "input_scale")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        frozen: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        where = "meta" if frozen else device
        super().__init__(in_features, out_features, bias, device=where, dtype=dtype)
        self.frozen = frozen
        self._dtype = self.weight.dtype

    def _hold_zeros(self, device: torch.device | str | None) -> None:
        """Zero codes, scales and bias: what a checkpoint is read into."""
        device = torch.get_default_device() if device is None else device
        like = self._quantize_weight(self.weight.detach())
        self._hold({name: torch.zeros_like(t, device=device) for name, t in like.items()})
        self.register_buffer("input_scale", None)
        if self.bias is not None:
            self.bias = _fixed(torch.zeros_like(self.bias, device=device))

    def _hold(self, tensors: dict[str, Tensor]) -> None:
        for name, t in tensors.items():
            if t.dim():
                setattr(self, name, _fixed(t))
            else:
                self.register_buffer(name, t)

    def _quantize_weight(self, weight: Tensor, as_trained: bool = False) -> dict[str, Tensor]:
        """The tensors of the frozen form by name; as_trained: with what the training form's forward quantizes."""
        raise NotImplementedError

    def _activation(self, x: Tensor) -> Tensor | QuantizedTensor:
        """The operand of the frozen form that stands for x (t,k)."""
        raise NotImplementedError

    def _quantizers(self) -> Quantizers:
        """Of the training form."""
        raise NotImplementedError

    @property
    def input_range(self) -> float | None:
        """What `input_scale` is the amax over; None where x has no scale of the whole tensor."""
        raise NotImplementedError

    def _options(self) -> dict:
        """Constructor options beyond nn.Linear's and `frozen`."""
        raise NotImplementedError

    def set_input_amax(self, amax: Tensor | None) -> bool:
        """Fix x's scale by its largest magnitude () fp32, in the frozen form; None: find it at each call again.
        False, and nothing is done, where the format has no such scale."""
        if not self.frozen or self.input_range is None:
            return False
        # 0: the layer saw nothing but zeros, and a scale of 0 would make NaN of the first value that is not
        usable = None if amax is None else torch.where(amax > 0, amax / self.input_range, 1.0)
        self.input_scale = None if usable is None else usable.to(self.weight.device)
        return True

    @property
    def quantized_weight(self) -> QuantizedTensor:
        """W of the frozen form (n,k), on the module's own tensors."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """What the layer computes for: the weight's dtype, in the frozen form that of the weight it was made from."""
        return self._dtype if self.frozen else self.weight.dtype

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options) -> "QuantizedLinear":
        """The same layer in this format: in the training form on the very Parameters of `linear`, in the frozen form
        (frozen=True) on a quantized copy. options: the constructor's.

        Raises:
            TypeError: the weight of `linear` is quantized already.
        """
        w = linear.weight
        if isinstance(linear, QuantizedLinear) or not w.is_floating_point() or w.itemsize < 2:
            raise TypeError(f"{cls.__name__}.from_linear: {type(linear).__name__} is quantized")
        return cls._like(linear, **options)

    @classmethod
    def _like(cls, linear: nn.Linear, as_trained: bool = False, **options) -> "QuantizedLinear":
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        new = cls(*sizes, **options, device="meta", dtype=linear.weight.dtype)
        if new.frozen:
            new._hold(new._quantize_weight(linear.weight.detach(), as_trained))
            new.bias = None if linear.bias is None else _fixed(linear.bias.detach().clone())
        else:
            new.weight, new.bias = linear.weight, linear.bias
            new._move_constants(linear.weight.device)
        return new.train(linear.training)

    def freeze(self) -> "QuantizedLinear":
        """A new module in the frozen form whose forward gives this one's results bit for bit. A snapshot: training on
        changes this module only. Raises TypeError if this is frozen already."""
        if self.frozen:
            raise TypeError(f"{type(self).__name__}.freeze: it is frozen already")
        return self._like(self, as_trained=True, frozen=True, **self._options())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., k) fp32, bf16 or fp16 -> (..., n), in x's dtype or autocast's."""
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"{type(self).__name__}: x has shape {tuple(x.shape)}, expected (..., {self.in_features})"
            )
        kind = x.device.type
        cast = kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)  # meta knows no autocast
        dtype = torch.get_autocast_dtype(kind) if cast else x.dtype
        return self._frozen_forward(x, dtype) if self.frozen else self._training_forward(x, dtype)

    def _frozen_forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        operand, x_spec = pytree.tree_flatten(self._activation(_rows(x.detach()).to(dtype)))
        weight, w_spec = pytree.tree_flatten(self.quantized_weight)
        specs, split = (x_spec, w_spec), len(operand)
        return FrozenProduct.apply(x, self.bias, dtype, specs, split, *operand, *weight)

    def _training_forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        main_grad = getattr(self.weight, "main_grad", None)
        # autograd.Function sees requires_grad, not the mode: without it no copy for dW is made
        weight = self.weight if torch.is_grad_enabled() else self.weight.detach()
        return TrainingProduct.apply(
            *(x, weight, self.bias, self._quantizers(), dtype, main_grad),
            *self._randomness(x),
        )

    def _randomness(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(seed int64 (), signs (16) fp32) for the gradients; nothing is drawn where none is wanted."""
        return None, None

    def _move_constants(self, device: torch.device) -> None:
        """Make what the training form needs besides parameters, on `device`."""

    def _apply(self, fn, recurse=True):
        if not self.frozen:
            super()._apply(fn, recurse)
            self._move_constants(self.weight.device)
            return self
        codes = {id(t) for name in self.CODES if (t := getattr(self, name, None)) is not None}
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self.weight.device)).dtype

        def keep(t):
            moved = fn(t)
            return t.to(moved.device) if id(t) in codes and moved.dtype != t.dtype else moved

        return super()._apply(keep, recurse)

    def reset_parameters(self) -> None:
        if not getattr(self, "frozen", False):
            super().reset_parameters()

    def extra_repr(self) -> str:
        options = [f"{name}={value!r}" for name, value in self._options().items() if value]
        return ", ".join([super().extra_repr(), *options, *["frozen"] * self.frozen])


def _rows(t: Tensor) -> Tensor:
    """(..., k) -> (t,k)"""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _fixed(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t, requires_grad=False)
