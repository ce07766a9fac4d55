"""The entry of the command line and `tigon doctor`: quick, torch-free, and never at a loss."""

import json
import resource
import statistics
import subprocess
import sys
import time
from importlib import import_module

import pytest

from tigon import cli
from tigon.cli import doctor, machine


def python(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


def seconds(*arguments, runs=7) -> tuple[float, float]:
    """Median of the processor time and least of the wall time: other tests share the cores."""
    used, waited = [], []
    for _ in range(runs):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        python(*arguments)
        waited.append(time.perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(used), min(waited)


def heavy_modules_after(code: str) -> set[str]:
    report = f"{code}\nimport sys; sys.stderr.write('|'.join(sys.modules))"
    loaded = python("-c", report).stderr.split("|")
    assert "tigon" in loaded
    return {"torch", "triton", "numpy", "transformers", "rich", "matplotlib"} & set(loaded)


def test_import_tigon_is_lazy():
    assert heavy_modules_after("import tigon") == set()


def test_doctor_and_help_import_nothing_heavy():
    assert heavy_modules_after("from tigon.cli import main; main(['doctor', '--json'])") == set()
    assert (
        heavy_modules_after("from tigon.cli import main\ntry: main(['-h'])\nexcept SystemExit: 0")
        == set()
    )


@pytest.mark.parametrize(
    ("arguments", "limit"), [(("-m", "tigon", "doctor"), 0.3), (("-c", "import tigon"), 0.1)]
)
def test_start_takes_little_more_than_an_empty_python(arguments, limit):
    """Measured on two idle cores: doctor 0.10 s, import 0.01 s, wall and processor time alike."""
    used, waited = (a - b for a, b in zip(seconds(*arguments), seconds("-c", "pass"), strict=True))
    assert used < limit
    assert waited < 2 * limit


def test_every_command_follows_the_protocol_and_is_imported_only_when_used():
    for summary, module_name in cli.COMMANDS.values():
        assert summary and not summary.endswith(".")
        module = import_module(module_name)
        assert callable(module.add_arguments)
        assert callable(module.run)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((), 1),
        (("nonsense",), 1),
        (("doctor", "--nonsense"), 1),
        (("--version",), 0),
        (("doctor",), 0),
    ],
)
def test_exit_code_of_the_entry(arguments, code):
    done = python("-m", "tigon", *arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_missing_package_of_a_command_is_named_without_a_traceback(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "broken", ("needs what is not here", "not_a_package_at_all"))
    assert cli.main(["broken"]) == cli.ENVIRONMENT
    assert "'not_a_package_at_all'" in capsys.readouterr().err


GPU = {"name": "NVIDIA H200", "arch": 90, "memory_gib": 139.8}


@pytest.fixture
def on_machine(monkeypatch):
    """The report on a made-up machine: a healthy one with an H200, changed by the keywords."""

    def examine(native="extension", **changed) -> dict:
        found = {
            "os": {"name": "Linux"},
            "python": {"version": "3.12"},
            "packages": {"torch": "2.13.0", "torch_cuda": "13.0", "triton": "3.9.0", "cupy": None},
            "driver": {"version": "580.1", "cuda": "13.0", "gpus": [GPU]},
            "nvcc": None,
            "compiler": {"path": "/usr/bin/gcc", "version": "12", "python_headers": True},
        }
        for name, part in changed.items():
            found[name] = found[name] | part
        monkeypatch.setattr(machine, "facts", lambda: found)
        monkeypatch.setattr(
            doctor, "native_status", lambda: {"backend": native, "why": "no extension"}
        )
        return doctor.examine()

    return examine


def backends(report: dict) -> dict[str, set]:
    return {
        kind: {(op["backend"], op["why"]) for op in report["ops"] if op["kind"] == kind}
        for kind in ("triton", "cuda")
    }


def test_healthy_gpu_machine_takes_every_kernel_and_has_nothing_to_fix(on_machine):
    report = on_machine()
    assert {backend for rows in backends(report).values() for backend, _ in rows} == {
        "triton",
        "cuda",
    }
    assert report["fixes"] == []
    assert "NVIDIA H200, sm_90" in doctor.render(report)


@pytest.mark.parametrize(
    ("kinds", "why", "fix", "machine_is"),
    [
        (["cuda"], "no extension, and CuPy is not", "tigon[cu13]", {"native": None}),
        (["triton"], "needs a C compiler", "install gcc", {"compiler": {"path": None}}),
        (["triton"], "needs Python.h", "python3-dev", {"compiler": {"python_headers": False}}),
        (["triton"], "triton 3.5.1 is older", "triton>=3.6", {"packages": {"triton": "3.5.1"}}),
        (
            ["triton", "cuda"],
            "torch 2.5.1 is older",
            "torch>=2.6",
            {"packages": {"torch": "2.5.1"}},
        ),
        (["triton", "cuda"], "CPU build", "CUDA build", {"packages": {"torch_cuda": None}}),
        (["triton", "cuda"], "no NVIDIA GPU", None, {"driver": {"gpus": []}}),
        (["triton", "cuda"], "sm_75", None, {"driver": {"gpus": [GPU | {"arch": 75}]}}),
        (
            ["triton", "cuda"],
            "nvmlInit",
            "reboot",
            {"driver": {"gpus": [], "error": "nvmlInit failed"}},
        ),
    ],
)
def test_doctor_names_what_is_missing_and_its_fix(on_machine, kinds, why, fix, machine_is):
    report = on_machine(**machine_is)
    for kind, rows in backends(report).items():
        if kind in kinds:
            assert all(backend == "reference" and why in said for backend, said in rows), rows
        else:
            assert {backend for backend, _ in rows} == {kind}
    assert (fix is None) == (not report["fixes"])
    assert fix is None or any(fix in entry["fix"] for entry in report["fixes"])
    assert fix is None or fix in doctor.render(report)


def test_cupy_takes_the_place_of_the_extension(on_machine):
    rows = backends(on_machine(native="cupy", packages={"cupy": "14.2"}))["cuda"]
    assert rows == {("cuda", "CuPy 14.2, which compiles at run time")}


def test_forced_backend_is_shown(on_machine, monkeypatch):
    monkeypatch.setenv("TIGON_BACKEND", "reference")
    assert {op["why"] for op in on_machine()["ops"]} == {"TIGON_BACKEND=reference"}
    monkeypatch.setenv("TIGON_BACKEND", "kernel")
    assert {op["backend"] for op in on_machine(driver={"gpus": []})["ops"]} == {"none"}


@pytest.mark.parametrize("probe", ["os", "python", "package", "driver", "nvcc", "compiler"])
def test_a_broken_probe_breaks_neither_the_text_nor_the_json(probe, monkeypatch, capsys):
    def broken():
        raise RuntimeError("this probe is broken")

    monkeypatch.setattr(machine, f"{probe}_facts", broken)
    assert cli.main(["doctor"]) == cli.OK
    assert "this probe is broken" in capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == cli.OK
    json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("part", ["tigon_facts", "native_status", "op_facts"])
def test_a_broken_tigon_is_reported_not_raised(part, monkeypatch, capsys):
    def broken(*_):
        raise ImportError("this Tigon is broken")

    monkeypatch.setattr(doctor, part, broken)
    assert cli.main(["doctor"]) == cli.OK
    assert "this Tigon is broken" in capsys.readouterr().out
