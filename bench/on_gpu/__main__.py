"""Build, warm, test, sanitize and measure Tigon on a GPU: one call, each stage in a time box of its own.

What is done for these sources on this machine is not done again, unless the stage is named or FORCE=1; a stage that was
cut off goes on where it stopped. Exit codes: 0 fine, 1 a stage failed or ran out of time, 4 no GPU.

Settings, by environment variable:

  OUT        where the results go (bench/results/<gpu>): on_gpu.json, on_gpu.log, doctor.json, tests.jsonl, bench.json
  STATE      what a later call goes on from (build/on_gpu)
  DEVICE     cuda, or cpu to try the script without a GPU
  TOTAL      seconds for all stages (540); BOX_BUILD, BOX_WARM, BOX_TEST, BOX_SANITIZE, BOX_BENCH: for one
  FORCE      1: from the beginning
  VENV       the environment that is made (.venv-present)
  WORKERS    processes of the stages warm and test; by default by the cores
  OPS        the ops of warm, sanitize and bench, spaces between; by default all
  TESTS      folders or files of the tests, spaces between; by default all that need a GPU
  BENCH      arguments of tigon bench in place of the default ones
  WHEELS     a folder of wheels of peers, for a machine without network
  CMD_TEST   (or another stage) a command to run in place of the stage's own
"""

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import boxes
from measure import bench
from prepare import build, warm
from sanitizer import sanitize
from stage import Failed, OutOfTime, Skipped, Stage
from suite import test

ROOT = Path(__file__).resolve().parent.parent.parent
STAGES = {"build": build, "warm": warm, "test": test, "sanitize": sanitize, "bench": bench}
# Seconds; what a stage leaves of its box goes to the stages after it.
BOXES = {"build": 80, "warm": 80, "test": 140, "sanitize": 60, "bench": 170}
ENVIRONMENT = 4
SOURCES = ("python", "kernels", "csrc", "bench", "build_tools", "tests")
RESULTS = ("on_gpu.json", "on_gpu.log", "doctor.json", "tests.jsonl", "bench.json")


def machine():
    """python/cli/machine.py, which needs the standard library only, before Tigon is installed."""
    spec = importlib.util.spec_from_file_location("machine", ROOT / "python/cli/machine.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def git(*arguments: str) -> str | None:
    with suppress(OSError):
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None
    return None


def fingerprint(*facts: object) -> str:
    """Of the sources as they lie here, committed or not, and of `facts`."""
    found = hashlib.sha256(repr(facts).encode())
    for room in SOURCES:
        for path in sorted((ROOT / room).rglob("*.*")):
            if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h", ".sh") and path.is_file():
                found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return found.hexdigest()[:12]


def clocks() -> dict[str, str]:
    """What nvidia-smi says of the first GPU's clocks, power and temperature."""
    names = ["clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit"]
    names += ["temperature.gpu"]
    with suppress(OSError, subprocess.TimeoutExpired):
        command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
        return dict(zip(names, map(str.strip, said.splitlines()[0].split(",")))) if said else {}
    return {}


def environment(device: str) -> dict:
    """Date, commit, versions and machine."""
    facts = machine().facts()
    gpu = (facts["driver"].get("gpus") or [{}])[0] if device == "cuda" else {}
    dirty = git("status", "--porcelain", "--", *SOURCES)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--short", "HEAD"),
        "changed": bool(dirty) if dirty is not None else None,
        "device": gpu.get("name", device),
        "gpu": gpu | {"clocks": clocks()} if gpu else None,
        "cores": facts["os"].get("cores"),
        **{name: facts[name] for name in ("os", "packages", "driver", "nvcc", "compiler")},
        "python": {"version": facts["python"]["version"]},
    }


class Session:
    """One call of the script: what was asked, what is known from before, where things go."""

    def __init__(self, named: list[str]):
        self.named = named
        self.device = os.environ.get("DEVICE", "cuda")
        self.env = environment(self.device)
        gpu = self.env["device"]
        facts = (gpu, self.env["driver"].get("version"), self.env["packages"], sys.executable)
        self.key = fingerprint(*facts)
        slug = "".join(c if c.isalnum() else "_" for c in gpu.lower())
        self.out = Path(os.environ.get("OUT") or ROOT / "bench/results" / slug).resolve()
        state = Path(os.environ.get("STATE") or ROOT / "build/on_gpu").resolve()
        self.folder = state / f"{slug}-{self.key}"
        if os.environ.get("FORCE") == "1" and self.folder.is_dir():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.begin = time.monotonic()
        self.total = float(os.environ.get("TOTAL", 540))
        self.found: dict[str, dict] = {}
        with suppress(OSError, ValueError):
            self.found = json.loads((self.folder / "on_gpu.json").read_text())["stages"]

    def wanted(self) -> list[str]:
        """What is to do, in the order of the stages."""
        if self.named:
            return [name for name in BOXES if name in self.named]
        return [name for name in BOXES if self.found.get(name, {}).get("status") != "ok"]

    def box(self, name: str, later: list[str]) -> float:
        """Seconds for a stage: what was asked for, or all that the later ones do not need."""
        left = self.total - (time.monotonic() - self.begin)
        asked = os.environ.get(f"BOX_{name.upper()}")
        own = float(asked) if asked else left - sum(BOXES[other] for other in later)
        if name == "warm" and not asked:  # there is always more to compile
            own = min(own, BOXES[name])
        return min(left, max(own, 0.0))

    def keep(self) -> dict:
        """Write what is known so far and copy the results to `out`."""
        bad = ("failed", "timeout")
        record = {
            "schema": 1,
            "command": " ".join(["bench/on_gpu.sh", *self.named]),
            "env": self.env,
            "sources": self.key,
            "seconds": round(time.monotonic() - self.begin, 1),
            "limit": self.total,
            "ok": not any(stage["status"] in bad for stage in self.found.values()),
            "stages": {name: self.found[name] for name in BOXES if name in self.found},
        }
        file = self.folder / "on_gpu.json"
        part = file.with_suffix(".part")
        part.write_text(json.dumps(record, indent=1) + "\n")
        part.replace(file)
        self.out.mkdir(parents=True, exist_ok=True)
        for name in RESULTS:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, self.out / name)
        return record

    def run(self, name: str, box: float, log) -> None:
        """One stage; nothing that it started is alive afterwards."""
        begin = time.monotonic()
        stage = Stage(name, self.device, ROOT, self.folder, log, begin + box, self.found.get(name))
        log.write(f"\n=== {name}, {box:.0f} s\n".encode())
        status, note = "ok", ""
        try:
            if box < 1:
                raise OutOfTime("no time was left for it")
            command = os.environ.get(f"CMD_{name.upper()}")
            note = stage.own(command) if command else STAGES[name](stage)
        except Failed as error:
            status, note = "failed", str(error)
        except OutOfTime as error:
            status, note = "timeout", str(error)
        except Skipped as error:
            status, note = "skipped", str(error)
        except Exception as error:  # the other stages still have something to say
            status, note = "failed", f"{type(error).__name__}: {error}"
        finally:
            boxes.sweep()
        seconds = round(time.monotonic() - begin, 1)
        self.found[name] = {
            "status": status,
            "seconds": seconds,
            "box": round(box, 1),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "note": note,
            "facts": stage.facts,
        }


def summary(record: dict, done: list[str]) -> str:
    """The table that is printed last."""
    rows = [("stage", "status", "seconds", "what")]
    for name, stage in record["stages"].items():
        status = stage["status"] + ("" if name in done else ", before")
        rows.append((name, status, f"{stage['seconds']:.1f}", stage["note"]))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]).rstrip()
        for row in rows
    ]
    env = record["env"]
    where = f"{env['device']}, torch {env['packages']['torch']}, commit {env['commit']}"
    verdict = "all is well" if record["ok"] else "NOT all is well"
    return "\n".join([where, *lines, f"{verdict}; {record['seconds']:.0f} s"])


def main() -> int:
    parser = argparse.ArgumentParser(
        "bench/on_gpu.sh", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stage", nargs="*", help=", ".join(BOXES))
    named = parser.parse_args().stage
    if unknown := set(named) - set(BOXES):
        parser.error(f"unknown stage {', '.join(unknown)}; known: {', '.join(BOXES)}")
    session = Session(named)
    if session.device == "cuda" and session.env["gpu"] is None:
        print("no NVIDIA GPU is visible; DEVICE=cpu tries the script without one")
        return ENVIRONMENT
    boxes.adopt_orphans()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, boxes.interrupt)
    todo = session.wanted()
    with (session.folder / "on_gpu.log").open("ab", buffering=0) as log:
        try:
            for index, name in enumerate(todo):
                print(f"{name} …", flush=True)
                session.run(name, session.box(name, todo[index + 1 :]), log)
                record = session.keep()
                stage = session.found[name]
                print(f"{name}: {stage['status']}, {stage['seconds']:.1f} s", flush=True)
        except KeyboardInterrupt:
            print("interrupted; a later call goes on from here")
            return 1
        record = session.keep()
    print(f"\nresults in {session.out}\n{summary(record, todo)}")
    return 0 if record["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
