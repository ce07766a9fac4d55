"""The stage bench of bench/on_gpu.sh: what a process leaves behind when it crashes, hangs or is cut off."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tigon.bench.peers import find
from tigon.bench.workloads import SMALL, make

ROOT = Path(__file__).resolve().parent.parent.parent
OPS = ("a", "b", "c", "d")


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench/on_gpu"))
    import measure

    yield measure
    for name in ("measure", "suite", "stage", "boxes"):
        sys.modules.pop(name, None)


class Tigon:
    """A stage whose `tigon bench` does with each op what `fates` says: crash, hang, fails, wrong or (else) right;
    "peer hangs" or "peer crashes" where peers run."""

    device = "cuda"

    def __init__(self, fates=None, seconds=1000.0):
        self.fates, self.seconds, self.calls, self.facts = fates or {}, seconds, [], {}

    def left(self):
        return self.seconds

    def tigon(self, command, *arguments, box, watch):
        assert command == "bench"
        ops = [name for name in arguments if name in OPS]
        bare = "none" in arguments
        self.calls.append("".join(ops) + "!" * bare)
        file, cases, code, poisoned = arguments[arguments.index("--json") + 1], [], 0, False
        assert file == watch
        for op in ops:
            fate = self.fates.get(op, "right")
            if fate.startswith("peer"):
                fate = "right" if bare else {"hangs": "hang", "crashes": "crash"}[fate.split()[1]]
            if fate == "hang":
                return None
            if fate == "fails":
                code = 4
                continue
            if poisoned or fate == "crash":  # as after an illegal address
                poisoned, code = True, 4
                continue
            ok = fate != "wrong"
            code = max(code, 0 if ok else 2)
            cases.append({"case": {"op": op}, "check": {"ok": ok}, "results": [1] * ok})
            file.write_text(json.dumps({"cases": cases}))
        return code


def run(measure, stage, tmp_path, extra=()):
    job = measure.Job("forward", OPS, extra)
    return measure.run(stage, job, tmp_path, [])


def test_a_crash_costs_its_op_and_not_those_after_it(measure, tmp_path):
    stage = Tigon({"b": "crash"})
    bad, left = run(measure, stage, tmp_path)
    assert bad == {"b forward": "exit code 4: see the log"} and left == []
    assert stage.calls == ["abcd", "b", "b!", "cd"]
    assert measure.join(tmp_path, tmp_path / "bench") == 3


def test_a_hang_costs_its_op(measure, tmp_path):
    stage = Tigon({"c": "hang"})
    bad, left = run(measure, stage, tmp_path)
    assert bad == {"c forward": "too slow"} and left == [] and stage.calls == ["abcd", "c!", "d"]


@pytest.mark.parametrize("fate, calls", [("peer hangs", "b!"), ("peer crashes", "b b!")])
def test_a_peer_that_hangs_or_crashes_does_not_cost_the_op(measure, tmp_path, fate, calls):
    stage = Tigon({"b": fate})
    assert run(measure, stage, tmp_path) == ({}, [])
    assert stage.calls == ["abcd", *calls.split(), "cd"]
    assert stage.facts["without_peers"] == ["b forward"]


def test_an_error_after_which_others_go_on_is_not_tried_again(measure, tmp_path):
    stage = Tigon({"b": "fails", "c": "fails"})
    bad, left = run(measure, stage, tmp_path)
    assert list(bad) == ["b forward", "c forward"] and left == [] and stage.calls == ["abcd"]


def test_a_wrong_result_is_told_and_measured_anew_by_the_next_call_alone(measure, tmp_path):
    stage = Tigon({"b": "wrong"})
    assert run(measure, stage, tmp_path) == ({"b forward": "wrong result"}, [])
    assert stage.calls == ["abcd"]
    again = Tigon()
    assert run(measure, again, tmp_path) == ({}, []) and again.calls == ["b"]
    assert measure.join(tmp_path, tmp_path / "bench") == 4


def test_what_was_cut_off_is_gone_on_with(measure, tmp_path):
    class Short(Tigon):
        def tigon(self, *arguments, **options):
            super().tigon(*arguments, **options)
            self.seconds = 0.0

    assert run(measure, Short({"c": "hang"}), tmp_path) == ({}, ["c", "d"])
    again = Tigon()
    assert run(measure, again, tmp_path) == ({}, []) and again.calls == ["cd"]


def test_what_is_left_out_of_the_tests_exists(measure):
    import suite

    assert [name for name in suite.NO_GPU if not (ROOT / "tests" / name).exists()] == []


def test_a_case_that_was_measured_twice_keeps_more_peers(measure, tmp_path):
    for name, count in (("forward_000", 3), ("peers_auto_forward_000", 4), ("z", 2)):
        case = {"case": {"op": "a"}, "check": {"ok": True}, "results": [0] * count}
        (tmp_path / f"{name}.json").write_text(json.dumps({"cases": [case]}))
    assert measure.join(tmp_path, tmp_path / "bench") == 1
    [case] = json.loads((tmp_path / "bench").read_text())["cases"]
    assert len(case["results"]) == 4


def test_torch_compile_is_left_for_the_extras(measure):
    ops = [{"op": "a", "kernel": "cuda", "backward": "no"}]
    load = make("rms_norm", SMALL["rms_norm"], torch.float32)
    peers = measure.BENCH.split()[measure.BENCH.split().index("--peers") + 1]
    ready, missing = find.find(load, peers.replace("-", "_").split(","), "cpu")
    assert "torch_eager" in ready and "torch_compiled" not in {**ready, **missing}
    found = measure.jobs(ops, extras=True)
    assert [str(job) for job in found] == [
        "forward",
        "forward --graph",
        "forward --peers auto",
        "forward --variant all",
    ]


def test_a_box_begins_anew_where_the_watched_file_changes(measure, tmp_path):
    import os

    import boxes

    file = tmp_path / "file"
    command = ["sh", "-c", f"for i in 1 2 3; do sleep 0.7; echo $i >> {file}; done; sleep 30"]
    with (tmp_path / "log").open("wb") as log:
        assert boxes.run(command, log, 1.4, os.environ, tmp_path, file) is None
        assert file.read_text().split() == ["1", "2", "3"]
        file.unlink()
        assert boxes.run(command, log, 1.4, os.environ, tmp_path, file, limit=1.6) is None
        assert len(file.read_text().split()) < 3
