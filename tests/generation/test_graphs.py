"""Steps as graphs: padded rows touch nothing, and the host counts on replay what it counts in a step.

Without a GPU a graph is a stand-in whose replay makes the step again from the captured inputs.
"""

from typing import ClassVar

import pytest
import torch

from tigon.generation import generate, graphs, loop


class Again:
    """A captured step that is really made at each replay; checks what the host would have to count."""

    def __init__(self, decoder, slots, last, drafts):
        self.decoder, self.slots, self.last, self.drafts = decoder, slots, last, drafts
        self.result, self.replays = None, 0

    def replay(self):
        new = self.decoder.step(self.slots, self.last, self.drafts)
        for field in ("tokens", "accepted", "logprobs"):
            value = getattr(new, field)
            if value is not None:
                getattr(self.result, field).copy_(value)
        self.replays += 1
        self.bound = self.decoder.drafter and self.decoder.drafter.bound


class Steps(graphs.StepGraphs):
    made: ClassVar[list["Steps"]] = []

    def __init__(self, decoder):
        super().__init__(decoder)
        Steps.made.append(self)

    def _capture(self, slots, last, drafts):
        graph = Again(self.decoder, slots.clone(), last.clone(), drafts)
        width = self.decoder.tree.depth if self.decoder.tree else drafts
        graph.result = graphs.Step(
            slots.new_zeros(slots.shape[0], width + 1),
            slots.new_zeros(slots.shape[0]),
            torch.zeros(slots.shape[0], width + 1),
        )
        return graphs._Captured(graph, graph.slots, graph.last, graph.result)

    def step(self, slots, last, drafts):
        result = super().step(slots, last, drafts)
        drafter = self.decoder.drafter
        for captured in self.graphs.values():
            if captured.graph.replays and drafter is not None and captured.graph.bound is not None:
                assert drafter.bound == captured.graph.bound
                captured.graph.bound = None
        return result


@pytest.mark.parametrize(
    "options",
    [
        dict(draft_tokens=3),
        dict(draft_tokens=0),
        dict(tree=(2, 2)),
        dict(draft_tokens=2, max_slots=3),
        dict(draft_tokens=2, rule="strict", temperature=1.0, seed=4),
    ],
    ids=str,
)
def test_graphs_of_bucketed_rows_give_the_text_of_plain_steps(model, prompts, options, monkeypatch):
    options = dict(logprobs=True) | options
    expected, logs = generate(model, prompts, 30, **options)
    monkeypatch.setattr(loop, "_steps", Steps)
    monkeypatch.setattr(graphs, "KEYS", 16)
    Steps.made.clear()
    got, found = generate(model, prompts, 30, **options)
    for a, b in zip((*expected, *logs), (*got, *found)):
        torch.testing.assert_close(a, b)
    (steps,) = Steps.made
    assert sum(c.graph.replays for c in steps.graphs.values()) > 5
    assert {key[0] for key in steps.seen} <= {1, 2, 4, 8}


def test_a_drafter_that_waits_reads_its_inbox_before_it_overflows(model, prompts, monkeypatch):
    """Many steps without drafts, then drafts: the text is as ever."""
    expected = generate(model, prompts, 60, draft_tokens=0)

    class Late(loop.DraftLength):
        def choose(self, rows):
            self.step += 1
            return 2 if self.step % 50 > 40 else 0

    monkeypatch.setattr(loop, "DraftLength", Late)
    monkeypatch.setattr(loop, "INBOX", 16)
    for steps in (loop._steps, Steps):
        monkeypatch.setattr(loop, "_steps", steps)
        got = generate(model, prompts, 60, draft_tokens="auto")
        assert all(torch.equal(a, b) for a, b in zip(expected, got))


def test_buckets_hold_their_rows():
    assert [graphs.bucket(n) for n in (1, 2, 3, 5, 8, 9, 16, 17, 33)] == [
        1,
        2,
        4,
        8,
        8,
        16,
        16,
        24,
        40,
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_captured_steps_give_the_text_of_eager_ones(single, prompts, monkeypatch):
    model, rows = single.cuda(), [p.cuda() for p in prompts]
    options = dict(rule="strict", temperature=1.0, seed=4, draft_tokens=3)
    captured = generate(model, rows, 40, **options)
    monkeypatch.setattr(loop, "_steps", lambda decoder: decoder)
    eager = generate(model, rows, 40, **options)
    assert all(torch.equal(a, b) for a, b in zip(captured, eager))
