"""transformers' own torch code for the same maths: what a model without compiled kernels runs."""

from collections.abc import Callable

from tigon.bench.peers.find import once
from tigon.bench.workloads import Workload

OPS = ("ssd_scan", "moe_experts")
CHUNK = 128  # NemotronH's default


def build(work: Workload) -> Callable:
    """inputs -> outputs of the op."""
    return scan(work) if work.op == "ssd_scan" else experts(work, "eager")


def scan(work: Workload) -> Callable:
    from transformers.models.nemotron_h import modeling_nemotron_h as model

    scan = model.mamba2_chunk_scan  # takes mamba_ssm's kernel on a GPU where that is installed

    def call(inputs):
        given = {k: inputs[k] for k in ("dt", "A", "B", "C", "D", "dt_bias")}
        return scan(inputs["x"], chunk_size=CHUNK, **given, **work.options)

    return call


def experts(work: Workload, implementation: str) -> Callable:
    """NemotronH's experts, or Mixtral's for SwiGLU; their weights are the inputs themselves."""
    from transformers import MixtralConfig, NemotronHConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    if work.variant not in ("hidden", "relu", "nothing", "swiglu"):
        raise NotImplementedError(f"transformers has no moe_experts {work.variant}")
    gated = work.variant == "swiglu"
    e = work.sizes["e"]
    if gated:
        module = MixtralExperts(
            MixtralConfig(hidden_size=1, intermediate_size=1, num_local_experts=e)
        )
    else:
        small = {"hidden_size": 1, "moe_latent_size": 1, "moe_intermediate_size": 1}
        module = NemotronHExperts(NemotronHConfig(**small, n_routed_experts=e))
    module.config._experts_implementation = implementation
    names = ("gate_up_proj" if gated else "up_proj", "down_proj")
    for name in names:
        delattr(module, name)

    indices = once(lambda inputs: work.arguments(inputs)["routing"].indices.long())

    def call(inputs):
        for name, given in zip(names, ("up", "down")):
            setattr(module, name, inputs[given])
        return (module(inputs["x"], indices(inputs), inputs["weights"]),)

    return call
