"""What a quantized layer multiplies, seen from outside, and the products of the same operands in fp64."""

import pytest
import torch
from torch import Tensor, nn

from tigon.modules import quantized_linear
from tigon.ops.quantized import QuantizedTensor


def record_products(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """A list to which every (a, b) that a layer hands to `scaled_mm` is added."""
    seen, real = [], quantized_linear.scaled_mm

    def scaled_mm(a, b, **options):
        seen.append((a, b))
        return real(a, b, **options)

    monkeypatch.setattr(quantized_linear, "scaled_mm", scaled_mm)
    return seen


def values(q: QuantizedTensor | Tensor) -> Tensor:
    """In fp64."""
    return (q.dequantize() if isinstance(q, QuantizedTensor) else q).double()


def run(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(y, dx, dW, dbias) of one forward and backward; what was accumulated is cleared."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(dy)
    grads = [None if p is None else p.grad for p in (layer.weight, layer.bias)]
    for p in layer.parameters():
        p.grad = None
    return y.detach(), x.grad, *grads


def assert_same_operand(name: str, got, expected) -> None:
    """Equal byte for byte."""
    assert type(got) is type(expected) and tuple(got.shape) == tuple(expected.shape), name
    if isinstance(got, Tensor):
        assert torch.equal(got, expected), name
        return
    for field, t in expected.tensors().items():
        mine = getattr(got, field)
        assert mine.dtype == t.dtype and mine.shape == t.shape, f"{name}.{field}"
        if t.element_size() == 1:
            mine, t = mine.view(torch.uint8), t.view(torch.uint8)
        assert torch.equal(mine, t), f"{name}.{field}"


def assert_product(name: str, got: Tensor, a, b, bias: Tensor | None = None) -> None:
    """got = a b^T + bias to an fp32 sum and one rounding of got's dtype."""
    exact = values(a) @ values(b).T
    size = values(a).abs() @ values(b).abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    allowed = torch.finfo(got.dtype).eps * exact.abs() + 2**-20 * size
    error = (got.reshape(exact.shape).double() - exact).abs()
    assert (error <= allowed).all(), f"{name}: off by {(error - allowed).max():.3g} too much"
