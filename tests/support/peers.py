"""Asking packages that must stay out of sight: nvidia-modelopt and torchao, which `make env` puts into .venv/peers.

transformers takes such packages where it finds them, and they change torch when they are imported. So they run in a
process of their own.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor

PEERS = Path(sys.prefix) / "peers"
MISSING = 3  # exit code: the package cannot be imported

Questions = Mapping[str, Mapping[str, Tensor]]


def ask(module: str, questions: Questions) -> dict[str, dict[str, dict[str, Tensor]]]:
    """{function: {name: what that function of tests/support/<module>.py makes of the tensor}} for
    {function: {name: tensor}}, in one process. Skips where a package is missing."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "tensors.pt"
        torch.save({function: dict(given) for function, given in questions.items()}, file)
        command = [sys.executable, __file__, module, str(file)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        if done.returncode == MISSING:
            pytest.skip(f"{done.stdout.strip()}; `make env` installs it")
        assert done.returncode == 0, done.stderr
        return torch.load(file, weights_only=True)


def main(module: str, file: str) -> int:
    """The other process."""
    sys.path.append(str(PEERS))
    questions = torch.load(file, weights_only=True)
    answers = {}
    try:
        for function, given in questions.items():
            answer = getattr(__import__(module), function)
            answers[function] = {name: answer(t) for name, t in given.items()}
    except ImportError as error:
        print(error)
        return MISSING
    torch.save(answers, file)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
