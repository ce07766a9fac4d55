"""Running the command in this process, and breaking an op on purpose."""

import pytest
import torch

from tigon.cli import main
from tigon.ops import dispatch


@pytest.fixture
def tigon_command(capsys):
    """tigon_command(*argv) -> (exit code, what it printed)."""

    def run(*argv):
        try:
            code = main(list(argv))
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().out

    return run


@pytest.fixture
def broken_op(monkeypatch):
    """The selected backend's first result is 1 % off; the fp64 oracle and the baseline stay right."""
    load = dispatch._load

    def off(function):
        right = load(function)

        def wrong(*args, **options):
            out = right(*args, **options)
            first = out[0] if isinstance(out, tuple) else out
            if first.dtype != torch.float64 and dispatch._backend is None:
                first.mul_(1.01)
            return out

        return wrong

    monkeypatch.setattr(dispatch, "_load", off)
