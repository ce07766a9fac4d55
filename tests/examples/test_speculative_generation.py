"""The example runs as it is printed in the docs, and drafts change no text."""

from scripts import run


def test_speculative_generation_prints_a_report_a_way_and_one_text():
    options = ["--seconds", 1, "--tokens", 10, "--dtype", "float16"]
    lines = run("examples/speculative_generation.py", *options)
    ways = [line[:15].strip() for line in lines[:7]]
    assert ways == [*(f"K = {k}" for k in (0, 1, 2, 3, 5)), "tree (3, 2, 1)", "auto"]
    assert all("30 new tokens" in line for line in lines[:7])
    assert "ways gave the same text" in lines[-1] and not lines[-1].startswith("0 of")
