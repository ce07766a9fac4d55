"""Records: what is written is read again, old ones too, and people get tables of it."""

import csv
import io
import json
from pathlib import Path

import pytest
import torch

from tigon.bench import records, run
from tigon.bench.roof import Roof
from tigon.bench.workloads import SMALL

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "cpu"


@pytest.fixture(scope="module")
def record():
    settings = run.Settings(peers=["none"], repeat=1)
    roof = Roof("toy", "measured", 1e9, {"float32": 1e12})
    case = run.run_case("rms_norm", SMALL["rms_norm"], torch.float32, "cpu", settings, roof=roof)
    env = {"date": "today", "device": "cpu", "threads": 1, "tigon": "0", "commit": "c"}
    env["packages"] = {"torch": "2", "triton": "3"}
    limit = {"device": "toy", "source": "measured", "copy": 1e9, "gemm": {"float32": 1e12}}
    return {
        "schema": 2,
        "command": "tigon bench",
        "env": env,
        "roof": limit,
        "cases": [run.record(case)],
    }


def test_a_record_is_read_as_it_was_written(record, tmp_path):
    records.save(record, tmp_path / "a.json")
    assert records.load(tmp_path / "a.json") == json.loads(json.dumps(record))


def test_share_is_the_time_at_the_roof_over_the_median(record):
    (case,) = record["cases"]
    (result,) = case["results"]
    assert case["work"]["roof_s"] == pytest.approx(case["work"]["bytes"] / 1e9)
    assert case["work"]["bound"] == "memory"
    assert result["share"] == pytest.approx(case["work"]["roof_s"] / result["time"]["median"])


def test_csv_and_markdown_have_a_row_a_result(record):
    (row,) = csv.DictReader(io.StringIO(records.to_csv(record)))
    assert row["op"] == "rms_norm" and row["shape"] == "t=100,d=1024" and row["preset"] == ""
    assert float(row["ms"]) == record["cases"][0]["results"][0]["time"]["median"] * 1e3
    lines = records.to_markdown(record).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 3 and len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert "today, cpu, 1 threads, torch 2, triton 3, tigon 0 (c)" in lines


def test_a_wrong_result_is_in_the_markdown_without_a_time(record):
    wrong = {"name": "y", "error": 1.0, "baseline": 0.0, "limit": 0.1, "repeats": True}
    case = record["cases"][0] | {
        "results": [],
        "check": {"ok": False, "shape": {}, "rows": [wrong]},
    }
    text = records.to_markdown(record | {"cases": [case]})
    assert "WRONG, so not timed: rms_norm: y" in text
    assert sum(line.startswith("|") for line in text.splitlines()) == 2


@pytest.mark.parametrize("name", ["quantize_nvfp4", "ssd_scan_backward", "moe_experts_backward"])
def test_records_of_schema_1_are_read(name):
    found = records.load(RESULTS / f"{name}.json")
    assert found["schema"] == 2 and found["roof"] is None and list(records.rows(found))
    modes = {case["case"]["mode"] for case in found["cases"]}
    assert modes == {"step" if "backward" in name else "forward"}


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": 3}', "[1]", "\x00"])
def test_what_is_no_record_is_refused_by_name(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is not a record of tigon bench"):
        records.load(tmp_path / "x.json")
