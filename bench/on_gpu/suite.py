"""The stage test: the suite natively, and what came out of it, also where it was cut off."""

import json
import os
from contextlib import suppress
from pathlib import Path

from stage import Failed, OutOfTime, Stage, interpreter

# They compile for other machines, build on the host, read pages, run scripts on a CPU for minutes, or start this one.
NO_GPU = ("codegen", "csrc", "packaging", "examples", "tutorials", "docs", "bench/test_all.py")
NO_GPU += ("bench/test_on_gpu.py", "bench/test_on_gpu_measure.py", "bench/test_report_page.py")


def test(stage: Stage) -> str:
    """The suite natively, without what needs no GPU; what passed before is not run again."""
    python, lines = interpreter(stage), stage.folder / "tests.jsonl"
    have = {
        name
        for name in ("pytest", "xdist")
        if stage.says(python, "-c", f"import {name}") is not None
    }
    if "pytest" not in have:
        code = stage.tigon("check", "all", "--device", stage.device)
        if code:
            raise Failed(f"tigon check all: exit code {code}; pytest is not installed")
        return "pytest is not installed: tigon check all in its place"
    if stage.again:
        lines.unlink(missing_ok=True)
    passed = stage.folder / "passed.txt"
    before = read_tests(lines)["tests"]
    names = sorted(name for name, (outcome, _) in before.items() if outcome == "passed")
    passed.write_text("\n".join(names))
    kept = [line for line in lines_of(lines) if line.get("test") in set(names)]
    lines.write_text("".join(json.dumps(line) + "\n" for line in kept))
    command = [python, "-m", "pytest", "-q", "-p", "tigon.bench.progress"]
    command += ["--lines", lines, "--passed", passed, "-o", "addopts=--import-mode=importlib"]
    command += ["-p", "no:cacheprovider", "--tb=short", "--continue-on-collection-errors"]
    command += [f"--ignore=tests/{name}" for name in NO_GPU]
    if "xdist" in have:
        command += ["-n", stage.workers(12), "--dist", "loadgroup"]
    command += os.environ.get("TESTS", "tests").split()
    late = ""
    try:
        code = stage.call(*command, OMP_NUM_THREADS="1")
    except OutOfTime:
        code, late = None, "out of time: "
    found = read_tests(lines)
    counts: dict[str, int] = {}
    for outcome, _ in found["tests"].values():
        counts[outcome] = counts.get(outcome, 0) + 1
    bad = {
        name: what
        for name, (outcome, what) in found["tests"].items()
        if outcome in ("failed", "error")
    }
    stage.facts |= {
        "counts": counts,
        "passed_before": len(names),
        "failures": dict(list(bad.items())[:300]),
        "unfinished": found["unfinished"][:50],
        "not_collected": found["not_collected"],
        "slowest": found["slowest"],
        "workers": stage.workers(12) if "xdist" in have else 1,
    }
    note = late + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    if found["not_collected"]:
        note += f", {len(found['not_collected'])} files not collected"
    # A file that lacks a package is no failure of Tigon's; any other that cannot be read is.
    lack = all("No module named" in why for why in found["not_collected"].values())
    if bad or not lack:
        raise Failed(note)
    if late:
        raise OutOfTime(note)
    if code not in (0, 1, 5) or not found["tests"]:
        raise Failed(f"pytest: exit code {code}; {note}")
    return note


def lines_of(file: Path) -> list[dict]:
    """JSON a line; the last may be cut off."""
    found = []
    with suppress(OSError):
        for line in file.read_text().splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return found


def read_tests(file: Path) -> dict:
    """What `tigon.bench.progress` wrote: the last word on each test, (outcome, what)."""
    tests, started, times, collected = {}, {}, {}, {}
    for line in lines_of(file):
        if "file" in line:
            collected[line["file"]] = line["what"]
        elif line["outcome"] == "started":
            started[line["test"]] = None
        else:
            tests[line["test"]] = (line["outcome"], line.get("what", ""))
            times[line["test"]] = line.get("seconds", 0.0)
    slowest = sorted(times.items(), key=lambda pair: -pair[1])[:10]
    return {
        "tests": tests,
        "unfinished": [name for name in started if name not in tests],
        "not_collected": collected,
        "slowest": dict(slowest),
    }
