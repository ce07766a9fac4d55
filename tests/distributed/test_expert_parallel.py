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


def test_experts_sharded_on_meta_know_their_owners_after_to_empty():
    code = """
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from tigon.distributed import ExpertParallel
from tigon.modules import LatentMoE

dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
mesh, sizes = init_device_mesh("cpu", (1,)), (16, 8, 4, 8, 2, None)
whole, late = LatentMoE(*sizes), LatentMoE(*sizes, device="meta")
for layer in (whole, late):
    ExpertParallel(mesh).shard(layer)
late.to_empty(device="cpu")
for buffer in late.buffers():
    buffer.fill_(7)  # to_empty leaves anything
late.load_state_dict(whole.state_dict())
x = torch.randn(3, 16)
assert torch.equal(whole(x), late(x))
"""
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
