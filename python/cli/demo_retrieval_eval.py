"""Two-hop retrieval while tokens are dropped: methods at equal layer-averages, their accuracy, where the needles are.

A method says for an average a which tokens each layer runs on. Those that score let all questions of a sequence ask, so
that they differ in where they drop and by which layers' scores, not in whom they listen to.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tigon import attention_token_scores, ssd_token_scores, video_redundancy_mask
from tigon.cli.demo_retrieval_task import FRAME, GRID, Retrieval
from tigon.models import HybridLM
from tigon.models.reduction_schedule import ReductionSchedule
from tigon.modules import TokenReducer
from tigon.modules.reducible import Reducible

AVERAGES = (0.5, 0.25, 0.125)
Z = 1.959964  # of a 95 % interval
WHOLE = TokenReducer(ReductionSchedule("fastv", final=1.0))  # drops nothing between the layers
LEAST = 1e-6  # share that the last layers keep at least: one token
TOP = 0.125  # of the visual tokens: among the best so many, a needle counts as found


@dataclass(frozen=True)
class Result:
    """right of `asked` questions; average: mean share of the visual tokens over the layers, as it came out; kept
    (layers,2): share of the questions whose first and whose second record is still there, by layer."""

    right: int
    asked: int
    average: float
    kept: Tensor

    @property
    def accuracy(self) -> float:
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.asked)


def wilson(right: int, asked: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927)."""
    share, spread = right / asked, Z * Z / asked
    middle = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def ours(average: float, scores: str = "both") -> TokenReducer:
    """A power ramp to an eighth of the average, so low that all three kinds of scores reach every average."""
    schedule = ReductionSchedule("power", average=average, final=average / 8)
    return TokenReducer(schedule, scores=scores)


def one_shot(average: float, layer: int, pattern: str) -> TokenReducer:
    """One cut before `layer`, by the last attention before it; FastV for layer 2."""
    final = (average * len(pattern) - layer) / (len(pattern) - layer)
    if final < 0:
        raise ValueError(f"{layer} whole layers of {len(pattern)} average more than {average}")
    schedule = ReductionSchedule("fastv", final=max(final, LEAST), layer=layer)
    return TokenReducer(schedule, scores="attention")


def pyramid(average: float, pattern: str) -> TokenReducer:
    """PyramidDrop: equal stages of depth, the same share kept from one to the next, by attention. Four stages, or the
    fewest that reach the average and do not end below LEAST."""

    def reducer(stages: int, final: float) -> TokenReducer:
        schedule = ReductionSchedule("stages", final=final, stages=stages)
        return TokenReducer(schedule, scores="attention")

    def mean(stages: int, final: float) -> float:
        return reducer(stages, final).plan(pattern).average

    for stages in range(4, len(pattern) + 1):
        if mean(stages, LEAST) <= average:
            low, high = LEAST, 1.0
            for _ in range(50):
                middle = (low + high) / 2
                low, high = (low, middle) if mean(stages, middle) > average else (middle, high)
            return reducer(stages, low)
    raise ValueError(f"no number of stages on {len(pattern)} layers averages {average}")


def random_mask(batch: Retrieval, average: float, generator: torch.Generator) -> Tensor:
    """(b,visual) bool, so many in each row."""
    place = torch.rand(batch.ids.shape[0], batch.visual, generator=generator).argsort(1).argsort(1)
    return place < round(average * batch.visual)


def query_free_mask(model: HybridLM, batch: Retrieval, average: float) -> Tensor:
    """(b,visual) bool: the tokens that differ most from the frame before (EVS on embeddings)."""
    grid = (batch.visual // FRAME, *GRID)
    embedded = model.backbone.embeddings(batch.ids[:, : batch.visual])
    return torch.stack([video_redundancy_mask(row, grid, 1 - average) for row in embedded])


Method = Callable[[Retrieval], tuple[TokenReducer, Tensor | None]]


def methods(model: HybridLM, average: float, seed: int) -> dict[str, Method]:
    """By name: the reducer of a batch and, if tokens go before layer 0, the mask of those that stay."""
    pattern, generator = model.config.pattern, torch.Generator().manual_seed(seed)
    late = len(pattern) // 4
    reducers = {
        "progressive, both scores": lambda: ours(average),
        "progressive, attention scores": lambda: ours(average, "attention"),
        "progressive, Mamba scores": lambda: ours(average, "ssm"),
        "one-shot early (FastV)": lambda: one_shot(average, 2, pattern),
        f"one-shot late (layer {late})": lambda: one_shot(average, late, pattern),
        "stages (PyramidDrop)": lambda: pyramid(average, pattern),
    }
    found: dict[str, Method] = {}
    for name, make in reducers.items():
        try:
            reducer = make()
            reducer.plan(pattern)
        except ValueError:
            continue  # this average is out of its reach on these layers
        found[name] = lambda batch, reducer=reducer: (reducer, None)
    found["random"] = lambda batch: (WHOLE, random_mask(batch, average, generator))
    found["query-free (EVS)"] = lambda batch: (WHOLE, query_free_mask(model, batch, average))
    return found


@torch.no_grad()
def measure(model: HybridLM, batches: Iterable[Retrieval], method: Method | None) -> Result:
    """Of a method, or of the whole model."""
    right = asked = 0
    averages, kept_needles = [], []
    for batch in batches:
        reducer, keep = (WHOLE, None) if method is None else method(batch)
        mask = torch.zeros(batch.ids.shape, dtype=torch.bool)
        mask[:, : batch.visual] = True
        if keep is not None:
            keep = torch.cat([keep, torch.ones_like(mask[:, batch.visual :])], 1)
        prompt = Reducible.of(mask, keep=keep)
        logits, kept = model(batch.ids, reduction=reducer, reducible=prompt, return_plan=True)
        questions = batch.values.shape[1]
        rows = torch.tensor(kept.bounds()[1:])[:, None] - questions + torch.arange(questions)
        right += (logits[0, rows].argmax(-1) == batch.values).sum().item()
        asked += batch.values.numel()
        text = batch.ids.numel() - mask.sum().item()
        averages += [(len(index) - text) / mask.sum().item() for index in kept.index]
        kept_needles.append(_kept_needles(batch, kept))
    by_layer = torch.stack(kept_needles).mean(0)
    return Result(right, asked, sum(averages) / len(averages), by_layer)


def _kept_needles(batch: Retrieval, kept) -> Tensor:
    """(layers,2): share of the questions with a copy of the record among a layer's tokens."""
    places = [batch.needle_tokens(hop) for hop in (0, 1)]
    rows = []
    for index in kept.index:
        there = torch.zeros(batch.ids.numel(), dtype=torch.bool)
        there[index] = True
        there = there.view(batch.ids.shape)[:, None, : batch.visual]
        rows.append([(there & place).any(-1).float().mean() for place in places])
    return torch.tensor(rows)


@torch.no_grad()
def needle_recall(model: HybridLM, batches: Iterable[Retrieval]) -> dict[int, Tensor]:
    """By mixer layer of the whole model: (2) share of the questions whose first and whose second record is among the
    best TOP of the visual tokens by that layer's score."""
    seen: dict[int, list[Tensor]] = {}
    for batch in batches:
        h = model.backbone.embeddings(batch.ids)
        places = [batch.needle_tokens(hop) for hop in (0, 1)]
        for l, layer in enumerate(model.backbone.layers):
            if model.config.pattern[l] not in "M*":
                h = layer(h)
                continue
            inner: list[tuple] = []
            h = layer(h, watch=lambda *tensors, inner=inner: inner.append(tensors))
            scores = _scores(batch, *inner[0])
            best = scores.topk(round(TOP * batch.visual), 1).indices
            top = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)[:, None]
            found = [(top & place).any(-1).float().mean() for place in places]
            seen.setdefault(l, []).append(torch.stack(found))
    return {l: torch.stack(found).mean(0) for l, found in seen.items()}


def _scores(batch: Retrieval, *inner: Tensor) -> Tensor:
    """(b,visual) scores of the visual tokens, all questions asking: of (q, k), or of (C, B, dt)."""
    b, length = batch.ids.shape
    rows = torch.arange(b * length).view(b, length)
    visual, questions = rows[:, : batch.visual], rows[:, batch.visual :]
    lists = {
        "query_index": questions.flatten(),
        "key_index": visual.flatten(),
        "cu_queries": torch.arange(b + 1) * questions.shape[1],
        "cu_keys": torch.arange(b + 1) * batch.visual,
    }
    bounds = torch.arange(b + 1) * length
    inner = [t.flatten(0, 1) for t in inner]
    if len(inner) == 2:
        return attention_token_scores(*inner, cu_seqlens_q=bounds, **lists).view(b, -1)
    return ssd_token_scores(*inner, cu_seqlens=bounds, **lists).view(b, -1)
