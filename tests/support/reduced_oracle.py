"""A reduced run as it is defined: gather a layer's tokens, run the layer on them alone. And its choice, in loops."""

import torch
import torch.nn.functional as F

from tigon.reference.select_tokens import kept_of_sequence


def run_on(model, ids, kept, watch=None):
    """Logits (n,V) of the last layer's tokens of one sequence ids (l). kept: by layer, places in the sequence."""
    backbone = model.backbone
    h, before = backbone.embeddings(ids), torch.arange(ids.shape[0])
    for l, (block, now) in enumerate(zip(backbone.layers, kept, strict=True)):
        place = [before.tolist().index(i) for i in now.tolist()]
        h = h[place][None]
        if watch is not None:
            watch(l, block.mixer, block.norm(h))
        h, before = block(h)[0], now
    return model.logits(backbone.norm_f(h))


def with_more(kept, start, count):
    """The lists of a sequence that goes on with `count` tokens from place `start`, all of which stay."""
    more = torch.arange(start, start + count)
    return [torch.cat([now.to(torch.int64), more]) for now in kept]


def weights_of(mixer, x, decay=False, ahead=False):
    """(h,t,s) of one layer: the attention that it pays, all of it; x (1,n,d) is normed."""
    n = x.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool)
    causal = causal if ahead else causal.tril()
    if hasattr(mixer, "q_proj"):
        q = mixer.q_proj(x[0]).unflatten(-1, (mixer.num_heads, mixer.head_dim))
        k = mixer.k_proj(x[0]).unflatten(-1, (mixer.num_kv_heads, mixer.head_dim))
        k = k.repeat_interleave(mixer.num_heads // mixer.num_kv_heads, 1)
        scores = torch.einsum("thd,shd->hts", q, k) / mixer.head_dim**0.5
        return scores.masked_fill(~causal, -torch.inf).softmax(-1)
    _, _, _, xBC, dt = mixer.in_proj(x).split(mixer.splits, dim=-1)
    _, B, C = mixer._heads(mixer.conv1d(xBC))
    dt = F.softplus(dt[0] + mixer.dt_bias).clamp(*mixer.dt_limit)  # (n,h)
    each = mixer.nheads // mixer.ngroups
    weight = torch.einsum("tgn,sgn->gts", C[0], B[0]).abs().repeat_interleave(each, 0)
    weight = weight * dt.T[:, None]
    if decay:
        total = (dt * mixer._decay()).cumsum(0).T  # (h,n)
        weight = weight * (total[:, :, None] - total[:, None]).exp()
    return weight * causal


def choose(model, ids, mask, counts, scored="M*", last=False, decay=False, asks=None):
    """The kept lists of one sequence by the definition: the schedule's counts, full weights, sorting. asks: places of
    tokens that ask and see all others; None: the text behind the visual tokens, causal."""
    kept, held, pattern = [torch.arange(ids.shape[0])], None, model.config.pattern
    first = ids.shape[0] - 1 if last else int(mask.nonzero().max()) + 1
    for l in range(len(pattern) - 1):

        def watch(layer, mixer, x, l=l):
            nonlocal held
            if layer == l and pattern[l] in scored:
                rows = kept[-1] >= first if asks is None else torch.isin(kept[-1], asks)
                held = weights_of(mixer, x, decay, asks is not None)[:, rows].mean((0, 1))

        run_on(model, ids, kept + [kept[-1]] * (len(pattern) - len(kept)), watch)
        if counts[l + 1] == counts[l]:
            kept.append(kept[-1])
            continue
        stays = kept_of_sequence(held.tolist(), (~mask[kept[-1]]).tolist(), counts[l + 1], 1)
        held, now = held[stays], kept[-1][stays]
        kept.append(now)
    return kept
