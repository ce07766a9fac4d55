"""The stage sanitize: the CUDA ops in small under compute-sanitizer."""

import os
import re
from concurrent.futures import ThreadPoolExecutor

from stage import Failed, OutOfTime, Skipped, Stage, interpreter, program

TOOLS = ("memcheck", "racecheck", "initcheck")
# What compute-sanitizer says where it cannot work, as in some virtual machines.
UNUSABLE = (
    "not supported",
    "Failed to initialize",
    "Internal Sanitizer Error",
    "No attachable process",
    "Unable to",
    "Target application terminated before first instrumented API call",
)
FINDING = 77  # exit code of compute-sanitizer where it found something


def sanitize(stage: Stage) -> str:
    """The CUDA ops in small under compute-sanitizer: every tool and family at once, one core each."""
    sanitizer = os.environ.get("SANITIZER") or program("compute-sanitizer")
    if sanitizer is None:
        raise Skipped("compute-sanitizer is not installed")
    families: dict[str, list[str]] = {}
    for op in stage.ops():
        if op["kernel"] == "cuda":
            families.setdefault(op["family"], []).append(op["op"])
    python = interpreter(stage)
    jobs = [(tool, family) for tool in TOOLS for family in families]
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}

    def one(job: tuple[str, str]) -> dict:
        tool, family = job
        file = stage.folder / f"sanitize_{tool}_{family.replace(' ', '_')}.log"
        # Initcheck must see who wrote what is read, so it looks at torch's kernels too.
        only = [] if tool == "initcheck" else ["--kernel-name", "kernel_substring=tigon"]
        command = [sanitizer, "--tool", tool, *only, "--report-api-errors", "no"]
        command += ["--target-processes", "all", "--error-exitcode", str(FINDING)]
        command += [python, "-m", "tigon", "check", *families[family], "--device", stage.device]
        with file.open("w+b") as log:
            try:
                code = stage.call(*command, log=log, **env)
            except OutOfTime:
                code = None
        return verdict(code, file.read_text(errors="replace"), tool)

    with ThreadPoolExecutor(stage.workers(16)) as pool:
        found = list(pool.map(one, jobs))
    for (tool, family), said in zip(jobs, found):
        stage.facts.setdefault(tool, {})[family] = said
        text = f"{tool} {family}: {said['verdict']} {said['what']}\n"
        stage.log.write(text.encode())
    words = {
        tool: sorted({said["verdict"] for said in stage.facts[tool].values()}) for tool in TOOLS
    }
    note = "; ".join(f"{tool} {', '.join(said)}" for tool, said in words.items())
    verdicts = {said["verdict"] for said in found}
    if verdicts & {"finding", "wrong result", "failed"}:
        raise Failed(note)
    if words["memcheck"] == ["unusable"]:
        reason = next(said["what"] for said in stage.facts["memcheck"].values())
        raise Skipped(f"compute-sanitizer does not work here: {reason}")
    if "timeout" in words["memcheck"]:
        raise OutOfTime(note)
    return note


def verdict(code: int | None, text: str, tool: str) -> dict:
    """clean, finding, wrong result, unusable (the tool does not work here), failed or timeout, and a line on it."""
    said = [
        line.removeprefix("=========").strip() for line in text.splitlines() if line[:9] == "=" * 9
    ]
    totals = [re.search(r"SUMMARY: (\d+) (?:errors?|hazards?)", line) for line in said]
    count = sum(int(total[1]) for total in totals if total)
    own = [line for line in said if re.search(r"\btigon::|_ZN5tigon", line)]
    if code is None:
        return {"verdict": "timeout", "what": ""}
    if count and (own or tool != "initcheck"):
        first = next(
            (line for line in said if re.match(r"Invalid|Uninit|Error|Warning|Misal", line)),
            said[0],
        )
        where = f", {own[0]}" if own and own[0] != first else ""
        return {"verdict": "finding", "what": f"{count}: {first}{where}"}
    if code == 2 or "\nWRONG" in text:
        return {
            "verdict": "wrong result",
            "what": next(filter(re.compile("WRONG").match, text.splitlines()), ""),
        }
    if not any(totals) or code not in (0, FINDING):
        lines = [line for line in text.splitlines() if any(part in line for part in UNUSABLE)]
        last = next(filter(str.strip, reversed(text.splitlines())), "it said nothing").strip()
        kind = "unusable" if lines or not any(totals) else "failed"
        return {
            "verdict": kind,
            "what": f"{lines[0].strip('= ') if lines else last} (exit code {code})",
        }
    elsewhere = f"{count} outside Tigon's kernels" if count else ""
    return {"verdict": "clean", "what": elsewhere}
