"""Time and peak memory of calls, side by side.

Candidates run alternately, round after round, so that drift of the machine hits all alike. On a GPU a sample is the
time between two CUDA events around enough calls to last a millisecond, with nothing waited for inside, or around one
replay of a CUDA graph that holds as many; on a CPU it is a clock around enough calls to last 20 ms ("wall", or "cpu":
processor time of all threads, for a busy machine).

A candidate is a list of calls that take turns: with as many copies of the inputs as overflow the cache (`copies`),
each call finds its inputs in memory, as a layer of a model does.
"""

import contextlib
import gc
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

Calls = Sequence[Callable[[], object]]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SAMPLE_SECONDS = {"cpu": 20e-3, "cuda": 1e-3}
LEAST_ROUNDS = 3
HEAT_SECONDS = 0.2  # of work before the first sample, so that a GPU's clocks have risen
MOST_COPIES = 64


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over n samples."""

    median: float
    p20: float
    p80: float
    n: int
    method: str


def quantile(ordered: list[float], share: float) -> float:
    """Linear interpolation between the neighbours."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def summary(samples: list[float], method: str) -> Timing:
    ordered = sorted(samples)
    return Timing(*(quantile(ordered, q) for q in (0.5, 0.2, 0.8)), len(ordered), method)


def cache_bytes(device: str) -> int:
    """The last cache before memory: L2 of a GPU; of a CPU what Linux says, at most 64 MB of it, or 32 MB."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    with contextlib.suppress(OSError, ValueError):
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return min(int(text.removesuffix("K")) * 2**10, 2**26)
    return 2**25


def copies(held: int, device: str) -> int:
    """How many copies of `held` bytes of inputs overflow the cache twice, 64 at most."""
    return max(1, min(MOST_COPIES, -(-2 * cache_bytes(device) // max(1, held))))


def sample(turns: Calls, times: int, device: str, clock: str = "wall") -> float:
    """Seconds a call, over `times` calls in turn."""
    turn = itertools.cycle(turns)
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            next(turn)()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / times
    now = CLOCKS[clock]
    begin = now()
    for _ in range(times):
        next(turn)()
    return (now() - begin) / times


def calibrated(turns: Calls, device: str) -> int:
    """How many calls make a sample long enough for its clock; at least one a copy where that costs little."""
    turns[0]()  # compiles, allocates, warms the caches
    once = sample(turns, 1, device)
    times = max(1, math.ceil(SAMPLE_SECONDS[device] / max(once, 1e-7)))
    return max(times, len(turns)) if once * len(turns) < 10 * SAMPLE_SECONDS[device] else times


def graphed(turns: Calls, times: int) -> Callable[[], None]:
    """The replay of a CUDA graph of `times` calls in turn. RuntimeError where a call cannot be captured."""
    here = torch.cuda.current_stream()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in turns:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    turn = itertools.cycle(turns)
    try:
        with torch.cuda.graph(graph):
            for _ in range(times):
                next(turn)()
    except Exception:
        _forget_capture(here)
        raise
    return graph.replay


def _forget_capture(here: torch.cuda.Stream) -> None:
    """After a capture that failed: torch leaves its stream the current one, and its generator of random numbers as if
    it went on, so that every later draw would fail. A capture that ends ends that too."""
    torch.cuda.set_stream(here)
    with contextlib.suppress(RuntimeError):
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device="cuda")
    torch.cuda.set_stream(here)


def _heated(calls: Mapping[str, Calls]) -> None:
    """Keep the GPU busy until its clocks have risen."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < HEAT_SECONDS:
        for turns in calls.values():
            turns[0]()
        torch.cuda.synchronize()


def measure(
    calls: Mapping[str, Callable[[], object] | Calls],
    device: str,
    repeat: int | None = None,
    budget: float = 10.0,
    clock: str = "wall",
    graph: bool = False,
) -> dict[str, Timing]:
    """Time every candidate: `repeat` rounds, or as many as fit into `budget` seconds (3 at least)."""
    lists = {name: [c] if callable(c) else list(c) for name, c in calls.items()}
    times = {name: calibrated(turns, device) for name, turns in lists.items()}
    if device == "cuda":
        _heated(lists)
    per_sample = dict(times)
    if graph:
        lists = {name: [graphed(turns, times[name])] for name, turns in lists.items()}
        times = dict.fromkeys(times, 1)
    samples: dict[str, list[float]] = {name: [] for name in lists}
    begin = time.perf_counter()
    rounds = 0
    while rounds < (repeat or LEAST_ROUNDS) or (
        repeat is None and time.perf_counter() - begin < budget
    ):
        for name, turns in lists.items():
            seconds = sample(turns, times[name], device, clock)
            samples[name].append(seconds * times[name] / per_sample[name])
        rounds += 1
    method = {True: "CUDA graph replay", False: "CUDA events"}[graph]
    if device != "cuda":
        method = f"{clock} clock"
    return {name: summary(found, method) for name, found in samples.items()}


@contextlib.contextmanager
def quiet_stderr():
    """For C++ that writes to file descriptor 2, as the profiler does at its start and its end."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as sink:
            os.dup2(sink.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_memory(call: Callable[[], object], device: str) -> int:
    """Bytes that torch allocates during the call at their highest, over what was there before; results included.

    On the CPU from the profiler's record of every allocation (what a library keeps for itself is not in it).
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        quiet_stderr(),
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
    ):
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest
