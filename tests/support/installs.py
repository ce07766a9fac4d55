"""Helpers of the packaging tests: a command that must succeed, the build backend, a virtual environment."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*command, cwd=None, check=True, **env) -> subprocess.CompletedProcess:
    """Run; on failure the assertion shows all that the command said."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("TIGON_", "TRITON_", "PYTHONPATH"))
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert not check or done.returncode == 0, f"{command}\n{done.stdout}"
    return done


def tigon_build():
    """The build backend as a module."""
    spec = importlib.util.spec_from_file_location(
        "tigon_build", ROOT / "build_tools/tigon_build.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Environment:
    """A virtual environment."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def pip_install(self, *what, **env) -> None:
        # fmt: off
        run(sys.executable, "-m", "pip", "--python", self.python, "install", "-q", "--no-deps", "--no-index",
            "--no-build-isolation", *what, **env)
        # fmt: on

    def says(self, *code: str, **env) -> str:
        """What ``python -c`` prints, from a folder that is not the checkout."""
        return run(self.python, "-c", "\n".join(code), cwd=self.folder, **env).stdout.strip()

    def tigon(self, *arguments, **env) -> subprocess.CompletedProcess:
        return run(self.folder / "bin" / "tigon", *arguments, cwd=self.folder, check=False, **env)
