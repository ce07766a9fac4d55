"""Where and when a benchmark ran: what a reader needs to judge its numbers."""

import datetime
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

import tigon
from tigon.bench.peers.find import FOLDER
from tigon.cli import machine
from tigon.cli.explain import own_arch

PEERS = (
    "torchao",
    "nvidia-modelopt",
    "causal-conv1d",
    "flash-linear-attention",
    "flashinfer-python",
)


def commit() -> str | None:
    """The commit of a checkout; None for an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "setup.py").is_file() or not shutil.which("git"):
        return None
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def apart() -> list[tuple[str, str | None]]:
    """Versions of the peers, also of those that are out of sight."""
    found = {d.name: d.version for d in metadata.distributions(path=[str(FOLDER), *sys.path])}
    return [(name, found.get(name)) for name in PEERS]


def environment(device: str) -> dict:
    """Date, versions, commit and machine, for a record on `device`."""
    facts = machine.facts()
    facts["python"] = {"version": facts["python"]["version"]}  # where it lies is nobody's business
    facts["packages"] |= {name: version for name, version in apart() if version}
    return {
        "date": datetime.date.today().isoformat(),
        "tigon": tigon.__version__,
        "commit": commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "arch": own_arch() if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        **{name: facts[name] for name in ("os", "python", "packages", "driver")},
    }
