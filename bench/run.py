"""One benchmark case: gate, then time and memory of Tigon and its peers. No printing here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

import tigon
from tigon.bench import timing, verify
from tigon.bench.peers import find
from tigon.bench.work import Work, work
from tigon.bench.workloads import Workload, make

GATE_FLOPS = {"cpu": 4e10, "cuda": 2e13}  # of the fp64 oracle, about ten seconds
PEER_LIMIT = 0.05  # error of a peer; beyond it computes something else
INVARIANT = "tigon, batch-invariant"


@dataclass(frozen=True)
class Result:
    """One candidate of a case. error: of its outputs against fp64, the largest; peak: bytes, None if not measured."""

    name: str
    time: timing.Timing
    peak: int | None
    error: float
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """What was run and what came out. gate is empty if it was skipped; results are empty if the gate is red."""

    workload: Workload
    mode: str
    work: Work
    gate_sizes: Mapping[str, int]
    gate: list[verify.Row]
    results: list[Result] = field(default_factory=list)
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.gate)


def gate_sizes(
    op: str, sizes: Mapping[str, int], mode: str, device: str, variant: str | None = None
) -> dict[str, int]:
    """`sizes` with so many tokens that the oracle ends in seconds."""
    cut = dict(sizes)
    tokens = next((k for k in ("t", "rows", "l", "b", "m") if k in cut), None)
    while tokens and cut[tokens] > 1 and work(op, cut, 8, mode, variant).flops > GATE_FLOPS[device]:
        cut[tokens] //= 2
    return cut


def call_of(run: Callable, inputs: Mapping[str, Tensor], mode: str) -> Callable[[], object]:
    """What is timed: the forward, or forward and backward of the first output."""
    if mode == "forward":

        def forward():
            with torch.no_grad():
                return run(inputs)

        return forward
    leaves = {k: t.detach().requires_grad_(t.is_floating_point()) for k, t in inputs.items()}
    wanted = [t for t in leaves.values() if t.requires_grad]
    with torch.no_grad():
        grad = torch.randn_like(run(inputs)[0])

    def step():
        return torch.autograd.grad(run(leaves)[0], wanted, grad)

    return step


def batch_invariant(run: Callable) -> Callable:
    """`run` in batch-invariant mode."""

    def invariant(inputs):
        with tigon.batch_invariant():
            return run(inputs)

    return invariant


def run_case(
    op: str,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    device: str,
    mode: str = "forward",
    peers: Sequence[str] = ("auto",),
    seed: int = 0,
    memory: bool = True,
    variant: str | None = None,
    invariant: bool = False,
    **budget,
) -> Case:
    """Gate, then measure. invariant: also what batch-invariant mode costs. budget: of `timing.measure`."""
    counted = work(op, sizes, dtype.itemsize, mode, variant)
    small = gate_sizes(op, sizes, mode, device, variant)
    gated = make(op, small, dtype, device, seed, variant)
    gate = verify.verify(gated, backward=mode == "backward")
    workload = make(op, sizes, dtype, device, seed, variant)
    case = Case(workload, mode, counted, small, gate)
    if not case.ok:
        return case
    ready, missing = find.find(gated, peers, device)
    errors = {"tigon": max(row.error for row in gate)}
    runs: dict[str, Callable] = {"tigon": workload.run}
    if invariant:
        ready = {INVARIANT: batch_invariant(workload.run), **ready}
    exact = verify.oracle(gated, False)[0] if ready else {}
    for name, run in ready.items():
        try:
            got, _ = verify.results(gated, False, run)
            errors[name] = max(verify.difference(got[k], exact[k]) for k in got)
            runs[name] = run
        except Exception as error:  # a peer may fail in any way; it is reported
            missing[name] = f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"
    calls = {name: call_of(run, workload.inputs, mode) for name, run in runs.items()}
    times = timing.measure(calls, device, **budget)
    results = [
        Result(
            name,
            times[name],
            timing.peak_memory(call, device) if memory else None,
            errors[name],
            ("differs from the oracle",) if errors[name] > PEER_LIMIT else (),
        )
        for name, call in calls.items()
    ]
    return Case(workload, mode, counted, small, gate, results, missing)


def record(case: Case, command: str, environment: Mapping) -> dict:
    """The case as plain data (schema version 1)."""
    return {
        "schema": 1,
        "env": dict(environment),
        "case": {
            "op": case.workload.op,
            "variant": case.workload.variant,
            "mode": case.mode,
            "shape": dict(case.workload.sizes),
            "dtype": str(case.workload.dtype).removeprefix("torch."),
        },
        "work": asdict(case.work),
        "check": {
            "ok": case.ok,
            "shape": dict(case.gate_sizes),
            "rows": [asdict(row) for row in case.gate],
        },
        "results": [asdict(result) for result in case.results],
        "missing": dict(case.missing),
        "repro": command,
    }
