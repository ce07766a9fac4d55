"""One case: what is timed in each mode, and what a reader is warned of."""

import time

import pytest
import torch

from tigon.bench import run, timing
from tigon.bench.peers import find
from tigon.bench.roof import Roof
from tigon.bench.run import Result, Settings, flags
from tigon.bench.timing import Timing
from tigon.bench.workloads import SMALL, make
from tigon.registry import PUBLIC

ONE = Settings(peers=["none"], repeat=1, memory=False)


def result(name="tigon", median=1e-3, error=0.0, share=None, method="wall clock"):
    return Result(name, Timing(median, median, median, 3, method), None, error, share)


def flags_of(own, *peers):
    return flags(own, [own, *peers])


def test_more_than_the_roof_is_suspect():
    assert flags_of(result(share=1.3)) == ["suspect: 130% of the roof"]
    assert flags_of(result(share=1.02)) == ["suspect: 102% of the roof"]
    assert flags_of(result(share=1.0)) == []


def test_ten_times_a_peer_is_suspect_and_names_the_peer():
    peers = result("near", 9e-3), result("far", 12e-3)
    assert flags_of(result(), *peers) == ["suspect: 12x faster than far"]
    assert flags_of(result(), peers[0]) == []
    assert flags(peers[1], [result(), *peers]) == []


def test_another_result_and_a_launch_bound_time_are_told():
    assert flags_of(result(error=0.06)) == ["differs from the oracle"]
    (told,) = flags_of(result(median=1e-5, method="CUDA events"))
    assert told.startswith("launch-bound")
    assert flags_of(result(median=1e-5, method="CUDA graph replay")) == []


def test_modes_time_the_forward_the_gradients_alone_and_both():
    load = make("rms_norm", SMALL["rms_norm"], torch.float32)
    forwards = []

    def counted(inputs):
        forwards.append(1)
        return load.run(inputs)

    for mode, expected in (("forward", 2), ("backward", 0), ("step", 2)):
        call = run.call_of(load, mode, counted)
        forwards.clear()
        first, again = call(), call()
        assert len(forwards) == expected, mode
        if mode != "forward":
            assert [g.shape for g in first] == [t.shape for t in load.inputs.values()]
            assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("op", [op.name for op in PUBLIC.values() if op.backward])
def test_every_op_with_a_backward_has_a_step_though_its_first_output_be_integers(op):
    load = make(op, SMALL[op], torch.float32)
    for mode in ("backward", "step"):
        gradients = run.call_of(load, mode)()
        assert all(g.any() for g in gradients)


def test_gradients_of_both_modes_are_the_same():
    load = make("ssd_scan", SMALL["ssd_scan"], torch.float32)
    torch.manual_seed(0)
    alone = run.call_of(load, "backward")()
    torch.manual_seed(0)
    step = run.call_of(load, "step")()
    assert all(torch.equal(a, b) for a, b in zip(alone, step))


@pytest.mark.parametrize("cold", [True, False])
def test_cold_calls_take_turns_on_copies(cold, monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 3 * 10**6)
    load = make("rms_norm", SMALL["rms_norm"], torch.float32)  # 0.41 MB
    seen = []
    calls = run.turns(lambda given: seen.append(given["x"]), load, Settings(cold=cold), "cpu")
    for call in calls:
        call()
    assert len({t.data_ptr() for t in seen}) == len(calls) == (15 if cold else 1)
    assert all(torch.equal(t, load.inputs["x"]) for t in seen)


def test_a_peer_that_takes_seconds_a_call_is_told_and_not_timed(monkeypatch):
    """Such as a loop over 512 experts, whose gradients torch writes whole for each of them."""
    calls = []

    def crawls(inputs):
        calls.append(time.sleep(0.05))
        return (inputs["x"],)

    monkeypatch.setattr(find, "find", lambda *_: ({"crawls": crawls}, {}))
    monkeypatch.setitem(run.SLOW, "cpu", 0.02)
    case = run.run_case("rms_norm", SMALL["rms_norm"], torch.float32, "cpu", ONE)
    assert [r.name for r in case.results] == ["tigon"] and len(calls) == 3
    assert case.missing["crawls"].startswith("too slow to be timed: 0.1 s")


def test_clocks_are_those_of_the_device_that_is_timed(monkeypatch):
    monkeypatch.setattr(run, "clocks", lambda: {"sm_mhz": 1})
    case = run.run_case("rms_norm", SMALL["rms_norm"], torch.float32, "cpu", ONE)
    assert case.clocks is None  # though the machine has a GPU


def test_names_of_peers_are_all_some_or_all_but_some():
    every = list(find.NAMES)
    assert find.names(["none"]) == find.names([]) == [] and find.names(["auto"]) == every
    assert find.names(["torchao"]) == ["torchao"]
    for wanted in (["auto", "no_torchao"], ["no_torchao"]):
        assert find.names(wanted) == [name for name in every if name != "torchao"]
    with pytest.raises(ValueError, match="unknown peer dice; known: auto, none, transformers"):
        find.names(["no_dice"])


def test_the_roof_is_that_of_the_operands():
    roof = Roof("toy", "measured", 1e15, {"bfloat16": 1e9, "float8_e4m3fn": 4e9})
    sizes = {"m": 8, "n": 8, "k": 256}
    found = {
        variant: run.run_case("scaled_mm", sizes, torch.bfloat16, "cpu", ONE, variant, roof)
        for variant in ("w4a16", "fp8-row")
    }
    flops = 2 * 8 * 8 * 256
    assert found["w4a16"].roof_seconds == flops / 1e9
    assert found["fp8-row"].roof_seconds == flops / 4e9
