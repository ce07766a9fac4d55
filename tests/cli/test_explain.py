"""tigon explain."""

import json

import pytest

from tigon.registry import PUBLIC


@pytest.mark.parametrize("arch", ["80", "120"])
@pytest.mark.parametrize("op", PUBLIC)
def test_every_op_is_explained_for_a_gpu_that_is_not_here(op, arch, tigon_command):
    code, out = tigon_command("explain", op, "--arch", arch)
    assert code == 0, out
    assert PUBLIC[op].kernel in out and f"sm_{arch}" in out


def test_json_holds_sizes_and_launch_configs(tigon_command):
    case = ("--shape", "l=4k,d=640", "--dtype", "float32", "--arch", "90")
    code, out = tigon_command("explain", "causal_conv1d", *case, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["sizes"]["l"] == 4096 and found["backend"] == "triton"
    assert found["launch"]["convolve"]["block"] == 512


def test_the_backend_can_be_chosen(tigon_command):
    _, out = tigon_command("explain", "rms_norm", "--arch", "90", "--backend", "reference")
    assert "tigon.reference.norm" in out


@pytest.mark.parametrize(
    "argv",
    [
        ("rms_norm", "--shape", "z=3"),
        ("rms_norm", "--shape", "d=4x"),
        ("rms_norm", "--shape", "d"),
        ("gated_rms_norm", "--shape", "group_size=999"),
        ("no_such_op",),
    ],
    ids=" ".join,
)
def test_bad_arguments_are_a_usage_error(argv, tigon_command):
    assert tigon_command("explain", *argv)[0] == 1
