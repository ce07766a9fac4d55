"""Attention against its definition, and its cache against whole sequences."""

import pytest
import torch

from tigon.modules import Attention
from tigon.modules.attention_tiles import attend_tiled


def layer(dtype=torch.float64) -> Attention:
    torch.manual_seed(0)
    return Attention(32, 4, 2, head_dim=16, dtype=dtype)


def definition(m: Attention, x):
    q, k, v = (p(x).unflatten(-1, (-1, 16)).transpose(1, 2) for p in (m.q_proj, m.k_proj, m.v_proj))
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2)) / 4
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    return m.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))


def feed(m, cache, x, added=None, slots=None, **options):
    out = m(x, cache=cache, slots=slots, **options)
    if added is None:
        added = torch.full((x.shape[0],), x.shape[1])
    cache.lengths.advance(slots, added, x.shape[1])
    return out


def test_output_and_gradients_equal_the_definition():
    m, x = layer(), torch.randn(2, 21, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 21, 32, dtype=torch.float64)
    results = [
        [y, *torch.autograd.grad((y * weight).sum(), [x, *m.parameters()])]
        for y in (m(x), definition(m, x))
    ]
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected)


def test_a_sequence_in_pieces_equals_one_pass():
    m, x = layer(), torch.randn(2, 40, 32, dtype=torch.float64)
    cache = m.allocate_cache(2, 40)
    with torch.no_grad():
        pieces = [feed(m, cache, piece) for piece in x.split([9, 1, 1, 20, 9], 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), m(x))


def test_ragged_rows_in_slots_out_of_order_equal_each_sequence_alone():
    m, x = layer(), torch.randn(3, 30, 32, dtype=torch.float64)
    cache, slots = m.allocate_cache(5, 30), torch.tensor([4, -1, 2])
    seen = torch.zeros(3, dtype=torch.int64)
    with torch.no_grad():
        full = m(x)
        for counts in ([5, 8, 8], [4, 4, 1], [1, 1, 0], [1, 1, 1]):
            counts, width = torch.tensor(counts), max(counts)
            rows = torch.stack([window(x[r], int(seen[r]), width) for r in range(3)])
            y = feed(m, cache, rows, counts, slots, num_tokens=counts)
            for r in (0, 2):
                n = int(counts[r])
                start = int(seen[r])
                torch.testing.assert_close(y[r, :n], full[r, start : start + n])
            seen += counts
    assert cache.lengths.tensor.tolist() == [0, 0, int(seen[2]), 0, int(seen[0])]
    assert (cache.keys[[0, 1, 3], :30] == 0).all(), "a padding row wrote into a slot"


def window(x, start, width):
    return x[start : start + width]


def test_packed_sequences_equal_separate_ones_with_and_without_a_cache():
    m, x = layer(), torch.randn(1, 20, 32, dtype=torch.float64)
    bounds, slots = torch.tensor([0, 7, 7, 8, 20]), torch.tensor([3, 1, 0, 2])
    cache = m.allocate_cache(4, 30)
    with torch.no_grad():
        packed = m(x, bounds)
        fed = feed(m, cache, x, bounds.diff(), slots, cu_seqlens=bounds)
        more = feed(m, cache, x, bounds.diff(), slots, cu_seqlens=bounds)
        for i, j in zip(bounds.tolist(), bounds[1:].tolist()):
            piece = x[:, i:j]
            if i < j:
                torch.testing.assert_close(packed[:, i:j], m(piece))
                torch.testing.assert_close(fed[:, i:j], m(piece))
                torch.testing.assert_close(
                    more[:, i:j], m(torch.cat([piece, piece], 1))[:, j - i :]
                )


def test_tiles_equal_the_definition_where_rows_and_keys_are_no_multiple_of_a_tile():
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, n, h, 16, dtype=torch.float64) for n, h in ((37, 4), (130, 2), (130, 2))
    )
    visible = torch.rand(2, 37, 130) < 0.3
    visible[..., 100] = True
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=visible[:, None], enable_gqa=True
    )
    torch.testing.assert_close(attend_tiled(q, k, v, visible), expected.transpose(1, 2))


def test_heads_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="num_kv_heads=3 must divide num_heads=4"):
        Attention(32, 4, 3)
    with pytest.raises(ValueError, match="num_heads=5 must divide d_model=32"):
        Attention(32, 5)
