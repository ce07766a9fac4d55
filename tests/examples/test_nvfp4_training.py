"""The example runs as it is printed in the docs."""

import json

import pytest
from scripts import line, numbers, run


def test_nvfp4_training_compares_every_seed_and_judges_the_mean(tmp_path):
    file = tmp_path / "found.json"
    options = ["--steps", 4, "--seeds", 2, "--bytes", 300, "--json", file]
    lines = run("examples/nvfp4_training.py", *options)
    changes = []
    for seed in range(2):
        _, plain, low, change = numbers(line(lines, f"seed {seed}").replace(": fp32", " 0"))
        assert plain != low and change == pytest.approx(100 * (low / plain - 1), abs=0.02)
        changes.append(change)
    mean = numbers(line(lines, "mean difference"))[0]
    assert mean == pytest.approx(sum(changes) / 2, abs=0.02)
    record = json.loads(file.read_text())
    assert [100 * row["difference"] for row in record["rows"]] == pytest.approx(changes, abs=0.02)
    assert record["mean"] == pytest.approx(mean / 100, abs=1e-4) and record["options"]["steps"] == 4
