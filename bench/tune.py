"""Search launch configs of one case on the present device. No printing here.

For each kernel of a call the search goes from the best config so far to its nearest untried neighbours. A candidate
must compile without spills and pass the gate against fp64 before it is timed, alternately with the present config. It
wins only if its p80 lies below the present one's p20 by more than MARGIN: in the search, and once more at its end. What
comes out are rows of a tuned table (`kernels/launch_table.py`).
"""

import contextlib
import datetime
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

import tigon
from tigon.bench import run, timing, tune_space, verify
from tigon.bench.tune_space import Kernel
from tigon.bench.workloads import Workload, make
from tigon.kernels import launch, launch_table
from tigon.ops import dispatch
from tigon.registry import OPS

MARGIN = 0.03  # by which the slow fifth of a candidate must undercut the fast fifth of the present config
ROUND_SECONDS, LAST_SECONDS = 0.3, 2.0  # of rounds a candidate, and at the end
FASTER, NOT_FASTER, WRONG, FAILED = "faster", "not faster", "wrong", "failed"


@dataclass(frozen=True)
class Trial:
    """What became of one candidate. ratio: its time over the present config's, if it was timed."""

    fields: Mapping[str, object]
    outcome: str
    ratio: float | None = None
    why: str = ""


@dataclass
class Found:
    """The search of one kernel. best: the fields that won (none: what is there stays); row: of a tuned table."""

    kernel: Kernel
    trials: list[Trial] = field(default_factory=list)
    best: Mapping[str, object] | None = None
    row: dict | None = None
    ratio: float = 1.0

    def count(self, outcome: str) -> int:
        return sum(trial.outcome == outcome for trial in self.trials)


class Lost(RuntimeError):
    """The GPU cannot be used any more in this process."""


class Wrong(RuntimeError):
    """What is there gives wrong results already."""


def planned(
    op: str, sizes: Mapping[str, int], dtype: torch.dtype, mode: str, arch: int, variant: str | None
) -> list[Kernel]:
    """What there would be to search on an architecture; runs nothing, on any machine."""
    load = make(op, sizes, dtype, "meta", variant=variant)
    with launch.observe() as seen:
        tigon.explain(op, **load.call(), arch=arch)
    (name, table, given), *_ = seen
    calls = {"forward": [name], "backward": [OPS[op].backward], "step": [name, OPS[op].backward]}
    given = given | {"save": load.options.get("save", "hidden"), "states": False}
    return [kernel for call in calls[mode] for kernel in tune_space.kernels(call, table, given)]


def observed(call: Callable[[], object]) -> list[Kernel]:
    """What there is to search in a call: the kernels of every plan that it asks for, if they are launched."""
    call()
    with launch.observe() as seen, compiled() as built:
        call()
    launched = {name for name, _ in built}
    asked = {(op, arch, tuple(sizes.items())): sizes for op, arch, sizes in seen}
    return [
        kernel
        for (op, arch, _), sizes in asked.items()
        for kernel in tune_space.kernels(op, arch, sizes)
        if kernel.name in launched or not launched
    ]


@dataclass
class Bench:
    """How candidates of one case are judged: `gated` against the truth, `turns` by the timer."""

    gated: Workload
    known: verify.Truth
    backward: bool
    turns: timing.Calls
    device: str
    timer: Callable[..., Mapping[str, timing.Timing]]
    chosen: dict[str, dict[str, Mapping[str, object]]] = field(default_factory=dict)

    @contextlib.contextmanager
    def using(self, kernel: Kernel, fields: Mapping[str, object]) -> Iterator[None]:
        """Within the block, what other kernels won with, and these fields."""
        with contextlib.ExitStack() as stack:
            for op, names in self.chosen.items():
                stack.enter_context(launch.override(op, names))
            stack.enter_context(launch.override(kernel.op, {kernel.name: fields}))
            yield

    def check(self, kernel: Kernel, fields: Mapping[str, object]) -> Trial | None:
        """Why a candidate is out before it is timed; None if nothing is wrong with it."""
        try:
            with self.using(kernel, fields), compiled() as built:
                rows = verify.verify(self.gated, self.backward, known=self.known)
        except Exception as error:  # a compiler may fail in any way; it is reported
            self.alive(error)
            said = (str(error).splitlines() or [""])[0]
            return Trial(fields, FAILED, why=f"{type(error).__name__}: {said}")
        spilled = max((spills for name, spills in built if name == kernel.name), default=0)
        if spilled:
            return Trial(fields, FAILED, why=f"spills {spilled} registers")
        red = [row.name for row in rows if not row.ok]
        return Trial(fields, WRONG, why=", ".join(red)) if red else None

    def alive(self, error: Exception) -> None:
        """Lost if the GPU does not answer after an error: nothing after it could be believed."""
        if self.device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as broken:
                raise Lost(f"the GPU was lost: {error}") from broken

    def timed(self, kernel: Kernel, fields: Mapping[str, object], seconds: float) -> tuple:
        """(timing of the present config, of the candidate), measured alternately."""

        def under(given: Mapping[str, object], call: Callable[[], object]) -> object:
            with self.using(kernel, given):
                return call()

        pair = {"present": kernel.present, "candidate": fields}
        calls = {
            name: [partial(under, given, call) for call in self.turns]
            for name, given in pair.items()
        }
        times = self.timer(calls, self.device, budget=seconds)
        return times["present"], times["candidate"]


@contextlib.contextmanager
def compiled() -> Iterator[list[tuple[str, int]]]:
    """(kernel, spilled registers) of every Triton launch within the block; nothing where Triton interprets."""
    from triton.runtime.jit import JITFunction

    seen: list[tuple[str, int]] = []
    original = JITFunction.run

    def noting(self, *args, **kwargs):
        built = original(self, *args, **kwargs)
        seen.append((self.fn.__name__, getattr(built, "n_spills", 0) or 0))
        return built

    JITFunction.run = noting
    try:
        yield seen
    finally:
        JITFunction.run = original


def wins(present: timing.Timing, candidate: timing.Timing) -> bool:
    return candidate.p80 < (1 - MARGIN) * present.p20


def search(kernel: Kernel, bench: Bench, seconds: float) -> Found:
    """Try candidates, nearest to the best so far first, until none is left or the time is spent."""
    found, left = Found(kernel), list(kernel.candidates)
    best, ratio, end = kernel.present, 1.0, time.perf_counter() + seconds
    while left and time.perf_counter() < end:
        fields = min(left, key=partial(tune_space.distance, kernel.name, best))
        left.remove(fields)
        trial = bench.check(kernel, fields)
        if trial is None:
            present, candidate = bench.timed(kernel, fields, ROUND_SECONDS)
            outcome = FASTER if wins(present, candidate) else NOT_FASTER
            trial = Trial(fields, outcome, candidate.median / present.median)
            if outcome == FASTER and trial.ratio < ratio:
                best, ratio = fields, trial.ratio
        found.trials.append(trial)
    if best is not kernel.present and ratio < 1:
        present, candidate = bench.timed(kernel, best, LAST_SECONDS)
        if wins(present, candidate):
            found.best, found.ratio = best, candidate.median / present.median
            found.row = {
                "op": kernel.op,
                "kernel": kernel.name,
                "when": kernel.when,
                "config": dict(best),
                "evidence": evidence(present, candidate, bench.device),
            }
    return found


def evidence(present: timing.Timing, candidate: timing.Timing, device: str) -> dict[str, object]:
    """Both times in seconds, where and when, and what with."""
    import triton

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu (Triton's interpreter)"
    versions = {
        "tigon": tigon.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    return {
        "seconds": candidate.median,
        "baseline_seconds": present.median,
        "method": candidate.method,
        "gpu": name,
        "date": datetime.date.today().isoformat(),
        "versions": versions,
    }


def tune(
    op: str,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    device: str,
    mode: str = "forward",
    variant: str | None = None,
    seed: int = 0,
    seconds: float = 60.0,
    timer: Callable[..., Mapping[str, timing.Timing]] = timing.measure,
) -> Iterator[Found]:
    """Search the kernels of one case, one after the other; winners stay on for those that follow.

    RuntimeError where the call takes no Triton kernel, Wrong, Lost; ValueError where no row could be followed.
    """
    if dispatch.is_batch_invariant():
        raise ValueError("rows of a tuned table are not for batch-invariant mode: switch it off")
    backward = mode != "forward"
    workload = make(op, sizes, dtype, device, seed, variant)
    chosen = tigon.explain(op, **workload.call())
    if chosen.backend != "triton":
        raise RuntimeError(f"{op} would take no kernel here: {chosen.reason}")
    small = run.gate_sizes(op, sizes, mode, device, variant)
    gated = make(op, small, dtype, device, seed, variant)
    settings = run.Settings(mode=mode, seed=seed)
    turns = run.turns(workload.run, workload, settings, device)
    bench = Bench(gated, verify.truth(gated, backward), backward, turns, device, timer)
    red = [row.name for row in verify.verify(gated, backward, known=bench.known) if not row.ok]
    if red:
        raise Wrong(
            f"{op}: {', '.join(red)} is wrong before anything is changed; see: tigon check {op}"
        )
    kernels = observed(turns[0])
    if not all(kernel.sizes.get("aligned", True) for kernel in kernels):
        raise ValueError(
            f"{op}: rows of these sizes do not start on 16 bytes; tuned rows are for those that do"
        )
    end = time.perf_counter() + seconds
    for i, kernel in enumerate(kernels):
        share = (end - time.perf_counter()) / (len(kernels) - i)
        found = search(kernel, bench, share)
        if found.best:
            bench.chosen.setdefault(kernel.op, {})[kernel.name] = found.best
        yield found


def merged(path: Path, arch: int, rows: Sequence[Mapping]) -> dict:
    """The table at `path` with rows replaced where op, kernel and sizes are the same, added elsewhere.

    ValueError where the file is a table of another architecture, or none.
    """
    old = []
    if path.is_file():
        launch_table.read(path, arch)
        old = launch_table.parse(path)["rows"]

    def case(row: Mapping) -> tuple:
        return row["op"], row["kernel"], json.dumps(row["when"], sort_keys=True)

    new = {case(row) for row in rows}
    kept = [row for row in old if case(row) not in new]
    return {"schema": 1, "arch": arch, "rows": [*kept, *rows]}


def write(path: Path, arch: int, rows: Sequence[Mapping]) -> None:
    """Merge rows into the table at `path`, which is whole at every moment."""
    text = json.dumps(merged(path, arch, rows), indent=1) + "\n"
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    launch_table.read(part, arch)
    os.replace(part, path)
