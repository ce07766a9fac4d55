"""Batch-invariant mode on the CPU: the same bits whatever else is in the batch and however many rows a call has."""

import pytest
import torch

import tigon
from tigon.models import PRESETS, HybridLM
from tigon.modules import Attention, Mamba2
from tigon.modules.linear import linear


@pytest.fixture(autouse=True)
def invariant():
    torch.manual_seed(0)
    with tigon.batch_invariant():
        yield


def test_a_row_of_a_linear_layer_does_not_see_the_others():
    for k, n in ((64, 100), (1000, 333)):
        x, weight, bias = torch.randn(70, k), torch.randn(n, k), torch.randn(n)
        whole = linear(x, weight, bias)
        torch.testing.assert_close(whole, torch.nn.functional.linear(x, weight, bias))
        for i, j in ((0, 1), (5, 6), (69, 70), (3, 40)):
            assert torch.equal(linear(x[i:j], weight, bias), whole[i:j])
    assert linear(torch.randn(2, 0, 8), torch.randn(3, 8)).shape == (2, 0, 3)


@pytest.mark.parametrize(
    "make", [lambda: Attention(64, 4, 2), lambda: Mamba2(64, 16, headdim=16, ngroups=2)]
)
def test_a_token_of_a_layer_does_not_see_other_rows_nor_later_tokens(make):
    m, x = make(), torch.randn(3, 150, 64)
    with torch.no_grad():
        whole = m(x)
        for length in (1, 16, 33, 64, 65, 129):
            assert torch.equal(m(x[1:2, :length]), whole[1:2, :length]), length


def test_prefill_of_a_model_is_the_same_bits_for_one_row_alone_and_for_any_length():
    model = HybridLM(PRESETS["tiny"].replace(pattern="M*-M", vocab_size=50))
    ids = torch.randint(0, 50, (3, 70))
    with torch.no_grad():
        whole = model(ids)
        packed = model(ids.flatten()[None], torch.tensor([0, 70, 140, 210]))
        assert torch.equal(packed.view_as(whole), whole)
        for length in (1, 31, 65):
            assert torch.equal(model(ids[2:, :length]), whole[2:, :length]), length


def test_decode_of_a_model_is_the_same_bits_for_one_row_alone():
    model = HybridLM(PRESETS["tiny"].replace(pattern="M*-M", vocab_size=50))
    ids = torch.randint(0, 50, (3, 24))
    with torch.no_grad():
        cache, alone = model.allocate_cache(3, 30), model.allocate_cache(1, 40)
        model(ids[:, :20], cache=cache)
        model(ids[1:2, :20], cache=alone)
        for i in range(20, 24):
            step = ids[:, i : i + 1]
            assert torch.equal(model(step, cache=cache)[1:2], model(step[1:2], cache=alone))


def test_attention_gives_the_same_bits_in_prefill_and_in_decode():
    m, x = Attention(64, 4, 2), torch.randn(1, 40, 64)
    cache = m.allocate_cache(1, 64)
    with torch.no_grad():
        pieces = []
        for piece in x.split([33, 1, 6], 1):
            pieces.append(m(piece, cache=cache))
            cache.lengths.advance(None, torch.tensor([piece.shape[1]]), piece.shape[1])
        assert torch.equal(torch.cat(pieces, 1), m(x))
