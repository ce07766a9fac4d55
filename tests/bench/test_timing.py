"""Timing: turns over copies of the inputs, samples long enough for their clock, CUDA events and graphs."""

import contextlib
import time
from types import SimpleNamespace

import pytest
import torch

from tigon.bench import timing


def test_quantiles_interpolate():
    found = timing.summary([5.0, 1.0, 2.0, 3.0, 4.0], "")
    assert (found.median, found.p20, found.p80, found.n) == (3.0, 1.8, 4.2, 5)


def test_measured_time_is_that_of_one_call():
    found = timing.measure({"sleep": lambda: time.sleep(2e-3)}, "cpu", repeat=3)["sleep"]
    assert 2e-3 <= found.median < 2e-2
    busy = timing.measure({"sleep": lambda: time.sleep(2e-3)}, "cpu", repeat=3, clock="cpu")
    assert busy["sleep"].median < 1e-3


def test_calls_take_turns_so_that_no_input_stays_in_the_cache():
    seen = []
    calls = [lambda name=name: seen.append(name) for name in "abc"]
    timing.sample(calls, 7, "cpu")
    assert "".join(seen) == "abcabca"


def test_copies_overflow_the_cache_twice(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1000)
    assert [timing.copies(held, "cpu") for held in (3000, 2000, 1999, 500, 1)] == [1, 1, 2, 4, 64]


def test_this_machine_has_a_cache():
    assert 2**18 <= timing.cache_bytes("cpu") <= 2**26


def test_peak_memory_counts_what_lived_at_once():
    def call():
        first = torch.ones(1000)
        second = first + 1
        del first
        return second * 2

    assert 8000 <= timing.peak_memory(call, "cpu") < 8100  # and a few bytes of scalars


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose calls take 100 us each: work is queued, events read its clock, a graph replays what it captured."""
    gpu = SimpleNamespace(now=0.0, capturing=None, launched=0)

    def call():
        gpu.launched += 1
        if gpu.capturing is None:
            gpu.now += 100e-6
        else:
            gpu.capturing.held += 1

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = gpu.now

        def synchronize(self):
            self.ready = True

        def elapsed_time(self, end):
            assert end.ready, "read before the GPU got there"
            return 1e3 * (end.at - self.at)

    class Graph:
        held = 0

        def replay(self):
            gpu.now += self.held * 90e-6  # no launch costs

    class Capture:
        def __init__(self, graph):
            self.graph = graph

        def __enter__(self):
            gpu.capturing = self.graph

        def __exit__(self, *error):
            gpu.capturing = None

    class Stream:
        def wait_stream(self, other):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    for name, stand_in in {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": Capture,
        "Stream": Stream,
        "stream": lambda stream: stream,
        "current_stream": Stream,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(timing, "HEAT_SECONDS", 1e-3)
    gpu.call = call
    return gpu


def test_events_time_one_call_with_nothing_waited_for_inside(gpu):
    found = timing.measure({"call": gpu.call}, "cuda", repeat=3)["call"]
    assert found.median == pytest.approx(100e-6) and found.method == "CUDA events"
    gpu.launched = 0
    timing.sample([gpu.call], 5, "cuda")
    assert gpu.launched == 5


def test_a_graph_holds_a_sample_of_calls_and_its_time_is_that_of_one(gpu):
    found = timing.measure({"call": [gpu.call] * 3}, "cuda", repeat=3, graph=True)["call"]
    assert found.median == pytest.approx(90e-6) and found.method == "CUDA graph replay"
    launched = gpu.launched
    replay = timing.graphed([gpu.call], 4)
    replay()
    assert gpu.launched - launched == 5  # one to warm up, four captured, none replayed


def test_after_a_capture_that_fails_torch_is_as_before(gpu, monkeypatch):
    """torch ends a capture that an error has broken by another error, without going back to the stream before it."""
    state = SimpleNamespace(current="ours", drawing=True)

    class Capture:
        def __init__(self, graph):
            self.before = state.current

        def __enter__(self):
            state.current, state.drawing = (
                "capture",
                False,
            )  # of random numbers, outside of a capture

        def __exit__(self, *error):
            if error[0]:
                raise RuntimeError("capture was invalidated")
            state.current, state.drawing = self.before, True

    def reads():
        if state.current == "capture":
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(wait_stream=lambda _: None))
    ours = SimpleNamespace(wait_stream=lambda _: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: ours)

    def set_stream(stream):
        assert stream is ours
        state.current = "ours"

    monkeypatch.setattr(torch.cuda, "set_stream", set_stream)
    monkeypatch.setattr(torch, "zeros", lambda *args, **options: None)
    with pytest.raises(RuntimeError, match="invalidated"):
        timing.graphed([reads], 3)
    assert state.current == "ours" and state.drawing
