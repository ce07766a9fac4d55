"""The numerics contract: how far a result may lie from the fp64 oracle.

A kernel (or a faster reference) passes if its relative RMS error against fp64 is at most twice that of an
honest baseline (the reference that rounds operands exactly where the kernel feeds tensor cores) plus one
rounding of the output, and if no single element is further off than `cap` times that allowance. Of a tensor with
fewer than FEW elements (gradients by head) the baseline's RMS is itself a draw, some 1 / sqrt(2 n) of it off: there
the factor is 2 + 2 / sqrt(n).
"""

import torch
from torch import Tensor

FEW = 32


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def relative_rms(got: Tensor, oracle: Tensor) -> float:
    """RMS of the difference over RMS of the oracle (absolute where the oracle is zero)."""
    return rms(got.double() - oracle.double()) / (rms(oracle) or 1.0)


def assert_close_to_oracle(
    name: str, got: Tensor, oracle: Tensor, baseline: Tensor, cap: float = 30.0
) -> None:
    """`got` and `baseline` against the fp64 `oracle`, by the contract above."""
    assert got.shape == oracle.shape, (
        f"{name}: shape {tuple(got.shape)}, oracle {tuple(oracle.shape)}"
    )
    if not oracle.numel():
        return
    assert torch.isfinite(got).all(), f"{name}: not finite"
    unit = torch.finfo(got.dtype).eps
    luck = oracle.numel() ** -0.5 if oracle.numel() < FEW else 0.0
    allowed = 2 * (1 + luck) * relative_rms(baseline, oracle) + unit
    error = relative_rms(got, oracle)
    assert error <= allowed, f"{name}: relative RMS error {error:.3g}, allowed {allowed:.3g}"
    largest = (got.double() - oracle.double()).abs().max().item()
    limit = cap * allowed * (rms(oracle) or 1.0)
    limit += unit * oracle.double().abs().max().item()
    assert largest <= limit, f"{name}: largest error {largest:.3g}, allowed {limit:.3g}"
