"""tigon bench: the gate, what is printed and recorded, and the parts that it is made of."""

import json
import subprocess
import sys
import time

import pytest
import torch

from tigon.bench import lowprec, run, timing, workloads
from tigon.bench.peers import find
from tigon.bench.variants import variants
from tigon.bench.work import stored, work
from tigon.ops.quantized import QuantizedTensor

SHAPE = ("--shape", "l=16,h=4,p=8,g=2,n=16", "--dtype", "float32")
ONCE = ("--repeat", "1", "--device", "cpu")


def test_a_wrong_result_prints_no_time_and_exits_with_2(tigon_command, broken_op):
    code, out = tigon_command("bench", "ssd_scan", *SHAPE, *ONCE, "--peers", "none")
    assert code == 2
    assert "WRONG y" in out and "GB/s" not in out


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_peers_stand_beside_tigon_and_failures_are_told(mode, tigon_command, monkeypatch, tmp_path):
    def peers(load, wanted, device):
        def fails(inputs):
            raise RuntimeError("no such chip")

        def other(inputs):
            y, final = load.run(inputs)
            return 2 * y, final

        return {"twin": load.run, "other": other, "fails": fails}, {"absent": "not installed"}

    monkeypatch.setattr(find, "find", peers)
    file = tmp_path / "bench.json"
    code, out = tigon_command(
        "bench", "ssd_scan", *SHAPE, *ONCE, "--mode", mode, "--json", str(file)
    )
    assert code == 0, out
    assert "fails: failed: RuntimeError: no such chip" in out and "absent: not installed" in out
    assert "differs from the oracle" in out
    (found,) = json.loads(file.read_text())
    assert [r["name"] for r in found["results"]] == ["tigon", "twin", "other"]
    assert found["check"]["ok"] and found["case"]["shape"]["l"] == 16
    assert all(r["time"]["median"] > 0 and r["peak"] > 0 for r in found["results"])


def test_transformers_computes_the_same_scan():
    load = workloads.make("ssd_scan", workloads.SMALL["ssd_scan"], torch.float32)
    ready, missing = find.find(load, ["transformers", "mamba_ssm"], "cpu")
    assert list(missing) == ["mamba_ssm"]
    for got, expected in zip(ready["transformers"](load.inputs), load.run()):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_dry_run_needs_no_gpu_and_prints_work_and_launch(tigon_command):
    code, out = tigon_command("bench", "all", "--dry-run", "--mode", "backward", "--arch", "90")
    assert code == 0
    assert "GFLOP" in out and "convolve on sm_90" in out and "ssd_update has no backward" in out


CASES = [(op, variant) for op in lowprec.BUILDERS for variant in variants(op)]


@pytest.mark.parametrize("op,variant", CASES)
def test_bytes_of_a_low_precision_op_are_those_of_its_tensors(op, variant):
    load = workloads.make(op, workloads.SMALL[op], torch.bfloat16, variant=variant)
    out = load.run()
    assert len(out) == len(load.outputs)
    moved = sum(t.nbytes for t in (*load.inputs.values(), *out))
    assert work(op, load.sizes, 2, variant=variant).bytes == moved
    meta = workloads.make(op, load.sizes, torch.bfloat16, "meta", variant=variant)
    assert [t.shape for t in meta.run()] == [t.shape for t in out]


def test_stored_bytes_of_real_sizes():
    """16 elements of NVFP4 take nine bytes, 32 of MXFP8 33."""
    assert stored("nvfp4", 128, 4096, 2) == 128 * 4096 * 9 // 16 + 4
    assert stored("mxfp8", 128, 4096, 2) == 128 * 4096 * 33 // 32
    assert stored("fp8-128x128", 300, 300, 2) == 300 * 300 + 4 * 9
    assert stored("plain", 3, 5, 2) == 30


@pytest.mark.parametrize("format", ["plain", "nvfp4", "mxfp8", "fp8-row", "fp8-128x128"])
def test_exact_values_are_the_dequantized_ones_but_for_a_rounding(format):
    q = lowprec.quantized(torch.randn(150, 272), format)
    got = q.dequantize() if isinstance(q, QuantizedTensor) else q
    assert lowprec.values(q).dtype == torch.float64
    torch.testing.assert_close(got.double(), lowprec.values(q), rtol=2**-23, atol=0)


def test_batch_invariant_mode_stands_beside_the_default(tigon_command):
    argv = ("--variant", "w4a16", "--shape", "m=20,n=30,k=64", "--peers", "none", *ONCE)
    code, out = tigon_command("bench", "scaled_mm", *argv, "--batch-invariant")
    assert code == 0 and run.INVARIANT in out


def test_peers_give_almost_the_same_bytes_and_the_same_products(tmp_path):
    """In a process of their own: transformers would take what it finds, and torchao cannot be imported twice."""
    file = tmp_path / "bench.json"
    command = [sys.executable, "-m", "tigon", "bench", "quantize_nvfp4", "scaled_mm", *ONCE]
    command += ["--shape", "m=64,n=32,k=256", "--no-memory", "--json", str(file)]
    subprocess.run(command, check=True, capture_output=True)
    quantizers, products = json.loads(file.read_text())
    assert quantizers["case"]["variant"] == "row" and products["case"]["variant"] == "fp8-row"
    errors = {r["name"]: r["error"] for r in quantizers["results"]}
    missing = {k for k, v in quantizers["missing"].items() if "not installed" in v}
    assert {"tigon", "torchao", "modelopt"} <= set(errors) | missing
    assert errors.pop("tigon") == 0
    assert all(error < 0.006 for error in errors.values())  # a byte holds two codes
    errors = {r["name"]: r["error"] for r in products["results"]}
    assert {"tigon", "torch_eager", "torch_scaled_mm"} <= set(errors)
    assert all(error < 1e-2 for error in errors.values())


def test_work_of_the_scan_is_the_published_count():
    """H 128, P 64, N 128, G 8, bf16: 37.1 KB and, at Q = 64, 4.8 MFLOP a token."""
    sizes = dict(b=1, l=4096, h=128, p=64, g=8, n=128)
    forward = work("ssd_scan", sizes, 2)
    states = 4 * 128 * 64 * 128
    assert (forward.bytes - states) / 4096 == 2 * (2 * 128 * 64 + 2 * 8 * 128 + 128) == 37120
    assert round(forward.flops / 4096 / 1e6, 1) == 4.8
    assert work("ssd_scan", sizes, 2, "backward").flops > 3 * forward.flops


def test_the_gate_cuts_tokens_only():
    sizes = dict(b=1, l=2**17, h=128, p=64, g=8, n=128)
    cut = run.gate_sizes("ssd_scan", sizes, "forward", "cpu")
    assert 128 <= cut.pop("l") < 2**17
    assert cut == {k: v for k, v in sizes.items() if k != "l"}


def test_quantiles_interpolate():
    found = timing.summary([5.0, 1.0, 2.0, 3.0, 4.0], "")
    assert (found.median, found.p20, found.p80, found.n) == (3.0, 1.8, 4.2, 5)


def test_measured_time_is_that_of_one_call():
    found = timing.measure({"sleep": lambda: time.sleep(2e-3)}, "cpu", repeat=3)["sleep"]
    assert 2e-3 <= found.median < 2e-2
    busy = timing.measure({"sleep": lambda: time.sleep(2e-3)}, "cpu", repeat=3, clock="cpu")
    assert busy["sleep"].median < 1e-3


def test_peak_memory_counts_what_lived_at_once():
    def call():
        first = torch.ones(1000)
        second = first + 1
        del first
        return second * 2

    assert 8000 <= timing.peak_memory(call, "cpu") < 8100  # and a few bytes of scalars
