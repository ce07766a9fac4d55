"""Every supported Python that this machine has compiles all sources and runs `tigon doctor`, without torch."""

import json
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
from installs import ROOT, run

SUPPORTED = ("3.10", "3.11", "3.12", "3.13")
ROOMS = ("python", "kernels", "bench", "build_tools", "tests", "setup.py")


@cache
def interpreter(version: str) -> str | None:
    """A working interpreter of that version: on PATH, or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))]
    for path in filter(None, found):
        done = subprocess.run([path, "-V"], capture_output=True, text=True)
        if done.stdout.startswith(f"Python {version}."):
            return str(path)
    return None


@pytest.fixture(params=SUPPORTED)
def python(request) -> str:
    found = interpreter(request.param)
    if not found:
        pytest.skip(f"no Python {request.param} on this machine")
    return found


def test_every_source_compiles(python, tmp_path):
    rooms = [ROOT / room for room in ROOMS if (ROOT / room).exists()]
    run(python, "-m", "compileall", "-q", "-f", *rooms, PYTHONPYCACHEPREFIX=str(tmp_path))


def test_doctor_runs_without_torch(python, tmp_path):
    (tmp_path / "tigon").symlink_to(ROOT / "python")
    alone = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = run(python, "-m", "tigon", "doctor", "--json", cwd=tmp_path, **alone)
    report = json.loads(done.stdout)
    assert re.match(r"3\.1[0-3]\.", report["python"]["version"])
    assert report["ops"]
    for part in ("tigon", "os", "python", "packages", "driver", "compiler"):
        assert "error" not in report[part]
    assert "error" not in report["tigon"]["native"]


def test_classifiers_name_the_supported_versions():
    text = (ROOT / "pyproject.toml").read_text()
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)
    assert tuple(named) == SUPPORTED
