"""tigon check."""

import pytest
import torch

from tigon.bench.variants import variants
from tigon.ops import dispatch
from tigon.registry import PUBLIC

SMALL = ("--shape", "l=20,t=20,d=32,h=4,p=8,n=16,group_size=16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_op_is_right_here(dtype, tigon_command):
    code, out = tigon_command("check", "all", *SMALL, "--dtype", dtype)
    assert code == 0, out
    assert out.count("same bits") == sum(len(variants(op)) for op in PUBLIC)
    assert "ddt_bias" in out and "quantize_nvfp4 gradient" in out and "WRONG" not in out


@pytest.mark.parametrize("op", ["rms_norm", "ssd_scan"])
def test_a_wrong_result_exits_with_2_and_is_named(op, tigon_command, broken_op):
    code, out = tigon_command("check", op, "--dtype", "float32", *SMALL[:1], size(op))
    assert code == 2
    assert f"WRONG: {op} y" in out


def size(op):
    return {"rms_norm": "t=9,d=16", "ssd_scan": "l=9,h=2,p=4,n=8,g=1"}[op]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for CPU tensors")
def test_kernels_are_checked_in_the_interpreter(tigon_command):
    argv = ("gated_rms_norm", "--shape", "t=3,d=32,group_size=16", "--backend", "kernel")
    code, out = tigon_command("check", *argv)
    assert code == 0 and "gated_rms_norm t=3,d=32,group_size=16 bfloat16: triton" in out


def test_a_kernel_that_cannot_run_here_is_an_environment_error(tigon_command, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    code, out = tigon_command("check", "rms_norm", "--device", "cpu", "--backend", "kernel")
    assert code == 4
    assert "TRITON_INTERPRET" in out


@pytest.mark.parametrize("op,name", [("quantize_nvfp4", "codes"), ("scaled_mm", "out")])
def test_a_wrong_byte_or_product_is_named_with_its_variant(op, name, tigon_command, monkeypatch):
    """Only the selected backend is wrong: oracles and baselines name theirs."""
    load = dispatch._load

    def off(function):
        right = load(function)

        def wrong(*args, **options):
            out = right(*args, **options)
            if dispatch._backend is None and function.endswith(op):
                first = out[0] if isinstance(out, tuple) else out
                first.view(-1)[:1] += 100
            return out

        return wrong

    monkeypatch.setattr(dispatch, "_load", off)
    variant = variants(op)[1]
    code, out = tigon_command("check", op, "--variant", variant, "--dtype", "float32")
    assert code == 2 and f"WRONG: {op} {variant} {name}" in out


def test_an_unknown_variant_is_a_usage_error(tigon_command):
    code, out = tigon_command("check", "scaled_mm", "--variant", "w2a2")
    assert code == 1 and "it has fp8-row" in out
    code, out = tigon_command("check", "rms_norm", "--variant", "row")
    assert code == 1 and "it has none" in out


def test_an_unknown_size_is_a_usage_error(tigon_command):
    code, out = tigon_command("check", "rms_norm", "--shape", "h=3")
    assert code == 1 and "it has t=" in out
