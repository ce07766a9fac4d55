"""tigon compare: verdicts, exit codes, and what makes two rows incomparable."""

import copy
import json
import subprocess
import sys

import pytest

from tigon.bench import compare

SHAPE = {"b": 1, "l": 4096}


def result(median=1e-3, spread=0.01, name="tigon", n=20, method="wall clock"):
    low, high = median * (1 - spread), median * (1 + spread)
    time = {"median": median, "p20": low, "p80": high, "n": n, "method": method}
    return {"name": name, "time": time, "peak": None, "error": 0.0, "share": None, "flags": []}


def case(*results, op="ssd_scan", ok=True, clocks=None, **fields):
    """One case of a record; a red gate has no results."""
    error = 0.0 if ok else 1.0
    row = {"name": "y", "error": error, "baseline": 0.0, "limit": 0.5, "repeats": True}
    named = {"op": op, "variant": "", "mode": "forward", "preset": None, "shape": dict(SHAPE)}
    named |= {"dtype": "float32", "seed": 0, "cold": True, "graph": False, "backend": None}
    return {
        "case": named | {"sweep": None} | fields,
        "work": {"bytes": 1, "flops": 1, "roof_s": None, "bound": None},
        "check": {"ok": ok, "shape": dict(SHAPE), "rows": [row]},
        "results": list(results) if ok else [],
        "missing": {},
        "clocks": clocks,
    }


def record(*cases, device="cpu", threads=2):
    env = {"date": "2026-01-02", "tigon": "0.1.0", "commit": "abc", "device": device, "arch": None}
    env |= {"threads": threads, "os": {}, "python": {}, "packages": {}, "driver": {}}
    command = "tigon bench ssd_scan"
    return {"schema": 2, "command": command, "env": env, "roof": None, "cases": list(cases)}


def clocks(mhz=1980, throttle=()):
    read = {"sm_mhz": mhz, "memory_mhz": 2619, "power_w": 500.0, "throttle": list(throttle)}
    return {"before": {**read, "sm_mhz": 345, "throttle": []}, "after": read}


def only(first, second, **kw):
    """The one row of a comparison."""
    (row,) = compare.compare(first, second, **kw).rows
    return row


@pytest.mark.parametrize(
    ("median", "spread", "verdict"),
    [
        (1.04e-3, 0.001, "SAME"),
        (0.96e-3, 0.001, "SAME"),
        (1.2e-3, 0.01, "SLOWER"),
        (0.8e-3, 0.01, "FASTER"),
        (1.2e-3, 0.3, "UNCLEAR"),
    ],
)
def test_a_verdict_needs_medians_and_intervals_to_agree(median, spread, verdict):
    row = only(record(case(result())), record(case(result(median, spread))))
    assert row.verdict == verdict and row.ratio == pytest.approx(median / 1e-3)
    assert row.low < row.ratio < row.high
    assert bool(row.reasons) == (verdict == "UNCLEAR")


def test_the_limit_is_the_same_in_both_directions():
    first, second = record(case(result(spread=0))), record(case(result(1.1e-3, 0)))
    for limit, there, back in ((0.11, "SAME", "SAME"), (0.095, "SLOWER", "FASTER")):
        assert only(first, second, limit=limit).verdict == there
        assert only(second, first, limit=limit).verdict == back


GPU = {"device": "NVIDIA H100"}
OTHER_CONDITIONS = {
    "devices": (record(case(result())), record(case(result(2e-3)), **GPU), "other devices"),
    "threads": (record(case(result())), record(case(result(2e-3)), threads=1), "threads"),
    "method": (
        record(case(result())),
        record(case(result(2e-3, method="cpu clock"))),
        "methods of timing",
    ),
    "few samples": (record(case(result())), record(case(result(2e-3, n=2))), "2 samples"),
    "clocks": (
        record(case(result(), clocks=clocks(1980)), **GPU),
        record(case(result(2e-3), clocks=clocks(1755)), **GPU),
        "1980 and 1755 MHz",
    ),
    "throttled": (
        record(case(result(), clocks=clocks()), **GPU),
        record(case(result(2e-3), clocks=clocks(throttle=["power cap"])), **GPU),
        "second was throttled: power cap",
    ),
}


@pytest.mark.parametrize("why", OTHER_CONDITIONS)
def test_rows_measured_under_other_conditions_are_unclear_and_say_why(why):
    first, second, reason = OTHER_CONDITIONS[why]
    row = only(first, second)
    assert row.verdict == "UNCLEAR" and reason in "; ".join(row.reasons)


def test_clocks_within_the_limit_and_threads_beside_a_gpu_do_not_matter():
    first = record(case(result(), clocks=clocks(1980)), **GPU, threads=1)
    second = record(case(result(2e-3), clocks=clocks(1950)), **GPU, threads=2)
    assert only(first, second).verdict == "SLOWER"


@pytest.mark.parametrize(
    "other",
    [
        {"op": "rms_norm"},
        {"mode": "step"},
        {"dtype": "bfloat16"},
        {"shape": {"b": 2, "l": 4096}},
        {"cold": False},
        {"graph": True},
        {"backend": "kernel"},
        {"preset": "tiny"},
        {"sweep": "l"},
    ],
    ids=str,
)
def test_rows_of_different_cases_are_not_compared(other):
    found = compare.compare(record(case(result())), record(case(result(), **other)))
    assert not found.rows and len(found.only_first) == len(found.only_second) == 1


@pytest.fixture
def run(tigon_command, tmp_path):
    """run(first, second, *options) -> (exit code, output) of the command."""

    def command(first, second, *options):
        files = [tmp_path / "a.json", tmp_path / "b.json"]
        for file, found in zip(files, (first, second)):
            file.write_text(found if isinstance(found, str) else json.dumps(found))
        return tigon_command("compare", *map(str, files), *options)

    return command


BASE = record(case(result(), result(2e-3, name="torch_eager")), case(result(), op="rms_norm"))


def changed(own=1.0, peer=1.0, norm=1.0):
    found = copy.deepcopy(BASE)
    for factor, part in zip((own, peer, norm), (c for k in found["cases"] for c in k["results"])):
        part["time"] |= {k: factor * part["time"][k] for k in ("median", "p20", "p80")}
    return found


@pytest.mark.parametrize(
    ("second", "options", "expected"),
    [
        (changed(), (), 0),
        (changed(norm=1.2), (), 3),
        (changed(norm=1.2), ("--fail-on", "slower=25%"), 0),
        (changed(norm=1.2), ("--limit", "0.3"), 0),
        (changed(peer=1.5), (), 0),
        (changed(peer=1.5), ("--peers",), 3),
        (changed(own=0.5), (), 0),
        (record(BASE["cases"][0], case(op="rms_norm", ok=False)), (), 2),
    ],
)
def test_the_exit_code_follows_tigons_rows(second, options, expected, run):
    code, out = run(BASE, second, *options)
    assert code == expected, out
    assert ("WRONG" in out) == (expected == 2)
    assert "only in" not in out


def test_the_table_shows_ratio_interval_reason_and_rows_in_one_file_only(run, tmp_path):
    first = record(case(result(spread=0.2)), case(result(), op="rms_norm"))
    second = record(case(result(1.2e-3, 0.2)), case(result(), op="moe_sort"))
    code, out = run(first, second, "--md", str(tmp_path / "found.md"))
    page = (tmp_path / "found.md").read_text()
    assert code == 0
    for text in (out, page):
        assert "1.200x" in text and "0.800 to 1.800" in text and "the intervals overlap" in text
        assert "only in first" in text and "rms_norm" in text
        assert "only in second" in text and "moe_sort" in text


def test_json_holds_the_verdicts(run):
    code, out = run(BASE, changed(own=1.2), "--json")
    found = json.loads(out)
    assert code == found["exit"] == 3
    assert [row["verdict"] for row in found["rows"]] == ["SLOWER", "SAME", "SAME"]
    assert found["rows"][0]["case"]["op"] == "ssd_scan"


def test_old_records_are_compared_with_new_ones(run):
    """Schema 1 called a step "backward" and knew neither caches nor graphs."""
    new = record(case(result(1.2e-3), mode="step", cold=False))
    (part,) = record(case(result()))["cases"]
    named = {k: part["case"][k] for k in ("op", "variant", "shape", "dtype")} | {"mode": "backward"}
    shared = {"schema": 1, "env": new["env"], "repro": "tigon bench", "missing": {}}
    old = [shared | {k: part[k] for k in ("work", "check", "results")} | {"case": named}]
    code, out = run(old, new)
    assert code == 3 and "SLOWER" in out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not a record"),
        ("{}", "is not a record"),
        ('{"schema": 2, "env": {}}', "not a whole record"),
        ('{"schema": 2, "cases": [{"case": {}}], "env": {"device": "cpu"}}', "not a whole record"),
    ],
)
def test_a_file_that_is_no_record_is_named(text, says, run):
    code, out = run(BASE, text)
    assert code == 1 and says in out and "b.json" in out


def test_a_missing_file_and_records_without_a_common_row_are_no_success(run, tigon_command):
    assert tigon_command("compare", "nowhere.json", "nowhere.json")[0] == 1
    code, out = run(record(case(result())), record(case(result(), op="rms_norm")))
    assert code == 1 and "no row is in both files" in out


@pytest.mark.parametrize("options", [("--limit", "x"), ("--fail-on", "faster=5%")])
def test_a_share_that_is_none_is_a_usage_error(options, run):
    assert run(BASE, BASE, *options)[0] == 1


def test_it_does_not_wait_for_torch(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(BASE))
    code = "import sys; from tigon.cli import main; code = main(sys.argv[1:]); "
    code += "sys.exit(9 if 'torch' in sys.modules else code)"
    done = subprocess.run(
        [sys.executable, "-c", code, "compare", str(file), str(file)], capture_output=True
    )
    assert done.returncode == 0
