"""Generated blocks of the pages: fresh, made of the data, and nothing in them typed by hand."""

import json
import re

import pytest
from installs import ROOT

from tigon.bench import tables
from tigon.registry import PUBLIC

SUPPORT = "<!-- generated: support -->\n{}<!-- end -->\n"


def test_every_page_says_what_the_data_say(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_speed_stands_in_generated_blocks_only():
    readme = (ROOT / "README.md").read_text()
    assert readme.count("<!-- generated: ") == readme.count("<!-- end -->") == 3
    assert not re.search(r"\d ?(x|ms|TB/s|GB/s)\b", tables.BLOCK.sub("", readme))


@pytest.fixture
def checkout(tmp_path):
    """A checkout with one page, and folders for results."""
    (tmp_path / "bench/results/cpu").mkdir(parents=True)
    (tmp_path / "README.md").write_text("Before.\n" + SUPPORT.format("| old |\n") + "After.\n")
    return tmp_path


def test_a_stale_page_fails_and_names_the_command_then_is_rewritten(checkout, capsys):
    page, root = checkout / "README.md", ["--root", str(checkout)]
    before = page.read_text()
    assert tables.main([*root, "--check"]) == 1
    assert capsys.readouterr().out == "stale: README.md. Run: python -m tigon.bench.tables\n"
    assert page.read_text() == before
    assert tables.main(root) == 0
    new = page.read_text()
    assert new.startswith("Before.\n<!-- generated") and new.endswith("<!-- end -->\nAfter.\n")
    assert all(f"`{op}`" in new for op in PUBLIC) and "old" not in new
    assert tables.main([*root, "--check"]) == 0


def test_an_unknown_block_is_refused(checkout):
    (checkout / "README.md").write_text(SUPPORT.replace("support", "hearsay"))
    with pytest.raises(ValueError, match="'hearsay'; there are support, gpu-results"):
        tables.main(["--root", str(checkout)])


def test_a_folder_without_a_readme_is_an_environment_error(tmp_path):
    assert tables.main(["--root", str(tmp_path)]) == 4


def result(name: str, median: float, peak=None, share=None, flags=()) -> dict:
    time = {"median": median, "p20": median, "p80": median, "n": 9, "method": "CUDA events"}
    return {"name": name, "time": time, "peak": peak, "error": 0.0, "share": share, "flags": flags}


def run(*results, device="NVIDIA H100", sweep=None, **more) -> dict:
    shape = {"b": 1, "l": 8192}
    case = {
        "op": "ssd_scan",
        "variant": "",
        "mode": "step",
        "preset": "nemotron-3-super",
        "shape": shape,
    }
    case |= {"dtype": "bfloat16", "cold": True, "graph": False, "sweep": sweep}
    packages = {"torch": "2.13.0", "triton": "3.7.1", "transformers": "5.23.0"}
    env = {
        "date": "2026-12-01",
        "tigon": "0.1.0",
        "commit": "0123abc",
        "device": device,
        "threads": 2,
    }
    return {
        "schema": 2,
        "command": "tigon bench ssd_scan --preset nemotron-3-super",
        "env": env | {"packages": packages, "os": {"cores": 2}},
        "roof": {"device": device, "source": "measured", "copy": 3e12, "gemm": {"bfloat16": 7e14}},
        "cases": [{"case": case, "results": list(results), "missing": {}, **more}],
    }


def write(path, content) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def test_gpu_results_give_time_share_peers_machine_and_command(checkout):
    assert tables.gpu_results(checkout) == "Not measured yet.\n"
    folder = checkout / "bench/results/h100"
    write(folder / "on_gpu.json", {"stages": {}})
    assert tables.gpu_results(checkout) == "Not measured yet.\n"
    own = result("tigon", 2e-3, share=0.615, flags=["noisy"])
    other = result("tigon, batch-invariant", 3e-3)
    slow = result("mamba_ssm", 5e-3, flags=["differs from the oracle"])
    write(
        folder / "bench.json",
        run(own, other, slow, result("fast", 1e-3), missing={"fla": "absent"}),
    )
    text = tables.gpu_results(checkout)
    row = (
        "| `ssd_scan` forward and backward nemotron-3-super b=1,l=8192 bf16 cold | 2 ms (noisy) | 61.5 % "
        "| 2.5x faster than mamba_ssm (differs from the oracle); 2x slower than fast |"
    )
    assert row in text
    for part in (
        "2026-12-01",
        "H100",
        "torch 2.13.0",
        "0123abc",
        "3000 GB/s",
        "`tigon bench ssd_scan --preset",
    ):
        assert part in text
    assert tables.gpu_results(checkout, ["other"]) == "Not measured yet.\n"


def test_a_red_gate_shows_no_time_and_a_sweep_no_row(checkout):
    write(checkout / "bench/results/h100/red.json", run())
    assert "| wrong, so not timed | - | - |" in tables.gpu_results(checkout)
    write(checkout / "bench/results/h100/red.json", run(result("tigon", 1.0, share=0.5), sweep="l"))
    assert "ssd_scan` forward" not in tables.gpu_results(checkout)


def test_cpu_results_are_ratios_of_the_named_files_in_their_order(checkout):
    own, other = result("tigon", 1.0, peak=100), result("transformers", 4.0, peak=50)
    write(checkout / "bench/results/cpu/a.json", run(own, other, device="cpu"))
    text = tables.cpu_results(checkout, ["a"])
    assert "| 2 | transformers | 4x faster | 2x more |" in text
    assert "2026-12-01, torch 2.13.0, transformers 5.23.0; tigon at 0123abc" in text
    assert "`a.json`" in text


def test_a_ratio_too_good_to_be_true_is_marked_in_records_of_before_flags_too(checkout):
    near, far = result("near", 9.9), result("far", 12.0)
    write(checkout / "bench/results/cpu/a.json", run(result("tigon", 1.0), near, far, device="cpu"))
    text = tables.cpu_results(checkout, ["a"])
    assert "12x faster (suspect: over 10x)" in text and text.count("suspect") == 1


def test_the_packages_that_were_measured_beside_are_named_and_no_others(checkout):
    found = run(result("tigon", 1.0), result("modelopt", 4.0), device="cpu")
    found["env"]["packages"] |= {"nvidia-modelopt": "0.47.0", "torchao": "0.18.0"}
    write(checkout / "bench/results/cpu/a.json", found)
    text = tables.cpu_results(checkout, ["a"])
    assert "nvidia-modelopt 0.47.0" in text and "torchao" not in text


def test_ratios_that_round_to_one_are_no_claim():
    assert tables.speed(1.0, 0.997) == tables.speed(1.0, 1.003) == "the same"
    assert tables.speed(1.0, 0.5) == "2x slower" and tables.memory(None, 5) == "-"
