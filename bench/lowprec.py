"""Workloads of the low-precision ops. `draw` is a workloads.Draw, `choice` what variants.VARIANTS says.

Quantizers and `dequantize` are right if every byte is the reference's. A product is compared with the fp64 product of
what its operands stand for.
"""

from dataclasses import replace

import torch
from torch import Tensor

import tigon
from tigon.ops.quantized import QuantizedTensor

SIGNS = (
    1,
    1,
    1,
    -1,
    1,
    -1,
    -1,
    -1,
    -1,
    -1,
    -1,
    1,
    -1,
    1,
    -1,
    -1,
)  # of the published training recipe
TENSORS = {"nvfp4": ("codes", "block_scale", "tensor_scale"), "mxfp8": ("codes", "block_scale")}

SMALL = {
    "quantize_nvfp4": {"m": 70, "k": 200},
    "quantize_mxfp8": {"m": 70, "k": 200},
    "quantize_fp8": {"m": 150, "k": 200},
    "dequantize": {"m": 150, "k": 200},
    "scaled_mm": {"m": 40, "n": 150, "k": 272},
}


def quantized(t: Tensor, format: str) -> Tensor | QuantizedTensor:
    """`t` in a format of variants.FORMATS, or as it is ("plain"); scales lie as the device's tensor cores read them."""
    packed = t.is_cuda and torch.cuda.get_device_capability(t.device) >= (10, 0)
    layout = "128x4" if packed else "linear"
    if format == "plain":
        return t
    if format == "nvfp4":
        return tigon.quantize_nvfp4(t, scale_layout=layout)
    if format == "mxfp8":
        return tigon.quantize_mxfp8(t, scale_layout=layout)
    return tigon.quantize_fp8(t, granularity=format.removeprefix("fp8-"))


def values(t: Tensor | QuantizedTensor) -> Tensor:
    """fp64: what a matrix stands for, nothing rounded."""
    if isinstance(t, Tensor):
        return t.double()
    if isinstance(t, tigon.MXFP8Tensor):
        return t.dequantize().double()
    name = "tensor_scale" if isinstance(t, tigon.NVFP4Tensor) else "scale"
    scale = getattr(t, name).double()
    one = replace(t, **{name: torch.ones_like(getattr(t, name))})
    return one.dequantize().double() * beside(scale, t)


def beside(scale: Tensor, t: QuantizedTensor) -> Tensor:
    """The outer scales of t, to be multiplied with its elements."""
    granularity = getattr(t, "granularity", "row" if scale.dim() else "tensor")
    if granularity == "tensor":
        return scale
    if granularity == "row":
        return scale[..., None]
    m, k = t.shape
    rows = scale if granularity == "1x128" else scale.repeat_interleave(128, 0)[:m]
    return rows.repeat_interleave(128, 1)[:, :k]


def by_reference(work) -> tuple[Tensor, ...]:
    with tigon.backend("reference"):
        return work.run()


def product(work) -> tuple[Tensor]:
    return (values(work.inputs["a"]) @ values(work.inputs["b"]).T,)


def _quantizer(tensors: tuple[str, ...]):
    def build(draw, choice: dict, m: int, k: int) -> dict:
        x, options = draw.normal(m, k), dict(choice)
        if options.pop("hadamard", False):
            options["hadamard"] = torch.tensor(SIGNS, dtype=torch.float32, device=draw.device)
        if options.get("rounding") == "stochastic":
            options["seed"] = torch.ones((), dtype=torch.int64, device=draw.device)
        outputs = tensors
        if options.get("axis") == "both":
            outputs = (*tensors, *(f"{name}_t" for name in tensors))
        return _exact({"x": x}, options, outputs)

    return build


def _exact(inputs: dict, options: dict, outputs: tuple[str, ...]) -> dict:
    return {
        "inputs": inputs,
        "options": options,
        "outputs": outputs,
        "exact": True,
        "oracle": by_reference,
    }


def dequantize(draw, choice: str, m: int, k: int) -> dict:
    q = quantized(draw.normal(m, k), choice)
    return _exact({"q": q}, {"dtype": draw.dtype}, ("y",))


def scaled_mm(draw, choice: tuple[str, str], m: int, n: int, k: int) -> dict:
    left, right = choice
    a, b = quantized(draw.normal(m, k), left), quantized(draw.normal(n, k), right)
    return {
        "inputs": {"a": a, "b": b},
        "options": {"out_dtype": draw.dtype},
        "outputs": ("out",),
        "oracle": product,
    }


BUILDERS = {
    "quantize_nvfp4": _quantizer(TENSORS["nvfp4"]),
    "quantize_mxfp8": _quantizer(TENSORS["mxfp8"]),
    "quantize_fp8": _quantizer(("codes", "scale")),
    "dequantize": dequantize,
    "scaled_mm": scaled_mm,
}
