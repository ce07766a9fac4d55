"""How a model drops tokens between its layers: a schedule of counts, and scores to choose by.

Layer l runs on n_l tokens; the scores of the last mixer up to l choose n_{l+1} of them:

    attention layer    softmax weights of the asking tokens              `tigon.attention_token_scores`
    Mamba-2 layer      |C_t . B_s| dt_s, its hidden attention            `tigon.ssd_token_scores`

Text always stays. Source: "Stateful Token Reduction" (arXiv 2603.00198) for both scores, and for dropping in all layers
of a hybrid; who asks, and how weights become one score, is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from tigon.modules.reducible import bounds_of
from tigon.ops.token_scores import REDUCTIONS, Reduction

if TYPE_CHECKING:
    from tigon.models.reduction_schedule import ReductionPlan, ReductionSchedule

SCORES = {"both": "M*", "attention": "*", "ssm": "M"}
QUERIES = ("after", "last")


@dataclass(frozen=True)
class TokenReducer:
    """What a reduced call does.

    Args:
        schedule: a `tigon.models.reduction_schedule.ReductionSchedule`: the share of its reducible tokens that a
            sequence keeps, by layer. Shares are of what layer 0 gets.
        scores: "both"; "attention" or "ssm": only layers of that kind score, and the others hold the last such score.
            Before the first of them nothing is dropped.
        queries: who asks, "after": all text behind the last reducible token; "last": the last token alone.
            `Reducible.of(queries=…)` names others.
        decay: whether Mamba scores decay with distance.
        head_reduce, query_reduce: "mean" or "max".

    Raises:
        ValueError, TypeError: an argument, by name.
    """

    schedule: "ReductionSchedule"
    scores: Literal["both", "attention", "ssm"] = "both"
    queries: Literal["after", "last"] = "after"
    decay: bool = False
    head_reduce: Reduction = "mean"
    query_reduce: Reduction = "mean"

    def __post_init__(self):
        if not hasattr(self.schedule, "plan"):
            kind = type(self.schedule).__name__
            raise TypeError(f"TokenReducer: schedule must be a ReductionSchedule, got {kind}")
        for name, allowed in (
            ("scores", tuple(SCORES)),
            ("queries", QUERIES),
            ("head_reduce", REDUCTIONS),
            ("query_reduce", REDUCTIONS),
        ):
            if getattr(self, name) not in allowed:
                said = ", ".join(map(repr, allowed))
                raise ValueError(
                    f"TokenReducer: {name}={getattr(self, name)!r} is not one of {said}"
                )

    @property
    def scored(self) -> str:
        """Letters of the layers that score."""
        return SCORES[self.scores]

    def plan(self, layers, *, visual: int | None = None, text: int = 0) -> "ReductionPlan":
        """Of `ReductionSchedule.plan`, for the layers that score here."""
        return self.schedule.plan(layers, visual=visual, text=text, scored=self.scored)

    def counts(
        self, pattern: str, visual: Sequence[int], text: Sequence[int]
    ) -> tuple[tuple[int, ...], ...]:
        """Tokens of each sequence in each layer of a pattern: (layers)(sequences)."""
        shares = self.plan(pattern).shares
        each = [self.schedule.kept(shares, n) for n in visual]
        return tuple(
            tuple(kept[l] + t for kept, t in zip(each, text, strict=True))
            for l in range(len(pattern))
        )


def as_reducer(reduction) -> TokenReducer:
    """A reducer as it is, a schedule with the default options."""
    return reduction if isinstance(reduction, TokenReducer) else TokenReducer(reduction)


@dataclass(frozen=True)
class KeptTokens:
    """What a reduced call ran on.

    index: by layer, (n_l) int64 rows of the flattened input, ascending within a sequence. counts: by layer, tokens of
    each sequence, which lie one after the other. starts: where each sequence begins in the flattened input.
    queries: by layer that scores, inner rows (nq,…) of the tokens that `Reducible.of(queries=…)` named. asking: how
    many tokens of each sequence ask.
    """

    index: tuple[Tensor, ...]
    counts: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    queries: dict[int, Tensor] = field(default_factory=dict, repr=False)
    asking: tuple[int, ...] = ()

    def of(self, layer: int, sequence: int = 0) -> Tensor:
        """Places (n) int64 in its sequence of what one sequence has in one layer."""
        start, end = self.bounds(layer)[sequence : sequence + 2]
        return self.index[layer][start:end] - self.starts[sequence]

    def bounds(self, layer: int = -1) -> tuple[int, ...]:
        """(s+1): where the sequences lie among the tokens of a layer; of the last one: among the logits."""
        return bounds_of(self.counts[layer])

    def last(self) -> list[int]:
        """Rows of each sequence's last token among the logits."""
        return [end - 1 for end in self.bounds()[1:]]
