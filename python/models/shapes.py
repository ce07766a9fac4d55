"""Name and shape of every tensor of a NemotronH checkpoint before quantization, LatentMoE layers and multi-token
prediction included."""

from typing import Any

from tigon.models.config import HybridConfig
from tigon.models.expert_tensors import split

MOST_EXPERTS = 1 << 14  # a broken config.json must not fill the memory with names


def tensor_shapes(settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """From what config.json holds; names are those on disk, `lm_head.weight` left out where it is tied.

    Raises:
        ValueError: what `HybridConfig.from_dict` and the layers refuse.
    """
    from tigon.models.hybrid import HybridLM

    config = HybridConfig.from_dict(settings)
    if (
        "E" in config.pattern + config.mtp_pattern
        and not 0 < config.n_routed_experts <= MOST_EXPERTS
    ):
        raise ValueError(f"config.json: n_routed_experts={config.n_routed_experts} is out of range")
    tensors = split(HybridLM(config, device="meta").state_dict())
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes
