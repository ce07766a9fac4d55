"""nvidia-modelopt's tensor classes, eager: what writes its checkpoints."""

from collections.abc import Callable

from tigon.bench.workloads import Workload

OPS = ("quantize_nvfp4", "quantize_mxfp8", "dequantize")
PACKAGE = "nvidia-modelopt"
APART = True


def build(work: Workload) -> Callable:
    """inputs -> outputs of the op."""
    from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor

    def quantize_nvfp4(inputs):
        q, *scales = NVFP4QTensor.quantize(inputs["x"], 16)
        return q._quantized_data, *scales

    def quantize_mxfp8(inputs):
        q, scale = MXFP8QTensor.quantize(inputs["x"])
        return q._quantized_data, scale

    def dequantize(inputs):
        ours = inputs["q"]
        q = NVFP4QTensor(ours.shape, work.dtype, ours.codes)
        scales = {"scale": ours.block_scale, "double_scale": ours.tensor_scale}
        return (q.dequantize(work.dtype, block_sizes={-1: 16}, **scales),)

    kinds = {
        ("quantize_nvfp4", "row"): quantize_nvfp4,
        ("quantize_mxfp8", "row"): quantize_mxfp8,
        ("dequantize", "nvfp4"): dequantize,
    }
    if (work.op, work.variant) not in kinds:
        raise NotImplementedError(f"modelopt has no {work.op} {work.variant}")
    return kinds[work.op, work.variant]
