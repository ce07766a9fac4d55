"""torchao: its quantizers, dequantizers and the products of its tensor classes; eager on a CPU, compiled on a GPU."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tigon.bench.peers.find import once
from tigon.bench.workloads import Workload

OPS = ("quantize_nvfp4", "quantize_mxfp8", "quantize_fp8", "dequantize", "scaled_mm")
PACKAGE = "torchao"
APART = True


def build(work: Workload) -> Callable:
    """inputs -> outputs of the op."""
    from torchao.prototype.mx_formats import mx_tensor, nvfp4_tensor  # noqa: F401

    kinds = {
        ("quantize_nvfp4", "row"): quantize_nvfp4,
        ("quantize_mxfp8", "row"): quantize_mxfp8,
        ("quantize_fp8", "tensor"): quantize_fp8,
        ("quantize_fp8", "row"): quantize_fp8,
        ("dequantize", "nvfp4"): dequantize,
        ("dequantize", "mxfp8"): dequantize,
        ("scaled_mm", "w4a16"): weight_only,
    }
    if (work.op, work.variant) not in kinds:
        raise NotImplementedError(f"torchao has no {work.op} {work.variant}")
    run = kinds[work.op, work.variant](work)
    on_gpu = any(t.device.type == "cuda" for t in work.inputs.values())
    return torch.compile(run) if on_gpu and work.op.startswith("quantize") else run


def quantize_nvfp4(work: Workload) -> Callable:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    def call(inputs):
        x = inputs["x"]
        q = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=per_tensor_amax_to_scale(x.abs().max()))
        return q.qdata, q.scale, q.per_tensor_scale

    return call


def quantize_mxfp8(work: Workload) -> Callable:
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    def call(inputs):
        mode = ScaleCalculationMode.RCEIL
        q = MXTensor.to_mx(inputs["x"], torch.float8_e4m3fn, 32, scaling_mode=mode)
        return q.qdata, q.scale.view(torch.uint8)

    return call


def quantize_fp8(work: Workload) -> Callable:
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated

    dtype, options = torch.float8_e4m3fn, {}
    if work.variant == "row":
        options = {"scaling_granularity": ScalingGranularity.AXISWISE, "axiswise_dim": -1}

    def call(inputs):
        x = inputs["x"]
        scale = tensor_to_scale(x, dtype, **options)
        codes = to_fp8_saturated(x.float() * scale, dtype)
        return codes, (1 / scale).squeeze(-1) if options else 1 / scale

    return call


def wrapped(q, dtype: torch.dtype):
    """Tigon's tensor as torchao's."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

    if q.scale_layout != "linear":
        raise NotImplementedError("torchao is given linear scales")
    if q.codes.dtype == torch.uint8:
        return NVFP4Tensor(q.codes, q.block_scale, 16, dtype, q.tensor_scale)
    scale = q.block_scale.view(torch.float8_e8m0fnu)
    return MXTensor(q.codes, scale, torch.float8_e4m3fn, 32, dtype, None, None, False)


def dequantize(work: Workload) -> Callable:
    dtype = work.options["dtype"]
    ours = once(lambda inputs: wrapped(inputs["q"], dtype))
    return lambda inputs: (ours(inputs).dequantize(dtype),)


def weight_only(work: Workload) -> Callable:
    """Its weight-only linear layer: the weight is dequantized at every call."""
    ours = once(lambda inputs: wrapped(inputs["b"], work.options["out_dtype"]))
    return lambda inputs: (F.linear(inputs["a"], ours(inputs)),)
