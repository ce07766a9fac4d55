"""A small hybrid with an MTP head, in fp64 unless a test says otherwise."""

import pytest
import torch

from tigon.models import HybridConfig, HybridLM

CONFIG = HybridConfig(
    pattern="M*ME",
    mtp_pattern="*-",
    vocab_size=24,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    mamba_num_heads=8,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    moe_shared_expert_intermediate_size=16,
    initializer_range=0.4,
    mamba_ssm_cache_dtype="float64",
    eos_token_id=None,
)


@pytest.fixture(scope="session")
def model():
    torch.manual_seed(0)
    return HybridLM(CONFIG, dtype=torch.float64).eval()


@pytest.fixture(scope="session")
def single():
    """The same in fp32, states too."""
    torch.manual_seed(0)
    config = CONFIG.replace(mamba_ssm_cache_dtype="float32")
    return HybridLM(config, dtype=torch.float32).eval()


@pytest.fixture
def prompts():
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(0, 24, (n,), generator=draw) for n in (5, 1, 19, 40, 2)]
