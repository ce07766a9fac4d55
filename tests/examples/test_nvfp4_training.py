"""The examples run as they are printed in the docs."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_nvfp4_training_compares_every_seed_and_judges_the_mean():
    command = [sys.executable, EXAMPLES / "nvfp4_training.py"]
    options = ["--steps", "4", "--seeds", "2", "--bytes", "300"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, *options], capture_output=True, text=True, env=env, timeout=300
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line[:6] for line in lines[:2]] == ["seed 0", "seed 1"]
    assert lines[2].startswith("mean difference")
