"""What the demo says of drafts."""

from types import SimpleNamespace

from tigon.cli.demo_drafts import LOOP, in_loop, verdict


def test_a_loop_is_text_that_repeats_itself_long_enough():
    text = list(range(100))
    assert not in_loop(text)
    assert in_loop(text + [7, 8, 9] * 9)
    assert not in_loop(text + [7, 8, 9] * (LOOP // 3 - 2))
    assert in_loop([5] * (LOOP + 1)) and not in_loop([5] * LOOP)


def test_the_verdict_names_the_fastest_or_says_by_how_much_and_why_there_is_none():
    one = SimpleNamespace(parts={"draft": 1.0, "model": 4.0}, steps=10, acceptance=[0.5])
    assert "fastest: K = 2, 1.50 times" in verdict({0: 100.0, 1: 120.0, 2: 150.0}, one)
    said = verdict({0: 100.0, 1: 95.0, 2: 80.0}, one)
    assert "K = 1 is 5 % slower" in said and "0.25 of a pass" in said and "50%" in said
