"""Tuned launch tables: which rows a plan follows, what a row may say, and what is refused by name."""

import inspect
import itertools
import json
from dataclasses import fields

import pytest
import torch

import tigon
from tigon.kernels import launch, launch_gemm, launch_moe, launch_table, launch_tokens

ARCHS = (80, 90, 100, 120)
SCAN = {"b": 1, "l": 8192, "h": 128, "p": 64, "n": 128, "itemsize": 2}
STATIC = {name: SCAN[name] for name in ("h", "p", "n", "itemsize")}
MOVING = {"b": [0, 1], "l": [4096, 8192]}
ROW = {"op": "ssd_scan", "kernel": "walk", "when": STATIC | MOVING, "config": {"q": 32, "warps": 2}}

# One call's sizes of each op: of its static ones those that `when` must name.
CALLS = {
    "ssd_scan": SCAN,
    "ssd_scan_backward": SCAN | {"g": 8},
    "causal_conv1d": {"b": 1, "l": 8192, "d": 10240, "width": 4, "itemsize": 2},
    "causal_conv1d_backward": {"b": 1, "l": 8192, "d": 10240, "width": 4, "itemsize": 2}
    | {"states": False},
    "gated_rms_norm": {"t": 8192, "d": 8192, "group_size": 1024, "itemsize": 2},
    "gated_rms_norm_backward": {"t": 8192, "d": 8192, "group_size": 1024, "itemsize": 2},
    "scaled_mm": {"m": 8192, "n": 18560, "k": 4096, "itemsize": 1}
    | {"a_format": "fp8-row", "b_format": "fp8-row"},
    "grouped_mm": {"rows": 180224, "e": 512, "n": 2688, "k": 1024, "itemsize": 2},
    "grouped_mm_backward": {"rows": 180224, "e": 512, "n": 2688, "k": 1024, "itemsize": 2},
    "moe_experts": {"t": 8192, "k": 22, "e": 512, "m": 2688, "l": 1024, "itemsize": 2},
    "moe_experts_backward": {"t": 8192, "k": 22, "e": 512, "m": 2688, "l": 1024, "itemsize": 2}
    | {"save": "hidden"},
    "attention_token_scores": {"nq": 64, "hq": 32, "hkv": 8, "dim": 128, "itemsize": 2},
    "ssd_token_scores": {"nq": 64, "h": 128, "n": 128, "itemsize": 2, "decay": True},
}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """table(*rows, arch=90) -> the file, which plans now follow."""
    numbers = itertools.count()

    def write(*rows, arch=90):
        file = tmp_path / f"table{next(numbers)}.json"
        file.write_text(json.dumps({"schema": 1, "arch": arch, "rows": list(rows)}))
        monkeypatch.setenv("TIGON_LAUNCH_TABLE", str(file))
        launch._plan.cache_clear()
        return file

    yield write
    launch._plan.cache_clear()


def walk(**sizes):
    return launch.plan("ssd_scan", 90, **SCAN | sizes)["walk"]


def test_a_row_replaces_the_fields_that_it_names_and_no_other(table):
    before = launch.plan("ssd_scan", 90, **SCAN)
    table(ROW)
    after = launch.plan("ssd_scan", 90, **SCAN)
    pairs = {
        f.name: [getattr(c["walk"], f.name) for c in (before, after)] for f in fields(after["walk"])
    }
    changed = {name for name, (old, new) in pairs.items() if old != new}
    assert changed == {"q", "warps"} and (after["walk"].q, after["walk"].warps) == (32, 2)
    assert after["segment_states"] == before["segment_states"]


@pytest.mark.parametrize(
    "sizes",
    [
        {"b": 2}, {"l": 4096}, {"l": 8193}, {"h": 64}, {"p": 80}, {"itemsize": 4}, {"aligned": False},
        {"batch_invariant": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_row_is_for_its_sizes_only_and_never_for_batch_invariant_mode(sizes, table):
    expected = walk(**sizes)
    table(ROW)
    assert walk().q == 32 and walk(l=4097).q == 32
    assert walk(**sizes) == expected


def test_without_a_moving_size_a_row_holds_for_every_batch_in_both_modes(table):
    table(ROW | {"when": STATIC})
    sizes = [{"b": b, "l": l, "batch_invariant": i} for b in (1, 64) for l in (1, 10**6) for i in (0, 1)]  # fmt: skip
    assert {(walk(**s).q, walk(**s).warps) for s in sizes} == {(32, 2)}


def test_later_rows_and_the_users_rows_win(table, tmp_path, monkeypatch):
    shipped = {"schema": 1, "arch": 90, "rows": [ROW, ROW | {"config": {"stages": 3}}]}
    (tmp_path / "sm_90.json").write_text(json.dumps(shipped))
    monkeypatch.setattr(launch_table, "SHIPPED", tmp_path)
    launch_table.rows.cache_clear()
    file = table(ROW | {"config": {"warps": 8}})
    try:
        assert (walk().q, walk().warps, walk().stages) == (32, 8, 3)
        source = launch.sources("ssd_scan", 90, **SCAN)
        assert source == {"walk": f"row 1 of {file}"}
    finally:
        monkeypatch.undo()
        launch_table.rows.cache_clear()


def test_k_is_not_summed_twice_where_a_row_widens_its_blocks(table):
    """Segments of k must end where a block ends."""
    sizes = {"t": 1, "k": 6, "e": 128, "m": 2688, "l": 1024, "itemsize": 2}
    before = launch.plan("moe_experts", 90, **sizes)["multiply_rows"]
    when = launch_table.when_of("moe_experts", sizes)
    table(
        {"op": "moe_experts", "kernel": "multiply_rows", "when": when, "config": {"block_k": 128}}
    )
    after = launch.plan("moe_experts", 90, **sizes)["multiply_rows"]
    assert before.splits > 1 and before.split_k % 128
    assert after.split_k % 128 == 0 and after.split_k * after.splits >= 2688


@pytest.mark.skipif(torch.cuda.is_available(), reason="a tile that no register file holds")
def test_a_segment_past_the_end_of_k_adds_nothing():
    """Blocks of 512 make four segments of 640 into four of 1024, of which the last is empty."""
    x, w = torch.randn(4, 2096), tigon.quantize_nvfp4(torch.randn(16, 2096))
    with tigon.backend("kernel"), launch.observe() as seen:
        expected = tigon.scaled_mm(x, w, out_dtype=torch.float32)
        ((op, arch, sizes),) = seen
        with launch.override(op, {"multiply": {"block_k": 512}}):
            config = launch.plan(op, arch, **sizes)["multiply"]
            got = tigon.scaled_mm(x, w, out_dtype=torch.float32)
    assert config.split_k * (config.splits - 1) >= 2096
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_segments_hold_whole_chunks(table):
    table(ROW | {"config": {"segment": 320, "q": 128}})
    assert walk().segment == 384


def test_explain_and_print_config_name_the_row(table, monkeypatch, capsys, tigon_scan):
    file = table(ROW)
    monkeypatch.setenv("TIGON_PRINT_CONFIG", "1")
    said = tigon.explain("ssd_scan", **tigon_scan, arch=90)
    assert said.tuned == {"walk": f"row 1 of {file}"}
    assert str(said).count(f"tuned by row 1 of {file}") == 1
    printed = [line for line in capsys.readouterr().err.splitlines() if "walk" in line]
    assert printed and all(f"(row 1 of {file})" in line for line in printed)


@pytest.fixture
def tigon_scan():
    from tigon.bench import workloads

    sizes = {"b": 1, "l": 8192, "h": 128, "p": 64, "g": 8, "n": 128}
    return workloads.make("ssd_scan", sizes, torch.bfloat16, "meta").call()


WRONG = {
    "op": (ROW | {"op": "ssd_skan"}, "op 'ssd_skan' is not one of ssd_scan"),
    "kernel": (ROW | {"kernel": "run"}, "no kernel 'run' there; it has walk, segment_states"),
    "field": (ROW | {"config": {"precision": "tf32"}}, "'precision' is not a field to tune"),
    "no field": (ROW | {"config": {}}, "names no field"),
    "type": (ROW | {"config": {"q": "64"}}, "q='64' must be int"),
    "bool": (ROW | {"config": {"q": True}}, "q=True must be int"),
    "value": (ROW | {"config": {"q": 48}}, "q=48 must be a power of two"),
    "warps": (ROW | {"config": {"warps": 32}}, "warps=32 must be a power of two up to 16"),
    "segment": (ROW | {"config": {"segment": 100}}, "segment=100 must be a multiple of 64"),
    "shared memory": (
        ROW | {"config": {"q": 128, "stages": 8}},
        "takes at least 448 KB of shared memory, sm_90 has 227",
    ),
    "static size": (ROW | {"when": MOVING | {"h": 128}}, "must name p, n, itemsize"),
    "unknown size": (ROW | {"when": STATIC | {"t": 4}}, "not t"),
    "range": (ROW | {"when": STATIC | {"l": [100, 200]}}, "l=[100, 200] must be [low, high]"),
    "one end": (ROW | {"when": STATIC | {"l": 8192}}, "l=8192 must be [low, high]"),
    "static range": (ROW | {"when": STATIC | {"h": [64, 128]}}, "h=[64, 128] must be one value"),
    "key": (ROW | {"wehn": {}}, "a row has config, evidence, kernel, op, when"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_row_that_is_wrong_is_refused_with_file_and_number(what, table):
    row, says = WRONG[what]
    file = table(ROW, row)
    with pytest.raises(ValueError) as refused:
        walk()
    assert str(refused.value).startswith(f"launch table {file}, row 2: ")
    assert says in str(refused.value)


def test_what_depends_on_the_batch_needs_a_moving_size(table):
    sizes = launch_table.when_of("ssd_scan_backward", CALLS["ssd_scan_backward"])
    row = {"op": "ssd_scan_backward", "kernel": "sweep", "when": sizes, "config": {"programs": 99}}
    file = table(row)
    planned = launch.plan("ssd_scan_backward", 90, **CALLS["ssd_scan_backward"])
    assert planned["sweep"].programs == 99
    file = table(row | {"when": {k: v for k, v in sizes.items() if k not in ("b", "l")}})
    with pytest.raises(ValueError, match="depends on the batch"):
        launch.plan("ssd_scan_backward", 90, **CALLS["ssd_scan_backward"])
    assert file.is_file()


NORM = {"op": "gated_rms_norm", "kernel": "gated_norm", "config": {"warps": 2}}


def test_a_norm_has_no_moving_size_as_its_launcher_knows_no_batch_invariant_mode(table):
    when = launch_table.when_of("gated_rms_norm", CALLS["gated_rms_norm"])
    assert set(when) == {"d", "group_size", "itemsize"}
    table(NORM | {"when": when | {"t": [1, 2]}})
    with pytest.raises(ValueError, match="not t"):
        launch.plan("gated_rms_norm", 90, **CALLS["gated_rms_norm"])


@pytest.mark.parametrize("name", ["gated_rms_norm", "rms_norm", "rms_statistics"])
def test_norms_that_share_a_launch_share_its_rows(name, table):
    """All are launched as gated_rms_norm; `tigon explain rms_norm` plans under its own name."""
    table(NORM | {"when": launch_table.when_of("gated_rms_norm", CALLS["gated_rms_norm"])})
    assert launch.plan(name, 90, **CALLS["gated_rms_norm"])["gated_norm"].warps == 2


def test_a_block_does_not_reach_over_two_scales(table):
    sizes = CALLS["scaled_mm"] | {"a_format": "fp8-1x128", "b_format": "fp8-128x128"}
    when = launch_table.when_of("scaled_mm", sizes)
    table({"op": "scaled_mm", "kernel": "multiply", "when": when, "config": {"block_k": 256}})
    with pytest.raises(ValueError, match="block_k must be 128 at most"):
        launch.plan("scaled_mm", 90, **sizes)


def test_tensor_descriptors_are_refused_where_the_chip_has_none(table):
    table(ROW | {"config": {"tma": True}}, arch=80)
    with pytest.raises(ValueError, match="sm_80 has no tensor descriptors"):
        launch.plan("ssd_scan", 80, **SCAN)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"schema": 1, "arch": 70, "rows": []}', '{"schema": 1, "arch": 90}']
)
def test_a_file_that_is_no_table_is_named(text, table):
    file = table()
    file.write_text(text)
    with pytest.raises(ValueError, match=str(file)):
        walk()


def test_a_missing_file_and_one_for_another_chip_are_errors(table, monkeypatch):
    file = table(ROW)
    with pytest.raises(ValueError, match=f"{file} is for sm_90, not for sm_80"):
        launch.plan("ssd_scan", 80, **SCAN)
    monkeypatch.setenv("TIGON_LAUNCH_TABLE", "nowhere.json")
    with pytest.raises(ValueError, match=r"nowhere\.json cannot be read"):
        launch.plan("ssd_scan", 90, **SCAN, sms=1)


@pytest.mark.parametrize(
    ("size", "range"), [(1, (0, 1)), (2, (1, 2)), (64, (32, 64)), (65, (64, 128)), (8192, (4096, 8192))]
)  # fmt: skip
def test_a_measurement_speaks_for_sizes_up_to_the_next_power_of_two(size, range):
    assert launch_table.size_class(size) == range
    assert range[0] < size <= range[1]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", CALLS)
def test_every_op_takes_rows_of_its_own_plans(op, arch):
    """A row of what the planner chose itself is right: fields, values, and the estimate of shared memory."""
    assert set(CALLS) == set(launch.PLANNERS) - set(launch_table.SAME) == set(launch_table.STATIC)
    when = launch_table.when_of(op, CALLS[op])
    assert None not in when.values()
    kernels = launch.PLANNERS[op](arch, **CALLS[op])
    for kernel in kernels.keys() - {"add_splits"}:
        config = kernels[kernel]
        named = launch_table.FIELDS[type(config).__name__]
        values = {name: getattr(config, name) for name in named if getattr(config, name) != 0}
        row = {"op": op, "kernel": kernel, "when": when, "config": values}
        assert launch_table.checked(row, arch).fits(CALLS[op])


def test_fields_to_tune_are_fields_of_their_configs():
    rooms = (launch, launch_gemm, launch_moe, launch_tokens)
    found = {n: c for room in rooms for n, c in inspect.getmembers(room) if n.endswith("Config")}
    assert set(found) == set(launch_table.FIELDS)
    for name, config in found.items():
        assert set(launch_table.FIELDS[name]) <= {f.name for f in fields(config)}


def test_an_override_holds_in_its_block_in_every_thread_and_is_not_cached():
    from concurrent.futures import ThreadPoolExecutor

    before = walk()
    with launch.override("ssd_scan", {"walk": {"q": 16}}), ThreadPoolExecutor(1) as pool:
        assert walk().q == 16 and pool.submit(walk).result().q == 16
        with launch.override("ssd_scan", {"walk": {"warps": 16}}):
            assert (walk().q, walk().warps) == (16, 16)
        assert launch.plan("rms_norm", 90, **CALLS["gated_rms_norm"])
    assert walk() is before


def test_what_plans_are_asked_for_can_be_observed():
    with launch.observe() as seen:
        walk(b=3)
    walk()
    assert seen == [("ssd_scan", 90, SCAN | {"b": 3})]
