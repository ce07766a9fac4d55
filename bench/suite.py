"""What the pytest-benchmark suites of `bench/suites` run: a case is checked, then timed as it should be.

pytest-benchmark reads a clock before and after a function, and a function that launches kernels returns before they
have run. What is benchmarked here is therefore a batch: N calls and then one wait for the device. On a GPU CUDA events
around the calls give the device's own time beside it.

TIGON_BENCH_SIZES: "default" (the registry's), "small" (those of `tigon check`), or sizes by the API's letters,
"t=64,d=32". Unset, it is "default" on a GPU and "small" on a CPU.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch

from tigon.bench import workloads
from tigon.bench.run import call_of, gate_sizes
from tigon.bench.variants import variants
from tigon.bench.verify import verify
from tigon.bench.work import MODES, work
from tigon.cli.arguments import shape, sizes_of
from tigon.registry import OPS, PUBLIC

BATCH_SECONDS = 5e-3  # of calls between two waits, so that the wait itself does not count
MOST_CALLS = 1000


class Device(Protocol):
    """Where calls run: how to wait for them, and what to measure them with from the inside."""

    name: str

    def synchronize(self) -> None: ...

    def event(self) -> object | None:
        """A moment in the device's own order of work, None where there is none."""

    def seconds(self, start: object, end: object) -> float: ...


class Cpu:
    """Calls have ended when they return."""

    name = "cpu"

    def synchronize(self) -> None:
        pass

    def event(self) -> None:
        return None

    def seconds(self, start: None, end: None) -> float:
        raise NotImplementedError("a CPU has no events")


class Cuda:
    """Calls are launched; events are recorded between them."""

    name = "cuda"

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1e3


class Batch:
    """`calls` calls and one wait; the device's own times of each batch are kept, in seconds a call."""

    def __init__(self, call: Callable[[], object], device: Device, calls: int):
        self.call, self.device, self.calls = call, device, calls
        self.device_seconds: list[float] = []

    def __call__(self) -> None:
        start = self.device.event()
        for _ in range(self.calls):
            self.call()
        end = self.device.event()
        self.device.synchronize()
        if start is not None:
            self.device_seconds.append(self.device.seconds(start, end) / self.calls)


def here() -> Device:
    return Cuda() if torch.cuda.is_available() else Cpu()


def cases(family: str) -> Iterator[tuple[str, str, str]]:
    """(op, variant, mode) of every public op of a family; "backward" and "step" where there are gradients."""
    for op in (op.name for op in PUBLIC.values() if op.family == family):
        for variant in variants(op):
            load = workloads.make(
                op, workloads.SMALL[op], torch.bfloat16, "meta", variant=variant or None
            )
            for mode in MODES if load.differentiable else MODES[:1]:
                yield op, variant, mode


def sizes(op: str, device: str) -> dict[str, int]:
    """By TIGON_BENCH_SIZES. ValueError for letters that no op has."""
    wanted = os.environ.get("TIGON_BENCH_SIZES") or ("default" if device == "cuda" else "small")
    if wanted == "default":
        return dict(OPS[op].sizes)
    small = dict(workloads.SMALL[op])
    return small if wanted == "small" else sizes_of(op, shape(wanted), small, several=True)


def calls_a_batch(call: Callable[[], object], device: Device, clock: Callable[[], float]) -> int:
    """So many that a batch lasts BATCH_SECONDS."""
    call()  # compiles
    device.synchronize()
    begin = clock()
    call()
    device.synchronize()
    return max(1, min(MOST_CALLS, math.ceil(BATCH_SECONDS / max(clock() - begin, 1e-7))))


def facts(op: str, variant: str, mode: str, load: workloads.Workload) -> Mapping[str, object]:
    """What a reader of the numbers needs: the case, and the least that it must move and compute."""
    counted = work(op, load.sizes, load.dtype.itemsize, mode, variant or None)
    return {
        "op": op,
        "variant": variant,
        "mode": mode,
        "shape": dict(load.sizes),
        "dtype": str(load.dtype).removeprefix("torch."),
        "bytes": counted.bytes,
        "flops": counted.flops,
    }


def measure(
    benchmark, op: str, variant: str, mode: str, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Check one case and time it with pytest-benchmark. AssertionError where a result is wrong: it gets no time.

    The statistics are of a batch; `extra_info` holds calls a batch, the wall clock's and the device's seconds a call
    (the medians), bytes and FLOPs a call, and their rates.
    """
    device = here()
    wanted = sizes(op, device.name)
    small = gate_sizes(op, wanted, mode, device.name, variant or None)
    gated = workloads.make(op, small, dtype, device.name, variant=variant or None)
    wrong = [row.name for row in verify(gated, backward=mode != "forward") if not row.ok]
    assert not wrong, f"{op} {variant}: wrong {', '.join(wrong)}; no time is taken of it"
    load = workloads.make(op, wanted, dtype, device.name, variant=variant or None)
    call = call_of(load, mode)
    batch = Batch(call, device, calls_a_batch(call, device, benchmark._timer))
    benchmark.pedantic(batch, rounds=10, iterations=1, warmup_rounds=1)
    info = {**facts(op, variant, mode, load), "device": device.name, "calls": batch.calls}
    if benchmark.stats is not None:  # None with --benchmark-disable
        info["seconds"] = benchmark.stats.stats.median / batch.calls
    if batch.device_seconds:
        info["device_seconds"] = sorted(batch.device_seconds)[len(batch.device_seconds) // 2]
    if best := info.get("device_seconds", info.get("seconds")):
        info |= {"GB/s": info["bytes"] / best / 1e9, "TFLOP/s": info["flops"] / best / 1e12}
    benchmark.extra_info |= info
