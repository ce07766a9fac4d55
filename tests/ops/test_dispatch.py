"""Choosing a backend, saying why, and the registry behind both."""

import importlib
import inspect

import pytest
import torch

import tigon
from tigon.ops import dispatch
from tigon.registry import OPS, PUBLIC

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_reference_and_kernel_exist_and_take_the_same_arguments(op):
    def load(where):
        module, name = where.split(":")
        return getattr(importlib.import_module(module), name)

    names = [p for p in inspect.signature(load(op.reference)).parameters if p != "round_operands"]
    kernel = list(inspect.signature(load(op.kernel)).parameters)
    assert kernel[: len(names)] == names
    assert op.backward is None or op.backward in OPS
    assert hasattr(torch.ops.tigon, op.name) or op.name == "rms_norm"


def test_public_ops_are_attributes_of_the_package():
    for name in PUBLIC:
        assert getattr(tigon, name) is getattr(tigon.ops, name)


def test_cpu_tensors_take_the_reference_and_the_reason_says_so():
    choice = dispatch.select("ssd_scan", CPU, torch.float32)
    assert choice.backend == "reference" and "cpu" in choice.reason


def test_environment_and_context_override(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TIGON_BACKEND", "kernel")
    assert dispatch.select("ssd_scan", CPU, torch.float32).backend == "triton"
    with tigon.backend("reference"):
        choice = dispatch.select("ssd_scan", CPU, torch.float32)
        assert choice.backend == "reference" and "tigon.backend" in choice.reason
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(
        RuntimeError, match=r"ssd_scan: TIGON_BACKEND=kernel, but .*TRITON_INTERPRET=1"
    ):
        dispatch.select("ssd_scan", CPU, torch.float32)
    monkeypatch.setenv("TIGON_BACKEND", "fast")
    with pytest.raises(
        ValueError, match="TIGON_BACKEND='fast' is not one of auto, reference, kernel"
    ):
        dispatch.select("ssd_scan", CPU, torch.float32)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'fast' is not one of"), tigon.backend("fast"):
        pass


def test_fp64_is_the_references():
    assert dispatch.select("ssd_scan", CUDA, torch.float64, arch=90).backend == "reference"
    with tigon.backend("kernel"), pytest.raises(TypeError, match="no kernel computes in float64"):
        dispatch.select("ssd_scan", CUDA, torch.float64, arch=90)


@pytest.mark.parametrize(
    ("major", "minor", "table"),
    [(8, 0, 80), (8, 9, 80), (9, 0, 90), (10, 3, 100), (12, 0, 120), (12, 1, 120), (7, 5, 75)],
)
def test_every_gpu_finds_the_nearest_table_below(major, minor, table):
    assert dispatch.table_arch(major, minor) == table


def test_old_gpus_take_the_reference_and_the_reason_names_the_limit():
    choice = dispatch.select("ssd_scan", CUDA, torch.float32, arch=75)
    assert choice.backend == "reference" and "sm_80" in choice.reason


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_explain_names_the_launch_of_a_gpu_that_is_not_there(arch):
    meta = lambda *s: torch.empty(*s, device="meta", dtype=torch.bfloat16)  # noqa: E731
    found = tigon.explain(
        "ssd_scan",
        *(meta(1, 4096, 128, 64), meta(1, 4096, 128), torch.empty(128, device="meta")),
        *(meta(1, 4096, 8, 128), meta(1, 4096, 8, 128)),
        arch=arch,
    )
    assert (found.backend, found.arch) == ("triton", arch)
    assert found.launch and f"sm_{arch}" in str(found)


def test_explain_raises_what_the_call_would():
    with pytest.raises(ValueError, match="ssd_scan: x has shape"):
        tigon.explain("ssd_scan", *[torch.zeros(2)] * 5)
    with pytest.raises(ValueError, match="unknown op 'ssd_scam'"):
        tigon.explain("ssd_scam")
    assert dispatch._recording is None


def test_batch_invariant_mode_is_a_context_and_a_variable(monkeypatch):
    assert not dispatch.is_batch_invariant()
    with tigon.batch_invariant():
        assert dispatch.is_batch_invariant()
        with tigon.batch_invariant(False):
            assert not dispatch.is_batch_invariant()
    monkeypatch.setenv("TIGON_BATCH_INVARIANT", "1")
    assert dispatch.is_batch_invariant()
