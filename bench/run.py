"""One benchmark case: gate, then time and memory of Tigon and its peers. No printing here."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

import tigon
from tigon.bench import timing, verify
from tigon.bench.clocks import clocks
from tigon.bench.peers import find
from tigon.bench.records import SUSPECT
from tigon.bench.roof import Roof, operands
from tigon.bench.work import Work, work
from tigon.bench.workloads import Workload, make

GATE_FLOPS = {"cpu": 4e10, "cuda": 2e13}  # of the fp64 oracle, about ten seconds
GATE_BYTES = {"cpu": 2e9, "cuda": 2e10}
PEER_LIMIT = 0.05  # error of a peer; beyond it computes something else
SLOW = {"cpu": 60.0, "cuda": 1.0}  # seconds a call, beyond which a peer is not timed
LAUNCH_SECONDS = 20e-6  # shorter calls are timed by how fast Python can launch them
INVARIANT = "tigon, batch-invariant"


@dataclass(frozen=True)
class Settings:
    """How to measure. peers: names, "auto" or "none"; invariant: also batch-invariant mode; cold: inputs from memory;
    graph: replayed as a CUDA graph; repeat, budget, clock: of `timing.measure`."""

    mode: str = "forward"
    peers: Sequence[str] = ("auto",)
    seed: int = 0
    memory: bool = True
    invariant: bool = False
    cold: bool = True
    graph: bool = False
    repeat: int | None = None
    budget: float = 10.0
    clock: str = "wall"


@dataclass(frozen=True)
class Result:
    """One candidate of a case. error: of its outputs against fp64, the largest; peak: bytes, None if not measured;
    share: of the roof, None without one."""

    name: str
    time: timing.Timing
    peak: int | None
    error: float
    share: float | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """What was run and what came out. results are empty if the gate is red."""

    workload: Workload
    settings: Settings
    work: Work
    gate_sizes: Mapping[str, int]
    gate: list[verify.Row]
    roof: Roof | None = None
    results: list[Result] = field(default_factory=list)
    missing: Mapping[str, str] = field(default_factory=dict)
    clocks: Mapping[str, dict | None] | None = None

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.gate)

    @property
    def dtype(self) -> str:
        return str(self.workload.dtype).removeprefix("torch.")

    @property
    def roof_seconds(self) -> float | None:
        kind = operands(self.workload.op, self.workload.variant, self.dtype)
        return None if self.roof is None else self.roof.seconds(self.work, kind)


def gate_sizes(
    op: str, sizes: Mapping[str, int], mode: str, device: str, variant: str | None = None
) -> dict[str, int]:
    """`sizes` with so few tokens that the oracle ends in seconds, and so few experts that fp64 has room for them."""
    cut = dict(sizes)
    tokens = next((k for k in ("t", "rows", "l", "b", "m") if k in cut), None)
    chosen = cut["k"] if op == "moe_experts" else 1

    def counted() -> Work:
        return work(op, cut, 8, mode, variant)

    while "e" in cut and cut["e"] >= 2 * max(chosen, 8) and counted().bytes > GATE_BYTES[device]:
        cut["e"] //= 2
    while tokens and cut[tokens] > 1 and counted().flops > GATE_FLOPS[device]:
        cut[tokens] //= 2
    return cut


def call_of(
    load: Workload,
    mode: str,
    run: Callable | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    invariant: bool = False,
) -> Callable[[], object]:
    """What is timed: the forward, the gradients alone, or both ("step"). run and inputs: a peer's, a copy of them.

    Gradients are of all outputs that have any, but for final states, which training does not look at.
    """
    run, inputs = run or load.run, inputs or load.inputs
    within = tigon.batch_invariant if invariant else contextlib.nullcontext
    if mode == "forward":

        def forward():
            with within(), torch.no_grad():
                return run(inputs)

        return forward
    leaves = {k: t.detach().requires_grad_(t.is_floating_point()) for k, t in inputs.items()}
    wanted = [t for t in leaves.values() if t.requires_grad]

    def outputs() -> list[Tensor]:
        named = zip(load.outputs, run(leaves))
        return [t for name, t in named if t.requires_grad and not name.startswith("final_state")]

    with within():
        grads = [torch.randn_like(t) for t in outputs()]
    if mode == "backward":
        with within():
            kept = outputs()

        def backward():
            with within():
                return torch.autograd.grad(kept, wanted, grads, retain_graph=True)

        return backward

    def step():
        with within():
            return torch.autograd.grad(outputs(), wanted, grads)

    return step


def turns(
    run: Callable, workload: Workload, settings: Settings, device: str, invariant: bool = False
) -> timing.Calls:
    """Calls on copies of the inputs; on the inputs alone where caches may be warm."""
    held = sum(t.nbytes for t in workload.inputs.values())
    number = timing.copies(held, device) if settings.cold else 1
    inputs = [workload.inputs]
    inputs += [
        {k: t.detach().clone() for k, t in workload.inputs.items()} for _ in range(number - 1)
    ]
    return [call_of(workload, settings.mode, run, given, invariant) for given in inputs]


def run_case(
    op: str,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    device: str,
    settings: Settings = Settings(),
    variant: str | None = None,
    roof: Roof | None = None,
) -> Case:
    """Gate, then measure. ValueError where the op has no backward and the mode wants one."""
    mode, backward = settings.mode, settings.mode != "forward"
    counted = work(op, sizes, dtype.itemsize, mode, variant)
    small = gate_sizes(op, sizes, mode, device, variant)
    gated = make(op, small, dtype, device, settings.seed, variant)
    gate = verify.verify(gated, backward=backward)
    workload = make(op, sizes, dtype, device, settings.seed, variant)
    case = Case(workload, settings, counted, small, gate, roof)
    if not case.ok:
        return case
    calls = {"tigon": turns(workload.run, workload, settings, device)}
    errors = {"tigon": max(row.error for row in gate)}
    if settings.invariant:
        calls[INVARIANT] = turns(workload.run, workload, settings, device, invariant=True)
        errors[INVARIANT] = invariant_error(gated)
    ready, missing = find.find(gated, settings.peers, device)
    exact = verify.oracle(gated, False)[0] if ready else {}
    # A peer is built for one workload: its options, offsets or seeds, may be as long as the inputs.
    timed = ready if small == dict(sizes) else find.find(workload, [*ready], device)[0]
    for name, run in ready.items():
        try:
            errors[name] = peer_error(gated, run, exact)
            peer = turns(timed[name], workload, settings, device)
            peer[0]()
            if (seconds := timing.sample(peer, 1, device)) > SLOW[device]:
                missing[name] = f"too slow to be timed: {seconds:.1f} s a call"
                continue
            if settings.graph:
                timing.graphed(peer, len(peer))
            calls[name] = peer
        except Exception as error:  # a peer may fail in any way; it is reported
            missing[name] = (
                f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            )
        if name in missing and device == "cuda":
            peer = None
            torch.cuda.empty_cache()  # others need it, also what allocates without torch
    before = clocks() if device == "cuda" else None
    times = timing.measure(
        calls, device, settings.repeat, settings.budget, settings.clock, settings.graph
    )
    after = clocks() if device == "cuda" else None
    results = [
        Result(
            name,
            times[name],
            timing.peak_memory(peers[0], device) if settings.memory else None,
            errors[name],
            case.roof_seconds and case.roof_seconds / times[name].median,
        )
        for name, peers in calls.items()
    ]
    results = [replace(r, flags=tuple(flags(r, results))) for r in results]
    seen = None if before is None else {"before": before, "after": after}
    return replace(case, results=results, missing=missing, clocks=seen)


def invariant_error(gated: Workload) -> float:
    with tigon.batch_invariant():
        return max(row.error for row in verify.verify(gated, backward=False, repeat=False))


def peer_error(gated: Workload, run: Callable, exact: Mapping[str, Tensor]) -> float:
    """The largest error of a peer's outputs."""
    got, _ = verify.results(gated, False, run)
    return max(verify.difference(got[k], exact[k]) for k in got)


def flags(result: Result, results: Sequence[Result]) -> list[str]:
    """What a reader must know before believing a time."""
    found = []
    if result.error > PEER_LIMIT:
        found.append("differs from the oracle")
    if result.share is not None and result.share > 1:
        found.append(f"suspect: {result.share:.0%} of the roof")
    if result.name == "tigon":
        slower = {r.name: r.time.median / result.time.median for r in results}
        name = max(slower, key=slower.__getitem__)
        if slower[name] > SUSPECT:
            found.append(f"suspect: {slower[name]:.0f}x faster than {name}")
    if result.time.method == "CUDA events" and result.time.median < LAUNCH_SECONDS:
        found.append("launch-bound: measure with --graph")
    return found


def record(
    case: Case, preset: str | None = None, backend: str | None = None, sweep: str | None = None
) -> dict:
    """The case as plain data: one of `cases` of a record (`records`)."""
    settings, workload = case.settings, case.workload
    kind = operands(workload.op, workload.variant, case.dtype)
    return {
        "case": {
            "op": workload.op,
            "variant": workload.variant,
            "mode": settings.mode,
            "preset": preset,
            "shape": dict(workload.sizes),
            "dtype": case.dtype,
            "seed": settings.seed,
            "cold": settings.cold,
            "graph": settings.graph,
            "backend": backend,
            "sweep": sweep,
        },
        "work": asdict(case.work)
        | {
            "roof_s": case.roof_seconds,
            "bound": None if case.roof is None else case.roof.bound(case.work, kind),
        },
        "check": {
            "ok": case.ok,
            "shape": dict(case.gate_sizes),
            "rows": [asdict(row) for row in case.gate],
        },
        "results": [asdict(result) for result in case.results],
        "missing": dict(case.missing),
        "clocks": case.clocks,
    }
