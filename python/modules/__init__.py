"""`tigon.modules`: the layers of hybrid models. Parameters live here; the arithmetic is `tigon.ops`'s."""

from tigon.modules.attention import Attention
from tigon.modules.experts import Experts
from tigon.modules.fp8_linear import FP8Linear
from tigon.modules.latent_moe import LatentMoE, Router, router_losses
from tigon.modules.linear import Linear
from tigon.modules.mamba2 import Mamba2
from tigon.modules.mamba_cache import MambaCache
from tigon.modules.mlp import MLP, GatedMLP
from tigon.modules.mtp import MTP
from tigon.modules.norm import GatedRMSNorm, RMSNorm
from tigon.modules.nvfp4_linear import NVFP4Linear
from tigon.modules.reducible import Reducible
from tigon.modules.sharding import fully_shard
from tigon.modules.state import KVCache, Lengths
from tigon.modules.token_reducer import KeptTokens, TokenReducer

__all__ = [
    "MLP",
    "MTP",
    "Attention",
    "Experts",
    "FP8Linear",
    "GatedMLP",
    "GatedRMSNorm",
    "KVCache",
    "KeptTokens",
    "LatentMoE",
    "Lengths",
    "Linear",
    "Mamba2",
    "MambaCache",
    "NVFP4Linear",
    "RMSNorm",
    "Reducible",
    "Router",
    "TokenReducer",
    "fully_shard",
    "router_losses",
]
