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
    """One process. every: all variants, not only the first, for as long as there is time."""

    mode: str
    ops: tuple[str, ...]
    every: bool = False

    def __str__(self) -> str:
        return " ".join((*self.ops, self.mode, *(["variants"] if self.every else [])))

    @property
    def file(self) -> str:
        return f"{self.every:d}-{self.ops[0]}-{len(self.ops)}-{self.mode}.json"


def jobs(ops: list[dict], every: bool) -> list[Job]:
    """A process a family and mode; then, with `every`, one an op for its variants."""
    families: dict[str, list[str]] = {}
    for op in ops:
        families.setdefault(op["family"], []).append(op["op"])
    trained = {op["op"] for op in ops if op["backward"] == "yes"}
    found = [Job("forward", tuple(names)) for names in families.values()]
    for names in families.values():
        if both := tuple(name for name in names if name in trained):
            found.append(Job("step", both))
    return found + [Job("forward", (op["op"],), True) for op in ops if every]


def bench(stage: Stage) -> str:
    """A process a family; where one crashes, is wrong or hangs, one an op, so that it costs one op only."""
    parts = stage.folder / "bench"
    if stage.again and parts.is_dir():
        shutil.rmtree(parts)
    parts.mkdir(exist_ok=True)
    peers(stage)
    given = os.environ.get("BENCH")
    arguments = (BENCH if given is None else given).split()
    todo = jobs(stage.ops(), every=given is None and stage.device == "cuda")
    bad, late, over = {}, [], []
    while todo:
        job = todo.pop(0)
        if (parts / job.file).is_file():
            continue
        if stage.left() < LEAST * (1 + 2 * job.every):
            (over if job.every else late).append(str(job))
            continue
        code = measure(stage, job, parts, arguments)
        if code == 0:
            continue
        if len(job.ops) > 1 and stage.left() > LEAST:
            todo[:0] = [Job(job.mode, (op,)) for op in job.ops]
        elif code is None and stage.left() < LEAST:
            (over if job.every else late).append(str(job))
        else:
            words = {None: "too slow", 2: "wrong result"}
            bad[str(job)] = words.get(code, f"exit code {code}")
    count = join(parts, stage.folder / "bench.json")
    stage.facts |= {"cases": count, "failed": bad, "not_run": late + over, "arguments": arguments}
    note = f"{count} cases"
    note += f"; failed: {', '.join(f'{op} ({why})' for op, why in bad.items())}" if bad else ""
    note += f"; not run: {', '.join(late)}" if late else ""
    note += f"; no time for the variants of {len(over)} ops" if over else ""
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
    command += ["--variant", "all"] if job.every else []
    box = START + CASE * (3 if job.every else len(job.ops))
    try:
        code = stage.tigon(*command, *arguments, box=box)
    except OutOfTime:
        return None
    if code == 0 and part.is_file():
        part.replace(file)
    return code


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
    """One record of all parts, in schema 2 (or, by an older `tigon bench`, schema 1); the number of its cases.

    A case that was measured twice is there once: with the other variants beside it.
    """
    records = [json.loads(file.read_text()) for file in sorted(parts.glob("*.json"))]
    if not records:
        into.unlink(missing_ok=True)
        return 0
    old = isinstance(records[0], list)
    cases = {}
    for record in records:
        for case in record if old else record["cases"]:
            cases[json.dumps(case["case"], sort_keys=True)] = case
    whole = {} if old else {**records[-1], "command": "bench/on_gpu.sh bench"}
    found = list(cases.values())
    into.write_text(json.dumps(found if old else whole | {"cases": found}, indent=1) + "\n")
    return len(found)
