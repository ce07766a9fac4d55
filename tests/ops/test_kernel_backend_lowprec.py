"""The low-precision ops on the kernel backend: the reference's bytes, and fused prologues equal to the two steps.

Natively on a GPU; elsewhere in Triton's interpreter and the host build of csrc.
"""

import host_build
import pytest
import torch
import torch.nn.functional as F

import tigon
from tigon import native
from tigon.ops import GatedRMSNorm, RMSNorm, dispatch

SIGNS = torch.tensor([1.0, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1])


@pytest.fixture(autouse=True)
def kernel_backend(device):
    if device.type == "cpu":
        if reason := host_build.missing():
            pytest.skip(reason)
        native.use_host_library(host_build.build("fibers"))
    with tigon.backend("kernel"):
        yield
    native.use_host_library(None)


def equal(a, b):
    for one, other in zip(*((v if isinstance(v, tuple) else (v,)) for v in (a, b)), strict=True):
        assert one.shape == other.shape
        for name, t in one.tensors().items():
            flat = [v.contiguous().flatten().view(torch.uint8) for v in (t, other.tensors()[name])]
            assert torch.equal(*flat), name


QUANTIZERS = [
    (tigon.quantize_nvfp4, {"axis": "both", "hadamard": True}),
    (tigon.quantize_nvfp4, {"axis": "both", "block": "16x16", "four_over_six": "mse"}),
    (tigon.quantize_nvfp4, {"axis": "both", "rounding": "stochastic", "seed": 7, "offset": 3}),
    (tigon.quantize_nvfp4, {"amax": "row", "scale_layout": "128x4"}),
    (tigon.quantize_mxfp8, {"axis": "both"}),
    *(
        (tigon.quantize_fp8, {"granularity": g, "axis": "both"})
        for g in ("tensor", "row", "1x128", "128x128")
    ),
]


def run(quantize, options, x, **more):
    if options.get("hadamard"):
        options = options | {"hadamard": SIGNS.to(x.device)}
    return quantize(x, **options, **more)


@pytest.mark.parametrize(
    "quantize, options", QUANTIZERS, ids=lambda v: getattr(v, "__name__", str(v))
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_are_the_references(device, quantize, options, dtype):
    x = torch.randn(3, 13, 70).to(dtype)
    got = run(quantize, options, x.to(device))
    with tigon.backend("reference"):
        want = run(quantize, options, x)
    pairs = zip(*((v if isinstance(v, tuple) else (v,)) for v in (got, want)), strict=True)
    for one, other in pairs:
        equal(one.cpu(), other)
        assert torch.equal(one.dequantize().cpu(), other.dequantize())


@pytest.mark.parametrize(
    "quantize, options", QUANTIZERS, ids=lambda v: getattr(v, "__name__", str(v))
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fused_prologues_are_the_two_steps_byte_for_byte(device, quantize, options, dtype):
    x, z = (torch.randn(9, 96, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(96, device=device)
    steps = [
        ("relu2", F.relu(x).square()),
        (RMSNorm(weight, 1e-3), tigon.rms_norm(x, weight, eps=1e-3)),
    ]
    for last in (False, True):
        norm = {"eps": 1e-3, "group_size": 48, "norm_before_gate": last}
        steps.append((GatedRMSNorm(z, weight, **norm), tigon.gated_rms_norm(x, z, weight, **norm)))
    for prologue, y in steps:
        equal(run(quantize, options, x, prologue=prologue), run(quantize, options, y))


def test_a_product_of_quantized_matrices(device):
    x, w = torch.randn(5, 70, device=device), torch.randn(9, 70, device=device)
    for a, b in (
        (x.bfloat16(), tigon.quantize_nvfp4(w)),
        (tigon.quantize_nvfp4(x), tigon.quantize_nvfp4(w)),
        (tigon.quantize_fp8(x, granularity="1x128"), tigon.quantize_fp8(w, granularity="128x128")),
    ):
        got = tigon.scaled_mm(a, b, out_dtype=torch.float32)
        with tigon.backend("reference"):
            want = tigon.scaled_mm(a, b, out_dtype=torch.float32)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_autograd_sees_that_out_was_written(device):
    x, w = torch.ones(4, 32, device=device), tigon.quantize_nvfp4(torch.ones(8, 32, device=device))
    factor, out = (
        torch.ones(4, 8, device=device, requires_grad=True),
        torch.ones(4, 8, device=device),
    )
    y = (factor * out).sum()
    tigon.scaled_mm(x, w, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_the_kernels_really_run(device):
    for op in ("quantize_nvfp4", "quantize_mxfp8", "quantize_fp8", "dequantize", "scaled_mm"):
        assert dispatch.select(op, device, torch.bfloat16).backend in ("triton", "cuda")
