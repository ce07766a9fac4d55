"""Published sizes, by name, and `tiny` for the demo.

Sources: NVIDIA-NeMo/Megatron-Bridge and the technical reports of Nemotron-H (arXiv 2504.03624), Nemotron Nano 2
(2508.14444), Nemotron 3 Nano (2512.20848) and Super (2604.12374). Super and Ultra predict further tokens with one more
block of attention and LatentMoE, trained two tokens deep.
"""

from tigon.models.config import HybridConfig


def _alternating(layers: int, attention: tuple[int, ...]) -> str:
    """Mamba and MoE in turns, with attention at the given places."""
    pattern, turn = "", 0
    for i in range(layers):
        if i in attention:
            pattern += "*"
        else:
            pattern += "ME"[turn % 2]
            turn += 1
    return pattern


_H_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"

#: HybridConfig by name: "nemotron-h-8b", "nemotron-3-super", …; `tigon list presets` shows them.
PRESETS: dict[str, HybridConfig] = {
    "nemotron-h-4b": HybridConfig(
        pattern=_H_8B, hidden_size=3072, mamba_num_heads=112, intermediate_size=12288
    ),
    "nemotron-h-8b": HybridConfig(pattern=_H_8B),
    "nemotron-h-47b": HybridConfig(
        pattern="M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-"
        "M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-",
        hidden_size=8192,
        mamba_num_heads=256,
        ssm_state_size=256,
        num_attention_heads=64,
        intermediate_size=30720,
    ),
    "nemotron-h-56b": HybridConfig(
        pattern="M-M-M-M*-M-M-M-M-M*" + "-M-M-M-M-M*" * 8 + "-M-M-M-M-M-",
        hidden_size=8192,
        mamba_num_heads=256,
        ssm_state_size=256,
        num_attention_heads=64,
        intermediate_size=32768,
    ),
    "nemotron-nano-2-12b": HybridConfig(
        pattern="M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
        hidden_size=5120,
        mamba_head_dim=80,
        num_attention_heads=40,
        intermediate_size=20480,
    ),
    "nemotron-nano-2-9b": HybridConfig(
        pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
        hidden_size=4480,
        mamba_head_dim=80,
        num_attention_heads=40,
        intermediate_size=15680,
    ),
    "nemotron-3-nano-4b": HybridConfig(
        pattern="M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-",
        hidden_size=3136,
        mamba_num_heads=96,
        mamba_head_dim=80,
        num_attention_heads=40,
        intermediate_size=12544,
    ),
    "nemotron-3-nano": HybridConfig(
        pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        hidden_size=2688,
        mamba_num_heads=64,
        num_key_value_heads=2,
        n_routed_experts=128,
        num_experts_per_tok=6,
        moe_intermediate_size=1856,
        moe_shared_expert_intermediate_size=3712,
        routed_scaling_factor=2.5,
    ),
    "nemotron-3-super": HybridConfig(
        pattern=_alternating(88, (7, 16, 25, 36, 47, 58, 69, 78)),
        num_key_value_heads=2,
        n_routed_experts=512,
        num_experts_per_tok=22,
        moe_intermediate_size=2688,
        moe_shared_expert_intermediate_size=5376,
        moe_latent_size=1024,
        routed_scaling_factor=5.0,
        max_position_embeddings=262144,
        mtp_pattern="*E",
        mtp_loss_coef=0.3,
    ),
    # The scaling factor is Super's: no source names Ultra's.
    "nemotron-3-ultra": HybridConfig(
        pattern=_alternating(108, (7, 14, 23, 32, 39, 48, 57, 64, 73, 82, 89, 98)),
        hidden_size=8192,
        mamba_num_heads=256,
        num_attention_heads=64,
        num_key_value_heads=2,
        n_routed_experts=512,
        num_experts_per_tok=22,
        moe_intermediate_size=5120,
        moe_shared_expert_intermediate_size=10240,
        moe_latent_size=2048,
        routed_scaling_factor=5.0,
        mtp_pattern="*E",
    ),
    # A whole hybrid that learns from bytes within a minute and a half on two CPU cores. Bits a byte on held-out text
    # after 45 s of one core: 2.29; as MEM*E 2.34; as MM*- 2.37 with an initializer_range of 0.02, 2.28 with 0.06.
    # Its prediction block, after 400 steps from seed 0: "*-" guesses 55 % of the second bytes, and 34 % of second and
    # third together, "*E" 56 and 34 %, "*" 47 and 23 %; a step takes 1.6, 1.7 and 1.4 times that without. Bits a byte
    # at equal steps, seeds 0 to 2: 2.049, 2.053, 2.022 with "*-", 2.060, 2.054, 2.047 without.
    "tiny": HybridConfig(
        pattern="MM*E",
        vocab_size=256,
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        mamba_num_heads=8,
        mamba_head_dim=32,
        ssm_state_size=32,
        n_groups=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        moe_latent_size=64,
        moe_shared_expert_intermediate_size=384,
        initializer_range=0.08,
        mtp_pattern="*-",
        mtp_loss_coef=0.3,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    ),
}


def preset(name: str) -> HybridConfig:
    """The config of that name; ValueError with the known ones."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]
