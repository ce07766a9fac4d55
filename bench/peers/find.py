"""Which other packages can run a workload here. A peer is a module beside this one:

OPS       the ops that it knows
PACKAGE   what is installed, by its name there
DEVICES   where it runs, if not everywhere
APART     it may lie in the folder `peers` of the environment, out of sight of packages that would take it
build(workload) -> function from inputs to outputs; may raise ImportError, or NotImplementedError with the reason

The function is for inputs of that workload and for copies of them: the workload's options, which may be as long as the
inputs (offsets, seeds), belong to it. A peer that changes an input does so on whichever inputs it gets. Outputs are the
first ones of the workload, in its order; whoever has fewer returns fewer.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from tigon.bench.timing import quiet_stderr
from tigon.bench.workloads import Workload

NAMES = (
    "transformers",
    "transformers_grouped_mm",
    "torch_eager",
    "torch_compiled",
    "torch_scaled_mm",
    "torch_grouped_mm",
    "torchao",
    "modelopt",
    "flashinfer",
    "flash_linear_attention",
    "flash_attn",
    "mamba_ssm",
    "causal_conv1d",
)
FOLDER = Path(sys.prefix) / "peers"
SOUGHT = ("mamba_ssm", "causal_conv1d")  # what transformers takes instead of its own code
_hidden: dict[str, ModuleType] = {}


@contextlib.contextmanager
def in_sight() -> Iterator[None]:
    """Packages in FOLDER can be imported; what they say about missing extensions goes nowhere.

    Afterwards those that are SOUGHT are out of sight again. They are kept: their ops can be registered once only.
    """
    sys.path.append(str(FOLDER))
    sys.modules.update(_hidden)
    try:
        with quiet_stderr():
            yield
    finally:
        sys.path.remove(str(FOLDER))
        sought = {k: m for k, m in sys.modules.items() if k.split(".")[0] in SOUGHT}
        _hidden.update({k: m for k, m in sought.items() if _lies_in_folder(m)})
        for name in _hidden:
            sys.modules.pop(name, None)


def _lies_in_folder(module: ModuleType) -> bool:
    places = (getattr(module, "__file__", None), *getattr(module, "__path__", ()))
    return any(FOLDER in Path(place).parents for place in places if place)


def once(prepare: Callable[[Mapping], object]) -> Callable[[Mapping], object]:
    """`prepare(inputs)`, done once for each inputs that come: what a peer need not do at every call.

    Inputs are told apart by identity and kept, as copies of them take turns where caches shall be cold.
    """
    kept: dict[int, tuple] = {}

    def prepared(inputs):
        if id(inputs) not in kept:
            kept[id(inputs)] = inputs, prepare(inputs)
        return kept[id(inputs)][1]

    return prepared


def names(wanted: Sequence[str]) -> Sequence[str]:
    """The peers that are meant. ValueError for a name that none has.

    wanted: names, ["auto"] or ["none"]; "no_" before a name leaves it out, as in ["auto", "no_torch_compiled"].
    """
    without = [name.removeprefix("no_") for name in wanted if name.startswith("no_")]
    named = [name for name in wanted if not name.startswith("no_")]
    if without and not named:
        named = ["auto"]
    unknown = [name for name in (*named, *without) if name not in (*NAMES, "auto", "none")]
    if unknown:
        raise ValueError(
            f"unknown peer {', '.join(unknown)}; known: auto, none, {', '.join(NAMES)}"
        )
    meant = () if "none" in named else NAMES if "auto" in named else named
    return [name for name in meant if name not in without]


def find(work: Workload, wanted: Sequence[str], device: str) -> tuple[dict[str, Callable], dict]:
    """(callables by name; reasons of those that cannot run, by name). wanted: as of `names`."""
    ready, missing = {}, {}
    for name in names(wanted):
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
