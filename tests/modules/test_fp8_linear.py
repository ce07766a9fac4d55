"""FP8Linear: each scaling's operands in all three products, scales that stay static, rows that stay apart."""

import pytest
import torch
from quantized_products import assert_product, assert_same_operand, record_products, run
from torch import nn

import tigon
from tigon.modules import FP8Linear
from tigon.ops import quantize_fp8, quantize_mxfp8

K, N = 150, 70  # neither a multiple of 16 nor of 128, and more than one block
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def _quantizers(scaling: str, gradient_dtype: torch.dtype):
    """(of tokens, of the gradient, of the weight), written out: axis -> quantized."""
    if scaling == "mxfp8":
        return (
            lambda t, axis: quantize_mxfp8(t, axis=axis),
            lambda t, axis: quantize_mxfp8(t, axis=axis, dtype=gradient_dtype),
            lambda t, axis: quantize_mxfp8(t, axis=axis),
        )
    tokens, weight = {
        "tensor": ("tensor",) * 2,
        "row": ("row",) * 2,
        "block": ("1x128", "128x128"),
    }[scaling]
    return (
        lambda t, axis: quantize_fp8(t, granularity=tokens, axis=axis),
        lambda t, axis: quantize_fp8(t, granularity=tokens, axis=axis, dtype=gradient_dtype),
        lambda t, axis: quantize_fp8(t, granularity=weight, axis=axis),
    )


@pytest.mark.parametrize("gradient_dtype", [None, E5M2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", ["tensor", "row", "block", "mxfp8"])
def test_each_product_has_the_operands_of_its_scaling_and_their_value(
    scaling, dtype, gradient_dtype, monkeypatch
):
    layer = FP8Linear.from_linear(
        nn.Linear(K, N, dtype=dtype), scaling=scaling, gradient_dtype=gradient_dtype
    )
    x, dy = torch.randn(2, 65, K, dtype=dtype), torch.randn(2, 65, N, dtype=dtype)
    products = record_products(monkeypatch)
    y, dx, dw, db = run(layer, x, dy)
    tokens, gradient, weight = _quantizers(scaling, gradient_dtype or E4M3)
    x, dy, w = x.flatten(0, 1), dy.flatten(0, 1), layer.weight.detach()
    expected = {
        "fprop": (tokens(x, "row"), weight(w, "row")),
        "dgrad": (gradient(dy, "row"), weight(w, "column")),
        "wgrad": (gradient(dy, "column"), tokens(x, "column")),
    }
    for (name, operands), seen in zip(expected.items(), products, strict=True):
        for side, want, got in zip("ab", operands, seen):
            assert_same_operand(f"{name} {side}", got, want)
    bias = layer.bias.detach()
    assert_product("y", y, *expected["fprop"], bias)
    assert_product("dx", dx, *expected["dgrad"])
    assert_product("dW", dw, *expected["wgrad"])
    torch.testing.assert_close(db, dy.float().sum(0).to(dtype))
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype,) * 3 and y.shape == (2, 65, N)


@pytest.mark.parametrize("scaling", ["tensor", "row", "block", "mxfp8"])
def test_frozen_layer_has_modelopts_tensors_and_the_training_forwards_bits(scaling):
    layer = FP8Linear.from_linear(nn.Linear(K, N), scaling=scaling)
    frozen = layer.freeze()
    x = torch.randn(9, K)
    assert torch.equal(frozen(x), layer(x))
    shape = {"tensor": (), "row": (N,), "block": (1, 2), "mxfp8": (N, 5)}[scaling]
    scale_dtype = torch.uint8 if scaling == "mxfp8" else torch.float32
    state = {k: (tuple(t.shape), t.dtype) for k, t in frozen.state_dict().items()}
    assert state == {
        "weight": ((N, K), E4M3),
        "weight_scale": (shape, scale_dtype),
        "bias": ((N,), torch.float32),
    }
    scale = frozen.weight_scale
    if scaling == "tensor":
        torch.testing.assert_close(scale, layer.weight.abs().max() / 448)
    error = frozen.quantized_weight.dequantize() - layer.weight
    assert error.norm() < 0.05 * layer.weight.norm()


@pytest.mark.parametrize("scaling", ["tensor", "row", "block", "mxfp8"])
def test_a_row_does_not_feel_the_others_in_batch_invariant_mode(scaling):
    layer = FP8Linear.from_linear(nn.Linear(K, N), scaling=scaling)
    x = torch.randn(37, K) * torch.logspace(-2, 2, 37)[:, None]
    with tigon.batch_invariant(), torch.no_grad():
        for module in (layer, layer.freeze()):
            whole = module(x)
            for i in (0, 5, 36):
                assert torch.equal(module(x[i : i + 1]), whole[i : i + 1]), i


def test_a_static_scale_is_used_as_it_is_and_cuts_off_what_it_does_not_reach():
    layer = FP8Linear.from_linear(nn.Linear(K, N), frozen=True)
    x = torch.randn(6, K)
    dynamic = layer(x)
    assert layer.set_input_amax(x.abs().max())
    assert layer.input_scale.shape == () and "input_scale" in layer.state_dict()
    torch.testing.assert_close(layer(x), dynamic, rtol=1e-4, atol=1e-4)
    whole = layer(10 * x)
    assert not torch.allclose(whole, 10 * dynamic, rtol=0.1)  # saturated, not rescaled
    with tigon.batch_invariant():
        assert torch.equal(layer(x[:1]), layer(x)[:1])
    layer.set_input_amax(torch.zeros(()))
    assert layer(x).isfinite().all()
    row = FP8Linear.from_linear(nn.Linear(K, N), scaling="row", frozen=True)
    assert not row.set_input_amax(torch.ones(())) and row.input_scale is None


def test_wrong_options_are_refused_by_name():
    with pytest.raises(ValueError, match="scaling='1x32' is not one of tensor, row, block, mxfp8"):
        FP8Linear(4, 4, scaling="1x32")
    with pytest.raises(ValueError, match=r"gradient_dtype=torch\.bfloat16"):
        FP8Linear(4, 4, gradient_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"x has shape \(3, 5\), expected \(\.\.\., 4\)"):
        FP8Linear(4, 4)(torch.randn(3, 5))
