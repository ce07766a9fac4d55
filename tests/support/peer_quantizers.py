"""nvidia-modelopt's and torchao's quantizers, by name. Imported only where `peers.ask` runs them.

Each takes a (m,k) tensor and returns tensors by name.
"""

import warnings

warnings.simplefilter("ignore")


def modelopt_nvfp4(x):
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    q, block_scale, tensor_scale = NVFP4QTensor.quantize(x.clone(), 16)
    values = q.dequantize(
        x.float().dtype, scale=block_scale, double_scale=tensor_scale, block_sizes={-1: 16}
    )
    return {
        "codes": q._quantized_data,
        "block_scale": block_scale,
        "tensor_scale": tensor_scale,
        "values": values,
    }


def modelopt_mxfp8(x):
    from modelopt.torch.quantization.qtensor import MXFP8QTensor

    q, scale = MXFP8QTensor.quantize(x)
    return {"codes": q._quantized_data, "block_scale": scale}


def modelopt_fp8(x):
    from modelopt.torch.quantization.qtensor import FP8QTensor

    out = {}
    for name, options in {
        "tensor": {},
        "row": {"axis": 0},
        "1x128": {"block_sizes": {-1: 128}},
        "128x128": {"block_sizes": {-1: 128, -2: 128}},
    }.items():
        q, scale = FP8QTensor.quantize(x.float(), **options)
        out |= {f"{name} codes": q._quantized_data, f"{name} scale": scale}
    return out


def torchao_nvfp4(x):
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    scale = per_tensor_amax_to_scale(x.abs().max())
    q = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale)
    swizzled = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale, is_swizzled_scales=True)
    return {
        "codes": q.qdata,
        "block_scale": q.scale,
        "tensor_scale": scale,
        "swizzled": swizzled.scale.flatten(),
        "values": q.dequantize(x.float().dtype),
    }


def torchao_mxfp8(x):
    import torch
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    out = {}
    for name, dtype in {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}.items():
        q = MXTensor.to_mx(x, dtype, 32, scaling_mode=ScaleCalculationMode.RCEIL)
        out |= {f"{name} codes": q.qdata, f"{name} block_scale": q.scale.view(torch.uint8)}
    return out


def torchao_fp8(x):
    """Its training path: encode scales from a division in fp64, rounded to fp32."""
    import torch
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated
    from torchao.prototype.blockwise_fp8_training.kernels import (
        torch_blockwise_scale_act_quant_lhs,
        torch_blockwise_scale_weight_quant,
    )

    x, out = x.float(), {}
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        for power in (False, True):
            for name, options in {
                "tensor": {},
                "row": {"scaling_granularity": ScalingGranularity.AXISWISE, "axiswise_dim": -1},
            }.items():
                enc = tensor_to_scale(x, dtype, round_scales_to_power_of_2=power, **options)
                key = f"{name} {dtype} {power}"
                out |= {f"{key} codes": to_fp8_saturated(x * enc, dtype), f"{key} scale": 1 / enc}
    for name, quantize in {
        "1x128": torch_blockwise_scale_act_quant_lhs,
        "128x128": torch_blockwise_scale_weight_quant,
    }.items():
        codes, scale = quantize(x)
        out |= {f"{name} codes": codes, f"{name} scale": scale.contiguous()}
    return out


def torchao_to_blocked(x):
    from torchao.prototype.mx_formats.utils import from_blocked, to_blocked

    blocked = to_blocked(x)
    return {"blocked": blocked, "back": from_blocked(blocked, *x.shape).contiguous()}


def torchao_e2m1(x):
    from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, f32_to_f4_unpacked

    codes = f32_to_f4_unpacked(x.contiguous())
    return {"codes": codes, "values": f4_unpacked_to_f32(codes)}


def modelopt_e2m1(x):
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    return {"codes": NVFP4QTensor._cast_fp4(x.clone())}
