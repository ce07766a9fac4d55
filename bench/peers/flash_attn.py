"""flash_attn's Triton RMSNorm. Its attention keeps no softmax weights."""

from collections.abc import Callable

from tigon.bench.workloads import Workload

OPS = ("rms_norm", "attention_token_scores")
DEVICES = ("cuda",)
PACKAGE = "flash-attn"
EPS = 1e-5


def build(work: Workload) -> Callable:
    """inputs -> outputs of the op."""
    if work.op == "attention_token_scores":
        raise NotImplementedError("flash_attn gives outputs of attention, not its weights")
    from flash_attn.ops.triton.layer_norm import rms_norm_fn

    return lambda inputs: (rms_norm_fn(inputs["x"], inputs["weight"], None, eps=EPS),)
