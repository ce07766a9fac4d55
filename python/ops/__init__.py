"""The functional API: arguments are checked, then a registered op runs on the backend that `select` names."""

from tigon.ops.conv1d import causal_conv1d, causal_conv1d_update
from tigon.ops.dispatch import backend, batch_invariant, explain
from tigon.ops.norm import gated_rms_norm, rms_norm
from tigon.ops.ssd import ssd_scan, ssd_update

__all__ = [
    "backend",
    "batch_invariant",
    "causal_conv1d",
    "causal_conv1d_update",
    "explain",
    "gated_rms_norm",
    "rms_norm",
    "ssd_scan",
    "ssd_update",
]
