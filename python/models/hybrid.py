"""A language model of Mamba-2, attention, MLP and LatentMoE layers, of the Nemotron-H and Nemotron 3 kind.

    h = embeddings(ids);  h = h + mixer_i(norm_i(h)) for each layer;  logits = lm_head(norm_f(h))

Parameter names are those of NemotronH checkpoints on disk (`backbone.layers.0.mixer.in_proj.weight`, …).
Sources: NVIDIA 2025, "Nemotron-H" (arXiv 2504.03624) and "Nemotron 3" (2512.20856).
"""

from os import PathLike

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tigon.generation.cache import HybridCache
from tigon.models.config import HybridConfig
from tigon.models.presets import preset
from tigon.modules import MLP, MTP, Attention, Experts, LatentMoE, Linear, Mamba2, RMSNorm, Router
from tigon.modules.latent_moe import router_losses, total_counts
from tigon.modules.stack import run_layers
from tigon.ops import Routing

Device = torch.device | str | None


def _mixer(kind: str, config: HybridConfig, layer: int, **factory) -> nn.Module:
    if kind == "M":
        return Mamba2(
            config.hidden_size,
            d_state=config.ssm_state_size,
            d_conv=config.conv_kernel,
            d_inner=config.d_inner,
            headdim=config.mamba_head_dim,
            ngroups=config.n_groups,
            dt_min=config.time_step_min,
            dt_max=config.time_step_max,
            dt_init_floor=config.time_step_floor,
            dt_limit=config.dt_limit,
            bias=config.use_bias,
            conv_bias=config.use_conv_bias,
            norm_eps=config.layer_norm_epsilon,
            layer_idx=layer,
            **factory,
        )
    if kind == "*":
        return Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            **factory,
        )
    if kind == "E":
        return LatentMoE(
            config.hidden_size,
            config.moe_latent_size,
            config.n_routed_experts,
            config.moe_intermediate_size,
            config.num_experts_per_tok,
            config.moe_shared_expert_intermediate_size,
            scale=config.routed_scaling_factor,
            groups=config.n_group,
            top_groups=config.topk_group,
            normalize=config.norm_topk_prob,
            bias=config.mlp_bias,
            aux="sequence" if config.router_aux_loss_coef else None,
            z_loss=bool(config.router_z_loss_coef),
            **factory,
        )
    return MLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, **factory)


class Block(nn.Module):
    """h + mixer(norm(h)); an MLP and a mixture remember nothing. A mixture with return_routing: (h, Routing)."""

    def __init__(self, kind: str, config: HybridConfig, layer: int, **factory):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon, **factory)
        self.mixer = _mixer(kind, config, layer, **factory)

    def forward(
        self, h: Tensor, cu_seqlens=None, cache=None, *, mask=None, return_routing=False, **rows
    ) -> Tensor | tuple[Tensor, Routing]:
        x = self.norm(h.to(self.norm.weight.dtype))
        if isinstance(self.mixer, MLP):
            return h + self.mixer(x)
        if not isinstance(self.mixer, LatentMoE):
            return h + self.mixer(x, cu_seqlens, cache, **rows)
        if not return_routing:
            return h + self.mixer(x, mask, cu_seqlens)
        y, routing = self.mixer(x, mask, cu_seqlens, return_routing=True)
        return h + y, routing


class Backbone(nn.Module):
    """Token ids to the hidden states before `lm_head`."""

    def __init__(self, config: HybridConfig, **factory):
        super().__init__()
        self.residual_dtype = torch.float32 if config.residual_in_fp32 else None
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, **factory)
        self.layers = nn.ModuleList(
            Block(kind, config, i, **factory) for i, kind in enumerate(config.pattern)
        )
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon, **factory)

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | None = None,
        cache: HybridCache | None = None,
        *,
        slots: Tensor | None = None,
        num_tokens: Tensor | None = None,
        mask: Tensor | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, list[Routing]]:
        """(b,l,d_model); arguments as in `HybridLM.forward`."""
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected (b, l)")
        h, routings = run_layers(
            self.layers,
            self.embeddings(input_ids).to(self.residual_dtype),
            cu_seqlens,
            cache,
            slots=slots,
            num_tokens=num_tokens,
            mask=mask,
            return_routing=return_routing,
        )
        h = self.norm_f(h.to(self.norm_f.weight.dtype))
        return (h, routings) if return_routing else h


def _drafter(config: HybridConfig, **factory) -> MTP | None:
    """The block of multi-token prediction, if the config has one; its layers are numbered after the backbone's."""
    if not config.mtp_pattern:
        return None
    n = len(config.pattern)
    return MTP(
        config.hidden_size,
        [Block(kind, config, n + i, **factory) for i, kind in enumerate(config.mtp_pattern)],
        norm_eps=config.layer_norm_epsilon,
        residual_dtype=torch.float32 if config.residual_in_fp32 else None,
        **factory,
    )


class HybridLM(nn.Module):
    """The model of a `HybridConfig`, or of a preset by its name.

    Args:
        config: sizes, or a name of `tigon.models.PRESETS`.
        device, dtype: of the parameters; "meta" for shapes alone.

    Attributes: backbone, lm_head, and mtp: the `tigon.modules.MTP` of config.mtp_pattern, or None.
    """

    def __init__(
        self, config: HybridConfig | str, device: Device = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        config = preset(config) if isinstance(config, str) else config
        self.config = config
        self.backbone = Backbone(config, device=device, dtype=dtype)
        self.mtp = _drafter(config, device=device, dtype=dtype)
        self.lm_head = Linear(
            config.hidden_size, config.vocab_size, bias=False, device=device, dtype=dtype
        )
        self.tie_weights()
        if torch.device(device or "cpu").type != "meta":
            self.reset_parameters()

    def tie_weights(self) -> None:
        """Make lm_head share the embeddings, if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights of initializer_range; what is added to the residual is scaled by 1/sqrt(layers) (GPT-2)."""
        std = self.config.initializer_range
        scale = len(self.config.pattern) ** -0.5 if self.config.rescale_prenorm_residual else 1.0
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith(("out_proj", "o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=std * scale if residual else std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Router):
                nn.init.normal_(module.weight, std=std)
            elif isinstance(module, Experts):
                nn.init.normal_(module.up, std=std)
                nn.init.normal_(module.down_proj, std=std * scale)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (…,d_model) -> (…,V) fp32 (fp64 for fp64)."""
        return _at_least_fp32(self.lm_head(hidden))

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | None = None,
        cache: HybridCache | None = None,
        labels: Tensor | None = None,
        *,
        slots: Tensor | None = None,
        num_tokens: Tensor | None = None,
        mask: Tensor | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, list[Routing]]:
        """Logits (b,l,V) in fp32, or the mean cross entropy in nats if labels are given; in training mode the router
        losses of the config are added to it.

        Args:
            input_ids: (b,l) int64; packed sequences: (1,l).
            cu_seqlens: (s+1) int32 or int64 bounds of the packed sequences.
            cache: of `allocate_cache`; the tokens continue its sequences and are added to them.
            labels: (b,l) int64, the token that follows each input token; -100 where none counts.
            slots: (b) or (s) int64, the cache's slot of each row or sequence; None: slot i. Negative: padding.
            num_tokens: (b) int32 or int64, real tokens of each row of a dense batch padded on the right.
            mask: (b,l) bool, False at padding on the right that no expert is to see or count; num_tokens says it too.
            return_routing: also return the `Routing` of every E layer, for `update_bias` and statistics.

        Raises:
            ValueError: arguments that contradict each other, or no room in the cache, by name.
        """
        losses = (self.config.router_aux_loss_coef, self.config.router_z_loss_coef)
        adds_losses = self.training and labels is not None and any(losses)
        where = {"slots": slots, "num_tokens": num_tokens, "mask": mask}
        hidden = self.backbone(
            input_ids, cu_seqlens, cache, return_routing=return_routing or adds_losses, **where
        )
        hidden, routings = hidden if return_routing or adds_losses else (hidden, [])
        result = self.logits(hidden)
        if labels is not None:
            result = F.cross_entropy(result.flatten(0, 1), labels.flatten(), ignore_index=-100)
        if adds_losses:
            result = result + router_losses(routings, *losses)
        return (result, routings) if return_routing else result

    @torch.no_grad()
    def update_bias(self, counts: Tensor, rate: float = 1e-3, group=None) -> None:
        """`LatentMoE.update_bias` of every E layer, after the optimizer's step.

        counts: (E layers, e) integers: `torch.stack([r.counts for r in routings])` of `return_routing`, added up over
        micro-batches. group: processes to add them up over as well, in one all-reduce.
        """
        mixers = [m.mixer for m in self.backbone.layers if isinstance(m.mixer, LatentMoE)]
        for mixer, layer_counts in zip(mixers, total_counts(counts, group), strict=True):
            mixer.update_bias(layer_counts, rate)

    def allocate_cache(
        self, slots: int, max_length: int, *, dtype: torch.dtype | None = None
    ) -> HybridCache:
        """A `HybridCache` on the model's device; recurrent states in config.mamba_ssm_cache_dtype."""
        ssm_dtype = getattr(torch, self.config.mamba_ssm_cache_dtype)
        mixers = [layer.mixer for layer in self.backbone.layers]
        device = self.lm_head.weight.device
        if dtype is None:
            dtype = (
                self.backbone.norm_f.weight.dtype
            )  # a quantized layer's weight has no dtype to go by
        return HybridCache(
            mixers, slots, max_length, dtype=dtype, ssm_dtype=ssm_dtype, device=device
        )

    @classmethod
    def from_pretrained(
        cls, path: str | PathLike, *, device: Device = None, dtype: torch.dtype | None = None
    ) -> "HybridLM":
        """Read a NemotronH checkpoint, quantized or not; see `tigon.models.checkpoint.load`."""
        from tigon.models.checkpoint import load

        return load(cls, path, device=device, dtype=dtype)

    def save_pretrained(self, path: str | PathLike, max_shard_size: int | str = "5GB") -> None:
        """Write a checkpoint that transformers loads; see `tigon.models.checkpoint.save`."""
        from tigon.models.checkpoint import save

        save(self, path, max_shard_size=max_shard_size)


def _at_least_fp32(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
