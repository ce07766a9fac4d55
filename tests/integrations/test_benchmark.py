"""The benchmark of tigon.patch runs, refuses to time wrong answers, and counts the dense share."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23")

from tigon.bench import patch_nemotron_h as bench

TINY = {
    "hidden_size": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 8,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 31,
}


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_benchmark_measures_both_phases_and_the_dense_share(clock):
    rows = bench.benchmark(tokens=8, steps=2, rounds=1, clock=clock, **TINY)
    assert rows.keys() == {"prefill", "decode"}
    for row in rows.values():
        assert row["ratio"] > 0
        assert 0 < row["dense_unpatched"] < 1 and 0 < row["dense_patched"] < 1


def test_twins_share_weights_and_only_one_is_patched():
    model, patched = bench.build(**TINY)
    assert all(p is q for p, q in zip(model.parameters(), patched.parameters()))
    assert any("forward" in vars(m) for m in patched.modules())
    assert not any("forward" in vars(m) for m in model.modules())


def test_benchmark_refuses_to_time_wrong_logits(monkeypatch):
    model, patched = bench.build(**TINY)
    patched.lm_head = torch.nn.Linear(16, 31, bias=False)
    monkeypatch.setattr(bench, "build", lambda **shape: (model, patched))
    with pytest.raises(AssertionError, match="nothing to time"):
        bench.benchmark(tokens=8, rounds=1, **TINY)


def test_report_names_the_ratio_and_its_bound(monkeypatch, capsys):
    row = {
        "unpatched": 2.0,
        "patched": 1.0,
        "ratio": 2.0,
        "dense_unpatched": 0.4,
        "dense_patched": 0.8,
    }
    monkeypatch.setattr(bench, "benchmark", lambda **kwargs: {"prefill": row, "decode": row})
    bench.main(["--tokens", "4", "--steps", "2"])
    out = capsys.readouterr().out
    assert "500.000 ms/token" in out and "2.00x" in out and "2.50x" in out and "40%" in out
