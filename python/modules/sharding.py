"""FSDP2 for modules that hold Mamba-2 layers, routers or quantized weights.

`MixedPrecisionPolicy(param_dtype=bf16)` casts every parameter of a group. A bf16 A_log puts the decay rate off by up to
0.5 %, a bf16 router flips choices, and FP8 codes cast to bf16 lose their meaning. Here A_log, D and dt_bias, the
routers of LatentMoE, and the frozen quantized layers form groups of their own that keep the dtypes they are stored in.
"""

from torch import nn

from tigon.modules.latent_moe import Router
from tigon.modules.mamba2 import Mamba2
from tigon.modules.quantized_linear import QuantizedLinear


def fully_shard(module: nn.Module, *, mp_policy=None, **options) -> nn.Module:
    """torch's `fully_shard`, but A_log, D and dt_bias of the Mamba2 layers inside `module`, the weights of its
    routers, and all of the frozen FP8Linear and NVFP4Linear layers, keep their dtypes.

    Shard blocks first, then the model, as with torch's own. options: mesh, reshard_after_forward, offload_policy.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp import fully_shard as shard

    mp_policy = mp_policy or MixedPrecisionPolicy()
    as_stored = MixedPrecisionPolicy(
        reduce_dtype=mp_policy.reduce_dtype, cast_forward_inputs=False, output_dtype=None
    )
    for layer in [m for m in module.modules() if isinstance(m, Mamba2) and not _is_sharded(m)]:
        cast = [m for m in layer.children() if not _is_sharded(m) and not _holds_codes(m)]
        shard(cast, mp_policy=mp_policy, **options)
        shard(layer, mp_policy=as_stored, **options)
    for router in [m for m in module.modules() if isinstance(m, Router) and not _is_sharded(m)]:
        shard(router, mp_policy=as_stored, **options)
    codes = [m for m in module.modules() if _holds_codes(m)]
    if codes and mp_policy.param_dtype is not None:
        shard(codes, mp_policy=as_stored, **options)
    if _is_sharded(module):
        return module
    return shard(module, mp_policy=mp_policy, **options)


def _is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 has seen it."""
    return hasattr(module, "set_requires_all_reduce")


def _holds_codes(module: nn.Module) -> bool:
    """Whether it is a frozen quantized layer that is not sharded, by itself or with a module around it."""
    is_frozen = isinstance(module, QuantizedLinear) and module.frozen
    return is_frozen and not hasattr(module.weight, "placements")
