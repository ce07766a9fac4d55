"""bench/suites under pytest-benchmark: what is timed has been waited for, is right, and is described."""

import json
import os
import subprocess
import sys
import time

import pytest
from installs import ROOT

from tigon.bench import suite
from tigon.bench.verify import Row
from tigon.registry import PUBLIC

pytest.importorskip("pytest_benchmark")


class Lazy:
    """A device that computes when it is waited for, as a GPU may."""

    name = "cpu"

    def __init__(self):
        self.queue, self.now = 0, 0.0

    def launch(self):
        self.queue += 1

    def synchronize(self):
        time.sleep(2e-3 * self.queue)
        self.queue = 0

    def event(self):
        self.now += 1.0
        return self.now

    def seconds(self, start, end):
        return end - start


def test_a_time_holds_the_work_that_was_only_launched():
    device = Lazy()
    batch = suite.Batch(device.launch, device, calls=5)
    begin = time.perf_counter()
    batch()
    assert time.perf_counter() - begin >= 10e-3 and device.queue == 0
    assert batch.device_seconds == [1.0 / 5]


def test_a_batch_is_long_enough_also_where_calls_return_at_once():
    device = Lazy()
    ticks = iter([0.0, 1e-3])
    assert suite.calls_a_batch(device.launch, device, lambda: next(ticks)) == 5
    assert device.queue == 0  # the clock was read after a wait


def test_every_public_op_is_in_a_suite():
    families = {op.family for op in PUBLIC.values()}
    found = [case for family in families for case in suite.cases(family)]
    assert {op for op, _, _ in found} == set(PUBLIC)
    assert ("moe_experts", "hidden", "step") in found
    assert ("moe_experts", "nvfp4", "backward") not in found and len(set(found)) == len(found)
    text = "".join(path.read_text() for path in (ROOT / "bench/suites").glob("test_*.py"))
    assert {family for family in families if f'cases("{family}")' in text} == families


def test_sizes_come_from_the_environment(monkeypatch):
    small = suite.sizes("rms_norm", "cpu")
    assert small == {"t": 100, "d": 1024} and suite.sizes("rms_norm", "cuda")["t"] == 8192
    monkeypatch.setenv("TIGON_BENCH_SIZES", "t=7,V=9")
    assert suite.sizes("rms_norm", "cuda") == {"t": 7, "d": 1024}


def test_a_wrong_result_gets_no_time(monkeypatch):
    """The benchmark is not even touched: it is None here."""
    red = [Row("y", error=0.1, baseline=0.0, limit=0.01)]
    monkeypatch.setattr(suite, "verify", lambda work, backward: red)
    with pytest.raises(AssertionError, match="wrong y"):
        suite.measure(None, "rms_norm", "", "forward")


def test_the_suites_run_and_their_numbers_are_described(tmp_path):
    file = tmp_path / "benchmark.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "bench/suites",
        "-k",
        "rms_norm and not gated or row-forward and mxfp8",
    ]
    command += [
        "--benchmark-only",
        f"--benchmark-json={file}",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    # It takes a worker of this run for its own, and workers cannot benchmark.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {
        b["extra_info"]["op"] + " " + b["extra_info"]["mode"]: b
        for b in json.loads(file.read_text())["benchmarks"]
    }
    assert set(found) >= {
        "rms_norm forward",
        "rms_norm backward",
        "rms_norm step",
        "quantize_mxfp8 forward",
    }
    for one in found.values():
        info = one["extra_info"]
        assert info["seconds"] * info["calls"] == pytest.approx(one["stats"]["median"])
        assert info["bytes"] > 0 and info["GB/s"] > 0 and info["shape"] and info["device"]
    assert (
        found["rms_norm step"]["extra_info"]["bytes"]
        > found["rms_norm forward"]["extra_info"]["bytes"]
    )
