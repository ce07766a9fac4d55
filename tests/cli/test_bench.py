"""tigon bench: the gate, what is printed and recorded, and the parts that it is made of."""

import json
import subprocess
import sys

import pytest
import torch

from tigon.bench import lowprec, records, run, workloads
from tigon.bench.peers import find
from tigon.bench.variants import variants
from tigon.bench.work import stored, work
from tigon.ops.quantized import QuantizedTensor

SHAPE = ("--shape", "l=16,h=4,p=8,g=2,n=16", "--dtype", "float32")
ONCE = ("--repeat", "1", "--device", "cpu", "--no-roof")


def test_a_wrong_result_prints_no_time_and_exits_with_2(tigon_command, broken_op):
    code, out = tigon_command("bench", "ssd_scan", *SHAPE, *ONCE, "--peers", "none")
    assert code == 2
    assert "WRONG y" in out and "median of" not in out and "p20" not in out


@pytest.mark.parametrize("mode", ["forward", "backward", "step"])
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
    (found,) = json.loads(file.read_text())["cases"]
    assert [r["name"] for r in found["results"]] == ["tigon", "twin", "other"]
    assert found["check"]["ok"] and found["case"]["shape"]["l"] == 16
    assert all(r["time"]["median"] > 0 and r["peak"] > 0 for r in found["results"])


def test_transformers_computes_the_same_scan():
    pytest.importorskip("transformers", minversion="5.23")
    load = workloads.make("ssd_scan", workloads.SMALL["ssd_scan"], torch.float32)
    ready, missing = find.find(load, ["transformers", "mamba_ssm"], "cpu")
    assert list(missing) == ["mamba_ssm"]
    for got, expected in zip(ready["transformers"](load.inputs), load.run()):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_dry_run_needs_no_gpu_and_prints_work_and_launch(tigon_command):
    code, out = tigon_command("bench", "all", "--dry-run", "--mode", "backward", "--arch", "90")
    assert code == 0
    assert "GFLOP" in out and "convolve on sm_90" in out and "ssd_update has no backward" in out


def test_dry_run_predicts_the_time_at_a_datasheets_roof(tigon_command):
    code, out = tigon_command("bench", "ssd_scan", "--dry-run", "--arch", "90")
    assert code == 0
    assert "an H200 (4.8 TB/s, 989 TFLOP/s, datasheet): 64.23 us, memory-bound" in out


def test_presets_and_sweeps_multiply_the_cases(tigon_command):
    argv = ("--preset", "nemotron-3-nano,nemotron-h-8b", "--sweep", "l=1k,8k", "--dry-run")
    code, out = tigon_command("bench", "ssd_scan", *argv)
    heads = [line.split()[1:3] for line in out.splitlines() if line.startswith("ssd_scan nemo")]
    nano, whole = "b=1,l={},h=64,p=64,g=8,n=128", "b=1,l={},h=128,p=64,g=8,n=128"
    assert code == 0 and heads == [
        ["nemotron-3-nano", nano.format(8192)],
        ["nemotron-3-nano", nano.format(1024)],
        ["nemotron-h-8b", whole.format(8192)],
        ["nemotron-h-8b", whole.format(1024)],
    ]


@pytest.mark.parametrize(
    "argv,said",
    [
        (("--graph", "--device", "cpu"), "--graph needs a GPU"),
        (("--graph", "--mode", "backward", "--device", "cuda"), "--graph captures forward or step"),
        (("--sweep", "q=1k"), "rms_norm has no size q; it has t, d"),
        (("--preset", "gpt"), "unknown preset 'gpt'"),
        (("--variant", "odd"), "no variant 'odd'"),
        (("--peers", "nobody"), "unknown peer nobody"),
        (("--mode", "step", "--variant", "plain"), "no variant 'plain'"),
    ],
)
def test_what_cannot_run_is_named_and_exits_with_1(argv, said, tigon_command):
    code, out = tigon_command("bench", "rms_norm", "--shape", "t=8,d=64", "--no-roof", *argv)
    assert code == 1 and said in out


def test_a_model_without_experts_is_told_and_others_go_on(tigon_command):
    argv = ("--preset", "nemotron-h-8b", "--dry-run")
    code, out = tigon_command("bench", "moe_route", *argv)
    assert code == 1 and "moe_route: a model without experts (nemotron-h-8b)" in out
    code, out = tigon_command("bench", "moe_route", "rms_norm", *argv)
    assert code == 0 and "rms_norm nemotron-h-8b" in out


def test_files_hold_what_was_measured_and_a_sweep_marks_its_points(tigon_command, tmp_path):
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "md")}
    argv = [word for kind, file in files.items() for word in (f"--{kind}", str(file))]
    shape = ("--shape", "t=64,d=64", "--dtype", "float32", "--sweep", "auto")
    code, out = tigon_command("bench", "rms_norm", *shape, "--hot", "--peers", "torch-eager", *ONCE, *argv)  # fmt: skip
    assert code == 0, out
    record = records.load(files["json"])
    cases = [(c["case"]["shape"]["t"], c["case"]["sweep"]) for c in record["cases"]]
    assert cases == [(64, None), (4, "t"), (16, "t")]
    assert {c["case"]["cold"] for c in record["cases"]} == {False} and "hot caches" in out
    assert record["roof"] is None and record["env"]["device"] == "cpu"
    assert len(files["csv"].read_text().splitlines()) == 1 + 3 * 2
    assert "torch_eager" in files["md"].read_text()


def test_every_row_says_its_share_of_the_roof_that_was_measured_first(tigon_command, tmp_path):
    file = tmp_path / "a.json"
    argv = ("rms_norm", "--shape", "t=64,d=64", "--dtype", "float32", "--peers", "none")
    code, out = tigon_command("bench", *argv, *ONCE[:-1], "--json", str(file))
    record = records.load(file)
    lines = out.splitlines()
    assert code == 0 and "Roof of cpu, measured: copy " in lines[1]
    (result,) = record["cases"][0]["results"]
    assert f" {result['share']:.1%} " in out and record["roof"]["source"] == "measured"


def test_a_wrong_result_is_recorded_without_a_time(tigon_command, broken_op, tmp_path):
    file = tmp_path / "a.json"
    code, _ = tigon_command(
        "bench", "ssd_scan", *SHAPE, *ONCE, "--peers", "none", "--json", str(file)
    )
    (found,) = records.load(file)["cases"]
    assert code == 2 and not found["check"]["ok"] and found["results"] == []


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
    command += ["--peers", "torchao,modelopt,torch_eager,torch_scaled_mm"]
    subprocess.run(command, check=True, capture_output=True)
    quantizers, products = json.loads(file.read_text())["cases"]
    assert quantizers["case"]["variant"] == "row" and products["case"]["variant"] == "fp8-row"
    errors = {r["name"]: r["error"] for r in quantizers["results"]}
    missing = {k for k, v in quantizers["missing"].items() if "not installed" in v}
    assert set(errors) | missing == {"tigon", "torchao", "modelopt", "torch_eager"}
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
    backward, step = (work("ssd_scan", sizes, 2, mode) for mode in ("backward", "step"))
    assert backward.flops > 2 * forward.flops and step == forward + backward


def test_the_gate_cuts_tokens_only():
    sizes = dict(b=1, l=2**17, h=128, p=64, g=8, n=128)
    cut = run.gate_sizes("ssd_scan", sizes, "forward", "cpu")
    assert 128 <= cut.pop("l") < 2**17
    assert cut == {k: v for k, v in sizes.items() if k != "l"}


def test_the_gate_cuts_experts_that_fp64_has_no_room_for():
    """Super's 512 experts take 45 GB in fp64, with gradients and their like 90."""
    whole = {"t": 8192, "k": 22, "e": 512, "m": 2688, "l": 1024}
    cut = run.gate_sizes("moe_experts", whole, "step", "cuda")
    assert cut["e"] == 64 and work("moe_experts", cut, 8, "step").bytes < 2e10
    few = whole | {"k": 200}
    assert run.gate_sizes("moe_experts", few, "step", "cuda")["e"] == 256
    small = whole | {"e": 16, "k": 2}
    assert run.gate_sizes("moe_experts", small, "forward", "cuda")["e"] == 16


def test_a_run_that_is_cut_off_has_left_its_first_cases(tigon_command, monkeypatch, tmp_path):
    from tigon.bench import run

    measure, file = run.run_case, tmp_path / "run.json"

    def first_only(op, *rest):
        if op != "rms_norm":
            raise KeyboardInterrupt
        return measure(op, *rest)

    monkeypatch.setattr(run, "run_case", first_only)
    shape = ("--shape", "t=8,d=64,group_size=64", "--peers", "none", *ONCE)
    code, _ = tigon_command("bench", "rms_norm", "gated_rms_norm", *shape, "--json", str(file))
    assert code == 130
    [case] = json.loads(file.read_text())["cases"]
    assert case["case"]["op"] == "rms_norm" and case["results"]
