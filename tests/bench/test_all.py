"""Every op beside every peer that is installed, in one call, on a CPU, within five minutes."""

import json
import os
import subprocess
import sys

import pytest

from tigon.registry import PUBLIC

PEERS = {"torchao": "torchao", "modelopt": "nvidia-modelopt", "transformers": "transformers"}


@pytest.mark.slow
def test_every_gate_is_green_and_the_named_peers_stand_beside_tigon(tmp_path):
    file = tmp_path / "all.json"
    command = [sys.executable, "-m", "tigon", "bench", "all", "--peers", "auto", "--device", "cpu"]
    command += ["--time-budget", "0.1", "--no-memory", "--json", str(file)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads(file.read_text())
    assert [found["case"]["op"] for found in record["cases"]] == list(PUBLIC)
    assert all(found["check"]["ok"] and found["results"] for found in record["cases"])
    ran = {r["name"] for found in record["cases"] for r in found["results"]}
    told = {name: why for found in record["cases"] for name, why in found["missing"].items()}
    for name, package in PEERS.items():
        if record["env"]["packages"].get(package):
            assert name in ran
        else:
            assert "not installed" in told[name]
    failed = {name: why for name, why in told.items() if why.startswith("failed")}
    assert not failed
