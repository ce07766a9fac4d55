"""Matrix products for Triton's interpreter where its own will not do."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}


def _values(handle, scale, transposed):
    """fp32 (rows, k) of codes and their scales; transposed: codes are (k, rows)."""
    codes = np.ascontiguousarray(handle.data.T if transposed else handle.data)
    if handle.dtype.scalar == tl.uint8:
        table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
        nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(codes.shape[0], -1)
        values = np.where(nibbles & 8, -1, 1) * table[nibbles & 7]
        assert scale.dtype.scalar == tl.float8e4nv, "4-bit codes go with E4M3 scales of 16"
    else:
        values = torch.from_numpy(codes).view(FP8[handle.dtype.scalar]).float().numpy()
        assert scale.dtype.scalar == tl.uint8, "8-bit codes go with E8M0 scales of 32"
    raw = torch.from_numpy(np.ascontiguousarray(scale.data).view(np.uint8))
    if scale.dtype.scalar == tl.uint8:
        factors = torch.exp2(raw.double() - 127).float()
        factors[raw == 255] = float("nan")
    else:
        factors = raw.view(torch.float8_e4m3fn).float()
    width = values.shape[1] // factors.shape[1]
    assert width == (16 if handle.dtype.scalar == tl.uint8 else 32)
    return values * np.repeat(factors.numpy(), width, 1)


def scaled_products(monkeypatch) -> None:
    """`tl.dot_scaled`, which Triton's interpreter lacks before 3.9; since, it reads E4M3 scales as exponents."""

    def create_dot_scaled(self, lhs, lhs_scale, _, rhs, rhs_scale, *rest):
        left, right = _values(lhs, lhs_scale, False), _values(rhs, rhs_scale, True)
        return interpreter.TensorHandle(
            (left @ right.T + rest[-1].data).astype(np.float32), tl.float32
        )

    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "create_dot_scaled", create_dot_scaled, raising=False
    )


def rowwise_products(monkeypatch) -> None:
    """`tl.dot` whose rows do not depend on each other. A BLAS sums in an order that depends on where a row lies in a
    tile; in fp64 the sums are (but for 1 in 10^8) exact."""
    original = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *rest):
        a, b, d = (
            interpreter.TensorHandle(_wide(t), tl.float64) if t is not None else None
            for t in (a, b, d)
        )
        product = original(self, a, b, d, *rest)
        return interpreter.TensorHandle(product.data.astype(np.float32), tl.float32)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def _wide(handle):
    """fp64 of an fp8, fp16 or fp32 tile."""
    if handle.dtype.scalar in FP8:
        codes = torch.from_numpy(np.ascontiguousarray(handle.data))
        return codes.view(FP8[handle.dtype.scalar]).double().numpy()
    return handle.data.astype(np.float64)
