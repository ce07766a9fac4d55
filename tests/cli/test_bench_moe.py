"""Workloads of the mixture-of-experts ops: inputs without near ties, work that is counted right, peers that agree."""

import json
from dataclasses import replace

import pytest
import torch

from tigon.bench import moe, verify, workloads
from tigon.bench.peers import find
from tigon.bench.variants import variants
from tigon.bench.work import touched, work
from tigon.bench.workloads import SMALL
from tigon.ops import dispatch


def make(op, dtype=torch.float32, device="cpu", variant=None, **sizes):
    return workloads.make(op, SMALL[op] | sizes, dtype, device, variant=variant)


@pytest.mark.parametrize("op", moe.BUILDERS)
def test_outputs_have_the_same_shapes_on_meta(op):
    for variant in variants(op):
        load = make(op, torch.bfloat16, variant=variant)
        out = load.run()
        assert len(out) == len(load.outputs)
        meta = make(op, torch.bfloat16, "meta", variant)
        assert [(t.shape, t.dtype) for t in meta.run()] == [(t.shape, t.dtype) for t in out]


def test_drawn_scores_lie_apart_with_the_bias_and_the_bias_matters():
    draw = workloads.Draw(torch.float32, "cpu", 0)
    logits, bias = moe.scores(draw, 40, 96)
    for scores in (logits.sigmoid() + bias, logits.sigmoid()):
        assert scores.min() > 0 and scores.max() < 1
    biased = (logits.sigmoid() + bias).sort(-1)[0]
    assert biased.diff(dim=-1).min() > 1e-3
    plain, chosen = logits.topk(6, -1)[1], (logits.sigmoid() + bias).topk(6, -1)[1]
    assert not torch.equal(plain, chosen)


@pytest.mark.parametrize("op,name", [("moe_route", "indices"), ("moe_sort", "order")])
def test_one_wrong_choice_is_a_wrong_result(op, name, monkeypatch):
    load = dispatch._load

    def off(function):
        right = load(function)

        def wrong(*args, **options):
            out = [t.clone() for t in right(*args, **options)]
            if dispatch._backend is None:
                at = next(i for i, t in enumerate(out) if t.dtype == torch.int32 and t.numel() > 99)
                out[at].view(-1)[:2] = out[at].view(-1)[:2].flip(0)
            return tuple(out)

        return wrong

    monkeypatch.setattr(dispatch, "_load", off)
    rows = verify.verify(make(op), backward=False)
    assert name in [row.name for row in rows if not row.ok]


def test_gradients_are_those_of_the_weights_too():
    assert [row.name for row in verify.verify(make("moe_experts"))] == [
        "y", "dx", "dup", "ddown", "dweights",
    ]  # fmt: skip
    quantized = make("moe_experts", variant="nvfp4")
    assert [row.name for row in verify.verify(quantized)] == ["y"]
    with pytest.raises(ValueError, match="moe_experts has no backward"):
        work("moe_experts", quantized.sizes, 2, "backward", "nvfp4")


def test_work_of_a_super_layer_is_the_published_count():
    """8,192 tokens, 22 of 512 experts, latent 1024, width 2688: 0.992 TFLOP a product, 5.64 GB of weights."""
    sizes = {"t": 8192, "k": 22, "e": 512, "m": 2688, "l": 1024}
    forward = work("moe_experts", sizes, 2)
    assert forward.flops == 4 * 8192 * 22 * 2688 * 1024
    assert round(forward.flops / 2e12, 3) == 0.992
    assert 5.64e9 < forward.bytes < 5.70e9
    one = work("moe_experts", sizes | {"t": 1}, 2)
    assert round(one.bytes / 1e9, 3) == 0.242
    steps = {v: work("moe_experts", sizes, 2, "step", v) for v in ("hidden", "nothing")}
    assert steps["hidden"].bytes - steps["nothing"].bytes == 2 * 2 * 8192 * 22 * 2688
    assert steps["nothing"].flops - steps["hidden"].flops == forward.flops // 2
    assert 3.4 < forward.bytes / work("moe_experts", sizes, 2, variant="nvfp4").bytes < 3.6


@pytest.mark.parametrize("op", ["grouped_mm", "moe_sort"])
def test_bytes_are_those_of_the_tensors(op):
    load = make(op)
    given = [v for v in load.call().values() if torch.is_tensor(v)]
    moved = (*given, *load.run())
    if op == "moe_sort":  # indices and weights come back as they are
        moved = (given[0], *load.run()[2:])
    assert work(op, load.sizes, 4).bytes == sum(t.nbytes for t in moved)


def test_few_tokens_touch_few_experts():
    assert touched(512, 22 / 512, 1) == 22 and touched(512, 22 / 512, 10**4) == 512


@pytest.mark.parametrize("variant", ["hidden", "swiglu"])
def test_transformers_computes_the_same(variant):
    pytest.importorskip("transformers", minversion="5.23")
    load = make("moe_experts", variant=variant)
    ready, missing = find.find(load, ["transformers", "transformers_grouped_mm"], "cpu")
    assert not missing
    found, grads = verify.results(load, True)
    for run in ready.values():
        other, _ = verify.results(load, True, run, grads)
        torch.testing.assert_close(other, found)


def test_what_a_peer_does_not_compute_is_told():
    _, missing = find.find(make("moe_experts", variant="before-down"), ["transformers"], "cpu")
    assert missing == {"transformers": "transformers has no moe_experts before-down"}


def test_torch_computes_the_same_product():
    load = make("grouped_mm")
    ready, missing = find.find(load, ["torch_grouped_mm"], "cpu")
    for run in ready.values():
        torch.testing.assert_close(run(load.inputs), load.run())
    assert ready or "no grouped_mm" in missing["torch_grouped_mm"]


def test_the_three_kinds_of_keeping_are_measured(tigon_command, tmp_path):
    file = tmp_path / "bench.json"
    peaks = {}
    for variant in ("hidden", "relu", "nothing"):
        argv = ("--shape", "t=3000,k=4,e=8,m=96,l=16", "--dtype", "float32", "--repeat", "1")
        rest = (
            "--mode",
            "step",
            "--peers",
            "none",
            "--no-roof",
            "--device",
            "cpu",
            "--json",
            str(file),
        )
        code, out = tigon_command("bench", "moe_experts", "--variant", variant, *argv, *rest)
        assert code == 0, out
        (found,) = json.loads(file.read_text())["cases"]
        peaks[variant] = found["results"][0]["peak"]
    assert peaks["hidden"] == peaks["relu"]
    # h is there once, not also as zeros for its gradient; "nothing" has a part of it at a time.
    h = 3000 * 4 * 96 * 4
    assert 0.5 * h < peaks["hidden"] - peaks["nothing"] < 1.2 * h


def test_a_routing_is_given_to_the_op_and_its_weights_are_an_input():
    load = make("moe_experts")
    doubled = load.inputs | {"weights": 2 * load.inputs["weights"]}
    torch.testing.assert_close(load.run(doubled)[0], 2 * load.run()[0])
    assert replace(load, options={}).call().keys() == {"x", "up", "down", "routing"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for CPU tensors")
@pytest.mark.parametrize("variant", ["hidden", "nvfp4"])
def test_expert_kernels_are_checked_in_the_interpreter(variant, tigon_command):
    argv = ("--variant", variant, "--shape", "t=20,k=2,e=3,m=24,l=16", "--backend", "kernel")
    code, out = tigon_command("check", "moe_experts", *argv)
    assert code == 0 and f"moe_experts {variant}" in out and ": triton" in out, out
