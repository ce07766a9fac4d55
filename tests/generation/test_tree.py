"""Trees of drafts: links, ancestors, limits."""

import pytest
import torch

from tigon.generation.tree import DraftTree


def test_links_and_ancestors_of_a_tree_level_by_level():
    tree = DraftTree((2, 3))
    child, sibling = (t[0].tolist() for t in tree.links)
    assert child == [1, 3, 6, -1, -1, -1, -1, -1, -1]
    assert sibling == [-1, 2, -1, 4, 5, -1, 7, 8, -1]
    assert [bin(b) for b in tree.bits.tolist()] == [
        bin(sum(1 << j for j in way))
        for way in ([0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4], [0, 1, 5], [0, 2, 6], [0, 2, 7], [0, 2, 8])
    ]  # fmt: skip
    assert tree.drafter_bits[0].tolist() == [[1, 2]]
    assert tree.drafter_bits[1].tolist() == [[5, 9, 17, 34, 66, 130]]


def test_a_tree_of_32_nodes_has_the_sign_bit_and_no_more_is_allowed():
    tree = DraftTree((31,))
    assert tree.bits[31].item() == torch.tensor((1 << 31) - 2**32 + 1).item()
    assert tree.drafter_bits[0][0, 30] == 1 << 30
    with pytest.raises(ValueError, match="at most 32 nodes"):
        DraftTree((32,))
    with pytest.raises(ValueError, match="positive branches"):
        DraftTree((2, 0))
