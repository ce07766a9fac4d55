"""A language model of Mamba-2, attention, MLP and LatentMoE layers, of the Nemotron-H and Nemotron 3 kind.

    h = embeddings(ids);  h = h + mixer_i(norm_i(h)) for each layer;  logits = lm_head(norm_f(h))

Parameter names are those of NemotronH checkpoints on disk (`backbone.layers.0.mixer.in_proj.weight`, …).
Sources: NVIDIA 2025, "Nemotron-H" (arXiv 2504.03624) and "Nemotron 3" (2512.20856).
"""

from os import PathLike
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tigon.generation.cache import HybridCache
from tigon.models.config import HybridConfig
from tigon.models.presets import preset
from tigon.modules import MLP, MTP, Attention, Experts, LatentMoE, Linear, Mamba2, RMSNorm, Router
from tigon.modules.latent_moe import router_losses, total_counts
from tigon.modules.mtp_loss import MTPLosses, mtp_losses
from tigon.modules.reduced_stack import run_reduced_layers
from tigon.modules.reducible import Reducible
from tigon.modules.stack import run_layers
from tigon.modules.token_reducer import TokenReducer, as_reducer
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
        reduction: TokenReducer | None = None,
        reducible: Tensor | Reducible | None = None,
        return_plan: bool = False,
        **undoable,
    ) -> Tensor | tuple:
        """(b,l,d_model); with a reduction (1,t,d_model). Arguments as in `HybridLM.forward`."""
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected (b, l)")
        if reduction is not None:
            if mask is not None or undoable:
                names = ", ".join([*undoable, *(["mask"] if mask is not None else [])])
                raise ValueError(f"reduction and {names} cannot be combined")
            prompt = _reducible(input_ids, reducible, cu_seqlens, num_tokens)
            h, routings, kept = run_reduced_layers(
                self.layers,
                self.embeddings(input_ids).to(self.residual_dtype),
                *(prompt, as_reducer(reduction), cache),
                slots=slots,
                return_routing=return_routing,
            )
            found = [self.norm_f(h.to(self.norm_f.weight.dtype))]
            found += [routings] * return_routing + [kept] * return_plan
            return found[0] if len(found) == 1 else tuple(found)
        if reducible is not None or return_plan:
            raise ValueError("reducible and return_plan are of a reduced call; pass reduction")
        h, routings = run_layers(
            self.layers,
            self.embeddings(input_ids).to(self.residual_dtype),
            cu_seqlens,
            cache,
            slots=slots,
            num_tokens=num_tokens,
            mask=mask,
            return_routing=return_routing,
            **undoable,
        )
        h = self.norm_f(h.to(self.norm_f.weight.dtype))
        return (h, routings) if return_routing else h


def _reducible(ids: Tensor, reducible, cu_seqlens, num_tokens) -> Reducible:
    """What a caller gave, fitting its input."""
    if isinstance(reducible, Tensor):
        if reducible.shape != ids.shape:
            given, wanted = tuple(reducible.shape), tuple(ids.shape)
            raise ValueError(f"reducible has shape {given}, input_ids {wanted}")
        return Reducible.of(reducible, cu_seqlens, num_tokens)
    if not isinstance(reducible, Reducible):
        kind = type(reducible).__name__
        raise TypeError(f"reduction needs reducible, a bool mask or a Reducible; got {kind}")
    if reducible.mask.shape[0] != ids.numel():
        raise ValueError(
            f"reducible is of {reducible.mask.shape[0]} tokens, input_ids of {ids.numel()}"
        )
    return reducible


class Losses(NamedTuple):
    """Of `HybridLM.losses`: total, what to minimize; cross_entropy, mean nats of the next token; mtp (depths) mean nats
    of the further ones, or None; routings, of the backbone's E layers, then of the drafter's, depth by depth."""

    total: Tensor
    cross_entropy: Tensor
    mtp: Tensor | None
    routings: list[Routing]


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
        self.lm_head = Linear(
            config.hidden_size, config.vocab_size, bias=False, device=device, dtype=dtype
        )
        self.tie_weights()
        is_meta = torch.device(device or "cpu").type == "meta"
        if not is_meta:
            self._reset(self.backbone, self.lm_head)
        # Last, so that for one seed the rest is the same with a drafter and without.
        self.mtp = _drafter(config, device=device, dtype=dtype)
        if self.mtp is not None and not is_meta:
            self._reset(self.mtp)

    def tie_weights(self) -> None:
        """Make lm_head share the embeddings, if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight

    def reset_parameters(self) -> None:
        """Normal weights of initializer_range; what is added to the residual is scaled by 1/sqrt(layers) (GPT-2)."""
        self._reset(self)

    @torch.no_grad()
    def _reset(self, *parts: nn.Module) -> None:
        std = self.config.initializer_range
        scale = len(self.config.pattern) ** -0.5 if self.config.rescale_prenorm_residual else 1.0
        for name, module in (item for part in parts for item in part.named_modules()):
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
        reduction: TokenReducer | None = None,
        reducible: Tensor | Reducible | None = None,
        return_plan: bool = False,
        **undoable,
    ) -> Tensor | tuple:
        """Logits (b,l,V) in fp32, or the mean cross entropy in nats if labels are given; in training mode the router
        losses of the config and those of multi-token prediction are added to it (see `losses`).

        Args:
            input_ids: (b,l) int64; packed sequences: (1,l).
            cu_seqlens: (s+1) int32 or int64 bounds of the packed sequences.
            cache: of `allocate_cache`; the tokens continue its sequences and are added to them.
            labels: (b,l) int64, the token that follows each input token; -100 where none counts.
            slots: (b) or (s) int64, the cache's slot of each row or sequence; None: slot i. Negative: padding.
            num_tokens: (b) int32 or int64, real tokens of each row of a dense batch padded on the right.
            mask: (b,l) bool, False at padding on the right that no expert is to see or count; num_tokens says it too.
            return_routing: also return the `Routing` of every E layer, for `update_bias` and statistics; where the
                losses of multi-token prediction are added, those of its E layers follow, depth by depth.
            reduction: a `tigon.modules.TokenReducer`, or the `ReductionSchedule` of one: tokens are dropped between the
                layers. Logits, and labels that count, are then those of the tokens that the last layer has: (1,t,V),
                packed; return_plan says which. A cache goes on counting all tokens of its sequences.
            reducible: (b,l) bool, the tokens that may be dropped, read by the host once; or a `Reducible` prepared
                before, which knows the lengths (cu_seqlens and num_tokens are then not looked at).
            return_plan: also return, last, the `KeptTokens`.
            undoable: commit=False leaves the tokens uncounted until `cache.commit` says how many of them stay;
                ancestors (b,l) int32 makes them nodes of a tree (`Mamba2.forward`). Both need a cache with a rollback.

        Raises:
            ValueError: arguments that contradict each other, or no room in the cache, by name.
        """
        where = {"slots": slots, "num_tokens": num_tokens, "mask": mask}
        if labels is not None and undoable:
            raise ValueError(f"labels and {', '.join(undoable)}: a loss is of tokens that stay")
        if labels is not None:
            where |= {"reduction": reduction, "reducible": reducible}
            found = self.losses(
                input_ids, labels, cu_seqlens, cache, return_routing=return_routing, **where
            )
            return (found.total, found.routings) if return_routing else found.total
        where |= undoable | {"return_routing": return_routing, "return_plan": return_plan}
        where |= {"reduction": reduction, "reducible": reducible}
        hidden = self.backbone(input_ids, cu_seqlens, cache, **where)
        if isinstance(hidden, tuple):
            return self.logits(hidden[0]), *hidden[1:]
        return self.logits(hidden)

    def losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        cu_seqlens: Tensor | None = None,
        cache: HybridCache | None = None,
        *,
        slots: Tensor | None = None,
        num_tokens: Tensor | None = None,
        mask: Tensor | None = None,
        return_routing: bool = False,
        reduction: TokenReducer | None = None,
        reducible: Tensor | Reducible | None = None,
    ) -> Losses:
        """The loss of `forward` and its parts; arguments as there.

            total = cross entropy + mtp_loss_coef mean_d(loss_d) + router losses        in training mode, else the first

        loss_d, d = 1..mtp_repeats, is the mean cross entropy of the token d places after the next. A call with a cache
        has none: the drafter would not see what the cache holds. With a reduction both are of the tokens that the last
        layer has, one after the other; the label of a dropped token does not count.
        """
        config, train = self.config, self.training
        coefs = (config.router_aux_loss_coef, config.router_z_loss_coef)
        predicts = train and cache is None and self.mtp is not None and config.mtp_loss_coef
        keeps = return_routing or (train and any(coefs))
        where = {"slots": slots, "num_tokens": num_tokens, "mask": mask}
        if reduction is not None:
            where |= {"reduction": reduction, "reducible": reducible, "return_plan": True}
        found = self.backbone(input_ids, cu_seqlens, cache, return_routing=keeps, **where)
        hidden, *rest = found if isinstance(found, tuple) else (found,)
        routings = rest[0] if keeps else []
        if reduction is not None:
            kept = rest[-1]
            input_ids, labels = (t.flatten()[kept.index[-1]][None] for t in (input_ids, labels))
            cu_seqlens = torch.tensor(kept.bounds(), device=labels.device)
        nats = F.cross_entropy(
            self.logits(hidden).flatten(0, 1), labels.flatten(), ignore_index=-100
        )
        total, further = nats, None
        if predicts:
            found = self.mtp_losses(
                *(hidden, input_ids, labels, cu_seqlens),
                mask=mask,
                metrics=False,
                return_routing=keeps,
            )
            further, routings = found.losses, [*routings, *found.routings]
            total = total + config.mtp_loss_coef * further.mean()
        if train and any(coefs):
            total = total + router_losses(routings, *coefs)
        return Losses(total, nats, further, routings)

    def mtp_losses(
        self,
        hidden: Tensor,
        input_ids: Tensor,
        labels: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        depths: int | None = None,
        mask: Tensor | None = None,
        metrics: bool = True,
        return_routing: bool = False,
    ) -> MTPLosses:
        """Losses of multi-token prediction by depth, and how often it is right when it is given the true tokens.

        Args:
            hidden: (b,l,d_model), the backbone's output for input_ids. Detached, and with config.mtp_detach_head, the
                drafter alone gets gradients.
            depths: how many further tokens; config.mtp_repeats if None.
            metrics: also find the shares of right tokens.
            The others: as in `forward`.

        Raises:
            ValueError: a model without multi-token prediction.
        """
        if self.mtp is None:
            raise ValueError("mtp_losses: the model has no multi-token prediction (mtp_pattern='')")
        embed, logits = self.backbone.embeddings, self.logits
        if self.config.mtp_detach_head:
            fixed = {n: p.detach() for n, p in self.lm_head.named_parameters()}

            def embed(ids: Tensor) -> Tensor:
                return self.backbone.embeddings(ids).detach()

            def logits(h: Tensor) -> Tensor:
                return _at_least_fp32(functional_call(self.lm_head, fixed, (h,)))

        return mtp_losses(
            *(self.mtp, embed, logits, hidden, input_ids, labels, cu_seqlens),
            depths=self.config.mtp_repeats if depths is None else depths,
            mask=mask,
            metrics=metrics,
            return_routing=return_routing,
        )

    @torch.no_grad()
    def update_bias(self, counts: Tensor, rate: float = 1e-3, group=None) -> None:
        """`LatentMoE.update_bias` of every E layer, after the optimizer's step.

        counts: (E layers, e) integers: `torch.stack([r.counts for r in routings])` of `return_routing`, added up over
        micro-batches: the backbone's E layers, or these and after them the drafter's of every depth, which are added
        up. group: processes to add them up over as well, in one all-reduce.

        Raises:
            ValueError: another number of rows.
        """
        mixers = _mixtures(self.backbone.layers)
        drafter = [] if self.mtp is None else _mixtures(self.mtp.layers)
        own, more = len(mixers), counts.shape[0] - len(mixers)
        if more < 0 or more % max(len(drafter), 1) or (more and not drafter):
            and_drafter = f", or these and {len(drafter)} a depth" if drafter else ""
            raise ValueError(
                f"update_bias: counts has {counts.shape[0]} rows, expected {own}{and_drafter}"
            )
        counts = total_counts(counts, group)
        rows = [*counts[:own]]
        if more:
            rows += [*counts[own:].unflatten(0, (-1, len(drafter))).sum(0)]
            mixers += drafter
        for mixer, layer_counts in zip(mixers, rows, strict=True):
            mixer.update_bias(layer_counts, rate)

    def allocate_cache(
        self,
        slots: int,
        max_length: int,
        *,
        dtype: torch.dtype | None = None,
        ssm_dtype: torch.dtype | None = None,
        **options,
    ) -> HybridCache:
        """A `HybridCache` on the model's device; recurrent states in config.mamba_ssm_cache_dtype if ssm_dtype is None.

        options: rounding, rollback, tokens, flush of `HybridCache`.
        """
        if ssm_dtype is None:
            ssm_dtype = getattr(torch, self.config.mamba_ssm_cache_dtype)
        if dtype is None:
            dtype = self.backbone.norm_f.weight.dtype  # a quantized layer's has no dtype to go by
        mixers = [layer.mixer for layer in self.backbone.layers]
        device = self.lm_head.weight.device
        return HybridCache(
            mixers, slots, max_length, dtype=dtype, ssm_dtype=ssm_dtype, device=device, **options
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
        mtp: bool | None = None,
    ) -> "HybridLM":
        """Read a NemotronH checkpoint, quantized or not; see `tigon.models.checkpoint.load`.

        mtp: False leaves multi-token prediction out, True insists on it; None takes what is there.
        """
        from tigon.models.checkpoint import load

        return load(cls, path, device=device, dtype=dtype, mtp=mtp)

    def save_pretrained(self, path: str | PathLike, max_shard_size: int | str = "5GB") -> None:
        """Write a checkpoint that transformers loads; see `tigon.models.checkpoint.save`."""
        from tigon.models.checkpoint import save

        save(self, path, max_shard_size=max_shard_size)


def _mixtures(layers: nn.ModuleList) -> list[LatentMoE]:
    return [layer.mixer for layer in layers if isinstance(layer.mixer, LatentMoE)]


def _at_least_fp32(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
