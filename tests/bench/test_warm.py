"""tigon.bench.warm: a workload that fails or kills its process costs itself only."""

import time

import pytest

from tigon.bench import warm
from tigon.bench.peers import find
from tigon.bench.warm import Task

DEADLY = """
import os, time

def worker(pipe, device):
    while (task := pipe.recv()) is not None:
        if task.op == "dies":
            os._exit(9)
        if task.op == "hangs":
            time.sleep(60)
        crowded = task.op == "big" and not os.path.exists(device)
        if crowded:
            open(device, "w").close()
        pipe.send(("out of memory" if crowded else None, task.op == "poisons"))
        if task.op == "poisons":
            return
"""


def of(*ops):
    return [Task(op, "", "bfloat16", "small") for op in ops]


def prepare(monkeypatch, tmp_path):
    """Workers that do as the op's name says."""
    (tmp_path / "deadly.py").write_text(DEADLY)
    monkeypatch.syspath_prepend(str(tmp_path))
    import deadly

    monkeypatch.setattr(warm, "worker", deadly.worker)
    return str(tmp_path / "mark")


def test_a_process_that_dies_takes_one_workload_with_it(monkeypatch, tmp_path):
    mark = prepare(monkeypatch, tmp_path)
    found = warm.warmed(of("a", "dies", "b", "poisons", "c", "big"), mark, jobs=1, budget=60)
    assert found["failures"] == {
        "dies bfloat16 small": "the process died, exit code 9"
    }  # what was crowded out ran alone
    assert found["done"] == 5 and found["left"] == 0


def test_what_has_no_time_is_counted_and_nothing_is_left_running(monkeypatch, tmp_path):
    mark = prepare(monkeypatch, tmp_path)
    begin = time.monotonic()
    found = warm.warmed(of("hangs", "a", "b"), mark, jobs=1, budget=3)
    assert found["left"] == 3 and time.monotonic() - begin < 30
    assert found["first_left"][0]["op"] == "hangs"


def test_as_many_run_at_once_as_memory_holds_and_one_too_large_runs_alone():
    big, small = Task("moe_experts", "hidden", "bfloat16", "default"), of("rms_norm")[0]
    need = warm.needs(big)
    assert 2e10 < need < 4e10 and warm.needs(small) == 0 and warm.needs(of("dies")[0]) == 0
    assert warm.needs(Task("rms_norm", "", "float32", "default")) < 2e9
    pool = warm.Pool(4, "cpu", room=1.5 * need)
    assert pool.next([big, small]) is big
    pool.busy = {"pipe": (None, big)}
    assert pool.next([big, small]) is small and pool.next([big]) is None
    pool.busy = {}
    pool.room = need / 2
    assert pool.next([big]) is big
    assert warm.room("cpu", 4) == float("inf")


@pytest.mark.parametrize(
    "said",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: out of memory\nCUDA kernel errors might be",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_whoever_runs_out_of_memory_is_tried_again(said):
    assert warm.said(RuntimeError(said)) == "out of memory"
    assert warm.said(ValueError("bad\nworse")) == "ValueError: bad"


def test_bf16_at_real_sizes_comes_first():
    found = warm.tasks(["rms_norm", "sample"], ["bfloat16", "float32"], ["default", "small"])
    assert len(found) == 2 * 2 * (1 + 3)
    assert {(t.dtype, t.sizes) for t in found[:4]} == {("bfloat16", "default")}
    with_peers = warm.tasks(["rms_norm", "sample"], ["bfloat16"], ["default", "small"], peers=True)
    assert [t.sizes for t in with_peers] == ["default"] * 4 + ["peers"] * 2 + ["small"] * 4


def test_peers_are_called_as_the_benchmark_will_and_may_fail(monkeypatch):
    calls = []

    def twin(inputs):
        calls.append((inputs["x"].requires_grad, inputs["x"].shape[-1]))
        return (inputs["x"] * inputs["weight"],)

    def fails(inputs):
        raise RuntimeError("no such chip")

    asked = []

    def found(work, wanted, device):
        asked.extend(wanted)
        return {"fails": fails, "twin": twin}, {}

    monkeypatch.setattr(find, "find", found)
    warm.run(Task("rms_norm", "", "bfloat16", "peers"), "cpu")
    assert "no_transformers" in asked and "no_torch_compiled" not in asked
    assert {name.removeprefix("no_") for name in asked} <= {"auto", *find.NAMES}
    assert {grad for grad, _ in calls} == {True, False} and {d for _, d in calls} == {4096}


def test_an_op_that_raises_is_listed(monkeypatch):
    found = warm.warmed(of("rms_norm", "no_such_op"), "cpu", jobs=1, budget=120)
    assert found["done"] == 1
    assert found["failures"] == {"no_such_op bfloat16 small": "KeyError: 'no_such_op'"}
