"""`tigon demo` with a few steps, and the parts that it reports with."""

import lzma
import math

import pytest
import torch

from tigon.cli import demo_drafts, demo_experts, demo_run, demo_text, demo_train, main
from tigon.models import HybridLM

FEW = ["demo", "--steps", "2", "--prompt", "A class"]


@pytest.fixture
def short(monkeypatch):
    """Less text to measure on and fewer bytes to generate."""
    training, held_out = demo_text.split_text()
    monkeypatch.setattr(demo_run, "split_text", lambda seed: (training[:20_000], held_out[:2_000]))
    monkeypatch.setattr(demo_run, "NEW_BYTES", 12)
    monkeypatch.setattr(demo_drafts, "NEW", 8)
    monkeypatch.setattr(demo_drafts, "ROUNDS", 1)
    monkeypatch.setattr(demo_drafts, "HELD_OUT", 512)
    monkeypatch.setattr(demo_train, "BATCH", 2)


def test_demo_trains_saves_compares_and_checks_the_decode_path(short, tmp_path, capsys):
    assert main([*FEW, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for part in (
        "tiny",
        "order-2",
        "lzma",
        "--- greedy",
        "--- temperature 1",
        "recomputation agree",
        "fp32 training",
        "nvfp4 training",
        "weights in nvfp4",
        "expert load",
        "given the true text",
        "greedy, outside loops",
        "bytes a step",
        "fastest",
        "snapshots, K = 6",
        "greedy text with 3 drafts",
    ):
        assert part in out
    assert (tmp_path / "loss.png").stat().st_size > 1000
    again = HybridLM.from_pretrained(tmp_path / "model")
    assert again.config == HybridLM("tiny", device="meta").config and again.mtp is not None


def test_demo_fails_if_decode_logits_are_not_those_of_recomputation(
    short, tmp_path, capsys, monkeypatch
):
    whole = demo_run._difference
    monkeypatch.setattr(demo_run, "_difference", lambda m, ids, seen: whole(m, ids, seen + 0.01))
    assert main([*FEW, "--out", str(tmp_path)]) == 2
    assert "DIFFER" in capsys.readouterr().out


def test_demo_works_without_rich_and_matplotlib_and_says_so(short, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_run, "find_spec", lambda name: None)
    assert main([*FEW, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "matplotlib is not installed" in out and "bits/byte, 0 %" in out


def test_held_out_paragraphs_are_not_in_the_training_text():
    training, held_out = demo_text.split_text()
    assert len(training) > 100_000 and 0.05 < len(held_out) / len(training) < 0.25
    known = {p.strip() for p in training.split(b"\n\n")}
    assert not known & {p.strip() for p in held_out.split(b"\n\n") if p.strip()}
    assert demo_text.split_text() == (training, held_out)


def test_order_2_model_is_a_distribution_and_learns():
    text = b"abracadabra " * 50
    assert demo_text.order_2_bits(text, b"abracadabra") < 1
    shares = [2 ** -demo_text.order_2_bits(text, bytes([byte])) for byte in range(256)]
    assert sum(shares) == pytest.approx(1, abs=1e-9)


def test_lzma_is_charged_only_for_what_the_held_out_text_adds():
    training, held_out = b"the quick brown fox " * 99, bytes(range(256)) * 4
    preset = 9 | lzma.PRESET_EXTREME
    sizes = [len(lzma.compress(t, preset=preset)) for t in (training + held_out, training)]
    assert demo_text.lzma_bits(training, held_out) == 8 * (sizes[0] - sizes[1]) / len(held_out)


@torch.no_grad()
def test_bits_per_byte_is_that_of_one_pass_whatever_the_window():
    torch.manual_seed(0)
    model, text = HybridLM("tiny").eval(), torch.randint(0, 256, (300,))
    nats = model(text[None, :-1], labels=text[None, 1:]).item()
    for window in (300, 128):
        bits = demo_train.bits_per_byte(model, text, window)
        assert bits == pytest.approx(nats / math.log(2), abs=1e-4)


def test_training_by_steps_is_reproducible_and_lowers_the_loss(monkeypatch):
    monkeypatch.setattr(demo_train, "BATCH", 2)
    monkeypatch.setattr(demo_train, "LENGTH", 64)
    text = torch.tensor(list(b"abcdefgh" * 100))
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(demo_train.train(HybridLM("tiny"), text, seconds=1, steps=12).nats)
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.7 * losses[0][0]
    boxed = demo_train.train(HybridLM("tiny"), text, seconds=0.5)
    assert len(boxed.nats) >= 1 and boxed.seconds < 30


def test_the_history_is_of_the_next_byte_alone_and_the_prediction_block_is_trained(monkeypatch):
    monkeypatch.setattr(demo_train, "LENGTH", 32)
    text = torch.tensor(list(b"abcdefgh" * 100))
    torch.manual_seed(0)
    model = HybridLM("tiny")
    ids = demo_train._windows(text, torch.Generator().manual_seed(0))
    nats = model.eval()(ids[:, :-1], labels=ids[:, 1:]).item()
    before = model.mtp.layers[0].eh_proj.weight.clone()
    history = demo_train.train(model, text, seconds=0, steps=2)
    assert history.nats[0] == pytest.approx(nats, rel=1e-5)
    assert not torch.equal(model.mtp.layers[0].eh_proj.weight, before)


@torch.no_grad()
def test_expert_load_is_the_share_of_choices_of_every_layer(capsys):
    model, text = HybridLM("tiny"), torch.randint(0, 256, (3000,))
    load = demo_experts.expert_load(model, text)
    layers, experts = model.config.pattern.count("E"), model.config.n_routed_experts
    assert load.shape == (layers, experts)
    torch.testing.assert_close(load.sum(1), torch.ones(layers))
    demo_experts.print_load(model, load)
    out = capsys.readouterr().out
    assert out.count("times the mean") == layers and f"{100 * load[0, 3]:5.1f}" in out
    for layer in model.backbone.layers:
        if hasattr(layer.mixer, "gate"):
            layer.mixer.gate.e_score_correction_bias[5] = 9.0
    assert (demo_experts.expert_load(model, text)[:, 5] - 0.5).abs().max() < 1e-6


@torch.no_grad()
def test_logits_that_differ_by_a_tie_of_experts_are_compared_in_fp64(monkeypatch, capsys):
    model, ids = HybridLM("tiny"), torch.randint(0, 256, (40,))
    decoded = demo_run._decode(model, ids, 30)
    full = model(ids[None])[0, 29:-1].log_softmax(-1).gather(1, ids[30:, None])[:, 0]
    torch.testing.assert_close(decoded, full, rtol=0, atol=1e-4)
    other = decoded.clone()
    other[3:] += 0.1  # as if a choice had gone the other way
    assert demo_run._agreement(model, ids, other) < 1e-9
    assert "a tie of two experts" in capsys.readouterr().out
    real = demo_run._decode
    monkeypatch.setattr(demo_run, "_decode", lambda *args: real(*args) + 1e-3)
    assert demo_run._agreement(model, ids, other) > 0.09
