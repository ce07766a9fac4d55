"""`scaled_mm`: products of quantized matrices.

    out = act( alpha (A B^T) + bias )

A (m,k) and B (n,k) are exactly what codes and block scales stand for; alpha is the product of the scales that a tensor
or row has. Sums are fp32.
"""

from typing import Literal

import torch
from torch import Tensor

from tigon.ops.checks import Check, names
from tigon.ops.dispatch import call, inner, is_batch_invariant, run
from tigon.ops.library import register
from tigon.ops.quantize import check_quantized, one_of, unpack
from tigon.ops.quantized import QuantizedTensor

OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)
_OPERANDS = (
    "Tensor a, Tensor? a_scale, Tensor? a_tensor_scale, str a_format, bool a_swizzled, "
    "Tensor b, Tensor? b_scale, Tensor? b_tensor_scale, str b_format, bool b_swizzled, "
    "SymInt k, Tensor? bias, bool relu2"
)
_OUTER = ("fp8-tensor", "fp8-row")
PAIRS = {
    **{(a, b): "FP8" for a in _OUTER for b in _OUTER},
    ("fp8-1x128", "fp8-128x128"): "FP8, blocks",
    ("fp8-1x128", "fp8-1x128"): "FP8, blocks",
    ("mxfp8", "mxfp8"): "MXFP8",
    ("plain", "nvfp4"): "W4A16",
    **{(f"fp8-{a}", "nvfp4"): "W4A8" for a in ("tensor", "row", "1x128")},
    ("nvfp4", "nvfp4"): "W4A4",
}


def _mm(*args):
    operands, out_dtype = args[:-1], args[-1]
    return _run(operands, out_dtype, None, False)


def _mm_out(*args):
    operands, (out, accumulate) = args[:-2], args[-2:]
    _run(operands, out.dtype, out, accumulate)


def _run(operands, out_dtype, out, accumulate):
    invariant = is_batch_invariant()
    main = operands[0]
    return run("scaled_mm", main, *operands, out_dtype, out, accumulate, batch_invariant=invariant)


def _mm_fake(*args):
    a, b, out_dtype = args[0], args[5], args[-1]
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


register(f"scaled_mm({_OPERANDS}, ScalarType out_dtype) -> Tensor", _mm, _mm_fake)
register(
    f"scaled_mm_out({_OPERANDS}, Tensor(a!) out, bool accumulate) -> ()",
    _mm_out,
    lambda *args: None,
)


def scaled_mm(
    a: Tensor | QuantizedTensor,
    b: QuantizedTensor,
    *,
    bias: Tensor | None = None,
    activation: Literal["relu2"] | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """a @ b.T of quantized matrices, with bias and activation; the formats pick the kernel.

    | a | b | |
    |---|---|---|
    | FP8 tensor or row | FP8 tensor or row | scales in the epilogue |
    | FP8 1x128 | FP8 128x128 or 1x128 | scales applied every 128 of k |
    | MXFP8 | MXFP8 | |
    | bf16, fp16, fp32 tensor | NVFP4 | W4A16: the weights are decoded on the fly |
    | FP8 tensor, row or 1x128 | NVFP4 | W4A8 |
    | NVFP4 | NVFP4 | W4A4 |

    Every format gives the same result, up to the order of fp32 sums, on every device: where there are no FP4 or FP8
    units, codes are decoded exactly. In batch-invariant mode a row's bits do not depend on the other rows or on m.

    Args:
        a: (m,k), quantized or a bf16, fp16 or fp32 tensor. b: (n,k), quantized along k like a.
        bias: (n) fp32, bf16 or fp16, added in fp32.
        activation: None, or "relu2": relu(.)^2 after the bias.
        out_dtype: fp32, bf16 or fp16.
        out: (m,n) to write to, its rows strided at will, apart from the inputs; its dtype is then the output's.
        accumulate: add to `out`, which must be fp32.

    Returns:
        (m,n); `out` itself if that was given.

    Raises:
        TypeError: formats that have no product together, dtypes. ValueError: shapes, devices, layouts, by name.
    """
    check = Check("scaled_mm")
    left, m, k = _operand(check, "a", a, plain=True)
    right, n, width = _operand(check, "b", b, plain=False)
    if k != width:  # spelled out here only: a symbolic size that is printed is fixed for good
        check.fail(f"a has k={k} columns, b has {width}")
    if (left[3], right[3]) not in PAIRS:
        known = "; ".join(f"{x} x {y}" for x, y in PAIRS)
        check.fail(f"{left[3]} x {right[3]} is not supported; these are: {known}", TypeError)
    check.sizes |= {"m": m, "n": n}
    check.source |= {"m": "a", "n": "b"}
    check.tensor("bias", bias, "n", dtypes=OUTPUTS, optional=True)
    bias = inner("bias", bias, 1)
    one_of(check, "activation", activation, (None, "relu2"))
    check.no_gradient("FP8Linear or NVFP4Linear", a=left[0], bias=bias)
    if out is not None:
        check.tensor("out", out, "m n", dtypes=(torch.float32,) if accumulate else OUTPUTS)
        check.require(out.stride(1) == 1 or n < 2, "out must have contiguous rows")
        check.require(m < 2 or out.stride(0) >= n, "out must have rows that do not overlap")
        _check_apart(check, out, a=left[:3], b=right[:3], bias=(bias,))
        check.no_gradient("FP8Linear or NVFP4Linear", out=out)
    else:
        check.require(not accumulate, "accumulate needs out")
        if out_dtype not in OUTPUTS:
            check.fail(f"out_dtype={out_dtype} is not one of {names(OUTPUTS)}", TypeError)
    operands = (*left, *right, k, bias, activation is not None)
    sizes = {"m": m, "n": n, "k": k, "itemsize": left[0].element_size()}
    sizes |= {"a_format": left[3], "b_format": right[3], "swizzled": left[4] and right[4]}
    if out is None:
        return call("scaled_mm", left[0], (*operands, out_dtype), sizes)
    call("scaled_mm", left[0], (*operands, out, accumulate), sizes, registered="scaled_mm_out")
    return out


def _check_apart(check: Check, out: Tensor, **inputs: tuple[Tensor | None, ...]) -> None:
    """No input lies where `out` does: some programs would read what others have written."""
    if torch.compiler.is_compiling() or type(out) is not Tensor or out.is_meta:
        return  # there are no addresses
    for name, tensors in inputs.items():
        for t in tensors:
            check.require(t is None or _apart(out, t), f"out lies on memory of {name}")


def _apart(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors with contiguous rows share no byte; columns of one buffer do not."""
    if not a.numel() or not b.numel():
        return True
    (start, width, pitch, rows), (at, wide, step, count) = _bytes(a), _bytes(b)
    if at >= start + (rows - 1) * pitch + width or start >= at + (count - 1) * step + wide:
        return True
    if rows > 1 and count > 1 and pitch != step:
        return False
    pitch = pitch if rows > 1 else step
    if rows == count == 1 or pitch == 0:
        return False
    between = (at - start) % pitch
    return between >= width and between + wide <= pitch


def _bytes(t: Tensor) -> tuple[int, int, int, int]:
    """(address, bytes of a row, bytes from row to row, rows)"""
    size, rows = t.element_size(), t.shape[0] if t.dim() == 2 else 1
    width = t.shape[-1] if t.dim() else 1
    return t.data_ptr(), width * size, t.stride(0) * size if rows > 1 else 0, rows


def _operand(check: Check, name: str, t: Tensor | QuantizedTensor, plain: bool):
    """((codes, scale, tensor scale, format, swizzled), rows, k) of a matrix."""
    if isinstance(t, QuantizedTensor):
        if len(t.shape) != 2:
            check.fail(f"{name} has shape {tuple(t.shape)}, expected a matrix")
        check_quantized(check, name, t)
        return unpack(t), *t.shape
    if not plain or not isinstance(t, Tensor):
        wanted = "an NVFP4Tensor, MXFP8Tensor or FP8Tensor"
        wanted += ", or a Tensor" if plain else ""
        check.fail(f"{name} must be {wanted}, got {type(t).__name__}", TypeError)
    rows, k = ("m", "k") if name == "a" else ("n", "k")
    check.tensor(name, t, f"{rows} {k}", dtypes=OUTPUTS)
    return (inner(name, t, 1), None, None, "plain", False), *t.shape
