"""tigon tune: candidates, the gate before the clock, what wins, and the table that another process follows."""

import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.jit import JITFunction

from tigon.bench import timing, tune, tune_space
from tigon.kernels import launch, launch_table
from tigon.ops import dispatch

ARCHS = (80, 90, 100, 120)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = ("rms_norm", "--shape", "t=4,d=64", "--dtype", "float32", "--device", DEVICE)
KERNEL = ("--backend", "kernel")
CALLS = {
    "ssd_scan": {"b": 1, "l": 8192, "h": 128, "p": 64, "n": 128, "itemsize": 2},
    "ssd_scan_backward": {"b": 1, "l": 8192, "h": 128, "g": 8, "p": 64, "n": 128, "itemsize": 2},
    "causal_conv1d": {"b": 1, "l": 8192, "d": 10240, "width": 4, "itemsize": 2},
    "gated_rms_norm": {"t": 8192, "d": 8192, "group_size": 1024, "itemsize": 2},
    "scaled_mm": {"m": 8, "n": 18560, "k": 4096, "itemsize": 2}
    | {"a_format": "plain", "b_format": "nvfp4"},
    "moe_experts": {"t": 8, "k": 22, "e": 512, "m": 2688, "l": 1024, "itemsize": 2},
    "moe_experts_backward": {"t": 8192, "k": 22, "e": 512, "m": 2688, "l": 1024, "itemsize": 2}
    | {"save": "hidden"},
    "attention_token_scores": {"nq": 64, "hq": 32, "hkv": 8, "dim": 128, "itemsize": 2},
    "ssd_token_scores": {"nq": 64, "h": 128, "n": 128, "itemsize": 2, "decay": True},
}


def seconds(median, spread=0.0):
    return timing.Timing(median, median * (1 - spread), median * (1 + spread), 9, "fake clock")


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds_of) replaces the timer: seconds_of(fields, whether it is the last measurement)."""

    def use(seconds_of):
        def measure(calls, device, budget, graph=False):
            found = {}
            for name, turns in calls.items():
                turns[0]()
                found[name] = seconds(seconds_of(turns[0].args[0], budget == tune.LAST_SECONDS))
            return found

        monkeypatch.setattr(timing, "measure", measure)

    return use


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Where the table goes; nothing of it is followed in this process."""
    monkeypatch.delenv("TIGON_LAUNCH_TABLE", raising=False)
    return tmp_path / "table.json"


@pytest.fixture
def search(tigon_command, path):
    """search(*options) -> (exit code, output, the table's rows) of a tiny norm."""

    def run(*options):
        code, out = tigon_command("tune", *TINY, "--output", str(path), "--budget", "30", *options)
        rows = json.loads(path.read_text())["rows"] if path.is_file() else []
        return code, out, rows

    return run


def test_another_process_follows_the_table_that_was_written(search, clock, path):
    clock(lambda fields, last: 0.5 if fields["warps"] == 8 else 1.0)
    code, out, (row,) = search(*KERNEL)
    assert code == 0 and "warps=8" in out and "0.500x" in out and f"written to {path}" in out
    assert (row["op"], row["kernel"]) == ("gated_rms_norm", "gated_norm")
    assert row["when"] == {"d": 64, "group_size": 64, "itemsize": 4}
    found = row["evidence"]
    assert (found["seconds"], found["baseline_seconds"]) == (0.5, 1.0)
    assert {"gpu", "date", "versions"} <= set(found)
    arch = json.loads(path.read_text())["arch"]
    code = f"""
from tigon.kernels import launch
for d in (64, 128):
    print(launch.plan("rms_norm", {arch}, t=4, d=d, group_size=d, itemsize=4)["gated_norm"].warps)
"""
    env = os.environ | {"TIGON_LAUNCH_TABLE": str(path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split()[0] == "8" != done.stdout.split()[1], done.stderr


def test_rows_of_other_cases_stay_and_the_same_case_is_replaced(search, clock, path):
    clock(lambda fields, last: 1.0 / fields["warps"])
    first = search(*KERNEL)[2]
    (other,) = search("--shape", "t=4,d=32", *KERNEL)[2][1:]
    clock(lambda fields, last: 1.0 * fields["rows"])
    rows = search(*KERNEL)[2]
    assert other["when"]["d"] == 32 and other in rows and len(rows) == 2
    assert first[0] not in rows and rows[1]["when"]["d"] == 64


def test_a_table_of_another_chip_is_not_added_to(search, clock, path):
    arch = launch.target(torch.device(DEVICE))[0]
    other = next(a for a in ARCHS if a != arch)
    text = json.dumps({"schema": 1, "arch": other, "rows": []})
    path.write_text(text)
    clock(lambda fields, last: 1.0 / fields["warps"])
    code, out, _ = search(*KERNEL)
    assert code == 1 and f"is for sm_{other}" in out and path.read_text() == text


def test_what_is_not_faster_again_at_the_end_is_not_written(search, clock, path):
    clock(lambda fields, last: 1.0 if last else 1.0 / fields["warps"])
    code, out, rows = search(*KERNEL)
    assert code == 0 and not rows and "nothing is faster" in out


def test_a_wrong_candidate_is_told_and_never_timed(search, clock, monkeypatch):
    """With 8 warps the kernel is 1 % off, and would be the fastest."""
    load = dispatch._load

    def off(function):
        right = load(function)

        def wrong(*args, **options):
            out = right(*args, **options)
            if any(("warps", 8) in fields for _, _, fields in launch._overrides):
                out.mul_(1.01)
            return out

        return wrong if function.startswith("tigon.kernels.gated_norm") else right

    monkeypatch.setattr(dispatch, "_load", off)
    timed = []
    clock(lambda fields, last: timed.append(fields["warps"]) or 1.0 / fields["warps"])
    code, out, (row,) = search(*KERNEL)
    assert code == 0 and "wrong: y" in out
    assert 8 not in timed and row["config"]["warps"] == 16


@pytest.mark.parametrize("what", ["raises", "spills"])
def test_a_candidate_that_does_not_compile_cleanly_is_told_and_dropped(
    what, search, clock, monkeypatch
):
    """As with 8 warps here."""
    used = tune.Bench.using

    @contextmanager
    def using(self, kernel, fields):
        with used(self, kernel, fields):
            if what == "raises" and fields["warps"] == 8:
                raise RuntimeError("out of resource: shared memory")
            spills.append(7 if what == "spills" and fields["warps"] == 8 else 0)
            yield

    @contextmanager
    def compiled():
        found = []
        yield found
        found.append(("gated_norm", spills[-1]))

    spills = [0]
    monkeypatch.setattr(tune.Bench, "using", using)
    monkeypatch.setattr(tune, "compiled", compiled)
    clock(lambda fields, last: 1.0 / fields["warps"])
    code, out, (row,) = search(*KERNEL)
    said = {"raises": "out of resource: shared memory", "spills": "spills 7 registers"}
    assert code == 0 and said[what] in out and row["config"]["warps"] == 16


def test_a_wrong_result_before_the_search_is_exit_code_2(search, broken_op, monkeypatch):
    monkeypatch.setenv("TIGON_BACKEND", "kernel")
    code, out, rows = search()
    assert code == 2 and "y is wrong before anything is changed" in out and not rows


def test_the_real_clock_runs_the_whole_way(tigon_command, path):
    """Gradients too; a budget of nothing tries nothing."""
    options = ("--mode", "step", "--budget", "1", "--output", str(path))
    code, out = tigon_command("tune", *TINY, *KERNEL, *options)
    assert code == 0, out
    assert "gated_rms_norm gated_norm " in out and "gated_rms_norm_backward" in out


def test_batch_invariant_mode_is_refused(search, monkeypatch):
    monkeypatch.setenv("TIGON_BATCH_INVARIANT", "1")
    code, out, _ = search(*KERNEL)
    assert code == 1 and "batch-invariant" in out


def test_without_a_gpu_the_sentence_says_what_is_missing(tigon_command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out = tigon_command("tune", "ssd_scan")
    assert code == 4 and "needs a GPU" in out and "--dry-run" in out


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU takes the kernel unasked")
def test_a_call_that_would_take_the_reference_is_refused(search):
    code, out, _ = search()
    assert code == 4 and "kernels run on CUDA tensors" in out


def test_gradients_alone_are_not_captured(tigon_command):
    code, out = tigon_command("tune", *TINY, "--mode", "backward", "--graph")
    assert code == 1 and "gradients alone cannot be captured" in out


@pytest.mark.parametrize(("op", "code"), [("ssd_update", 1), ("all", 0)])
def test_cuda_ops_have_no_table(op, code, tigon_command):
    found, out = tigon_command("tune", op, "--dry-run")
    assert found == code and "ssd_update: a kernel of CUDA C++" in out


@pytest.mark.parametrize("mode", ["forward", "backward", "step"])
def test_a_dry_run_lists_candidates_and_counts_what_was_pruned(mode, tigon_command):
    code, out = tigon_command("tune", "ssd_scan", "--dry-run", "--arch", "80", "--mode", mode)
    assert code == 0 and "candidates" in out and "further away" in out
    if mode != "backward":
        assert "ssd_scan walk on sm_80" in out
        assert "384 sm_80 has no tensor descriptors" in out and "wider than the tensor" in out
    assert ("ssd_scan_backward sweep" in out) == (mode != "forward")


def test_an_op_without_backward_and_a_wrong_size_are_usage_errors(tigon_command):
    assert tigon_command("tune", "scaled_mm", "--mode", "step", "--dry-run")[0] == 1
    assert tigon_command("tune", "rms_norm", "--shape", "x=3", "--dry-run")[0] == 1


def test_tiles_that_no_register_file_holds_are_pruned():
    """fp32 sums of 256 x 256 are 512 registers a thread of 4 warps."""
    (kernel,) = tune_space.kernels("scaled_mm", 90, CALLS["scaled_mm"] | {"m": 8192})
    assert kernel.pruned["too large for the registers"]
    assert all(c["left"] * c["right"] <= 192 * 32 * c["warps"] for c in kernel.candidates)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", CALLS)
def test_every_kernel_has_candidates_that_a_table_may_hold(op, arch):
    found = tune_space.kernels(op, arch, CALLS[op])
    assert {k.name for k in found} == set(launch.PLANNERS[op](arch, **CALLS[op])) - {"add_splits"}
    for kernel in found:
        named = launch_table.FIELDS[type(kernel.config).__name__]
        assert set(tune_space.SPACE[kernel.name]) <= set(named)
        assert kernel.candidates and kernel.present not in kernel.candidates
        far = [tune_space.distance(kernel.name, c, kernel.present) for c in kernel.candidates]
        assert far == sorted(far) and far[0] == 1
        tried = len(kernel.candidates) + sum(kernel.pruned.values()) + 1
        assert tried == math.prod(map(len, tune_space.values(kernel.name, kernel.config).values()))
        for fields in kernel.candidates[::37]:
            row = {"op": op, "kernel": kernel.name, "when": kernel.when, "config": fields}
            assert launch_table.checked(row, arch)


def test_the_search_walks_to_a_far_optimum_in_few_steps():
    """Time falls with each step towards it; most of the space is never tried."""
    (kernel, *_) = tune_space.kernels("ssd_scan", 90, CALLS["ssd_scan"])
    goal = kernel.candidates[-1]

    class Bench:
        device = "cpu"

        def check(self, kernel, fields):
            return None

        def timed(self, kernel, fields, budget):
            present, here = (
                10.0 + tune_space.distance(kernel.name, f, goal) for f in (kernel.present, fields)
            )
            return seconds(present, 0.001), seconds(here, 0.001)

    found = tune.search(kernel, Bench(), 30.0)
    first = next(i for i, trial in enumerate(found.trials) if trial.fields == goal)
    assert found.best == goal and found.row["config"] == goal
    assert first < len(kernel.candidates) // 4


@pytest.mark.parametrize(
    ("candidate", "wins"),
    [
        (seconds(0.9), True),
        (seconds(0.98), False),
        (seconds(0.9, 0.1), False),
        (seconds(1.1), False),
    ],
)
def test_a_winner_is_clear_of_noise_and_of_the_margin(candidate, wins):
    assert tune.wins(seconds(1.0, 0.01), candidate) == wins


def test_spills_are_read_from_what_triton_compiled(monkeypatch):
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **k: SimpleNamespace(n_spills=12))
    before = JITFunction.run
    with tune.compiled() as seen:
        JITFunction.run(SimpleNamespace(fn=SimpleNamespace(__name__="walk")))
    assert seen == [("walk", 12)] and JITFunction.run is before


def test_a_lost_gpu_ends_the_search(monkeypatch):
    def broken():
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    for device, raises in (("cpu", False), ("cuda", True)):
        bench = tune.Bench(None, None, False, [], device, None)
        try:
            bench.alive(ValueError("x"))
            assert not raises
        except tune.Lost:
            assert raises


def test_a_table_is_whole_at_every_moment(path):
    row = {"op": "ssd_scan", "kernel": "walk", "config": {"q": 48}}
    row["when"] = launch_table.when_of("ssd_scan", CALLS["ssd_scan"])
    tune.write(path, 90, [row | {"config": {"q": 32}}])
    before = path.read_text()
    with pytest.raises(ValueError, match="q=48"):
        tune.write(path, 90, [row])
    assert path.read_text() == before and Path(path).is_file()
