"""What a call of `generate` did and how long its parts took."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Report:
    """prompt_tokens, new_tokens: of all rows. steps: calls of the model after the prompts; rows: those of all steps,
    and kept: the tokens that they brought. seconds: of everything. parts, in seconds: prefill, draft, model (the pass
    that verifies), accept, commit; on a GPU "step" for steps that ran as graphs, whose parts cannot be told apart.

    offered[i], accepted[i]: how often a draft at depth i+1 was offered, and was kept. draft_lengths: steps by K.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    rows: int = 0
    kept: int = 0
    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    offered: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    draft_lengths: Counter = field(default_factory=Counter)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the steps over the time that is not prefill."""
        return self.kept / max(self.seconds - self.parts.get("prefill", 0.0), 1e-12)

    @property
    def acceptance(self) -> list[float]:
        """By depth: the share of the offered drafts that were kept, with all before them."""
        return [kept / max(n, 1) for kept, n in zip(self.accepted, self.offered)]

    @property
    def acceptance_length(self) -> float:
        """New tokens a row and step, the model's own one among them."""
        return self.kept / max(self.rows, 1)

    def count(self, drafts: int, accepted: list[int], kept: int) -> None:
        """One step with `drafts` drafts a row, of which each row accepted so many; kept: tokens of all rows, without
        those behind a stop."""
        self.steps += 1
        self.kept += kept
        self.rows += len(accepted)
        self.draft_lengths[drafts] += 1
        grow = drafts - len(self.offered)
        self.offered += [0] * grow
        self.accepted += [0] * grow
        for depth in range(drafts):
            self.offered[depth] += len(accepted)
            self.accepted[depth] += sum(n > depth for n in accepted)

    def __str__(self) -> str:
        depths = " ".join(f"{100 * a:.0f}%" for a in self.acceptance) or "no drafts"
        parts = ", ".join(f"{name} {1e3 * s:.0f} ms" for name, s in self.parts.items())
        return (
            f"{self.new_tokens} new tokens in {self.seconds:.2f} s, {self.tokens_per_second:.0f} a second after the "
            f"prompts; {self.acceptance_length:.2f} a step; drafts kept by depth: {depths}; {parts}"
        )


class Clock:
    """Seconds by part: on a GPU between events on the stream, which are read at the end; elsewhere by the wall. On no
    device (None) nothing is timed."""

    def __init__(self, device: torch.device | None):
        self.kind = None if device is None else device.type
        self.spans: list[tuple[str, object, object]] = []
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if self.kind is None:
            yield
            return
        if self.kind == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            yield
            events[1].record()
            self.spans.append((name, *events))
            return
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Of all parts so far; waits for the GPU."""
        if self.spans:
            torch.cuda.synchronize()
        for name, first, last in self.spans:
            self.seconds[name] = self.seconds.get(name, 0.0) + first.elapsed_time(last) / 1e3
        self.spans = []
        return dict(self.seconds)
