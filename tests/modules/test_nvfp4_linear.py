"""NVFP4Linear: the operands of the published recipe, unbiased gradients, the three frozen formats."""

import pytest
import torch
from quantized_products import assert_product, assert_same_operand, record_products, run, values
from torch import nn

import tigon
from tigon.modules import NVFP4Linear
from tigon.ops import quantize_fp8, quantize_nvfp4

K, N, T = 150, 70, 45  # none a multiple of 16
# + + + - + - - - - - - + - + - -
SIGNS = torch.tensor([1.0, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1])


def _seed_drawn_after(seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"row_scaled": True}, {"four_over_six": "mae"}])
def test_each_product_has_the_operands_of_the_recipe_and_their_value(options, dtype, monkeypatch):
    layer = NVFP4Linear.from_linear(nn.Linear(K, N, dtype=dtype), **options)
    x, dy = torch.randn(3, T // 3, K, dtype=dtype), torch.randn(3, T // 3, N, dtype=dtype)
    products = record_products(monkeypatch)
    torch.manual_seed(11)
    y, dx, dw, db = run(layer, x, dy)
    seed = _seed_drawn_after(11)
    x, dy, w = x.flatten(0, 1), dy.flatten(0, 1), layer.weight.detach()
    square = {"block": "16x16", "four_over_six": options.get("four_over_six")}
    random = {"rounding": "stochastic", "seed": seed}
    expected = {
        "fprop": (
            quantize_nvfp4(x, amax="row" if options.get("row_scaled") else None),
            quantize_nvfp4(w, **square),
        ),
        "dgrad": (quantize_nvfp4(dy, **random), quantize_nvfp4(w, **square, axis="column")),
        "wgrad": (
            quantize_nvfp4(dy, **random, hadamard=SIGNS, axis="column"),
            quantize_nvfp4(x, hadamard=SIGNS, axis="column"),
        ),
    }
    for (name, operands), seen in zip(expected.items(), products, strict=True):
        for side, want, got in zip("ab", operands, seen):
            assert_same_operand(f"{name} {side}", got, want)
    assert_product("y", y, *expected["fprop"], layer.bias.detach())
    assert_product("dx", dx, *expected["dgrad"])
    assert_product("dW", dw, *expected["wgrad"])
    # one quantization of W serves both products
    assert torch.equal(values(products[0][1]).T, values(products[1][1]))
    assert (y.dtype, dx.dtype, dw.dtype, db.dtype) == (dtype,) * 4


@pytest.mark.parametrize("tokens", [512, 45, 17, 5])
def test_hadamard_matrices_of_the_two_operands_cancel(tokens):
    """What dW is, is dy^T x: sums along the tokens, with the noise of 4 bits and not of a wrong or a cut rotation."""
    layer = NVFP4Linear.from_linear(nn.Linear(K, N))
    x, dy = torch.randn(tokens, K), torch.randn(tokens, N)
    *_, dw, _ = run(layer, x, dy)
    exact = dy.T @ x
    assert (dw - exact).norm() < 0.25 * exact.norm()


def test_gradients_are_unbiased_given_the_operands():
    """Over many seeds the mean of dx and dW lies where its own spread says; rounding to nearest would not."""
    t, k, n, draws = 32, 48, 32, 128
    layer = NVFP4Linear.from_linear(nn.Linear(k, n, bias=False))
    # Each block's largest element is 6 times a power of two, so that its scale is exact and nothing is cut off.
    dy = torch.rand(t, n) * 8 - 4
    dy.view(t, n // 16, 16)[:, :, 3] = 6.0
    x = torch.randn(t, k)
    results = [run(layer, x, dy)[1:3] for _ in range(draws)]
    weight = values(quantize_nvfp4(layer.weight.detach(), block="16x16"))
    dx = torch.stack([r[0] for r in results]).double()
    spread = dx.std(0) / draws**0.5
    z = ((dx.mean(0) - dy.double() @ weight) / spread).square().mean().sqrt()
    assert 0.8 < z < 1.2
    dw = torch.stack([r[1] for r in results]).double()
    rotated = values(quantize_nvfp4(x, hadamard=SIGNS, axis="column"))
    mixed = _hadamard(dy.double()).T @ rotated.T
    single = (dw[0] - mixed).norm()
    assert (dw.mean(0) - mixed).norm() < 3 * single / draws**0.5


def _hadamard(t: torch.Tensor) -> torch.Tensor:
    """diag(signs) H16 / 4 over each 16 tokens."""
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    blocks = t.unflatten(0, (-1, 16)) * SIGNS[:, None].double()
    return torch.einsum("bik,ij->bjk", blocks, h / 4).flatten(0, 1)


@pytest.mark.parametrize("activation", ["nvfp4", "bf16", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_formats_multiply_what_they_say(activation, dtype, monkeypatch):
    linear = nn.Linear(K, N, dtype=dtype)
    layer = NVFP4Linear.from_linear(linear, activation=activation, frozen=True)
    products = record_products(monkeypatch)
    x, w = torch.randn(T, K, dtype=dtype), quantize_nvfp4(linear.weight.detach())
    y = layer(x)
    operand = {
        "nvfp4": quantize_nvfp4(x),
        "bf16": x,
        "fp8": quantize_fp8(x, granularity="row"),
    }[activation]
    (seen,) = products
    assert_same_operand("x", seen[0], operand)
    assert_same_operand("W", seen[1], w)
    assert_product("y", y, operand, w, layer.bias)
    assert y.dtype == dtype
    state = {k: (tuple(t.shape), t.dtype) for k, t in layer.state_dict().items()}
    assert state == {
        "weight": ((N, 80), torch.uint8),
        "weight_scale": ((N, 10), torch.float8_e4m3fn),
        "weight_scale_2": ((), torch.float32),
        "bias": ((N,), dtype),
    }
    torch.testing.assert_close(
        layer.weight_scale_2, linear.weight.detach().abs().max().float() / 2688
    )


@pytest.mark.parametrize("options", [{}, {"row_scaled": True}, {"four_over_six": "mse"}])
def test_freezing_keeps_the_training_forwards_bits(options):
    layer = NVFP4Linear.from_linear(nn.Linear(K, N), **options)
    x = torch.randn(T, K)
    frozen = layer.freeze()
    assert frozen.frozen and not layer.frozen
    assert torch.equal(frozen(x), layer(x))
    with tigon.batch_invariant():
        assert torch.equal(frozen(x), layer(x))


@pytest.mark.parametrize("activation", ["nvfp4", "bf16", "fp8"])
def test_a_row_does_not_feel_the_others(activation):
    linear = nn.Linear(K, N)
    x = torch.randn(37, K) * torch.logspace(-2, 2, 37)[:, None]
    layers = [NVFP4Linear.from_linear(linear, activation=activation, frozen=True)]
    if activation == "nvfp4":
        trained = NVFP4Linear.from_linear(linear)
        layers += [trained, trained.freeze(), NVFP4Linear.from_linear(linear, row_scaled=True)]
    with tigon.batch_invariant(), torch.no_grad():
        for layer in layers:
            whole = layer(x)
            for i in (0, 5, 36):
                assert torch.equal(layer(x[i : i + 1]), whole[i : i + 1]), (layer, i)


def test_row_scales_save_a_small_row_beside_a_huge_one():
    linear = nn.Linear(64, 32)
    x = torch.randn(2, 64) * torch.tensor([[1e-4], [1e4]])
    errors = []
    for row_scaled in (False, True):
        layer = NVFP4Linear.from_linear(linear, row_scaled=row_scaled)
        with torch.no_grad():
            got, exact = (m(x)[0] - linear.bias for m in (layer, linear))
        errors.append(((got - exact).norm() / exact.norm()).item())
    assert errors[0] > 0.9 and errors[1] < 0.3


@pytest.mark.parametrize("activation", ["nvfp4", "fp8"])
def test_a_static_scale_gives_what_the_dynamic_one_gives_for_its_own_batch(activation):
    layer = NVFP4Linear.from_linear(nn.Linear(K, N), activation=activation, frozen=True)
    x = torch.randn(6, K)
    dynamic = layer(x)
    assert layer.set_input_amax(x.abs().max())
    error = (layer(x) - dynamic).norm() / dynamic.norm()
    assert error < (1e-4 if activation == "nvfp4" else 0.05)  # fp8: one scale in place of one a row
    assert layer.input_scale.item() == pytest.approx(
        x.abs().max().item() / {"nvfp4": 2688, "fp8": 448}[activation]
    )
    with tigon.batch_invariant():
        assert torch.equal(layer(x[:1]), layer(x)[:1])


def test_wrong_options_are_refused_by_name():
    with pytest.raises(ValueError, match="activation='int4' is not one of nvfp4, bf16, fp8"):
        NVFP4Linear(16, 16, activation="int4")
    with pytest.raises(ValueError, match="activation='bf16' needs frozen=True"):
        NVFP4Linear(16, 16, activation="bf16")
    with pytest.raises(ValueError, match="four_over_six='max'"):
        NVFP4Linear(16, 16, four_over_six="max")
