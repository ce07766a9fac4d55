"""transformers' own torch code for the same maths: what a model without compiled kernels runs.

Its functions take kernels of mamba_ssm and causal_conv1d where they find them; the code that they stand for is asked
here. NemotronH's router multiplies before it chooses, so that moe_route is not to be had alone.
"""

import inspect
from collections.abc import Callable

import torch

from tigon.bench.peers.find import once
from tigon.bench.peers.steps import by_token
from tigon.bench.workloads import Workload

OPS = (
    "ssd_scan",
    "ssd_update",
    "causal_conv1d",
    "causal_conv1d_update",
    "gated_rms_norm",
    "rms_norm",
    "moe_experts",
)
PACKAGE = "transformers"
CHUNK = 128  # NemotronH's default
EPS = 1e-5


def build(work: Workload) -> Callable:
    """inputs -> outputs of the op."""
    if work.op == "moe_experts":
        return experts(work, "eager")
    if work.variant not in ("", "plain"):
        raise NotImplementedError(f"transformers has no {work.op} {work.variant}")
    kinds = (scan, update, convolution, convolution_update, gated_norm, norm)
    return dict(zip(OPS, kinds))[work.op](work)


def torch_code(name: str) -> Callable:
    """The torch code of a function of NemotronH's."""
    from transformers.models.nemotron_h import modeling_nemotron_h as model

    if not hasattr(model, name):
        raise NotImplementedError(f"this transformers has no {name}")
    return inspect.unwrap(getattr(model, name))


def update(work: Workload) -> Callable:
    """A call a token."""
    return by_token(torch_code("mamba2_selective_state_update"))


def convolution(work: Workload) -> Callable:
    """Without the final state."""
    convolve = torch_code("causal_conv1d_fn")

    def call(inputs):
        x = inputs["x"]
        weight, bias = inputs["weight"].to(x.dtype), inputs["bias"].to(x.dtype)
        return (convolve(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2),)

    return call


def convolution_update(work: Workload) -> Callable:
    step = torch_code("causal_conv1d_update")
    low = once(lambda inputs: [inputs[name].to(work.dtype) for name in ("weight", "bias")])

    def call(inputs):
        x, state = inputs["x"].transpose(1, 2), inputs["conv_state"]
        return step(x, state, *low(inputs), activation="silu").transpose(1, 2), state

    return call


def weighted(module: torch.nn.Module) -> Callable:
    """`module`, its weight given at each call."""
    del module.weight

    def call(weight, *given):
        module.weight = weight.to(given[0].dtype)
        return (module(*given),)

    return call


def gated_norm(work: Workload) -> Callable:
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNormGated

    run = weighted(NemotronHRMSNormGated(1, work.options["group_size"], eps=EPS))
    return lambda inputs: run(inputs["weight"], inputs["x"], inputs["z"])


def norm(work: Workload) -> Callable:
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNorm

    run = weighted(NemotronHRMSNorm(1, eps=EPS))
    return lambda inputs: run(inputs["weight"], inputs["x"])


def scan(work: Workload) -> Callable:
    scan = torch_code("mamba2_chunk_scan")

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
