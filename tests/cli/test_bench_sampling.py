"""Workloads of sampling: no token is left to rounding, every length is accepted, work is counted."""

import pytest
import torch

from tigon.bench import sampling, verify, workloads
from tigon.bench.variants import variants
from tigon.bench.work import work
from tigon.bench.workloads import SMALL
from tigon.ops import dispatch


def make(op, dtype=torch.float32, device="cpu", variant=None, **sizes):
    return workloads.make(op, SMALL[op] | sizes, dtype, device, variant=variant)


@pytest.mark.parametrize("op", sampling.BUILDERS)
def test_outputs_have_the_same_shapes_on_meta(op):
    for variant in variants(op):
        load = make(op, torch.bfloat16, variant=variant or None)
        out = load.run()
        assert len(out) == len(load.outputs)
        meta = make(op, torch.bfloat16, "meta", variant or None)
        assert [(t.shape, t.dtype) for t in meta.run()] == [(t.shape, t.dtype) for t in out]


@pytest.mark.parametrize("variant", variants("verify_draft"))
def test_the_noise_decides_nothing_and_prefixes_of_every_length_are_accepted(variant):
    load = make("verify_draft", torch.bfloat16, variant=variant, b=60)
    tokens, accepted = load.run()
    assert set(accepted.tolist()) == {0, 1, 2, 3}
    leaders = load.inputs["target_logits"].argmax(-1)
    inside = torch.arange(4) <= accepted[:, None]
    assert (tokens == leaders)[inside].all() and (tokens[~inside] == -1).all()


def test_one_wrong_token_is_a_wrong_result(monkeypatch):
    load = dispatch._load

    def off(function):
        right = load(function)

        def wrong(*args, **options):
            out = right(*args, **options)
            if dispatch._backend is None:
                out[0][0, 0] += 1
            return out

        return wrong

    monkeypatch.setattr(dispatch, "_load", off)
    rows = verify.verify(make("verify_draft"), backward=False)
    assert [row.name for row in rows if not row.ok] == ["tokens"]


def test_bytes_are_those_of_the_logits():
    sizes = dict(b=32, K=5, V=131072)
    once = {
        name: work("verify_draft", sizes, 2, variant=name).bytes
        for name in variants("verify_draft")
    }
    line = 32 * 131072 * 2
    assert once["token"] // line == 13 and once["token-greedy-drafts"] // line == 7
    assert once["block"] // line == 21 and once["strict"] // line == 6
