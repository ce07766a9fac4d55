"""Decode steps as CUDA graphs, by batch size.

A step is captured for a number of rows from a short list, for a number of drafts, and for a range of keys; rows that
are missing name slot -1 and touch nothing. The first step of each kind runs as it is and is the warm-up; the second
one is captured. All graphs share one memory pool: they run one after the other, on one stream.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tigon.generation.decoder import Decoder, Step
from tigon.generation.report import Clock

KEYS = 1024  # attention reads whole multiples of so many keys


def bucket(rows: int) -> int:
    """The smallest of 1, 2, 4, 8, 16, 24, 32, ... that is not below `rows`."""
    return 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8


@dataclass
class _Captured:
    graph: object
    slots: Tensor
    last: Tensor
    result: Step


class StepGraphs:
    """`Decoder.step` for CUDA: the same arguments and result."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.pool = None
        self.seen: set[tuple] = set()
        self.graphs: dict[tuple, _Captured] = {}

    def step(self, slots: Tensor, last: Tensor, drafts: int) -> Step:
        decoder, drafter, rows = self.decoder, self.decoder.drafter, slots.shape[0]
        missing = bucket(rows) - rows
        slots = torch.nn.functional.pad(slots, (0, missing), value=-1)
        last = torch.nn.functional.pad(last, (0, missing))
        decoder.bound_lengths(-(-decoder.longest // KEYS) * KEYS)
        if drafter is not None and not drafts and drafter.bound + 1 > drafter.room:
            drafter.catch_up(slots)  # so that a step without drafts never has to
        waiting = 0 if drafter is None else drafter.bound
        unread = drafter.unread if drafts else 0
        key = (slots.shape[0], drafts, decoder.cache._lengths.bound, unread)
        decoder.settled = key in self.graphs
        if key in self.seen and key not in self.graphs:
            self.graphs[key] = self._capture(slots, last, drafts)
        self.seen.add(key)
        captured = self.graphs.get(key)
        if captured is None:
            result = decoder.step(slots, last, drafts)
        else:
            with decoder.clock.part("step"):
                captured.slots.copy_(slots)
                captured.last.copy_(last)
                captured.graph.replay()
            result = captured.result
            if drafter is not None:  # what the host counts in a step
                drafter.bound = (0 if drafts else waiting) + result.tokens.shape[1]
        logprobs = None if result.logprobs is None else result.logprobs[:rows]
        return Step(result.tokens[:rows], result.accepted[:rows], logprobs)

    def _capture(self, slots: Tensor, last: Tensor, drafts: int) -> _Captured:
        decoder, drafter = self.decoder, self.decoder.drafter
        waiting = 0 if drafter is None else drafter.bound
        slots, last = slots.clone(), last.clone()
        graph = torch.cuda.CUDAGraph()
        clock, decoder.clock = decoder.clock, Clock(None)
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                result = decoder.step(slots, last, drafts)
        finally:
            decoder.clock = clock
        self.pool = self.pool or graph.pool()
        if drafter is not None:
            drafter.bound = waiting
        return _Captured(graph, slots, last, result)
