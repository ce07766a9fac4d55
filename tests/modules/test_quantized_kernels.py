"""Quantized layers on the kernel backend (on a CPU: the host build and Triton's interpreter) beside the reference."""

import host_build
import pytest
import torch
from quantized_products import run
from torch import nn

import tigon
from tigon import native
from tigon.modules import FP8Linear, NVFP4Linear

K, N, T = 40, 24, 18
CASES = [
    (FP8Linear, {"scaling": "tensor"}),
    (FP8Linear, {"scaling": "row"}),
    (FP8Linear, {"scaling": "block"}),
    (FP8Linear, {"scaling": "mxfp8"}),
    (NVFP4Linear, {}),
    (NVFP4Linear, {"row_scaled": True}),
]
FROZEN = [(NVFP4Linear, {"activation": "bf16"}), (NVFP4Linear, {"activation": "fp8"})]


@pytest.fixture(autouse=True)
def kernel_backend(device):
    if device.type == "cpu":
        if reason := host_build.missing():
            pytest.skip(reason)
        native.use_host_library(host_build.build("fibers"))
    with tigon.backend("kernel"):
        yield
    native.use_host_library(None)


@pytest.mark.parametrize("kind, options", CASES)
def test_training_gives_the_references_results_and_freezing_the_training_bits(
    kind, options, device
):
    layer = kind.from_linear(nn.Linear(K, N, device=device).bfloat16(), **options)
    x = torch.randn(T, K, device=device).bfloat16()
    dy = torch.randn(T, N, device=device).bfloat16()
    results = []
    for backend in ("kernel", "reference"):
        with tigon.backend(backend):
            torch.manual_seed(1)  # the same random bits: the operands are equal byte for byte
            results.append(run(layer, x, dy))
    for got, expected in zip(*results):
        assert (got - expected).norm() <= 2**-7 * expected.norm()
    assert torch.equal(layer.freeze()(x), results[0][0])


@pytest.mark.parametrize(
    "kind, options, frozen",
    [(*case, frozen) for case in CASES for frozen in (False, True)]
    + [(*case, True) for case in FROZEN],
)
def test_a_row_does_not_feel_the_others(kind, options, frozen, device):
    linear = nn.Linear(K, N, device=device).bfloat16()
    layer = kind.from_linear(linear, **options, frozen=frozen)
    x = torch.randn(T, K, device=device).bfloat16()
    with tigon.batch_invariant(), torch.no_grad():
        whole = layer(x)
        for i in (0, T - 1):
            assert torch.equal(layer(x[i : i + 1]), whole[i : i + 1])
