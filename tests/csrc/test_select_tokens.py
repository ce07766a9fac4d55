"""csrc/select_tokens.cu and gather_rows.cu against the reference, bit for bit, in guarded memory."""

import pytest
import torch
from options import case_id, pairwise
from token_cases import LENGTHS, check_rows, check_selection, launched, rows, selection

import tigon
from tigon.native import tokens
from tigon.reference import select_tokens as reference


def moved(arguments: dict, device: torch.device) -> dict:
    def move(v):
        return (
            [move(x) for x in v]
            if isinstance(v, list)
            else v.to(device)
            if torch.is_tensor(v)
            else v
        )

    return {name: move(v) for name, v in arguments.items()}


CASES = pairwise(
    lengths=LENGTHS,
    kind=["layers", "wide", "ties", "odd"],
    keep=[0.3, 0.0, 1.0, 0.01, 2.0],
    multiple=[1, 64, 3],
    protect=[0.0, 0.2, 0.9],
    wide=[False, True],
    padding=[0, 9, 1100],
)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_selects_as_the_reference(kernels, case):
    check_selection(moved(selection(**case), kernels))


@pytest.mark.parametrize("kind", ["layers", "ties", "odd"])
def test_a_sequences_choice_has_the_same_bits_in_any_batch(kernels, kind):
    """And with any width of a block: the launch goes by the batch."""
    whole = moved(selection([700, 1, 2100, 90], kind), kernels)
    index, cu_kept, _ = launched("select_tokens", whole)
    bounds, kept = whole["cu_seqlens"].tolist(), cu_kept.tolist()
    for i in range(4):
        part = slice(bounds[i], bounds[i + 1])
        alone = whole | dict(
            scores=whole["scores"][part].clone(), keep=whole["keep"][i : i + 1],
            cu_seqlens=torch.tensor([0, bounds[i + 1] - bounds[i]], dtype=torch.int32, device=kernels),
        )  # fmt: skip
        own = launched("select_tokens", alone)[0][: kept[i + 1] - kept[i]]
        assert torch.equal(own + bounds[i], index[kept[i] : kept[i + 1]])


def test_keep_may_be_anything(kernels):
    case = selection([50, 60, 70], wide=True)
    case |= dict(keep=torch.tensor([-(2**40), 2**40, 2**31]), capacity=200)
    assert check_selection(moved(case, kernels))[1].tolist() == [0, 0, 60, 130]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_zeros_of_either_sign_tie(kernels, keep):
    case = selection([4]) | dict(keep=torch.tensor([keep]), capacity=keep)
    case["scores"] = torch.tensor([-0.0, 0.0, -0.0, 0.0])
    assert check_selection(moved(case, kernels))[0].tolist() == list(range(keep))


@pytest.mark.parametrize("capacity", [0, 1, 40, 99])
def test_a_capacity_that_is_too_small_cuts_the_end(kernels, capacity):
    case = selection([100, 200, 300], keep=0.5, protect=0.1) | dict(capacity=capacity)
    index, cu_kept, inverse = check_selection(moved(case, kernels))
    assert cu_kept[-1] == capacity and (index >= 0).all() and inverse.max() == capacity - 1


def test_bounds_that_make_no_sense_reach_no_foreign_memory(kernels):
    for bounds in ([0, 900, 100, 50], [5, 3, 2**31 - 1, -7], [0, -1, -1, -1]):
        case = selection([100, 200, 300]) | dict(capacity=64)
        case["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
        index, _, inverse = launched("select_tokens", moved(case, kernels))
        assert index.shape == (64,) and inverse.shape == (600,)


def test_rows_move_as_in_the_reference(kernels):
    check_rows(moved(rows(), kernels))


def test_no_rows_and_rows_of_no_width(kernels):
    check_rows(moved(rows(kept=0), kernels))
    empty = dict(tensors=[torch.empty(0, 4), torch.empty(0)], fills=[1.0, 2.0])
    check_rows(moved(empty | dict(index=torch.tensor([0, -1], dtype=torch.int32)), kernels))
    narrow = dict(tensors=[torch.empty(5, 0), torch.arange(5)], fills=[1.0, 2.0])
    check_rows(moved(narrow | dict(index=torch.tensor([0, -1, 4], dtype=torch.int32)), kernels))


def test_row_addresses_are_64_bit(kernels):
    far = 2**31 + 64
    memory = torch.empty(2 * far + 8, dtype=torch.uint8, device=kernels)
    source = memory.as_strided((3, 8), (far, 1)).copy_(torch.arange(24).view(3, 8))
    index = torch.tensor([2, 0], dtype=torch.int32, device=kernels)
    check_rows(dict(tensors=[source], index=index, fills=[0.0]))


def public(scores, x):
    t = len(scores)
    cu = torch.tensor([0, 4, t], device=x.device)
    kept = tigon.select_tokens(
        scores, torch.tensor([2, 3], device=x.device), cu_seqlens=cu, capacity=7,
        protected=torch.arange(t, device=x.device) == 1,
    )  # fmt: skip
    positions = torch.arange(t, device=x.device)
    a, b, slots = tigon.compact_tokens((x, positions), kept, slot_map=positions, fill=3)
    return (
        kept.index,
        kept.cu_kept,
        kept.inverse,
        b,
        slots,
        a,
        *torch.autograd.grad(a.square().sum(), x),
    )


def test_public_functions_on_the_kernel_backend(kernels):
    scores, x = (
        torch.randn(9, device=kernels),
        torch.randn(9, 5, device=kernels, requires_grad=True),
    )
    with tigon.backend("kernel"):
        got = public(scores, x)
    with tigon.backend("reference"):
        want = public(scores, x)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_more_tokens_than_are_counted_are_refused():
    with pytest.raises(
        ValueError, match="select_tokens: 2147483647 tokens of 1 sequences are over"
    ):
        tokens.plan_select_tokens(2**31 - 1, 1)
    assert tokens.plan_select_tokens(2**31 - 2**13, 7)[1].grid[0] == 2**21 - 8 + 8


def test_reference_rule_and_counts_agree():
    """Counts that the host may look at beforehand are those of the selection."""
    case = selection([40, 0, 33], "odd", protect=0.3, multiple=4)
    counts = reference.kept_counts(
        73, case["keep"], case["cu_seqlens"], case["protected"], case["multiple"]
    )
    assert reference.select_tokens(**case)[1].diff().tolist() == counts.tolist()
