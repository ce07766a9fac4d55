"""Name and shape of every tensor of a NemotronH checkpoint before quantization, LatentMoE layers included."""

from typing import Any

from tigon.models.config import HybridConfig

MOST_EXPERTS = 1 << 14  # a broken config.json must not fill the memory with names


def tensor_shapes(settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """From what config.json holds; names are those on disk, `lm_head.weight` left out where it is tied.

    Raises:
        ValueError: what `HybridConfig.from_dict` and the layers refuse.
    """
    from tigon.models.hybrid import HybridLM

    config = HybridConfig.from_dict(settings)
    # HybridLM has no LatentMoE layers: an MLP holds the place of each, and makes room for its table.
    stand_in = config.replace(pattern=config.pattern.replace("E", "-"))
    model = HybridLM(stand_in, device="meta")
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for i, kind in enumerate(config.pattern):
        if kind == "E":
            mixer = f"backbone.layers.{i}.mixer."
            shapes = {k: v for k, v in shapes.items() if not k.startswith(mixer)}
            shapes |= {mixer + name: shape for name, shape in moe_shapes(config).items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def moe_shapes(config: HybridConfig) -> dict[str, tuple[int, ...]]:
    """The mixer of a LatentMoE layer: router, latent projections, experts by index, shared expert. No biases."""
    if not 0 < config.n_routed_experts <= MOST_EXPERTS:
        raise ValueError(f"config.json: n_routed_experts={config.n_routed_experts} is out of range")
    d, m, e = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    latent, shared = config.moe_latent_size or d, config.moe_shared_expert_intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "gate.weight": (e, d),
        "gate.e_score_correction_bias": (e,),
    }
    if config.moe_latent_size:
        shapes |= {"fc1_latent_proj.weight": (latent, d), "fc2_latent_proj.weight": (d, latent)}
    for i in range(e):
        shapes[f"experts.{i}.up_proj.weight"] = (m, latent)
        shapes[f"experts.{i}.down_proj.weight"] = (latent, m)
    return shapes | {
        "shared_experts.up_proj.weight": (shared, d),
        "shared_experts.down_proj.weight": (d, shared),
    }
