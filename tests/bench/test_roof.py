"""The roof: which limit binds, which units an op may use, what a machine is measured to do."""

import pytest
import torch

from tigon.bench import roof
from tigon.bench.roof import DATASHEETS, Roof, operands
from tigon.bench.variants import VARIANTS
from tigon.bench.work import Work, work
from tigon.kernels.launch import SMS

TOY = Roof("toy", "measured", 1e9, {"float32": 1e12, "bfloat16": 4e12})


def test_the_slower_of_memory_and_products_is_the_roof():
    memory, compute = Work(10**9, 10**11), Work(10**6, 8 * 10**12)
    assert (TOY.seconds(memory, "bfloat16"), TOY.bound(memory, "bfloat16")) == (1.0, "memory")
    assert (TOY.seconds(compute, "bfloat16"), TOY.bound(compute, "bfloat16")) == (2.0, "compute")
    assert TOY.seconds(compute, "float32") == 8.0


def test_work_may_use_the_units_of_a_wider_dtype_but_not_of_a_narrower_one():
    assert TOY.flops("float4_e2m1fn") == TOY.flops("float8_e4m3fn") == TOY.flops("float16") == 4e12
    assert Roof("", "", 1.0, {"float32": 5.0, "bfloat16": 1.0}).flops("bfloat16") == 5.0
    assert Roof("", "", 1.0, {"bfloat16": 5.0}).flops("float32") == float("inf")


def test_operands_name_the_units_that_the_wider_matrix_needs():
    kinds = {v: operands("scaled_mm", v, "bfloat16") for v in VARIANTS["scaled_mm"]}
    assert kinds.pop("w4a16") == "bfloat16" and kinds.pop("w4a4") == "float4_e2m1fn"
    assert set(kinds.values()) == {"float8_e4m3fn"}
    assert operands("scaled_mm", None, "bfloat16") == "float8_e4m3fn"
    assert operands("ssd_scan", "", "float32") == "float32"


def test_every_table_of_launches_has_a_datasheet():
    assert DATASHEETS.keys() == SMS.keys()
    for sheet in DATASHEETS.values():
        rates = [sheet.flops(d) for d in ("float32", "bfloat16", "float8_e4m3fn", "float4_e2m1fn")]
        assert rates == sorted(rates) and 1e12 < sheet.copy < 1e13


def test_a_super_scan_is_memory_bound_on_an_h200():
    """308 MB at 4.8 TB/s are 64 us; 39 GFLOP at 989 TFLOP/s are 40."""
    sizes = {"b": 1, "l": 8192, "h": 128, "p": 64, "g": 8, "n": 128}
    counted = work("ssd_scan", sizes, 2)
    assert DATASHEETS[90].bound(counted, "bfloat16") == "memory"
    assert DATASHEETS[90].seconds(counted, "bfloat16") == pytest.approx(64.2e-6, rel=1e-3)


def test_this_machine_is_measured_by_bytes_read_and_written_and_by_two_flops_a_product(monkeypatch):
    monkeypatch.setattr(roof, "COPY_BYTES", {"cpu": 1000})
    monkeypatch.setattr(roof, "GEMM_SIZE", {"cpu": 10})
    monkeypatch.setattr(roof, "_fastest", lambda call, device: call() is None or 0.5)
    found = roof.measure("cpu")
    assert found == Roof("cpu", "measured", 4000.0, {"float32": 4000.0, "bfloat16": 4000.0})


def test_measuring_leaves_the_precision_of_products_as_it_was(monkeypatch):
    monkeypatch.setattr(roof, "GEMM_SIZE", {"cpu": 10})
    before = torch.backends.cuda.matmul.allow_tf32
    assert roof._gemm("cpu", torch.float32) > 0
    assert torch.backends.cuda.matmul.allow_tf32 == before
