"""Every tutorial runs as a script and prints what its text claims."""

import math
from importlib.util import find_spec

import pytest
from scripts import ROOT, line, numbers, run

HAS_PLOTS = find_spec("matplotlib") is not None
TUTORIALS = sorted((ROOT / "tutorials").glob("*.py"))


def plot(folder):
    return ["--plot", folder] if HAS_PLOTS else []


def test_quickstart_packs_patches_explains_and_generates():
    pytest.importorskip("transformers", minversion="5.23")
    lines = run("tutorials/01_quickstart.py")
    sequences, difference = numbers(line(lines, "packed:"))
    assert sequences == 3 and difference < 1e-5
    assert numbers(line(lines, "without cu_seqlens they would differ by"))[0] > 1e-2
    assert "2 NemotronHMamba2Mixer" in line(lines, "patch:")
    assert numbers(line(lines, "logits differ by at most"))[0] < 1e-4
    assert line(lines, "its own generate gives the same tokens:") == " True"
    assert line(lines, "ssd_scan:").startswith(" triton")
    assert "ScanConfig" in line(lines, "walk on sm_90:")
    assert "because tigon.backend('reference') asks for it" in "\n".join(lines)
    assert numbers(line(lines, "generate:"))[0] == 3 * 16
    assert line(lines, "the same tokens without drafts:") == " True"


def test_three_forms_of_ssd_agree_and_their_counts_grow_as_said():
    lines = run("tutorials/02_ssd_from_scratch.py")
    for form in ("matrix", "chunked", "tigon_scan"):
        (error,) = numbers(next(t for t in lines if "differs" in t and form in t))
        assert error < 1e-12
    rows = [numbers(text) for text in lines if text.startswith("l = ")]
    (least, *first), *_, (most, *last) = rows
    growth = [b / a for a, b in zip(first, last)]
    assert (least, most) == (2**10, 2**20)
    assert growth[0] == pytest.approx(2**10, rel=0.1) and growth[2] == pytest.approx(2**10, rel=0.1)
    assert growth[1] == pytest.approx(2**20, rel=0.1)
    milliseconds = [numbers(text)[-1] for text in lines if " ms" in text]
    assert len(milliseconds) == 16 and min(milliseconds) > 0


def test_nvfp4_by_hand_is_byte_equal_and_decibels_are_what_was_said():
    lines = run("tutorials/03_nvfp4_numerics.py")
    assert numbers(line(lines, "E2M1:")) == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    codes, scales = numbers(line(lines, "by hand and by tigon: the same"))
    assert (codes, scales) == (512 * 1024 / 2, 512 * 1024 / 16)
    nearest, _, better, _, rotated = (numbers(text) for text in lines if "gaussian" in text)
    assert [nearest[0], better[0], rotated[0]] == pytest.approx([20.4, 21.2, 20.4], abs=0.3)
    assert rotated[1] < nearest[1] and rotated[2] < nearest[2] / 4  # on outliers
    rms, bias, ci = numbers(line(lines, "stochastic_unbiased"))
    assert rms < 0.02 and abs(bias - 1 / 512) < 2 * ci < 1e-3
    for name in ("W4A4", "W4A16"):
        measured, expected = numbers(line(lines, f"{name} ").split("product")[1])
        assert measured == pytest.approx(expected, abs=0.2)


def test_drafts_bring_tokens_and_change_no_text(tmp_path):
    lines = run("tutorials/04_mtp_decoding.py", *plot(tmp_path))
    nats = [numbers(text.split("byte")[1])[0] for text in lines if text.startswith("step ")]
    assert nats[0] > math.log(256) - 0.5 and nats[-1] < 3
    per_pass = [numbers(line(lines, f"K = {k}:"))[0] for k in range(4)]
    assert per_pass[0] == 1 and per_pass[3] > 1.2
    assert line(lines, "the same text for every K:") == " True"
    assert numbers(line(lines, "law ")) == numbers(line(lines, "p  ")) == [0.5, 0.3, 0.15, 0.05]
    rows, *counts, chi2, _ = numbers(line(lines, "tigon.verify_draft,"))
    assert sum(counts) == rows and chi2 < 16.3
    kept, overlap = numbers(line(lines, "kept ").replace("min(p, q)", ""))
    assert overlap == 0.7 and abs(kept - overlap) < 0.005
    assert [path.name for path in tmp_path.iterdir()] == ["mtp_drafts.png"] * HAS_PLOTS


def test_roofline_counts_by_hand_and_says_what_bounds_each_op(tmp_path):
    lines = run("tutorials/05_reading_a_roofline.py", *plot(tmp_path))
    speed, flops, *_, ridge = numbers(line(lines, "cpu (measured):").replace("float32", ""))
    assert ridge == pytest.approx(flops / speed, rel=0.1)
    memory, products = numbers(line(lines, "ssd_update {'b': 64").split(":")[-1])
    assert products / memory == pytest.approx(0.75, abs=0.02)
    assert numbers(line(lines, "ssd_update, 1 row"))[0] == pytest.approx(0.74)
    assert line(lines, "ssd_update, 64 rows  ").rstrip().endswith("memory")
    assert line(lines, "scaled_mm W4A16, 8192 rows").rstrip().endswith("compute")
    shares = [numbers(text.split("share")[1])[0] for text in lines if ", share " in text]
    assert len(shares) == 2 and all(0.01 < share < 3 for share in shares)
    assert [path.name for path in tmp_path.iterdir()] == ["roofline.png"] * HAS_PLOTS


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_notebooks_can_be_made_of_it_and_it_stays_short(path):
    text = path.read_text()
    cells = text.split("\n# %%")
    assert text.startswith("# %% [markdown]\n# # ") and len(text.splitlines()) < 150
    for cell in cells[1:]:
        kind, *body = cell.split("\n")
        assert kind in ("", " [markdown]")
        if kind:
            assert all(row.startswith("#") or not row for row in body)


def test_the_docs_show_every_tutorial():
    page = (ROOT / "docs" / "tutorials.md").read_text()
    assert len(TUTORIALS) == 5
    for path in TUTORIALS:
        assert f"../tutorials/{path.name}\n" in page
