"""transformers' own torch code for the same maths: what a model without compiled kernels runs."""

from collections.abc import Callable

from tigon.bench.workloads import Workload

OPS = ("ssd_scan",)
CHUNK = 128  # NemotronH's default


def build(work: Workload) -> Callable:
    """inputs -> outputs of the op."""
    from transformers.models.nemotron_h import modeling_nemotron_h as model

    scan = model.mamba2_chunk_scan  # takes mamba_ssm's kernel on a GPU where that is installed

    def call(inputs):
        given = {k: inputs[k] for k in ("dt", "A", "B", "C", "D", "dt_bias")}
        return scan(inputs["x"], chunk_size=CHUNK, **given, **work.options)

    return call
