"""Multi-token prediction: a drafter of one block that reads the model's hidden state and guesses the token after next.

    x_i  = W [norm_e(e_{i+1}), norm_h(h_i)]        the embedding first
    x_i += mixer_j(norm_j(x))_i                    for each of the block's layers: attention, then a mixture or an MLP
    h'_i = norm_f(x_i)                             lm_head(h'_i) predicts token i+2

h (b,l,d) is the model's hidden state after its last norm, e the embeddings of the tokens one place further, W (d,2d).
The next depth is the same block, with the same weights, on h' and the embeddings of the tokens yet one place further.
Embeddings and lm_head are the model's.

Sources: DeepSeek-V3 (arXiv 2412.19437), section 2.2; Nemotron 3 Super (2604.12374), which repeats one block. That h is
taken after the last norm is what vLLM's NemotronH does; the reports do not say it (UNCONFIRMED).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tigon.modules.linear import Linear
from tigon.modules.mamba2 import Mamba2
from tigon.modules.norm import RMSNorm
from tigon.modules.stack import run_layers
from tigon.ops import Routing


class MTP(nn.Module):
    """hidden and embeddings (b,l,d_model) -> hidden of the next depth (b,l,d_model).

    Args:
        d_model: width (d).
        blocks: one or more modules h -> h + mixer(norm(h)) with the arguments of `HybridLM`'s layers and attributes
            `norm` and `mixer`; the drafter's own parts are added to the first and the last.
        norm_eps: of its norms. residual_dtype: of the residual stream; None: the weights'.

    Parameters, as on disk: layers.0.enorm.weight and layers.0.hnorm.weight (d), layers.0.eh_proj.weight (d,2d),
    layers.i.norm.weight (d), layers.i.mixer.…, and layers.{last}.final_layernorm.weight (d).

    With FSDP2, shard the whole drafter (`tigon.modules.fully_shard(model.mtp)`), not its layers.

    Raises:
        ValueError: no block, or one with a recurrent state (Mamba2), which a drafter could not take back.
    """

    def __init__(
        self,
        d_model: int,
        blocks: Sequence[nn.Module],
        *,
        norm_eps: float = 1e-5,
        residual_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not blocks:
            raise ValueError("MTP: blocks is empty; it needs at least one")
        for i, block in enumerate(blocks):
            if isinstance(block.mixer, Mamba2):
                raise ValueError(
                    f"MTP: blocks[{i}] is a Mamba2 layer; a drafter may hold attention, MLP and LatentMoE"
                )
        self.d_model, self.residual_dtype = d_model, residual_dtype
        self.layers = nn.ModuleList(blocks)
        factory = {"device": device, "dtype": dtype}
        first, last = self.layers[0], self.layers[-1]
        first.enorm = RMSNorm(d_model, norm_eps, **factory)
        first.hnorm = RMSNorm(d_model, norm_eps, **factory)
        first.eh_proj = Linear(2 * d_model, d_model, bias=False, **factory)
        last.final_layernorm = RMSNorm(d_model, norm_eps, **factory)

    def forward(
        self,
        hidden: Tensor,
        embeddings: Tensor,
        cu_seqlens: Tensor | None = None,
        cache=None,
        *,
        slots: Tensor | None = None,
        num_tokens: Tensor | None = None,
        mask: Tensor | None = None,
        return_routing: bool = False,
        **options,
    ) -> Tensor | tuple[Tensor, list[Routing]]:
        """One depth: position i sees hidden_i, embeddings_i and, by attention, the positions before it.

        Args:
            hidden: (b,l,d), the backbone's output, or this module's own at the depth before.
            embeddings: (b,l,d), of the tokens that follow: the backbone's token after i, at the first depth.
            cache: of `allocate_cache`; the positions continue its sequences, and are counted.
            options: commit=False leaves the positions uncounted; for the attention layers, first_node (positions that
                earlier calls left uncounted) and ancestors (b,l) int32 (`tigon.modules.Attention`).
            The others: as in `HybridLM.forward`.

        Returns:
            (b,l,d) after final_layernorm; with return_routing also the `Routing` of every mixture.

        Raises:
            ValueError: shapes that do not fit; slots or num_tokens without a cache; no room in the cache.
        """
        if hidden.dim() != 3 or hidden.shape[-1] != self.d_model:
            raise ValueError(
                f"MTP: hidden has shape {tuple(hidden.shape)}, expected (b, l, {self.d_model})"
            )
        if embeddings.shape != hidden.shape:
            raise ValueError(
                f"MTP: embeddings has shape {tuple(embeddings.shape)}, expected hidden's {tuple(hidden.shape)}"
            )
        first, norm = self.layers[0], self.layers[-1].final_layernorm
        dtype = first.enorm.weight.dtype
        both = [first.enorm(embeddings.to(dtype)), first.hnorm(hidden.to(dtype))]
        h, routings = run_layers(
            self.layers,
            first.eh_proj(torch.cat(both, -1)).to(self.residual_dtype),
            cu_seqlens,
            cache,
            slots=slots,
            num_tokens=num_tokens,
            mask=mask,
            return_routing=return_routing,
            **options,
        )
        h = norm(h.to(norm.weight.dtype))
        return (h, routings) if return_routing else h

    def allocate_cache(
        self,
        slots: int,
        max_length: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        """A `HybridCache` of the drafter's layers: keys and values of `max_length` positions a slot."""
        from tigon.generation.cache import HybridCache  # it imports the modules

        weight = self.layers[0].enorm.weight
        return HybridCache(
            [layer.mixer for layer in self.layers],
            slots,
            max_length,
            dtype=dtype or weight.dtype,
            device=device or weight.device,
        )
