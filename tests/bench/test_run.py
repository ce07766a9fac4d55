"""One case: what is timed in each mode, and what a reader is warned of."""

import pytest
import torch

from tigon.bench import run, timing
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
