"""The stage bench: each op beside the peers, and one record of all."""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stage import Failed, OutOfTime, Stage, interpreter, venv

# torch.compile takes longer than all else, so its turn is among the extras.
BENCH = "--preset nemotron-3-super --peers auto,no-torch_compiled --time-budget 0.6"
CASE = 50  # seconds in which the next case must end; a process starts, and measures the roof, before its first
BARE = ("--peers", "none")
LEAST = 15  # seconds in which something can still be measured


@dataclass(frozen=True)
class Job:
    """One process, unless something goes wrong. extra: more arguments; such a job is run if there is time."""

    mode: str
    ops: tuple[str, ...]
    extra: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join((self.mode, *self.extra))

    @property
    def stem(self) -> str:
        return "_".join((*self.extra, self.mode)).replace("--", "")

    def files(self, parts: Path) -> list[Path]:
        return sorted(parts.glob(f"{self.stem}_[0-9][0-9][0-9].json"))

    def finished(self, parts: Path) -> set[str]:
        """The ops of which there are right results."""
        cases = [case for file in self.files(parts) for case in cases_of(file)]
        return {case["case"]["op"] for case in cases if case["check"]["ok"]}


def cases_of(file: Path) -> list[dict]:
    with suppress(OSError, ValueError):
        return json.loads(file.read_text())["cases"]
    return []


def jobs(ops: list[dict], extras: bool) -> list[Job]:
    """A process a mode. extras: then short calls as CUDA graphs, torch.compile beside the others, and all variants."""
    names = tuple(op["op"] for op in ops)
    train = tuple(op["op"] for op in ops if op["backward"] == "yes")
    found = [Job("forward", names), Job("step", train)]
    if extras:
        short = tuple(op["op"] for op in ops if op["kernel"] == "cuda")
        found += [Job("forward", short, ("--graph",))]
        found += [
            Job(mode, given, ("--peers", "auto"))
            for mode, given in (("forward", names), ("step", train))
        ]
        found += [Job("forward", names, ("--variant", "all"))]
    return [job for job in found if job.ops]


def bench(stage: Stage) -> str:
    """A process a mode. Where it ends early another one measures what is missing: first, alone, the op it was at."""
    parts = stage.folder / "bench"
    if stage.again and parts.is_dir():
        shutil.rmtree(parts)
    parts.mkdir(exist_ok=True)
    peers(stage)
    given = os.environ.get("BENCH")
    arguments = (BENCH if given is None else given).split()
    bad, late, over = {}, [], []
    for job in jobs(stage.ops(), extras=given is None and stage.device == "cuda"):
        failed, left = run(stage, job, parts, arguments)
        bad |= failed
        if left:
            (over if job.extra else late).append(f"{job}: {' '.join(left)}")
    count = join(parts, stage.folder / "bench.json")
    stage.facts |= {"cases": count, "failed": bad, "not_run": late + over, "arguments": arguments}
    note = f"{count} cases"
    note += f"; failed: {', '.join(f'{op} ({why})' for op, why in bad.items())}" if bad else ""
    if alone := stage.facts.get("without_peers"):
        note += f"; without peers: {', '.join(alone)}"
    note += f"; not run: {', '.join(late)}" if late else ""
    note += f"; no time for {len(over)} extras" if over else ""
    if bad:
        raise Failed(note)
    if late:
        raise OutOfTime(note)
    return note


def run(
    stage: Stage, job: Job, parts: Path, arguments: list[str]
) -> tuple[dict[str, str], list[str]]:
    """(why ops failed, ops for which there was no time). What an earlier call has measured is not measured again.

    An op without a result after which the process went on has failed. One at which it ended, or after which nothing
    came, is tried alone, as an illegal address of another may be the reason, and then without peers, as may they.
    """
    before = job.finished(parts)
    left, bad, how = [op for op in job.ops if op not in before], {}, "all"
    while left and stage.left() >= LEAST * (2 if job.extra else 1):
        now = left if how == "all" else left[:1]
        code, cases = measure(
            stage, job, now, parts, [*arguments, *job.extra, *BARE * (how == "bare")]
        )
        wrong = {case["case"]["op"] for case in cases if not case["check"]["ok"]}
        bad |= {f"{op} {job}": "wrong result" for op in sorted(wrong)}
        seen = {case["case"]["op"] for case in cases}
        last = max((i for i, op in enumerate(now) if op in seen), default=-1)
        failed = [op for op in now[:last] if op not in seen]
        bad |= {f"{op} {job}": "no result: see the log" for op in failed}
        left = [op for op in left if op not in seen and op not in failed]
        if last == len(now) - 1:
            if how == "bare":
                stage.facts.setdefault("without_peers", []).append(f"{now[0]} {job}")
            how = "all"
        elif code is None and stage.left() < LEAST:
            break
        elif how == "bare":
            why = "too slow" if code is None else f"exit code {code}: see the log"
            bad[f"{left.pop(0)} {job}"] = why
            how = "all"
        else:
            how = "bare" if code is None or len(now) == 1 else "alone"
    return bad, left


def measure(
    stage: Stage, job: Job, ops: list[str], parts: Path, arguments: list[str]
) -> tuple[int | None, list[dict]]:
    """(the exit code of `tigon bench`, None if it was too slow; the cases that it has measured)."""
    file = parts / f"{job.stem}_{len(job.files(parts)):03}.json"
    command = ["bench", *ops, "--mode", job.mode, "--device", stage.device, "--json", file]
    code, box = None, CASE * (2 if job.extra else 1)  # extras compile
    with suppress(OutOfTime):
        code = stage.tigon(*command, *arguments, box=box, watch=file)
    return code, cases_of(file)


def peers(stage: Stage) -> None:
    """Wheels that were carried here, into the folder where the bench looks for peers; best effort."""
    wheels = os.environ.get("WHEELS")
    if not wheels:
        return
    folder, found = venv(stage) / "peers", {}
    pip = [interpreter(stage), "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    for wheel in sorted(Path(wheels).resolve().glob("*.whl")):
        command = [*pip, "--upgrade", "--find-links", wheel.parent, "--target", folder, wheel]
        code = stage.call(*command, box=60)
        found[wheel.name] = "installed" if code == 0 else f"not installed: exit code {code}"
    stage.facts["wheels"] = found


def join(parts: Path, into: Path) -> int:
    """One record of all parts; the number of its cases. Of a case that was measured twice the one with more results."""
    files = sorted(parts.glob("*.json"))
    records, cases = [json.loads(file.read_text()) for file in files], {}
    if not records:
        into.unlink(missing_ok=True)
        return 0
    for record in records:
        for case in record["cases"]:
            key = json.dumps(case["case"], sort_keys=True)
            if key not in cases or len(case["results"]) >= len(cases[key]["results"]):
                cases[key] = case
    whole = {**records[-1], "command": "bench/on_gpu.sh bench", "cases": list(cases.values())}
    into.write_text(json.dumps(whole, indent=1) + "\n")
    return len(cases)
