"""`tigon.modules`: the layers of hybrid models. Parameters live here; the arithmetic is `tigon.ops`'s."""

from tigon.modules.attention import Attention
from tigon.modules.linear import Linear
from tigon.modules.mamba2 import Mamba2
from tigon.modules.mlp import MLP
from tigon.modules.norm import GatedRMSNorm, RMSNorm
from tigon.modules.sharding import fully_shard
from tigon.modules.state import KVCache, Lengths, MambaCache

__all__ = [
    "MLP",
    "Attention",
    "GatedRMSNorm",
    "KVCache",
    "Lengths",
    "Linear",
    "Mamba2",
    "MambaCache",
    "RMSNorm",
    "fully_shard",
]
