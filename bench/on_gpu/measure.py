"""The stage bench: each op beside the peers, and one record of all."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from stage import Failed, OutOfTime, Stage, interpreter, venv

BENCH = "--preset nemotron-3-super --peers auto --time-budget 1"
START, CASE = 20, 25  # seconds that a process and a case of it may take
LEAST = 8  # seconds in which something can still be measured


@dataclass(frozen=True)
class Job:
    """One process. extra: more arguments; such a job is run for as long as there is time."""

    mode: str
    ops: tuple[str, ...]
    extra: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join((*self.ops, self.mode, *self.extra))

    @property
    def file(self) -> str:
        extra = "".join(self.extra).replace("--", "-").strip("-")
        return f"{extra or 'a'}_{self.ops[0]}_{len(self.ops)}_{self.mode}.json"


def jobs(ops: list[dict], extras: bool) -> list[Job]:
    """A process a family and mode. extras: then the short calls as CUDA graphs, and an op's variants a process."""
    families: dict[str, list[dict]] = {}
    for op in ops:
        families.setdefault(op["family"], []).append(op)
    plain = {name: tuple(op["op"] for op in found) for name, found in families.items()}
    train = {
        name: tuple(op["op"] for op in found if op["backward"] == "yes")
        for name, found in families.items()
    }
    found = [Job("forward", names) for names in plain.values()]
    found += [Job("step", names) for names in train.values() if names]
    if extras:
        short = (tuple(op["op"] for op in f if op["kernel"] == "cuda") for f in families.values())
        found += [Job("forward", names, ("--graph",)) for names in short if names]
        found += [Job("forward", (op["op"],), ("--variant", "all")) for op in ops]
    return found


def bench(stage: Stage) -> str:
    """A process a family; where one crashes or hangs, one an op, so that it costs one op only."""
    parts = stage.folder / "bench"
    if stage.again and parts.is_dir():
        shutil.rmtree(parts)
    parts.mkdir(exist_ok=True)
    peers(stage)
    given = os.environ.get("BENCH")
    arguments = (BENCH if given is None else given).split()
    todo = jobs(stage.ops(), extras=given is None and stage.device == "cuda")
    bad, late, over = {}, [], []
    while todo:
        job = todo.pop(0)
        if (parts / job.file).is_file():
            continue
        if stage.left() < LEAST * (3 if job.extra else 1):
            (over if job.extra else late).append(str(job))
            continue
        code = measure(stage, job, parts, arguments)
        if code == 0:
            continue
        if (parts / job.file).with_suffix(".part").is_file():
            bad |= faults(stage, job, parts, code)
        elif len(job.ops) > 1 and stage.left() > LEAST:
            todo[:0] = [Job(job.mode, (op,), job.extra) for op in job.ops]
        elif code is None and stage.left() < LEAST:
            (over if job.extra else late).append(str(job))
        else:
            bad[str(job)] = "too slow" if code is None else f"exit code {code}"
    count = join(parts, stage.folder / "bench.json")
    stage.facts |= {"cases": count, "failed": bad, "not_run": late + over, "arguments": arguments}
    note = f"{count} cases"
    note += f"; failed: {', '.join(f'{op} ({why})' for op, why in bad.items())}" if bad else ""
    note += f"; not run: {', '.join(late)}" if late else ""
    note += f"; no time for {len(over)} extras" if over else ""
    if bad:
        raise Failed(note)
    if late:
        raise OutOfTime(note)
    return note


def measure(stage: Stage, job: Job, parts: Path, arguments: list[str]) -> int | None:
    """The exit code of `tigon bench`, None if it was too slow; a good record lies in `parts` then."""
    file = parts / job.file
    part = file.with_suffix(".part")
    part.unlink(missing_ok=True)
    command = ["bench", *job.ops, "--mode", job.mode, "--device", stage.device, "--json", part]
    box = START + CASE * (3 if job.extra else len(job.ops))
    try:
        code = stage.tigon(*command, *job.extra, *arguments, box=box)
    except OutOfTime:
        return None
    if code == 0 and part.is_file():
        part.replace(file)
    return code


def faults(stage: Stage, job: Job, parts: Path, code: int | None) -> dict[str, str]:
    """What went wrong in a process that ended by itself. The part is kept for the record, but done again next time."""
    cases = json.loads((parts / job.file).with_suffix(".part").read_text())["cases"]
    wrong = {case["case"]["op"] for case in cases if not case["check"]["ok"]}
    absent = set(job.ops) - {case["case"]["op"] for case in cases}
    found = {f"{op} {job.mode}": "wrong result" for op in sorted(wrong)}
    found |= {f"{op} {job.mode}": "no result: see the log" for op in sorted(absent)}
    return found or {str(job): f"exit code {code}: see the log"}


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
    """One record of all parts; the number of its cases. A case that was measured twice is there once."""
    files = [*sorted(parts.glob("*.part")), *sorted(parts.glob("*.json"))]
    records, cases = [json.loads(file.read_text()) for file in files], {}
    if not records:
        into.unlink(missing_ok=True)
        return 0
    for record in records:
        for case in record["cases"]:
            cases[json.dumps(case["case"], sort_keys=True)] = case
    whole = {**records[-1], "command": "bench/on_gpu.sh bench", "cases": list(cases.values())}
    into.write_text(json.dumps(whole, indent=1) + "\n")
    return len(cases)
