"""Peers that need a GPU, called with stand-ins: what they are given is what the packages take, and what comes back is
read as the op's outputs."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import peer_stand_ins
import pytest
import torch

from tigon.bench import verify, workloads
from tigon.bench.peers import find
from tigon.bench.variants import variants
from tigon.bench.workloads import SMALL

PACKAGES = {
    "mamba_ssm": "mamba_ssm",
    "causal_conv1d": "causal_conv1d",
    "flash_attn": "flash_attn",
    "flash_linear_attention": "fla",
    "flashinfer": "flashinfer",
}
PEERS = {name: import_module(f"tigon.bench.peers.{name}") for name in PACKAGES}
LACKING = {
    ("flash_attn", "attention_token_scores"): variants("attention_token_scores"),
    ("flashinfer", "ssd_update"): variants("ssd_update")[2:],
    ("flashinfer", "sample"): ("greedy",),
    ("flashinfer", "verify_draft"): variants("verify_draft")[2:],
    ("flashinfer", "quantize_nvfp4"): variants("quantize_nvfp4")[1:],
    ("flashinfer", "quantize_mxfp8"): ("both",),
}
EVERY = [(name, op, v) for name, peer in PEERS.items() for op in peer.OPS for v in variants(op)]
LACKED = [case for case in EVERY if case[2] in LACKING.get(case[:2], variants(case[1])[1:])]
CASES = [case for case in EVERY if case not in LACKED]
STEPS = [
    (name, op)
    for name, peer in PEERS.items()
    for op in ("ssd_update", "causal_conv1d_update")
    if op in peer.OPS
]
SIZES = {
    "ssd_scan": {"b": 2, "l": 20, "h": 4, "p": 16, "g": 2, "n": 16},
    "quantize_nvfp4": {"m": 70, "k": 256},
    "quantize_mxfp8": {"m": 70, "k": 256},
}
LIMIT, BYTES = 2e-2, 6e-3


def make(op, variant=None, **sizes):
    given = SMALL[op] | SIZES.get(op, {}) | sizes
    return workloads.make(op, given, torch.bfloat16, variant=variant or None)


def built(name, load, monkeypatch):
    peer_stand_ins.install(monkeypatch, PACKAGES[name])
    ready, missing = find.find(load, [name], "cuda")
    assert not missing
    return ready[name]


def agree(load, run):
    right, _ = verify.oracle(load, False)
    got, _ = verify.results(load, False, run)
    assert got and list(got) == list(right)[: len(got)]
    for name, t in got.items():
        assert t.shape == right[name].shape, name
        limit = LIMIT if t.is_floating_point() and t.element_size() > 1 else 0
        limit = BYTES if load.op.startswith("quantize") and t.element_size() == 1 else limit
        assert verify.difference(t, right[name]) <= limit, name


@pytest.mark.parametrize("name,op,variant", CASES)
def test_arguments_and_outputs_are_in_the_layouts_of_both_sides(name, op, variant, monkeypatch):
    load = make(op, variant)
    agree(load, built(name, load, monkeypatch))


@pytest.mark.parametrize("name,op,variant", LACKED)
def test_what_a_package_lacks_is_told(name, op, variant, monkeypatch):
    peer_stand_ins.install(monkeypatch, PACKAGES[name])
    ready, missing = find.find(make(op, variant), [name], "cuda")
    assert not ready and "not installed" not in missing[name]


@pytest.mark.parametrize("name,op", STEPS)
def test_steps_of_one_token(name, op, monkeypatch):
    load = make(op, m=1)
    agree(load, built(name, load, monkeypatch))


@pytest.mark.parametrize("name", [n for n, p in PEERS.items() if "ssd_update" in p.OPS])
def test_each_copy_of_the_inputs_has_its_own_state(name, monkeypatch):
    load = make("ssd_update")
    run = built(name, load, monkeypatch)
    copies = [{k: t.clone() for k, t in load.inputs.items()} for _ in range(2)]
    first = [run(inputs)[0].clone() for inputs in copies]
    assert torch.equal(*first)
    assert not torch.equal(run(copies[0])[0], first[0])


def test_the_stand_in_for_a_cuda_part_is_gone_after_the_import(monkeypatch):
    from tigon.bench.peers import mamba_ssm

    monkeypatch.delitem(sys.modules, mamba_ssm.CUDA_PART, raising=False)
    with mamba_ssm.without_cuda_part():
        assert mamba_ssm.CUDA_PART in sys.modules
    assert mamba_ssm.CUDA_PART not in sys.modules


def test_signatures_are_those_of_the_packages_that_are_installed():
    """In a process of its own, which imports them."""
    script = Path(peer_stand_ins.__file__).with_name("peer_signatures.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip("none of these packages is installed; `make env` installs some")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
