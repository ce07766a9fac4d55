"""What a wheel holds, and that it works in an empty environment: with the extension, without it, without torch."""

import json
import sys
import tarfile
import zipfile

import pytest
from installs import ROOT, run, tigon_build

pytestmark = pytest.mark.xdist_group("packaging")

SCAN = """
import torch, tigon
x, dt, A, B = torch.ones(1, 5, 2, 4), torch.ones(1, 5, 2), -torch.ones(2), torch.ones(1, 5, 1, 3)
print(tuple(tigon.ssd_scan(x, dt, A, B, B).shape))
"""

UNSHIPPED = ("tigon/bench/results/", "tigon/bench/suites/", "tigon/bench/on_gpu/")


def names(wheel) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def shipped(room: str, *patterns: str) -> set[str]:
    """The files of a room, named as in the wheel."""
    name = "tigon" if room == "python" else f"tigon/{room}"
    files = (path for pattern in patterns for path in (ROOT / room).glob(pattern))
    return {f"{name}/{path.relative_to(ROOT / room)}" for path in files}


def test_pure_wheel_lacks_no_source_of_any_room(pure_wheel):
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    expected = {"tigon/py.typed"} | shipped("csrc", "*.cu", "common/*.cuh")
    expected |= shipped("python", "**/*.py") | shipped("kernels", "**/*.py")
    bench = shipped("bench", "**/*.py", "report.*")
    expected |= {name for name in bench if not name.startswith(UNSHIPPED)}
    assert expected - names(pure_wheel) == set()


def test_what_belongs_to_the_checkout_only_is_not_in_the_wheel(pure_wheel):
    """Records, pytest's suites, and the script that runs the tests on a GPU."""
    assert all((ROOT / folder.removeprefix("tigon/")).is_dir() for folder in UNSHIPPED)
    assert not [name for name in names(pure_wheel) if name.startswith(UNSHIPPED)]


def test_wheel_ships_nothing_but_the_package(pure_wheel):
    tops = {name.split("/")[0] for name in names(pure_wheel)}
    assert tops == {"tigon", next(top for top in tops if top.endswith(".dist-info"))}
    assert not [name for name in names(pure_wheel) if name.endswith((".so", "_build.json"))]


def test_pure_wheel_runs_ops_and_says_that_nothing_was_built(pure_wheel, environment):
    env = environment(borrow=True)
    env.pip_install(pure_wheel)
    assert env.says(SCAN) == "(1, 5, 2, 4)"
    assert str(env.folder) in env.says("import tigon; print(tigon.__file__)")
    report = json.loads(env.tigon("doctor", "--json").stdout)
    assert report["tigon"]["build"] is None
    assert report["packages"]["torch"]


def test_native_wheel_holds_an_extension_that_imports_without_gpu_and_torch(
    native_wheel, environment
):
    assert "none-any" not in native_wheel.name
    env = environment()
    env.pip_install(native_wheel)
    assert int(env.says("import tigon._C as c; print(len(c.kernels()))")) > 0
    report = json.loads(env.tigon("doctor", "--json").stdout)
    assert report["tigon"]["build"]["built"] is True
    assert report["tigon"]["build"]["archs"] == "90a"
    assert "error" not in report["tigon"]["native"]


def test_native_wheel_runs_ops_beside_torch(native_wheel, environment):
    env = environment(borrow=True)
    env.pip_install(native_wheel)
    assert env.says(SCAN) == "(1, 5, 2, 4)"


def test_doctor_without_torch_names_the_fix_and_strict_fails(pure_wheel, environment):
    env = environment()
    env.pip_install(pure_wheel)
    plain = env.tigon("doctor")
    assert plain.returncode == 0, plain.stdout
    assert "pip install 'torch>=2.6'" in plain.stdout
    report = json.loads(env.tigon("doctor", "--json").stdout)
    assert {op["backend"] for op in report["ops"]} == {"reference"}
    assert {op["why"] for op in report["ops"]} == {"torch is not installed"}
    assert env.tigon("doctor", "--strict").returncode == 4


def test_without_nvcc_auto_builds_a_working_wheel_and_says_why(build_wheel, environment, no_nvcc):
    env = environment()
    env.pip_install(build_wheel(TIGON_BUILD="auto", **no_nvcc))
    record = json.loads(env.tigon("doctor", "--json").stdout)["tigon"]["build"]
    assert record["built"] is False
    assert "no nvcc" in record["why"]


def test_without_nvcc_require_fails_and_says_why(build_wheel, no_nvcc):
    said = build_wheel(check=False, TIGON_BUILD="require", **no_nvcc)
    assert "TIGON_BUILD=require, but no nvcc" in str(said)


def test_unknown_build_mode_is_refused_by_name(build_wheel):
    said = build_wheel(check=False, TIGON_BUILD="maybe")
    assert "TIGON_BUILD is 'maybe'; allowed are auto, require and none" in str(said)


def test_sdist_lacks_nothing_that_the_build_needs(sources, tmp_path):
    code = f"import tigon_build; print(tigon_build.build_sdist({str(tmp_path)!r}))"
    run(sys.executable, "-c", code, cwd=sources, PYTHONPATH=str(ROOT / "build_tools"))
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.split("/", 1)[-1] for name in archive.getnames()}
    needed = {path for path in sources.glob("*") if path.suffix in (".py", ".toml", ".txt")}
    needed |= {path for room in ("build_tools", "csrc") for path in (sources / room).rglob("*.*")}
    needed |= set((sources / "bench").glob("report.*"))
    assert {str(path.relative_to(sources)) for path in needed} - held == set()


@pytest.fixture
def no_nvcc(tmp_path) -> dict:
    """An environment in which no nvcc can be found."""
    if tigon_build().wheel_nvcc():
        pytest.skip("this environment holds CUDA's compiler as a wheel")
    return {"CUDA_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}


class TestRequirements:
    """Of a build: CUDA's compiler is fetched only where it is wanted and missing."""

    @pytest.fixture
    def backend(self, monkeypatch):
        module = tigon_build()
        monkeypatch.setattr(module.sys, "platform", "linux")
        monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(module, "system_nvcc", lambda: None)
        monkeypatch.delenv("TIGON_BUILD", raising=False)
        return module

    def cuda(self, backend) -> list[str]:
        return [need for need in backend.build_requirements() if need.startswith("nvidia-")]

    def test_wheels_of_nvcc_are_added_where_the_system_has_none(self, backend):
        assert self.cuda(backend) == backend.CUDA_WHEELS
        assert all(need.endswith("==13.0.*") for need in backend.CUDA_WHEELS)

    def test_nothing_is_added_where_the_system_has_nvcc(self, backend, monkeypatch):
        monkeypatch.setattr(backend, "system_nvcc", lambda: "/usr/bin/nvcc")
        assert self.cuda(backend) == []

    def test_nothing_is_added_off_linux(self, backend, monkeypatch):
        monkeypatch.setattr(backend.sys, "platform", "darwin")
        assert self.cuda(backend) == []

    def test_mode_none_asks_for_nothing_at_all(self, backend, monkeypatch):
        monkeypatch.setenv("TIGON_BUILD", "none")
        assert backend.build_requirements() == []

    def test_torch_is_never_asked_for(self, backend):
        assert not [need for need in backend.build_requirements() if "torch" in need]
