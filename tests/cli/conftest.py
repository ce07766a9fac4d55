"""Running the command in this process, breaking an op on purpose, and a checkpoint to check."""

import json

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
            floats = isinstance(first, torch.Tensor) and first.dtype != torch.float64
            if floats and dispatch._backend is None:
                first.mul_(1.01)
            return out

        return wrong

    monkeypatch.setattr(dispatch, "_load", off)


@pytest.fixture(scope="session")
def good_checkpoint(tmp_path_factory):
    """Without fault."""
    pytest.importorskip("safetensors.torch")
    from checkpoints import quantized

    folder = tmp_path_factory.mktemp("good")
    quantized().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good_checkpoint, tmp_path):
    """A copy to spoil."""
    for file in good_checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture
def check(tigon_command):
    """check(folder, *options) -> (exit code, findings)."""

    def run(folder, *options):
        code, out = tigon_command("check-checkpoint", str(folder), "--json", *options)
        report = json.loads(out)
        wrong = [f for f in report["findings"] if f["severity"] == "error"]
        assert report["ok"] == (code == 0) == (not wrong)
        return code, report["findings"]

    return run
