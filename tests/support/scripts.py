"""Run an example or a tutorial as its reader does: a process of its own, one thread, its printed lines."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def run(script: str, *options: object, timeout: float = 300) -> list[str]:
    """Lines of standard output of a script (a path in the checkout), which must end well."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    command = [sys.executable, str(ROOT / script), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.splitlines()


def line(lines: list[str], start: str) -> str:
    """What stands behind `start` in the one line that begins with it."""
    found = [text.strip()[len(start) :] for text in lines if text.strip().startswith(start)]
    assert len(found) == 1, f"{len(found)} lines begin with {start!r}:\n" + "\n".join(lines)
    return found[0]


def numbers(text: str) -> list[float]:
    """The numbers in a text, in order."""
    return [float(n.replace(",", "")) for n in NUMBER.findall(text)]
