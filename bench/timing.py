"""Time and peak memory of calls, side by side.

Candidates run alternately, round after round, so that drift of the machine hits all alike. On a GPU a sample is the
time between two CUDA events around enough calls to last a millisecond, with nothing waited for inside; on a CPU it is a
clock around enough calls to last 20 ms ("wall", or "cpu": processor time of all threads, for a busy machine).
"""

import contextlib
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SAMPLE_SECONDS = {"cpu": 20e-3, "cuda": 1e-3}
LEAST_ROUNDS = 3


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


def _sample_cpu(call: Callable[[], object], times: int, clock: str) -> float:
    now = CLOCKS[clock]
    start = now()
    for _ in range(times):
        call()
    return (now() - start) / times


def _sample_cuda(call: Callable[[], object], times: int, clock: str) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def measure(
    calls: Mapping[str, Callable[[], object]],
    device: str,
    repeat: int | None = None,
    budget: float = 10.0,
    clock: str = "wall",
) -> dict[str, Timing]:
    """Time every call: `repeat` rounds, or as many as fit into `budget` seconds (3 at least)."""
    sample = _sample_cuda if device == "cuda" else _sample_cpu
    times = {}
    for name, call in calls.items():
        call()  # compiles, allocates, warms the caches
        once = sample(call, 1, "wall")
        times[name] = max(1, math.ceil(SAMPLE_SECONDS[device] / max(once, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    rounds = 0
    while rounds < (repeat or LEAST_ROUNDS) or (
        repeat is None and time.perf_counter() - begin < budget
    ):
        for name, call in calls.items():
            samples[name].append(sample(call, times[name], clock))
        rounds += 1
    method = "CUDA events" if device == "cuda" else f"{clock} clock"
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
