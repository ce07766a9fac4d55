"""The oldest dependencies that can be had: Triton 3.6 with NumPy 2.3, beside the torch that is installed.

The oldest torch is not tested: Tigon allows 2.6, whose only Linux wheel on the index is a CUDA build that
needs several GB of CUDA libraries to be imported. docs/install.md says so.
"""

import json
import subprocess
import sys

import pytest
from installs import ROOT, run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("oldest")]
OLDEST = ("triton==3.6.0", "numpy==2.3.*" if sys.version_info >= (3, 11) else "numpy==2.2.*")
SPILLS = {
    "ssd_forward p64 n128 unaligned/90",
    "ssd_backward p64 n128/90",
    "moe_experts backward super nothing/90",
}

IMPORT_ALL = """
import importlib, pkgutil, tigon, triton, numpy
for module in pkgutil.walk_packages(tigon.__path__, "tigon.", onerror=lambda name: None):
    if module.name.startswith(("tigon.ops", "tigon.reference", "tigon.kernels", "tigon.modules", "tigon.models")):
        importlib.import_module(module.name)
print(triton.__version__, numpy.__version__)
"""


@pytest.fixture(scope="session")
def oldest(tmp_path_factory) -> dict:
    """Environment variables under which Python finds the oldest versions first."""
    target = tmp_path_factory.mktemp("oldest")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, *OLDEST]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(
            f"{' and '.join(OLDEST)} cannot be had here: {done.stderr.strip().splitlines()[-1]}"
        )
    return {"PYTHONPATH": str(target), "TRITON_CACHE_DIR": str(target / "cache")}


def test_every_module_imports_with_the_oldest_versions(oldest):
    said = run(sys.executable, "-c", IMPORT_ALL, cwd=ROOT, **oldest).stdout
    triton, numpy = said.split()[-2:]
    assert (triton, numpy[:3]) == ("3.6.0", OLDEST[1][-5:-2])


def test_references_hold_with_the_oldest_versions(oldest):
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    quick = ["tests/ops", "-m", "not slow", "-k", "not gradcheck and not drawn", "-n", "2"]
    done = run(*pytest, *quick, cwd=ROOT, **oldest)
    assert " passed" in done.stdout


def test_sm_90_code_of_the_oldest_triton_spills_only_where_known(oldest):
    """One architecture, that of the GPU most often found with it; the gate proper covers all of them.

    The launch rows are chosen so that the newest Triton does not spill; in 3.6 two of them do.
    """
    gate = [sys.executable, "tests/codegen/compile.py", "--arch", "90", "--json"]
    reports = json.loads(run(*gate, cwd=ROOT, **oldest).stdout.splitlines()[-1])
    assert len(reports) > len(SPILLS)
    spilled = {case: r for case, found in reports.items() for r in found if r["stack"]}
    assert set(spilled) <= SPILLS, spilled
