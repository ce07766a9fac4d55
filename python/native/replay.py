"""Launchers of the decode kernels with rollback by replay: csrc/ssd_replay.cu and csrc/conv1d_replay.cu."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def ssd_replay(
    state: Tensor,
    state_scale: Tensor | None,
    ring_x: Tensor,
    ring_B: Tensor,
    ring_dt: Tensor,
    checkpoint: Tensor,
    length: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_indices: Tensor | None,
    num_tokens: Tensor | None,
    ancestors: Tensor | None,
    seeds: Tensor | None,
    flush: int,
    layer: int,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    batch_invariant: bool = False,
) -> Tensor:
    """m tokens a row beside slot-indexed states and rings."""
    raise RuntimeError("ssd_replay: there is no kernel yet")


def conv1d_replay(
    x: Tensor,
    ring: Tensor,
    length: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state_indices: Tensor | None,
    num_tokens: Tensor | None,
    ancestors: Tensor | None,
    silu: bool,
) -> Tensor:
    """m tokens a row beside a ring of inputs."""
    raise RuntimeError("conv1d_replay: there is no kernel yet")
