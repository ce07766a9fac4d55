"""Run every op once, on all cores, so that Triton's and CuPy's caches on disk hold the kernels.

    python -m tigon.bench.warm [--ops OP …] [--device cuda] [--dtypes bfloat16 …] [--sizes small|default|both]
                               [--peers] [--jobs N] [--budget SECONDS] [--json FILE]

Forward and, where there is one, backward of every variant; bf16 first. --peers: also the other packages that
`tigon bench --preset nemotron-3-super` would call, some of which compile for long. Processes are started afresh, as a
CUDA context does not survive a fork; one that dies takes one workload with it. As many run at once as the GPU's memory
holds; what does not fit beside the others all the same is tried again alone. Failures are listed and do not fail the
command. Without a GPU: --device cpu, for the reference.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path

PRESET = "nemotron-3-super"
DTYPES = ("bfloat16", "float16", "float32")
# Peers that compile nothing; some of them take tens of gigabytes.
EAGER = (
    "transformers",
    "transformers_grouped_mm",
    "torch_eager",
    "torch_scaled_mm",
    "torch_grouped_mm",
    "modelopt",
)
CONTEXT = 0.6e9  # bytes that a process takes before it does anything
DRAWN = 1.5  # times the bytes that an op moves: inputs are drawn in fp32, gradients stay
FULL = ("out of memory", "alloc_failed", "alloc failed")  # what CUDA, cuBLAS and drivers say


@dataclass(frozen=True)
class Task:
    """One workload: the registry's sizes ("default"), those of `tigon check` ("small"), or, by the peers, a model's."""

    op: str
    variant: str
    dtype: str
    sizes: str

    def __str__(self) -> str:
        return " ".join(filter(None, (self.op, self.variant, self.dtype, self.sizes)))


def tasks(ops: list[str], dtypes: list[str], sizes: list[str], peers: bool = False) -> list[Task]:
    """bf16 before the others, real sizes before small ones; peers after the first of these."""
    from tigon.bench.variants import variants

    found = [
        [Task(op, variant, dtype, size) for op in ops for variant in variants(op)]
        for dtype in dtypes
        for size in sizes
    ]
    if peers:
        found.insert(1, [Task(op, "", dtypes[0], "peers") for op in ops])
    return [task for group in found for task in group]


def run(task: Task, device: str) -> None:
    """Forward, and backward of the first output."""
    import torch

    from tigon.bench import workloads
    from tigon.registry import OPS

    if task.sizes == "peers":
        return run_peers(task, device)
    sizes = OPS[task.op].sizes if task.sizes == "default" else workloads.SMALL[task.op]
    work = workloads.make(
        task.op, sizes, getattr(torch, task.dtype), device, variant=task.variant or None
    )
    inputs = dict(work.inputs)
    if work.differentiable:
        inputs = {k: t.requires_grad_(t.is_floating_point()) for k, t in inputs.items()}
    out = work.run(inputs)[0]
    if out.requires_grad:
        out.backward(torch.ones_like(out))
    if device == "cuda":
        torch.cuda.synchronize()


def run_peers(task: Task, device: str) -> None:
    """Forward and training step of each peer that compiles; what fails is told by the benchmark, not here."""
    import torch

    from tigon.bench import presets, workloads
    from tigon.bench.peers import find
    from tigon.bench.run import call_of

    sizes = presets.sizes(task.op, PRESET, device)
    work = workloads.make(task.op, sizes, getattr(torch, task.dtype), device)
    ready, _ = find.find(work, ["auto", *(f"no_{name}" for name in EAGER)], device)
    for peer in ready.values():
        for mode in ("forward", "step") if work.differentiable else ("forward",):
            with suppress(Exception):
                call_of(work, mode, peer)()


def worker(pipe, device: str) -> None:
    """Runs what comes through the pipe; ends after an error that a CUDA context does not survive."""
    # Inductor's own processes, as many as there are cores, would be as many for each of ours.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    import torch

    torch.set_num_threads(1)
    while (task := pipe.recv()) is not None:
        error, dead = None, False
        try:
            run(task, device)
        except Exception as failure:  # whatever an op raises is listed
            error = said(failure)
        if device == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                dead = True
        pipe.send((error, dead))
        if dead:
            return


def said(failure: Exception) -> str:
    """One line; "out of memory" whoever says so: torch, a library, or the driver at the start of a process."""
    text = str(failure)
    if any(words in text.lower() for words in FULL):
        return "out of memory"
    return f"{type(failure).__name__}: {(text.splitlines() or [''])[0]}"


def needs(task: Task) -> float:
    """Bytes of the device's memory that a task takes at most, roughly."""
    from tigon.bench.work import work
    from tigon.registry import OPS

    if task.sizes == "small" or task.op not in OPS:
        return 0.0
    op, size = OPS[task.op], 4 if task.dtype == "float32" else 2
    mode = "step" if op.backward else "forward"
    return DRAWN * work(task.op, op.sizes, size, mode, task.variant or None).bytes


def room(device: str, jobs: int) -> float:
    """Bytes for tasks, contexts taken off; without bound where there is no GPU."""
    from tigon.cli import machine

    gpus = machine.facts()["driver"].get("gpus") if device == "cuda" else None
    return 0.9 * gpus[0]["memory_gib"] * 2**30 - jobs * CONTEXT if gpus else float("inf")


class Pool:
    """Processes that each have one task in hand. room: bytes that tasks may need together."""

    def __init__(self, jobs: int, device: str, room: float = float("inf")):
        self.context = multiprocessing.get_context("spawn")
        self.device = device
        self.jobs, self.room = jobs, room
        self.idle: list = []
        self.busy: dict = {}  # pipe: (process, task)
        self.done = 0
        self.failures: dict[str, str] = {}

    def start(self):
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=worker, args=(theirs, self.device), daemon=True)
        process.start()
        theirs.close()
        return ours, process

    def run(self, todo: list[Task], deadline: float) -> list[Task]:
        """What did not get its turn before the deadline."""
        todo = list(todo)
        while (todo or self.busy) and time.monotonic() < deadline:
            while len(self.busy) < self.jobs and (task := self.next(todo)):
                pipe, process = self.idle.pop() if self.idle else self.start()
                todo.remove(task)
                try:
                    pipe.send(task)
                except OSError:  # it died while it had nothing to do
                    todo.insert(0, task)
                    continue
                self.busy[pipe] = (process, task)
            for pipe in wait(list(self.busy), timeout=max(0.0, deadline - time.monotonic())):
                self.answer(pipe)
        late = [task for _, task in self.busy.values()] + todo
        self.close()
        return late

    def next(self, todo: list[Task]) -> Task | None:
        """The first task that fits beside those under way; alone each of them does."""
        left = self.room - sum(needs(task) for _, task in self.busy.values())
        fits = (task for task in todo if not self.busy or needs(task) <= left)
        return next(fits, None)

    def answer(self, pipe) -> None:
        process, task = self.busy.pop(pipe)
        try:
            error, dead = pipe.recv()
        except EOFError:
            process.join()
            self.failures[str(task)] = f"the process died, exit code {process.exitcode}"
            return
        if error:
            self.failures[str(task)] = error
        else:
            self.done += 1
        if not dead:
            self.idle.append((pipe, process))

    def close(self) -> None:
        """End all processes."""
        running = [process for process, _ in self.busy.values()]
        for process in running:
            process.kill()
        for pipe, process in self.idle:
            with suppress(OSError):
                pipe.send(None)
            running.append(process)
        for process in running:
            process.join(5)
            if process.is_alive():
                process.kill()
        self.idle, self.busy = [], {}


def warmed(todo: list[Task], device: str, jobs: int, budget: float) -> dict:
    """Run `todo`; {"done", "failures" by task, "left" (number), "seconds"}."""
    begin = time.monotonic()
    jobs = max(1, min(jobs, len(todo)))
    pool = Pool(jobs, device, room(device, jobs))
    late = pool.run(todo, begin + budget)
    crowded = [task for task in todo if pool.failures.get(str(task)) == "out of memory"]
    if crowded and not late:
        for task in crowded:
            del pool.failures[str(task)]
        pool.jobs = 1
        late = pool.run(crowded, begin + budget)
    return {
        "done": pool.done,
        "failures": pool.failures,
        "left": len(late),
        "first_left": [asdict(task) for task in late[:5]],
        "seconds": round(time.monotonic() - begin, 1),
    }


def main(argv: list[str] | None = None) -> int:
    from tigon.registry import PUBLIC

    parser = argparse.ArgumentParser(
        "python -m tigon.bench.warm", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--ops", nargs="+", choices=tuple(PUBLIC), default=list(PUBLIC), metavar="OP"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--sizes", choices=("small", "default", "both"))
    parser.add_argument("--peers", action="store_true", help="other packages too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--budget", type=float, default=600.0, help="seconds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    sizes = args.sizes or ("both" if args.device == "cuda" else "small")
    which = ["default", "small"] if sizes == "both" else [sizes]
    found = warmed(
        tasks(args.ops, args.dtypes, which, args.peers), args.device, args.jobs, args.budget
    )
    for name, error in found["failures"].items():
        print(f"{name}: {error}")
    print(
        f"{found['done']} workloads in {found['seconds']} s, {len(found['failures'])} failed, {found['left']} left"
    )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
