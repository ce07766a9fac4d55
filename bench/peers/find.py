"""Which other packages can run a workload here. A peer is a module beside this one:

OPS       the ops that it knows
DEVICES   where it runs, if not everywhere
APART     it may lie in the folder `peers` of the environment, out of sight of packages that would take it
RANDOM    of OPS those that draw with random numbers of their own, so that results cannot be compared
build(workload) -> function from inputs to outputs; may raise ImportError, or NotImplementedError with the reason
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path

from tigon.bench.timing import quiet_stderr
from tigon.bench.workloads import Workload

NAMES = (
    "transformers",
    "transformers_grouped_mm",
    "mamba_ssm",
    "torch_eager",
    "torch_scaled_mm",
    "torch_grouped_mm",
    "torchao",
    "modelopt",
    "flashinfer",
)
FOLDER = Path(sys.prefix) / "peers"


@contextlib.contextmanager
def in_sight() -> Iterator[None]:
    """Packages in FOLDER can be imported; what they say about missing extensions goes nowhere."""
    sys.path.append(str(FOLDER))
    try:
        with quiet_stderr():
            yield
    finally:
        sys.path.remove(str(FOLDER))


def once(prepare: Callable[[Mapping], object]) -> Callable[[Mapping], object]:
    """`prepare(inputs)`, done again only when other inputs come: what a peer need not do at every call."""
    last: list = [None, None]

    def prepared(inputs):
        if last[0] is not inputs:
            last[:] = inputs, prepare(inputs)
        return last[1]

    return prepared


def is_random(name: str, op: str) -> bool:
    """Whether what this peer returns of `op` differs from call to call by nature."""
    return name in NAMES and op in getattr(import_module(f"tigon.bench.peers.{name}"), "RANDOM", ())


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
            if name in wanted:
                missing[name] = f"has no {work.op}"
        elif device not in getattr(peer, "DEVICES", (device,)):
            missing[name] = f"does not run on {device}"
        else:
            apart = getattr(peer, "APART", False)
            try:
                with in_sight() if apart else contextlib.nullcontext():
                    ready[name] = peer.build(work)
            except ImportError as error:
                missing[name] = f"not installed ({error})"
            except NotImplementedError as error:
                missing[name] = str(error)
    return ready, missing
