"""bench/on_gpu.sh, run on the CPU: boxes, resumption, what is kept and what is said last."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
STAGES = ("build", "warm", "test", "sanitize", "bench")
NOTHING = {f"CMD_{name.upper()}": "true" for name in STAGES}
CLEAN = "#!/bin/sh\necho '========= COMPUTE-SANITIZER'\necho '========= ERROR SUMMARY: 0 errors'\n"


@pytest.fixture
def on_gpu(tmp_path):
    """on_gpu(*stages, **settings) -> (exit code, what it printed, on_gpu.json), from another folder."""

    def run(*stages, **settings):
        done = subprocess.run(**call(tmp_path, *stages, **settings), capture_output=True, text=True)
        file = tmp_path / "out/on_gpu.json"
        record = json.loads(file.read_text()) if file.is_file() else None
        return done.returncode, done.stdout + done.stderr, record

    return run


def call(folder: Path, *stages: str, **settings: str) -> dict:
    """The arguments of a process that runs the script from `folder`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TRITON", "TIGON"))}
    env = kept | {"DEVICE": "cpu", "PYTHON": sys.executable, "WORKERS": "1", **settings}
    env |= {"OUT": str(folder / "out"), "STATE": str(folder / "state")}
    return {"args": [str(ROOT / "bench/on_gpu.sh"), *stages], "env": env, "cwd": folder}


@pytest.fixture
def sanitizer(monkeypatch):
    """The module that reads what compute-sanitizer says; the script's folder is no package."""
    monkeypatch.syspath_prepend(str(ROOT / "bench/on_gpu"))
    import sanitizer

    yield sanitizer
    for name in ("sanitizer", "stage", "boxes"):
        sys.modules.pop(name, None)


def alive(pid: str) -> bool:
    """Not a zombie, which has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_every_stage_runs_for_real_and_its_facts_are_kept(on_gpu, tmp_path):
    tool = tmp_path / "sanitizer"
    tool.write_text(CLEAN)
    tool.chmod(0o755)
    (tmp_path / "test_some.py").write_text("def test_good(): pass\ndef test_fine(): pass\n")
    code, out, record = on_gpu(
        SANITIZER=str(tool),
        OPS="quantize_fp8",
        TESTS=str(tmp_path / "test_some.py"),
        BENCH="--shape m=4,k=128 --repeat 1 --no-memory --no-roof --peers none",
    )
    stages = record["stages"]
    assert code == 0 and record["ok"], out
    assert {name: stage["status"] for name, stage in stages.items()} == dict.fromkeys(STAGES, "ok")
    assert stages["build"]["facts"]["how"] == "already there"
    assert stages["warm"]["facts"]["done"] == 12 and not stages["warm"]["facts"]["failures"]
    assert stages["test"]["facts"]["counts"] == {"passed": 2}
    assert stages["sanitize"]["facts"]["memcheck"]["low precision"]["verdict"] == "clean"
    assert stages["bench"]["facts"]["cases"] == 1
    bench = json.loads((tmp_path / "out/bench.json").read_text())
    assert bench["cases"][0]["case"]["op"] == "quantize_fp8" and bench["cases"][0]["results"]
    assert json.loads((tmp_path / "out/doctor.json").read_text())["ops"]
    assert record["env"]["packages"]["torch"] and record["env"]["commit"]
    assert "quantize_fp8" in (tmp_path / "out/on_gpu.log").read_text()
    lines = out.strip().splitlines()
    assert lines[-1].startswith("all is well") and lines[-2].startswith("bench ")


def test_a_stage_over_its_box_dies_with_all_its_children(on_gpu, tmp_path):
    """Also those in a session of their own whose parent is gone, and those that ignore SIGTERM."""
    pids = tmp_path / "pids"
    keep = "trap '' TERM; echo $$ >> pids; while :; do sleep 0.2; done".replace("pids", str(pids))
    (tmp_path / "keep.sh").write_text(keep)
    command = f"(setsid sh {tmp_path}/keep.sh &); sh {tmp_path}/keep.sh & sh {tmp_path}/keep.sh"
    begin = time.monotonic()
    code, out, record = on_gpu("warm", "bench", **NOTHING | {"CMD_WARM": command}, BOX_WARM="2")
    assert time.monotonic() - begin < 40
    assert code == 1 and record["stages"]["warm"]["status"] == "timeout"
    assert record["stages"]["bench"]["status"] == "ok" and "NOT all is well" in out
    started = pids.read_text().split()
    assert len(started) == 3
    assert not [pid for pid in started if alive(pid)]


def test_an_interrupted_call_leaves_nothing_running(tmp_path):
    mark = tmp_path / "pid"
    stubs = NOTHING | {"CMD_WARM": f"echo $$ > {mark}.new; mv {mark}.new {mark}; sleep 60"}
    process = subprocess.Popen(**call(tmp_path, **stubs), stdout=subprocess.PIPE, text=True)
    while not mark.exists() and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and out.rstrip().endswith("a later call goes on from here")
    assert not alive(mark.read_text().strip())
    assert [*json.loads((tmp_path / "out/on_gpu.json").read_text())["stages"]] == ["build"]


def test_what_is_done_is_done_once_and_a_failure_stops_nothing(on_gpu, tmp_path):
    count = {
        f"CMD_{name.upper()}": f"echo {name} >> {tmp_path}/ran" for name in STAGES if name != "test"
    }
    bad = {**count, "CMD_TEST": f"echo test >> {tmp_path}/ran; exit 3"}
    code, out, record = on_gpu(**bad)
    assert (
        code == 1
        and record["stages"]["test"] | {"status": "failed", "note": "exit code 3"}
        == (record["stages"]["test"])
    )
    assert (tmp_path / "ran").read_text().split() == list(STAGES)
    good = {**count, "CMD_TEST": f"echo again >> {tmp_path}/ran"}
    code, out, record = on_gpu(**good)
    assert code == 0 and record["ok"] and "bench     ok, before" in out
    assert (tmp_path / "ran").read_text().split() == [*STAGES, "again"]
    on_gpu("warm", **good)
    assert (tmp_path / "ran").read_text().split() == [*STAGES, "again", "warm"]
    on_gpu(**good, FORCE="1")
    assert len((tmp_path / "ran").read_text().split()) == 12


def test_a_stage_without_time_left_is_no_success(on_gpu):
    code, _, record = on_gpu("build", "warm", **NOTHING, TOTAL="0")
    assert code == 1
    assert record["stages"]["warm"]["note"] == "no time was left for it"


def test_where_nothing_can_be_built_a_link_makes_tigon_importable(on_gpu, tmp_path):
    """By an interpreter that does not know Tigon, on a machine whose make fails."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/make").write_text("#!/bin/sh\nexit 2\n")
    (tmp_path / "bin/make").chmod(0o755)
    code, out, record = on_gpu(
        "build",
        PYTHON=sys._base_executable,
        PATH=f"{tmp_path}/bin:{os.environ['PATH']}",
        VENV=str(tmp_path / "env"),
    )
    assert code == 0, out
    assert record["stages"]["build"]["facts"]["how"].startswith("a link")
    said = subprocess.run(
        [tmp_path / "env/bin/python", "-c", "import tigon.kernels, tigon.bench; print(tigon.__file__)"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert Path(said.stdout.strip()).resolve() == ROOT / "python/__init__.py"


def test_where_the_build_is_too_slow_a_link_is_made_in_time(on_gpu, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/make").write_text("#!/bin/sh\nexec sleep 300\n")
    (tmp_path / "bin/make").chmod(0o755)
    code, out, record = on_gpu(
        "build",
        PYTHON=sys._base_executable,
        PATH=f"{tmp_path}/bin:{os.environ['PATH']}",
        VENV=str(tmp_path / "env"),
        BOX_BUILD="28",
    )
    assert code == 0, out
    assert record["stages"]["build"]["facts"]["how"].startswith("a link")


def test_without_a_gpu_it_says_so_and_exits_with_4(on_gpu):
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a GPU")
    code, out, _ = on_gpu(DEVICE="cuda")
    assert code == 4 and "no NVIDIA GPU" in out


def test_a_suite_that_is_cut_off_goes_on_where_it_stopped(on_gpu, tmp_path):
    file, ran = tmp_path / "test_some.py", tmp_path / "ran"
    file.write_text(f"""
import pathlib, time
ran = pathlib.Path({str(ran)!r})
def test_first(): ran.write_text("first")
def test_bad(): assert not ran.exists() or ran.read_text() != "first", "as planned"
def test_long():
    ran.write_text("long")
    time.sleep(60)
""")
    code, _, record = on_gpu("test", TESTS=str(file), BOX_TEST="10", WORKERS="0")
    test = record["stages"]["test"]
    assert code == 1 and test["status"] == "failed" and test["note"].startswith("out of time")
    assert test["facts"]["counts"] == {"passed": 1, "failed": 1}
    [(name, why)] = test["facts"]["failures"].items()
    assert name.endswith("::test_bad") and "as planned" in why
    assert [name.split("::")[1] for name in test["facts"]["unfinished"]] == ["test_long"]
    file.write_text(file.read_text().replace("60", "0"))
    code, _, record = on_gpu("test", TESTS=str(file))
    assert code == 0, record
    assert record["stages"]["test"]["facts"]["counts"] == {"passed": 3}
    assert record["stages"]["test"]["facts"]["passed_before"] == 1 and ran.read_text() == "long"


def test_a_test_file_that_lacks_a_package_is_told_and_no_failure(on_gpu, tmp_path):
    (tmp_path / "test_lacks.py").write_text("import nowhere_to_be_found\n")
    (tmp_path / "test_good.py").write_text("def test_good(): pass\n")
    code, _, record = on_gpu("test", TESTS=f"{tmp_path}/test_lacks.py {tmp_path}/test_good.py")
    facts = record["stages"]["test"]["facts"]
    assert code == 0 and facts["counts"] == {"passed": 1}
    assert [*facts["not_collected"].values()] == [
        "ModuleNotFoundError: No module named 'nowhere_to_be_found'"
    ]


HEAD = "========= COMPUTE-SANITIZER\n"
READ = "========= Invalid __global__ read of size 4 bytes\n=========     at void tigon::sort<8>(Sort)+0x90\n"
FAR = "========= Uninitialized __global__ memory read of size 4 bytes\n=========     at void at::native::f()\n"


@pytest.mark.parametrize(
    "tool, code, text, expected",
    [
        ("memcheck", 0, HEAD + "========= ERROR SUMMARY: 0 errors\n", "clean"),
        ("memcheck", 77, HEAD + READ + "========= ERROR SUMMARY: 3 errors\n", "finding"),
        ("initcheck", 77, HEAD + FAR + "========= ERROR SUMMARY: 3 errors\n", "clean"),
        ("racecheck", 0, HEAD + "========= RACECHECK SUMMARY: 0 hazards displayed\n", "clean"),
        ("racecheck", 77, HEAD + "========= RACECHECK SUMMARY: 1 hazard displayed\n", "finding"),
        (
            "memcheck",
            2,
            HEAD + "x\nWRONG: a y\n========= ERROR SUMMARY: 0 errors\n",
            "wrong result",
        ),
        ("memcheck", 255, HEAD + "========= Error: Device not supported\n", "unusable"),
        ("memcheck", 1, "unknown option\n", "unusable"),
        ("memcheck", 4, HEAD + "========= ERROR SUMMARY: 0 errors\n", "failed"),
        ("memcheck", None, HEAD, "timeout"),
    ],
)
def test_a_tool_that_does_not_work_is_told_from_a_finding(sanitizer, tool, code, text, expected):
    assert sanitizer.verdict(code, text, tool)["verdict"] == expected


def test_a_finding_fails_the_stage_and_a_tool_that_cannot_work_does_not(on_gpu, tmp_path):
    tool = tmp_path / "sanitizer"
    for says, status in (
        (READ + "========= ERROR SUMMARY: 1 error\n", "failed"),
        ("========= Error: Device not supported\n", "skipped"),
    ):
        tool.write_text(f"#!/bin/sh\ncat <<'END'\n{HEAD}{says}END\n")
        tool.chmod(0o755)
        code, out, record = on_gpu("sanitize", SANITIZER=str(tool), OPS="moe_sort")
        assert record["stages"]["sanitize"]["status"] == status
        assert code == (status == "failed"), out
    assert "Device not supported" in record["stages"]["sanitize"]["note"]
