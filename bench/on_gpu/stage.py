"""What a stage is given: a time box, a log, what is known from before; and how a stage can end."""

import json
import os
import shlex
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import boxes


class Failed(Exception):
    """Something is wrong."""


class OutOfTime(Exception):
    """The box was over."""


class Skipped(Exception):
    """This machine cannot do it."""


@dataclass
class Stage:
    """What a stage is given. before: its record of an earlier call; facts: what it finds out."""

    name: str
    device: str
    root: Path
    folder: Path
    log: BinaryIO
    deadline: float
    before: dict | None
    facts: dict = field(default_factory=dict)
    python: Path | None = None

    def left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def again(self) -> bool:
        """It was done and is wanted anew, so nothing of it is to be gone on from."""
        return (self.before or {}).get("status") == "ok"

    def call(
        self,
        *command: object,
        box: float = 1e9,
        watch: Path | None = None,
        log: BinaryIO | None = None,
        **env: str,
    ) -> int | None:
        """The exit code; None if `box` was over, which begins anew where the file `watch` changes. OutOfTime if the
        stage's own was."""
        left = self.left()
        if left <= 0:
            raise OutOfTime("out of time")
        said = log or self.log
        said.write(f"\n$ {shlex.join(map(str, command))}\n".encode())
        said.flush()
        known = self.environment() | env
        code = boxes.run(command, said, min(box, left), known, self.root, watch, left)
        if code is None and self.left() <= 0.1:
            raise OutOfTime("out of time")
        return code

    def environment(self) -> dict[str, str]:
        quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
        # Without a network transformers would wait for one.
        return {"HF_HUB_OFFLINE": "1", **os.environ, "PYTHONUNBUFFERED": "1", **quiet}

    def says(self, *command: object) -> str | None:
        """What a command prints, None if it fails."""
        file = self.folder / "said"
        with file.open("wb", buffering=0) as out:
            ok = self.call(*command, log=out) == 0
        text = file.read_text(errors="replace").partition("\n")[2].partition("\n")[2]
        return text if ok else None

    def own(self, command: str) -> str:
        """A command of the user's in place of the stage's."""
        if code := self.call("sh", "-c", command):
            raise Failed(f"exit code {code}")
        return command

    def tigon(self, *arguments: object, **options) -> int | None:
        return self.call(interpreter(self), "-m", "tigon", *arguments, **options)

    def ops(self) -> list[dict]:
        """The public ops that are asked for, as `tigon list` tells them, but without Tigon's own import."""
        said = self.says(interpreter(self), "-m", "tigon", "list", "ops", "--json")
        if said is None:
            raise Failed("tigon list does not work")
        wanted = os.environ.get("OPS", "").split()
        found = [op for op in json.loads(said) if not wanted or op["op"] in wanted]
        if not found:
            raise Failed(f"OPS={' '.join(wanted)!r} names no op")
        return found

    def workers(self, most: int) -> int:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return int(os.environ.get("WORKERS") or max(1, min(most, cores)))


def venv(stage: Stage) -> Path:
    return (stage.root / os.environ.get("VENV", ".venv-present")).absolute()


def imports_tigon(stage: Stage, python: object) -> bool:
    """Whether it is this checkout that `python` imports."""
    code = "import tigon, tigon.bench.work; print(tigon.__file__)"
    return (
        Path((stage.says(python, "-c", code) or "/").strip())
        .resolve()
        .is_relative_to(stage.root / "python")
    )


def interpreter(stage: Stage) -> Path:
    """The environment that was made, or the one that runs this script. Failed if neither imports Tigon."""
    if stage.python:
        return stage.python
    for python in (venv(stage) / "bin/python", Path(sys.executable)):
        if python.is_file() and imports_tigon(stage, python):
            stage.python = python
            return python
    raise Failed("Tigon cannot be imported: run the stage build")


def program(name: str) -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=f"{home}/bin")
