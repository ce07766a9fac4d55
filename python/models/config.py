"""Sizes and constants of a hybrid model, and their form in a transformers NemotronH `config.json`.

Field names are that file's, except `pattern`: one letter a layer, M Mamba-2, * attention, - MLP, E LatentMoE.
"""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

LAYER_KINDS = {"M": "Mamba-2", "*": "attention", "-": "ReLU² MLP", "E": "LatentMoE"}
_LETTERS = {  # names in `layers_block_type`: transformers 5, then older ones
    "linear_attention": "M",
    "full_attention": "*",
    "mlp": "-",
    "moe": "E",
    "mamba": "M",
    "attention": "*",
}
_OLD_NAMES = {  # transformers still reads these
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_init_floor": "time_step_floor",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
    "num_local_experts": "n_routed_experts",
}
_MTP_DEFAULT = "*E"  # transformers' mtp_layers_block_type
_MTP_REPEATS = (
    "mtp_num_layers"  # Megatron's name; published config.json files have none (UNCONFIRMED)
)
_ONLY = {  # what this model does; another value would change results, so it is refused
    "mamba_hidden_act": ("silu", "swish"),
    "mlp_hidden_act": ("relu2",),
    "attention_bias": (False, None),
    "attention_dropout": (0, None),
    "hidden_dropout": (0, None),
    "sliding_window": (None,),
}


@dataclass(frozen=True)
class HybridConfig:
    """Every field has transformers' default; the letters of `pattern` are the layers.

    router_aux_loss_coef, router_z_loss_coef: of the losses of E layers, each summed over them, that the training loss
    gets beside the cross entropy: load balance in each sequence, and logsumexp(logits)^2.

    mtp_pattern: the layers of the multi-token prediction block, * - or E; "" for none. It is trained to predict
    mtp_repeats tokens more (depths), the same weights at each; mtp_loss_coef times the mean of their losses joins the
    training loss. mtp_detach_head: these losses do not train lm_head and the embeddings.

    The step size of Mamba layers is clamped to `dt_limit`, in prefill and decode alike. As in transformers' prefill,
    its lower end is at least time_step_min, which is also the least of the initial steps.
    """

    pattern: str = "ME*-"
    vocab_size: int = 131072
    hidden_size: int = 4096
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 21504
    mamba_num_heads: int = 128
    mamba_head_dim: int = 64
    ssm_state_size: int = 128
    n_groups: int = 8
    conv_kernel: int = 4
    chunk_size: int = 128
    use_conv_bias: bool = True
    use_bias: bool = False
    mlp_bias: bool = False
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    mamba_ssm_cache_dtype: str = "float32"
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True
    max_position_embeddings: int = 4096
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    n_shared_experts: int = 1
    moe_intermediate_size: int = 7688
    moe_shared_expert_intermediate_size: int = 7688
    moe_latent_size: int | None = None
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.0
    router_z_loss_coef: float = 0.0
    mtp_pattern: str = ""
    mtp_repeats: int = 2
    mtp_loss_coef: float = 0.1
    mtp_detach_head: bool = False

    def __post_init__(self):
        unknown = sorted(set(self.pattern) - set(LAYER_KINDS))
        if unknown or not self.pattern:
            kinds = ", ".join(f"{letter} {kind}" for letter, kind in LAYER_KINDS.items())
            raise ValueError(f"HybridConfig: pattern={self.pattern!r} may hold: {kinds}")
        strangers = sorted(set(self.mtp_pattern) - (set(LAYER_KINDS) - {"M"}))
        if strangers:
            kinds = ", ".join(f"{k} {name}" for k, name in LAYER_KINDS.items() if k != "M")
            raise ValueError(
                f"HybridConfig: mtp_pattern={self.mtp_pattern!r} may hold: {kinds}; a drafter keeps no Mamba-2 state"
            )
        if self.mtp_repeats < 1:
            raise ValueError(f"HybridConfig: mtp_repeats={self.mtp_repeats} must be at least 1")
        object.__setattr__(self, "time_step_limit", tuple(map(float, self.time_step_limit)))

    @property
    def d_inner(self) -> int:
        """Channels of the Mamba layers."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def dt_limit(self) -> tuple[float, float]:
        """What the step size is clamped to."""
        low, high = self.time_step_limit
        return max(low, self.time_step_min), high

    def num_parameters(self) -> int:
        """Parameters of a model of these sizes, biases of routers and the drafter among them, from the shapes."""
        d = self.hidden_size
        count = {"M": self._mamba, "*": self._attention, "-": self._mlp, "E": self._moe}
        layers = sum(count[kind]() + d for kind in self.pattern + self.mtp_pattern)
        if self.mtp_pattern:
            layers += 2 * d * d + 3 * d  # eh_proj and three norms
        tables = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return layers + tables + d

    def _mamba(self) -> int:
        conv = self.d_inner + 2 * self.n_groups * self.ssm_state_size
        rows = self.d_inner + conv + self.mamba_num_heads
        products = self.hidden_size * (rows + self.d_inner)
        biases = (rows + self.hidden_size) * self.use_bias + conv * self.use_conv_bias
        return products + biases + conv * self.conv_kernel + 3 * self.mamba_num_heads + self.d_inner

    def _attention(self) -> int:
        heads = self.num_attention_heads + self.num_key_value_heads
        return 2 * self.hidden_size * heads * self.head_dim

    def _mlp(self) -> int:
        biases = (self.intermediate_size + self.hidden_size) * self.mlp_bias
        return 2 * self.hidden_size * self.intermediate_size + biases

    def _moe(self) -> int:
        d, latent = self.hidden_size, self.moe_latent_size
        width, biases = self.moe_shared_expert_intermediate_size, self.mlp_bias
        router = self.n_routed_experts * (d + 1)
        experts = 2 * self.n_routed_experts * self.moe_intermediate_size * (latent or d)
        shared = 2 * d * width + (width + d) * biases
        projections = 2 * d * latent + (latent + d) * biases if latent else 0
        return router + experts + shared + projections

    def replace(self, **changes: Any) -> "HybridConfig":
        """A copy with some fields changed."""
        return replace(self, **changes)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "HybridConfig":
        """From a NemotronH config.json; keys that describe nothing of the model are passed over.

        Raises:
            ValueError: another model_type, or an option that this model does not have, by name.
        """
        values = {_OLD_NAMES.get(key, key): value for key, value in values.items()}
        kind = values.get("model_type", "nemotron_h")
        if kind != "nemotron_h":
            raise ValueError(f"config.json: model_type={kind!r}, expected 'nemotron_h'")
        for key, allowed in _ONLY.items():
            if key in values and values[key] not in allowed:
                raise ValueError(
                    f"config.json: {key}={values[key]!r} is not supported; it may be {allowed[0]!r}"
                )
        known = {f.name for f in fields(cls)} - {"pattern", "mtp_pattern", "mtp_repeats"}
        chosen = {key: values[key] for key in known & set(values)}
        if "time_step_limit" in chosen:
            chosen["time_step_limit"] = tuple(map(_float, chosen["time_step_limit"]))
        if chosen.get("num_key_value_heads", 0) is None:
            chosen["num_key_value_heads"] = values["num_attention_heads"]
        if values.get(_MTP_REPEATS):
            chosen["mtp_repeats"] = values[_MTP_REPEATS]
        return cls(pattern=_pattern(values), mtp_pattern=_mtp_pattern(values), **chosen)

    def to_dict(self) -> dict[str, Any]:
        """As a NemotronH config.json. Layers are written as `hybrid_override_pattern`, which every version reads."""
        values = asdict(self)
        pattern, drafter = values.pop("pattern"), values.pop("mtp_pattern")
        return {
            "model_type": "nemotron_h",
            "architectures": ["NemotronHForCausalLM"],
            "hybrid_override_pattern": pattern,
            "num_hidden_layers": len(pattern),
            "num_nextn_predict_layers": 1 if drafter else 0,
            **({"mtp_hybrid_override_pattern": drafter} if drafter else {}),
            _MTP_REPEATS: values.pop("mtp_repeats"),
            **values,
            "time_step_limit": list(self.time_step_limit),
            "mamba_hidden_act": "silu",
            "mlp_hidden_act": "relu2",
        }


def _pattern(values: dict[str, Any]) -> str:
    names = values.get("layers_block_type") or values.get("layer_types")
    if names is None:
        pattern = values.get("hybrid_override_pattern")
        return HybridConfig.pattern if pattern is None else pattern
    return _letters(names, "layers_block_type")


def _mtp_pattern(values: dict[str, Any]) -> str:
    """The one block that published checkpoints have; how often training repeats it is not in its layers."""
    blocks = values.get("num_nextn_predict_layers") or 0
    if blocks not in (0, 1):
        raise ValueError(
            f"config.json: num_nextn_predict_layers={blocks} is not supported; it may be 0 or 1"
        )
    if not blocks:
        return ""
    pattern, names = values.get("mtp_hybrid_override_pattern"), values.get("mtp_layers_block_type")
    if pattern or not names:
        return pattern or _MTP_DEFAULT
    return _letters(names, "mtp_layers_block_type")


def _letters(names: list[str], key: str) -> str:
    unknown = sorted(set(names) - set(_LETTERS))
    if unknown:
        raise ValueError(f"config.json: {key} holds {unknown}, known: {list(_LETTERS)}")
    return "".join(_LETTERS[name] for name in names)


def _float(value: Any) -> float:
    """A number, or one of the ways in which JSON files write infinity."""
    return float(value["__float__"] if isinstance(value, dict) else value)
