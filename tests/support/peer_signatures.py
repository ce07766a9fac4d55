"""Runs by itself: are the signatures of tests/support/peer_stand_ins.py those of the packages that are installed?

Prints what differs and ends with 1; with 3 if none can be imported.
"""

import inspect
import sys
from importlib import import_module
from types import ModuleType

from peer_stand_ins import STAND_INS

from tigon.bench.peers.find import in_sight

CUDA_PARTS = ("selective_scan_cuda", "causal_conv1d_cuda", "flash_attn_2_cuda")


def real(module):
    """The module, with nothing for the CUDA parts that `make env` leaves out; None if it is not installed."""
    for name in CUDA_PARTS:
        try:
            import_module(name)
        except ImportError:
            sys.modules[name] = ModuleType(name)
    try:
        return import_module(module)
    except ImportError:
        return None


def parameters(function):
    """Of a class, those of its `run`."""
    function = function.run if inspect.isclass(function) else function
    return list(inspect.signature(function).parameters)


def main():
    compared = wrong = 0
    with in_sight():
        for module, functions in STAND_INS.items():
            package = real(module)
            for function in functions if package else ():
                theirs = parameters(getattr(package, function.__name__))
                compared += 1
                if theirs != parameters(function):
                    wrong += 1
                    print(f"{module}.{function.__name__}: {theirs}")
    return 1 if wrong else 0 if compared else 3


if __name__ == "__main__":
    sys.exit(main())
