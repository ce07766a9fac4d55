"""Another package's answers from a process of its own: what it imports, patches and caches stays there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PEERS = Path(sys.prefix) / "peers"  # where `make env` puts such packages


def run_peer(script, out, name):
    """A script of tests/support in a process of its own; skips with its reason if the peer cannot be imported."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    env |= {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(out),
        "XDG_CACHE_HOME": str(out / "cache"),
        "HF_HOME": str(out / "cache"),
        "TRITON_CACHE_DIR": str(out / "cache"),
        "TORCH_EXTENSIONS_DIR": str(out / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    path = Path(__file__).with_name(script)
    done = subprocess.run(
        [sys.executable, str(path), str(PEERS), str(out)], env=env, capture_output=True, text=True
    )
    if done.returncode == 3:
        reason = done.stdout.strip().splitlines()[-1]
        pytest.skip(f"{name}: {reason}; the top of this file says how to install it")
    assert done.returncode == 0, done.stderr[-2000:]
    return out
