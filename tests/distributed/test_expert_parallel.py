"""Experts over 2 and 4 gloo processes under torchrun: what one process computes, in every composition."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

WORKER = Path(__file__).with_name("expert_parallel_worker.py")
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


EXAMPLE = WORKER.parents[2] / "examples" / "expert_parallel.py"


def torchrun(processes: int, *program: str, timeout: float = 150) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [*command, *program], env=env, capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("check", ["layers", "dropping", "ddp", "fsdp"])
def test_processes_together_compute_what_one_does(processes, check):
    done = torchrun(processes, str(WORKER), check)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_a_killed_process_ends_the_job_with_an_error():
    """Within 30 s of its death; the start of the processes comes before."""
    start = time.monotonic()
    done = torchrun(2, str(WORKER), "killed", timeout=90)
    assert done.stdout.count("one step done") == 2, done.stderr[-4000:]
    assert done.returncode != 0
    assert time.monotonic() - start < 60


def test_the_example_trains():
    done = torchrun(2, str(EXAMPLE), "--steps", "10")
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [
        float(line.split()[2]) for line in done.stdout.splitlines() if line.startswith("step")
    ]
    assert len(losses) == 2 and losses[1] < losses[0]
