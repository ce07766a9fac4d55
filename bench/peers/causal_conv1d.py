"""causal_conv1d's CUDA kernels. They keep a final state of channels-last inputs, which Tigon's are."""

from collections.abc import Callable

from tigon.bench.workloads import Workload

OPS = ("causal_conv1d", "causal_conv1d_update")
DEVICES = ("cuda",)
APART = True
PACKAGE = "causal-conv1d"


def build(work: Workload) -> Callable:
    """inputs -> outputs of the op."""
    if work.variant not in ("", "plain"):
        raise NotImplementedError("causal_conv1d has no rollback by replay")
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update

    def convolve(inputs):
        x, options = inputs["x"].transpose(1, 2), {"activation": "silu"}
        options["return_final_states"] = True
        y, final = causal_conv1d_fn(x, inputs["weight"], inputs["bias"], **options)
        return y.transpose(1, 2), final

    def update(inputs):
        x, state = inputs["x"].transpose(1, 2), inputs["conv_state"]
        y = causal_conv1d_update(x, state, inputs["weight"], inputs["bias"], activation="silu")
        return y.transpose(1, 2), state

    return convolve if work.op == "causal_conv1d" else update
