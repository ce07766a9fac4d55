"""A stack of residual blocks in which layer l + 1 runs on fewer tokens than layer l.

    scores = of layer l;  tokens = select_tokens(scores, n_{l+1});  h, … = compact_tokens(h, …)

The tokens of a batch lie packed, or dense where all rows have equally many. Every count is known to the host
(`TokenReducer.counts`), so nothing here waits for the device.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from tigon.modules.attention import Attention
from tigon.modules.latent_moe import LatentMoE
from tigon.modules.mamba2 import Mamba2
from tigon.modules.reducible import Reducible, bounds_of, places
from tigon.modules.token_reducer import KeptTokens, TokenReducer
from tigon.ops import attention_token_scores, compact_tokens, select_tokens, ssd_token_scores
from tigon.ops.replay import MAX_FLUSH
from tigon.ops.routing import Routing
from tigon.ops.ssd import MAX_STEP

MOST_STEPPED = max(
    MAX_FLUSH, MAX_STEP
)  # tokens of a dense row that a cache may take by the decode ops


def letters(layers: Iterable[nn.Module]) -> str:
    """The pattern of blocks, as in `HybridConfig.pattern`."""

    def letter(mixer: nn.Module) -> str:
        if isinstance(mixer, Mamba2):
            return "M"
        if isinstance(mixer, Attention):
            return "*"
        return "E" if isinstance(mixer, LatentMoE) else "-"

    return "".join(letter(layer.mixer) for layer in layers)


class Tokens:
    """The tokens of a reduced call on their way through the layers: what is left, and who is asked.

    `enter` the first layer, hand `watch(l, …)` to layer l, `leave` it for the next.
    """

    def __init__(self, reducer: TokenReducer, pattern: str, prompt: Reducible):
        self.reducer, self.pattern, self.prompt = reducer, pattern, prompt
        if reducer.decay and prompt.by_proxy:
            raise ValueError(
                "TokenReducer: decay=True has no meaning with queries before what they score"
            )
        self.counts = reducer.counts(pattern, prompt.visual, prompt.text)
        device = prompt.mask.device

        def put(values) -> Tensor:
            return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)

        self._bounds = put([bounds_of(n) for n in self.counts])
        self._counts = put(self.counts)
        asking = [min(n, 1) for n in prompt.queries] if self._asks_last() else prompt.queries
        self._asking = sum(asking)
        self._cu_queries = put(bounds_of(asking))
        # From the end of its sequence, the distance of every asking token; it stays, for text stays.
        self._asker = put([(r, n - i) for r, n in enumerate(asking) for i in range(n)] or [(0, 1)])
        # What a cache counts: dropped tokens too.
        self.counted, self.whole = put(prompt.lengths), put(bounds_of(prompt.lengths))
        self.scores: Tensor | None = None
        self.index: list[Tensor] = []
        self.queries: dict[int, Tensor] = {}

    def _asks_last(self) -> bool:
        return self.reducer.queries == "last" and not self.prompt.by_proxy

    def packed(self, l: int) -> Tensor | None:
        """(s+1) int64 bounds of the sequences in layer l; None where they are rows of a dense batch."""
        counts = self.counts[l]
        dense = len(set(counts)) == 1 and counts[0] > MOST_STEPPED and not self.prompt.packed
        return None if dense else self._bounds[l]

    def rows(self, l: int, h: Tensor) -> Tensor:
        """h (t,d) -> (b,l,d) or, packed, (1,t,d)."""
        return h.unflatten(0, (1 if self.packed(l) is not None else len(self.counts[l]), -1))

    def reduced(self, l: int) -> tuple[Tensor, int]:
        """Tokens of each sequence in layer l, on the device, and the most of them, on the host."""
        return self._counts[l], max(self.counts[l], default=0)

    def enter(self, h: Tensor) -> Tensor:
        """h (b,l,d) -> the tokens (t,d) that layer 0 gets."""
        prompt, total = self.prompt, sum(self.counts[0])
        h = h.flatten(0, 1)
        if prompt.alive is None:
            self._text, self._asks = ~prompt.mask, prompt.asks
            self.index.append(torch.arange(total, device=h.device))
            return h
        origin = places(prompt.alive, total)
        self.index.append(origin)
        self._text = ~prompt.mask[origin]
        self._asks = None if prompt.asks is None else prompt.asks[origin]
        return h[origin]

    def watch(self, l: int, mixer: nn.Module) -> Callable[..., None] | None:
        """What layer l is to call with its inner tensors: None where its scores choose nothing."""
        asks = self._asks is not None  # later calls may ask with what these asked
        if self.pattern[l] not in self.reducer.scored or not (asks or self._chooses(l)):
            return None
        if self.pattern[l] == "*":
            return self._score_attention
        return partial(self._score_ssd, A_log=mixer.A_log.detach())

    def _drops(self, l: int) -> bool:
        return l + 1 < len(self.counts) and self.counts[l + 1] != self.counts[l]

    def _chooses(self, l: int) -> bool:
        """Whether tokens are dropped behind layer l or one that holds its scores."""
        for later in range(l, len(self.pattern)):
            if later > l and self.pattern[later] in self.reducer.scored:
                return False
            if self._drops(later):
                return True
        return False

    def leave(self, l: int, h: Tensor) -> Tensor:
        """h (t,d) behind layer l -> the tokens that layer l + 1 gets."""
        if l + 1 == len(self.counts):
            return h
        if not self._drops(l):
            self.index.append(self.index[-1])
            return h
        selection = select_tokens(
            self.scores,
            self._counts[l + 1],
            cu_seqlens=self._bounds[l],
            protected=self._text,
            capacity=sum(self.counts[l + 1]),
        )
        moved = [h, self.index[-1], self._text, self.scores]
        if self._asks is not None:
            moved.append(self._asks)
        h, index, self._text, self.scores, *asks = compact_tokens(tuple(moved), selection)
        if asks:
            self._asks = asks[0]
        self.index.append(index)
        return h

    def kept(self) -> KeptTokens:
        """By layer, what it ran on."""
        starts = tuple(start for start, _ in self.prompt.spans)
        asked_by = self.prompt.asked_by
        queries = self.queries if asked_by is None else asked_by.queries
        return KeptTokens(tuple(self.index), self.counts, starts, queries, self.prompt.queries)

    def _lists(self) -> dict:
        """The asking tokens of the present layer, behind the rest; everybody is scored, and text stays whatever its
        score."""
        bounds = self._bounds[len(self.index) - 1]
        query = bounds[1:][self._asker[:, 0]] - self._asker[:, 1]
        return {
            "query_index": query[: self._asking],
            "key_index": torch.arange(self._text.shape[0], device=bounds.device),
            "cu_queries": self._cu_queries,
            "cu_keys": bounds,
            "head_reduce": self.reducer.head_reduce,
            "query_reduce": self.reducer.query_reduce,
        }

    def _proxies(self, inner: Tensor) -> Tensor | None:
        """Rows (nq,…) of queries that see all tokens of this call: of `inner` (t,…), or of an earlier call."""
        l = len(self.index) - 1
        if self.prompt.asked_by is not None:
            return self.prompt.asked_by.queries[l].to(inner.dtype)
        if self._asks is None:
            return None
        self.queries[l] = inner[places(self._asks, self._asking)]
        return self.queries[l]

    @torch.no_grad()
    def _score_attention(self, q: Tensor, k: Tensor) -> None:
        q, k = q.flatten(0, 1), k.flatten(0, 1)
        lists, proxies = self._lists(), self._proxies(q)
        of_q = {"cu_seqlens_q": lists["cu_keys"]}
        if proxies is not None:
            q = proxies
            lists["query_index"] = torch.arange(self._asking, device=q.device)
            of_q = {"cu_seqlens_q": self._cu_queries, "cu_seqlens_k": lists["cu_keys"]}
            of_q["causal"] = False
        self.scores = attention_token_scores(q, k, **of_q, **lists)

    @torch.no_grad()
    def _score_ssd(self, C: Tensor, B: Tensor, dt: Tensor, *, A_log: Tensor) -> None:
        C, B, dt = (t.flatten(0, 1) for t in (C, B, dt))
        lists, proxies = self._lists(), self._proxies(C)
        bounds = lists["cu_keys"]
        if proxies is not None:
            # A token sees none behind it, so proxies are put behind everything that they are to score.
            sequences = torch.arange(bounds.shape[0] - 1, device=bounds.device)
            each, more = C.shape[0], self._asking
            row = torch.repeat_interleave(sequences, bounds.diff(), output_size=each)
            asker = torch.repeat_interleave(sequences, self._cu_queries.diff(), output_size=more)
            key = lists["key_index"] + self._cu_queries[row]
            query = torch.arange(more, device=bounds.device) + bounds[1:][asker]

            def beside(t: Tensor, rows: Tensor | None = None) -> Tensor:
                out = t.new_zeros(each + more, *t.shape[1:])
                out[key] = t
                if rows is not None:
                    out[query] = rows
                return out

            C, B, dt = beside(C, proxies), beside(B), beside(dt)
            lists |= {"key_index": key, "query_index": query}
            bounds = bounds + self._cu_queries
        A = -torch.exp(A_log.to(dt.dtype)) if self.reducer.decay else None
        self.scores = ssd_token_scores(
            *(C, B, dt, A), cu_seqlens=bounds, decay=self.reducer.decay, **lists
        )


def run_reduced_layers(
    layers: Iterable[nn.Module],
    h: Tensor,
    prompt: Reducible,
    reducer: TokenReducer,
    cache=None,
    *,
    slots: Tensor | None = None,
    return_routing: bool = False,
) -> tuple[Tensor, list[Routing], KeptTokens]:
    """`run_layers` with reduction: h (b,l,d) -> (1,t,d) of the tokens that the last layer had, packed.

    Tokens lie as they came, packed or dense, until rows become uneven, or so short that a cache would take them for
    decoded ones; then packed. With a cache every layer's keys and values are those of its own tokens; its `lengths`
    count the whole sequences.

    Raises:
        ValueError: no room in the cache; options that contradict each other, by name.
    """
    layers, routings = list(layers), []
    if slots is not None and cache is None:
        raise ValueError("slots say which part of a cache is meant; pass cache")
    tokens = Tokens(reducer, letters(layers), prompt)
    layer_caches, where = [None] * len(layers), {}
    if cache is not None:
        counted, longest = tokens.counted, max(prompt.lengths, default=0)
        reduced = {l: tokens.reduced(l) for l in range(len(layers))}
        rows = counted.shape[0]
        cache.begin(rows, longest, slots, None, tokens.whole, reduced=reduced)
        layer_caches, where = cache.layers, {"slots": slots}
    h = tokens.enter(h)
    for l, (layer, layer_cache) in enumerate(zip(layers, layer_caches, strict=True)):
        options = dict(where)
        if tokens.pattern[l] in "M*":
            options["watch"] = tokens.watch(l, layer.mixer)
        if tokens.pattern[l] == "M" and cache is not None:
            options["counted"] = counted
        if return_routing and tokens.pattern[l] == "E":
            options["return_routing"] = True
        out = layer(tokens.rows(l, h), tokens.packed(l), layer_cache, **options)
        if "return_routing" in options:
            out, routing = out
            routings.append(routing)
        h = tokens.leave(l, out.flatten(0, 1))
    if cache is not None:
        cache.finish(slots, counted, longest, reduced)
    return h[None], routings, tokens.kept()
