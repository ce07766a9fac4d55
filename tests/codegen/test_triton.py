"""Every Triton launch, compiled for every architecture: no spills, shared memory that fits, the right instructions.

One process, in which Triton does not interpret, compiles them all (compile.py); the tests read what it found. `make
codegen-all` compiles every dtype, `make codegen` one or two of each case.
"""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import codegen_cases as cases
import pytest

from tigon.kernels.launch import SHARED_LIMIT

HERE = Path(__file__).parent
ARCHS = (80, 90, 100, 120)
pytestmark = pytest.mark.xdist_group("codegen")


@pytest.fixture(scope="session")
def reports():
    """What compile.py found, by "case/arch". A second pytest worker waits, then finds everything in the cache."""
    build = HERE.parents[1] / "build"
    build.mkdir(exist_ok=True)
    everything = ["--all"] if os.environ.get("TIGON_CODEGEN") == "all" else []
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with open(build / "codegen.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            [sys.executable, HERE / "compile.py", "--json", *everything],
            env=env, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


PAIRS = [(case, arch) for case in cases.CASES for arch in ARCHS]
WIDE = [pair for pair in PAIRS if pair[0].wide]  # kernels that live on bandwidth


def pair_id(pair) -> str:
    return f"{pair[0].name}-sm_{pair[1]}".replace(" ", "_")


@pytest.fixture(params=PAIRS, ids=pair_id)
def built(request, reports):
    """(case, arch, its kernels' reports)."""
    case, arch = request.param
    return case, arch, reports[f"{case.name}/{arch}"]


def test_nothing_spills(built):
    _, _, kernels = built
    spilled = {f"{k['kernel']} {k['tile']}": k["stack"] for k in kernels if k["stack"]}
    assert not spilled


def test_shared_memory_fits(built):
    _, arch, kernels = built
    used = {k["kernel"]: k["shared"] for k in kernels}
    assert max(used.values()) <= SHARED_LIMIT[arch] * 1024, used


def test_matrix_products_use_the_architectures_instruction(built):
    case, arch, kernels = built
    native = {90: "wgmma", 100: "tcgen05"}.get(arch, "mma") if case.native else None
    for kernel in (k for k in kernels if k["half_dots"]):
        count = kernel["instructions"]
        assert count[native] if native else any(count.values()), kernel


@pytest.mark.parametrize("built", [p for p in PAIRS if p[0].needs], ids=pair_id, indirect=True)
def test_low_precision_operands_are_multiplied_as_they_are(built):
    case, arch, kernels = built
    if arch in case.needs:
        assert any(k["instructions"][case.needs[arch]] for k in kernels)


@pytest.mark.parametrize("built", WIDE, ids=pair_id, indirect=True)
def test_aligned_rows_move_16_bytes_at_a_time(built):
    _, _, kernels = built
    assert all(k["wide_loads"] and k["wide_stores"] for k in kernels)


def test_no_program_offset_is_32_bits_wide(built):
    """Offsets that grow with the batch or the sequence are added to a pointer as scalars: 64 bits, always."""
    _, _, kernels = built
    assert not {k["kernel"]: k["narrow_addresses"] for k in kernels if k["narrow_addresses"]}
