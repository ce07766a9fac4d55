"""FSDP2 for modules that hold Mamba-2 layers.

`MixedPrecisionPolicy(param_dtype=bf16)` casts every parameter of a group, A_log, D and dt_bias too, and a bf16 A_log
puts the decay rate off by up to 0.5 %. Here these three form a group of their own that keeps the dtype it is stored in.
"""

from torch import nn

from tigon.modules.mamba2 import Mamba2


def fully_shard(module: nn.Module, *, mp_policy=None, **options) -> nn.Module:
    """torch's `fully_shard`, but A_log, D and dt_bias of the Mamba2 layers inside `module` keep their dtype.

    Shard blocks first, then the model, as with torch's own. options: mesh, reshard_after_forward, offload_policy.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp import fully_shard as shard

    mp_policy = mp_policy or MixedPrecisionPolicy()
    as_stored = MixedPrecisionPolicy(
        reduce_dtype=mp_policy.reduce_dtype, cast_forward_inputs=False, output_dtype=None
    )
    for layer in [m for m in module.modules() if isinstance(m, Mamba2)]:
        if not hasattr(layer, "set_requires_all_reduce"):  # FSDP2 has not seen it yet
            shard(list(layer.children()), mp_policy=mp_policy, **options)
            shard(layer, mp_policy=as_stored, **options)
    if isinstance(module, Mamba2):
        return module
    return shard(module, mp_policy=mp_policy, **options)
