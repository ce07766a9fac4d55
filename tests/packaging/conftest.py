"""A clean copy of the sources, wheels built from it, and empty virtual environments to put them in.

Everything is built and installed without network: the build takes its tools from the environment that
runs the tests, and the fresh environments borrow torch from it through a ``.pth`` file.
"""

import shutil
import sys
import venv
from pathlib import Path

import pytest
from installs import ROOT, Environment, run, tigon_build

UNSHIPPED = shutil.ignore_patterns(
    ".*", "build", "dist", "_build*", "*.so", "__pycache__", "*.egg-info"
)


@pytest.fixture
def environment(tmp_path):
    """Makes an empty environment; ``borrow=True`` lets it see the packages of this one, but not its Tigon."""

    def make(borrow: bool = False) -> Environment:
        made = Environment(tmp_path / f"venv-{borrow}")
        venv.create(made.folder, with_pip=False)
        if borrow:
            # Plain lines: the .pth files in those folders, an editable Tigon among them, are not read.
            [site] = made.folder.glob("lib/python*/site-packages")
            packages = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
            (site / "borrowed.pth").write_text("\n".join(packages))
        return made

    return make


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> Path:
    """The files of the checkout, without what was built in it."""
    copy = tmp_path_factory.mktemp("sources") / "tigon"
    shutil.copytree(ROOT, copy, ignore=UNSHIPPED)
    return copy


@pytest.fixture(scope="session")
def build_wheel(sources, tmp_path_factory):
    """Builds a wheel in an environment where importing torch is an error."""

    def build(check=True, **env) -> Path | str:
        out = tmp_path_factory.mktemp("wheel")
        (out / "poison" / "torch").mkdir(parents=True)
        (out / "poison/torch/__init__.py").write_text("raise SystemExit('the build imports torch')")
        # fmt: off
        done = run(sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-index", "--no-build-isolation",
                   "-w", out, sources, check=check, PYTHONPATH=str(out / "poison"), **env)
        # fmt: on
        return next(out.glob("*.whl"), done.stdout)

    return build


@pytest.fixture(scope="session")
def pure_wheel(build_wheel) -> Path:
    return build_wheel(TIGON_BUILD="none")


@pytest.fixture(scope="session")
def native_wheel(build_wheel) -> Path:
    """With the extension for one architecture: this is about packaging, not about every GPU."""
    if not tigon_build().system_nvcc():
        pytest.skip("no nvcc on this machine, so no extension to package")
    return build_wheel(TIGON_BUILD="require", TIGON_CUDA_ARCHS="90a")
