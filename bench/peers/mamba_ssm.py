"""mamba_ssm's Triton kernels."""

from collections.abc import Callable

from tigon.bench.workloads import Workload

OPS = ("ssd_scan",)
CHUNK = 256  # the Mamba2 module's default
DEVICES = ("cuda",)


def build(work: Workload) -> Callable:
    """inputs -> outputs of the op."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def call(inputs):
        given = {k: inputs[k] for k in ("dt", "A", "B", "C", "D", "dt_bias")}
        return mamba_chunk_scan_combined(inputs["x"], chunk_size=CHUNK, **given, **work.options)

    return call
