"""A newcomer follows the README to the letter: its commands in a fresh environment, its examples as they stand.

No GPU, no Tigon, no torch beforehand. Only environment variables are set: where torch comes from, one architecture so
that the build is short, and make only says what it would do (`make test` runs this test; tests/cli/test_demo.py runs a
short `tigon demo`).
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from installs import ROOT, Environment, run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("readme")]
README = (ROOT / "README.md").read_text()
SETTING = {"PIP_CONSTRAINT": "constraints.txt", "TIGON_CUDA_ARCHS": "80", "OMP_NUM_THREADS": "1"}

# What the reader brings along.
READERS_OWN = """
import torch
from tigon.models import HybridLM

torch.manual_seed(0)
path = "checkpoint"
HybridLM("tiny").save_pretrained(path)
prompts = [torch.randint(0, 256, (9,)), torch.randint(0, 256, (5,))]
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def newcomer(sources, tmp_path_factory):
    """sh(commands) in a checkout, in a fresh environment with pip; its Python for the examples."""
    home = tmp_path_factory.mktemp("newcomer")
    checkout = shutil.copytree(sources, home / "tigon")
    fresh = Environment(home / "venv")
    run(sys.executable, "-m", "venv", fresh.folder)
    path = f"{fresh.folder / 'bin'}:{os.environ['PATH']}"

    def sh(commands: str, **setting) -> str:
        return run("sh", "-ec", commands, cwd=checkout, PATH=path, **SETTING, **setting).stdout

    asked = [fresh.python, "-m", "pip", "install", "-q", "--dry-run", "--report", "-", "torch"]
    done = subprocess.run(
        asked, cwd=checkout, env=os.environ | SETTING, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"torch cannot be had here: {done.stderr.strip().splitlines()[-1]}")
    needed = [part["metadata"]["name"] for part in json.loads(done.stdout)["install"]]
    if any(name.startswith("nvidia-") for name in needed):
        pytest.skip("torch comes as a CUDA build of several GB here")
    yield sh, fresh
    shutil.rmtree(home)


def test_commands_and_examples_of_the_readme_work_as_they_stand(newcomer):
    sh, fresh = newcomer
    said = ""
    for block in blocks("sh"):
        only_make = all(line.startswith("make ") for line in block.splitlines())
        said += sh(block, **{"MAKEFLAGS": "n"} if only_make else {})
    for sign in ("/tigon demo", "-m pytest", "Successfully installed", "CUDA extension"):
        assert sign in said, said
    examples = blocks("python")
    assert examples
    for example in examples:
        assert len(example.splitlines()) <= 12
        run(fresh.python, "-c", READERS_OWN + example, cwd=fresh.folder, OMP_NUM_THREADS="1")
