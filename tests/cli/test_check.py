"""tigon check."""

import pytest
import torch

SMALL = ("--shape", "l=20,t=20,d=32,h=4,p=8,n=16,group_size=16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_op_is_right_here(dtype, tigon_command):
    code, out = tigon_command("check", "all", *SMALL, "--dtype", dtype)
    assert code == 0, out
    assert out.count("same bits") == 6 and "ddt_bias" in out and "WRONG" not in out


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


def test_an_unknown_size_is_a_usage_error(tigon_command):
    code, out = tigon_command("check", "rms_norm", "--shape", "h=3")
    assert code == 1 and "it has t=" in out
