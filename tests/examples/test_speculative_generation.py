"""The example runs as it is printed in the docs, and drafts change no text."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "speculative_generation.py"


def test_speculative_generation_prints_a_report_a_way_and_one_text():
    options = ["--seconds", "1", "--tokens", "10", "--dtype", "float16"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, EXAMPLE, *options], capture_output=True, text=True, env=env, timeout=300
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    ways = [line[:15].strip() for line in lines[:7]]
    assert ways == [*(f"K = {k}" for k in (0, 1, 2, 3, 5)), "tree (3, 2, 1)", "auto"]
    assert all("30 new tokens" in line for line in lines[:7])
    assert "ways gave the same text" in lines[-1] and not lines[-1].startswith("0 of")
