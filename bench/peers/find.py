"""Which other packages can run a workload here. A peer is a module beside this one:

OPS       the ops that it knows
DEVICES   where it runs, if not everywhere
build(workload) -> function from inputs to outputs; may raise ImportError
"""

from collections.abc import Callable, Sequence
from importlib import import_module

from tigon.bench.workloads import Workload

NAMES = ("transformers", "mamba_ssm", "torch_eager")


def find(work: Workload, wanted: Sequence[str], device: str) -> tuple[dict[str, Callable], dict]:
    """(callables by name; reasons of those that cannot run, by name). wanted: names, ["auto"] or ["none"]."""
    if "none" in wanted:
        return {}, {}
    unknown = [name for name in wanted if name not in (*NAMES, "auto")]
    if unknown:
        raise ValueError(f"unknown peer {', '.join(unknown)}; known: {', '.join(NAMES)}")
    names = NAMES if "auto" in wanted else wanted
    ready, missing = {}, {}
    for name in names:
        peer = import_module(f"tigon.bench.peers.{name}")
        if work.op not in peer.OPS:
            missing[name] = f"has no {work.op}"
        elif device not in getattr(peer, "DEVICES", (device,)):
            missing[name] = f"does not run on {device}"
        else:
            try:
                ready[name] = peer.build(work)
            except ImportError as error:
                missing[name] = f"not installed ({error})"
    return ready, missing
