"""What a report says, without a browser; tests/bench/test_report_page.py opens it in one."""

import re
import sys

import pytest
from bench_records import ABSENT, case, sample_run

from tigon.bench import report


def words(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_without_matplotlib_the_page_says_how_to_get_plots(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = report.page(sample_run())
    assert "matplotlib was not installed" in page and "pip install" in page
    assert "<svg" not in page and "ssd_update" in page


def test_run_without_a_case_is_a_page_that_says_so():
    said = words(report.page(sample_run() | {"cases": []}))
    assert "No case ran." in said and "nothing to plot" in said and "No peer ran" in said


def test_machine_versions_command_and_roof_are_on_the_page():
    said = words(report.page(sample_run() | {"cases": [case("rms_norm")]}))
    for part in (
        "sm_90",
        "580.65.06, CUDA 13.0",
        "torch 2.13.0+cu130",
        "commit 0123abc",
        "3.12.3",
        "3 TB/s",
    ):
        assert part in said
    assert "tigon bench all --preset nemotron-3-super" in said
    assert "cupy" not in said.split("Reproduction")[-1].split("{")[0], (
        "what is not installed has no version"
    )


def test_peers_that_did_not_run_are_listed_once_a_reason():
    run = sample_run()
    said = words(report.page(run))
    assert f"{ABSENT} not installed {len(run['cases'])} all" in said
    assert re.search(
        r"torch_grouped_mm failed: RuntimeError: no kernel image .* 1 moe_experts", said
    )


def test_geometric_mean_leaves_doubtful_results_out():
    quick, slow, odd = (case("rms_norm", seed=seed) for seed in range(3))
    for item, times, flags in (
        (quick, 2, []),
        (slow, 8, []),
        (odd, 1000, ["differs from the oracle"]),
    ):
        mine, other = item["results"][:2]
        other["time"]["median"], other["flags"] = times * mine["time"]["median"], flags
        item["results"] = [mine, other]
    said = words(report.page(sample_run() | {"cases": [quick, slow, odd]}))
    assert "mamba_ssm 3 2 4.00 2.00 to 8.00" in said


def test_throttled_clocks_are_told():
    hot = case("scaled_mm", "fp8-row")
    said = words(report.page(sample_run() | {"cases": [hot, case("rms_norm")]}))
    assert "Clocks before and after 2 cases; 1 throttled" in said
    assert "1980 → 1755" in said and "power cap" in said


@pytest.mark.parametrize("device", [None, "cpu"])
def test_run_on_a_cpu_without_roof_driver_and_clocks_is_a_page_too(device):
    item = case("rms_norm") | {"clocks": None}
    for r in item["results"]:
        r["share"] = r["peak"] = None
    item["work"] |= {"roof_s": None, "bound": None}
    env = {"device": device, "driver": {"error": "none"}, "packages": {}}
    said = words(report.page({"command": None, "env": env, "roof": None, "cases": [item]}))
    assert "Not measured." in said and "Clocks" not in said
