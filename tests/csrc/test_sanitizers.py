"""The kernels on host threads under AddressSanitizer + UBSan and ThreadSanitizer: no report, right numbers.

And the proof that a report would come: a kernel with a missing barrier and one that writes past its end.
"""

import struct
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import host_build
import pytest
import torch
from decode_cases import conv1d_check, conv1d_plain, moved, ssd_check, ssd_plain
from quantize_cases import check as check_quantized
from quantize_cases import nvfp4, signs
from quantize_cases import source as quantizer_source
from route_cases import (
    backward_case,
    bounds,
    check_backward,
    check_route,
    check_sort,
    masked,
    odd,
    route_arguments,
)
from sanitized import Sanitized, SanitizerError, pointer_places
from token_cases import check_rows, check_selection, rows, selection

from tigon import native
from tigon.native import moe, quantize, tokens

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
ALL = dict(D="hp", z=True, bias=True, ragged=True, slots="padded", layout="sliced")
SSD = [
    ALL | dict(m=3),
    ALL | dict(m=2, held=BRAIN, shape=(40, 96), heads=(2, 2)),
    ALL | dict(m=2, io=HALF, held=HALF, shape=(7, 17), beside="io", D="h"),
    ALL | dict(m=1, io=FULL, held=FULL, shape=(5, 3), limit=(0.05, 0.4)),
    ALL | dict(m=16, shape=(2, 256), heads=(2, 1), D=None, z=False, bias=False),
]
CONV = [
    dict(slots="padded", ragged=True, layout="sliced", m=3),
    dict(io=FULL, held=BRAIN, width=8, extra=2, d=5, m=2, silu=False, bias=False),
    dict(io=HALF, width=2, d=130, channels_last=True, slots="padded"),
]


def tensors(arguments: dict) -> list[torch.Tensor]:
    return [t for t in arguments.values() if isinstance(t, torch.Tensor)]


def run(sanitizer, arguments, x, launcher, pointers, folder):
    loader = Sanitized(
        sanitizer, tensors(arguments), x.numel() * x.element_size(), pointers, folder
    )
    native.use_host_library(loader)
    try:
        return launcher(**arguments)
    finally:
        native.use_host_library(None)


@pytest.mark.parametrize("case", SSD, ids=range(len(SSD)))
def test_ssd_update_is_clean(sanitizer, case, tmp_path):
    before = ssd_plain(**case)
    arguments = moved(before, "cpu")
    y = run(sanitizer, arguments, arguments["x"], native.ssd_update, 12, tmp_path)
    ssd_check(arguments, y, before)


@pytest.mark.parametrize("case", CONV, ids=range(len(CONV)))
def test_conv1d_update_is_clean(sanitizer, case, tmp_path):
    before = conv1d_plain(**case)
    arguments = moved(before, "cpu")
    y = run(sanitizer, arguments, arguments["x"], native.conv1d_update, 7, tmp_path)
    conv1d_check(arguments, y, before)


PACKED = (quantize.AMAX, quantize.QUANTIZE_NVFP4, quantize.QUANTIZE_FP8, quantize.DEQUANTIZE)
PLACES = {packed.size: pointer_places(packed) for packed in PACKED}
SEED = torch.tensor(99)


def matrix(m, k, dtype=BRAIN, prologue="none", layout="packed", group=None) -> dict:
    fields = quantizer_source(m, k, dtype, prologue, layout, FULL, group, special=True)
    return dict(zip(("x", "z", "weight", "rstd", "prologue"), fields))


QUANTIZE = [
    ("quantize_nvfp4", matrix(37, 70, layout="sliced") | dict(column=True, swizzled=True)),
    ("quantize_nvfp4", matrix(130, 48, HALF, "gate_last", group=16) | dict(
        column=True, swizzled=True, hadamard=signs(), rounding="stochastic", seed=SEED, offset=5)),
    ("quantize_nvfp4", matrix(33, 144, FULL, "relu2") | dict(
        column=True, square=True, four_over_six="mse")),
    ("quantize_nvfp4", matrix(20, 40, prologue="norm") | dict(
        per_row=True, rounding="stochastic", seed=SEED, swizzled=True)),
    ("quantize_fp8", matrix(40, 144, FULL, layout="sliced") | dict(
        amax=None, granularity="128x128", e5m2=False, power_of_two=True, row=True, column=True)),
    ("quantize_fp8", matrix(33, 150) | dict(
        amax=None, granularity="row", e5m2=True, power_of_two=False, row=True, column=True)),
    ("quantize_fp8", matrix(130, 7, HALF) | dict(
        amax=None, granularity="1x128", e5m2=True, power_of_two=False, row=True, column=True)),
    ("quantize_mxfp8", matrix(70, 130, prologue="gate_first") | dict(
        e5m2=False, row=True, column=True, swizzled=True)),
    ("dequantize", dict(
        codes=torch.randint(256, (5, 16), dtype=torch.uint8), k=17, format="nvfp4", dtype=BRAIN,
        scale=torch.zeros(512, dtype=torch.float8_e4m3fn), tensor_scale=torch.ones(5), swizzled=True)),
    ("dequantize", dict(
        codes=torch.zeros(130, 40, dtype=torch.float8_e5m2), k=40, format="fp8-128x128", dtype=FULL,
        scale=torch.ones(2, 1), tensor_scale=None, swizzled=False)),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(QUANTIZE)))
def test_quantizers_are_clean(sanitizer, case, tmp_path):
    name, arguments = QUANTIZE[case]
    arguments = nvfp4() | arguments if name == "quantize_nvfp4" else arguments
    loader = Sanitized(sanitizer, tensors(arguments), 0, PLACES, tmp_path)
    native.use_host_library(loader)
    try:
        check_quantized(name, arguments, loader.know)
    finally:
        native.use_host_library(None)


ROUTE = [
    route_arguments(6, 40, 22, bias=torch.randn(40), sums=True, z_loss=True, mask=masked(6)),
    route_arguments(2, 200, 64, logits=torch.zeros(2, 200), score="softmax"),
    route_arguments(3, 48, 5, groups=6, top_groups=2, sums=True, cu_seqlens=bounds("int64", 3)),
    route_arguments(5, 70, 6, logits=odd()[:5], groups=35, top_groups=9, z_loss=True),
]
CHUNKED = [
    route_arguments(35, 9, 3, sums=True, z_loss=True, cu_seqlens=bounds("int32", 35)),
    route_arguments(35, 6, 2, groups=3, mask=masked(35)),
]


@contextmanager
def routing(sanitizer, arguments, folder):
    """The programs with the sanitizer behind the launchers; yields what must be told of each output."""
    packed = {k.lower(): v for k, v in vars(moe).items() if isinstance(v, struct.Struct)}
    places = {name: pointer_places(value) for name, value in packed.items()}
    loader = Sanitized(sanitizer, tensors(arguments), 0, places, folder)
    native.use_host_library(loader)
    try:
        yield loader.know
    finally:
        native.use_host_library(None)


@pytest.mark.parametrize("case", range(len(ROUTE)))
def test_moe_route_is_clean(sanitizer, case, tmp_path):
    with routing(sanitizer, ROUTE[case], tmp_path) as know:
        check_route(ROUTE[case], know, exact=case == 3)


@pytest.mark.parametrize("case", range(len(CHUNKED)))
def test_moe_route_in_chunks_is_clean(sanitizer, case, tmp_path, monkeypatch):
    """Two warps a block and 32 tokens a chunk."""
    plan = moe.plan_route

    def narrow(t, e, groups):
        return replace(plan(t, e, groups)[0], block=64, grid=(-(-t // 32), 1)), 32

    monkeypatch.setattr(moe, "plan_route", narrow)
    with routing(sanitizer, CHUNKED[case], tmp_path) as know:
        check_route(CHUNKED[case], know)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_moe_route_backward_is_clean(sanitizer, score, tmp_path):
    arguments = backward_case(5, 70, 22, score, False, "sums z", "int32", True, "sliced", 2.0)
    with routing(sanitizer, arguments, tmp_path) as know:
        check_backward(arguments, know)


def test_moe_sort_is_clean(sanitizer, tmp_path):
    arguments = dict(indices=torch.randint(-1, 8, (40, 3), dtype=torch.int32), e=7)
    with routing(sanitizer, arguments, tmp_path) as know:
        check_sort(arguments, know)


@pytest.mark.parametrize(
    "case",
    [
        selection([70, 0, 1100], "odd", protect=0.2, padding=5),
        selection([3, 1025], "ties", multiple=64, wide=True) | dict(capacity=9),
        selection([300], keep=2.0),
    ],
    ids=range(3),
)
def test_select_tokens_is_clean(sanitizer, case, tmp_path, monkeypatch):
    """Blocks of 64 threads; nothing lies around the scores, so that a read past them is seen."""
    case = case | dict(scores=case["scores"].clone())
    plan = tokens.plan_select_tokens
    monkeypatch.setattr(
        tokens, "plan_select_tokens", lambda *a: (replace(plan(*a)[0], block=64), plan(*a)[1])
    )
    with reducing(sanitizer, case, tmp_path) as know:
        check_selection(case, know)


def test_gather_rows_is_clean(sanitizer, tmp_path):
    case = rows(t=9, kept=7)
    with reducing(sanitizer, case | dict(enumerate(case["tensors"])), tmp_path) as know:
        check_rows(case, know)


@contextmanager
def reducing(sanitizer, arguments, folder):
    """As `routing`, for the launchers of token reduction."""
    packed = (tokens.SELECT_THRESHOLD, tokens.PLACE_TOKENS, tokens.GATHER_ROWS)
    places = {value.size: pointer_places(value) for value in packed}
    loader = Sanitized(sanitizer, tensors(arguments), 0, places, folder)
    native.use_host_library(loader)
    try:
        yield loader.know
    finally:
        native.use_host_library(None)


def reverse(kind: str, folder: Path, barrier: int = 1, extra: int = 0) -> torch.Tensor:
    """The kernel of mistakes.cu on 0..63."""
    if reason := host_build.missing():
        pytest.skip(reason)
    program = host_build.build(kind, [Path(__file__).with_name("mistakes.cu")])
    data = torch.arange(64.0)
    loader = Sanitized(program, [data], 0, 1, folder)
    launch = native.Launch("mistakes.cu", "reverse", (1, 1), 64, 256)
    loader.launch(launch, 0, 0, struct.pack("=Q2i", data.data_ptr(), barrier, extra))
    return data


@pytest.mark.parametrize("kind", ["asan", "tsan"])
def test_correct_kernel_passes(kind, tmp_path):
    assert torch.equal(reverse(kind, tmp_path), torch.arange(64.0).flip(0))


def test_missing_barrier_is_reported(tmp_path):
    with pytest.raises(SanitizerError, match="data race"):
        reverse("tsan", tmp_path, barrier=0)


def test_write_past_the_end_is_reported(tmp_path):
    with pytest.raises(SanitizerError, match="heap-buffer-overflow"):
        reverse("asan", tmp_path, extra=1)
