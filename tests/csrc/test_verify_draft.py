"""csrc/logit_stats.cu, verify_draft.cu and verify_tree.cu against the reference, in guarded memory.

On the host build with small blocks, which cost less there; natively with the real ones. A thousand tokens are drawn
with the real ones on both.
"""

import pytest
import torch
from decode_cases import moved
from memory import guarded
from options import case_id, pairwise
from sampling_cases import check, chi_square, draw, launched, make, tree, verified

import tigon
from tigon import native
from tigon.native import sampling
from tigon.reference.sampling import Purpose

INF, NAN = float("inf"), float("nan")
REAL_BLOCK = sampling.BLOCK


def eight_tokens(seed):
    """Logits of the target and of the drafts, after a prompt and after each first token."""
    g = torch.Generator().manual_seed(seed)
    return [1.5 * torch.randn(9, 8, generator=g) for _ in "td"]


@pytest.fixture(autouse=True)
def small_blocks(kernels, monkeypatch):
    if kernels.type == "cpu":
        monkeypatch.setattr(sampling, "BLOCK", 32)
        monkeypatch.setattr(sampling, "CUT_BLOCK", 64)
    sampling.plan_sampling.cache_clear()
    yield
    sampling.plan_sampling.cache_clear()


CASES = pairwise(
    V=[1000, 1, 7, 8, 8200, 16391],
    K=[3, 0, 1, 16],
    dtype=[torch.bfloat16, torch.float32, torch.float16],
    rule=["token", "block", "strict", "greedy", "mixed"],
    logits=[True, False],
    ragged=[False, True],
    layout=["packed", "sliced"],
    temperature=[1.0, 0.7, 0.0, "rows"],
    top_k=[0, 5, "rows"],
    top_p=[1.0, 0.8, "rows"],
    drafts=["close", "bad"],
)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_tokens_are_the_references(kernels, case):
    check("verify_draft", moved(make(b=4 if case["K"] > 3 else 6, **case), kernels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [40, 3000])
def test_the_largest_logit_is_taken_and_of_equal_ones_the_lowest(kernels, V, dtype):
    case = make(b=16, K=2, V=V, dtype=dtype, rule="greedy")
    logits = torch.randint(-3, 4, (16, 3, V)).to(dtype)
    logits[3, 0] = torch.tensor([-0.0, 0.0]).to(dtype).repeat(V // 2)
    logits[4:] = logits[4:].where(torch.rand(12, 3, V) < 0.9, -INF)
    drafts = logits[:, :2].argmax(-1).to(torch.int32)
    drafts[:8, 1] += 1
    case |= dict(target_logits=guarded(logits), draft_tokens=guarded(drafts))
    tokens, accepted = check("verify_draft", moved(case, kernels), exact=True)
    assert (tokens[8:] == logits[8:].argmax(-1)).all() and (accepted[8:] == 2).all()
    assert tokens[3, 0] == 0 and set(accepted[:8].tolist()) == {1}


@pytest.mark.parametrize("levels", [1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "V, k, p", [(50, 7, 1.0), (3000, 0, 0.4), (3000, 90, 0.5), (9001, 4000, 0.9)]
)
def test_equal_logits_at_the_cut_are_kept_from_the_lowest_index(kernels, V, k, p, dtype, levels):
    """Few levels, so that the cut goes through thousands of equal logits: the last kept one is drawn, none after it."""
    b = 12
    logits = torch.randint(levels, (b, V)).to(dtype)
    case = dict(
        logits=guarded(logits), seeds=torch.arange(b), positions=torch.arange(b), temperatures=None,
        top_ks=None, top_ps=None, temperature=1.0, top_k=k, top_p=p, purpose=0,
    )  # fmt: skip
    check("sample", moved(case, kernels))
    # A cut inside the last level, seen from its edge: the tokens on both sides lead by far in a second draw.
    if k and p == 1.0:
        kept = logits.float().sort(dim=-1, descending=True, stable=True).indices[:, :k]
        (drawn,) = launched("sample", moved(case | dict(seeds=torch.arange(b) + 99), kernels))
        assert (kept == drawn[:, None]).any(1).all()


def test_a_cut_made_of_one_logit_is_greedy(kernels):
    case = make(b=8, K=3, rule="token", V=3000)
    largest = case["target_logits"].argmax(-1)
    for change in (dict(top_k=1), dict(top_p=0.0), dict(top_p=1e-9, top_k=5)):
        tokens, accepted = launched("verify_draft", moved(case | change, kernels))
        for row, n in zip(tokens, accepted.tolist(), strict=True):
            at = int((tokens == row).all(1).nonzero()[0])
            assert row[n] == largest[at, n] and (row[:n] == largest[at, :n]).all()


def test_rows_whose_logits_are_bad_emit_nothing_and_spoil_no_other(kernels):
    """NaN, +inf and nothing at all, at positions that count and at one that does not."""
    for rule in ("token", "block", "strict", "greedy"):
        case = make(b=9, K=2, V=300, rule=rule, dtype=torch.float32)
        case["num_draft"] = torch.tensor([2, 2, 2, 2, 1, 2, 2, 1, 2], dtype=torch.int32)
        clean = launched("verify_draft", moved(case, kernels))
        target, draft = case["target_logits"], case["draft_logits"]
        target[1, 0, 299], target[2, 2, 0], target[3, 1, 5] = NAN, NAN, INF
        target[4, 2], target[5, 1] = NAN, -INF
        draft[6, 1, 7], draft[7, 1] = NAN, NAN
        tokens, accepted = check("verify_draft", moved(case, kernels))
        greedy, drawn = rule == "greedy", rule in ("strict", "greedy")
        bad = [1, 2, 5] + [3] * (not greedy) + [6] * (not drawn)
        assert (tokens[bad] == -1).all() and (accepted[bad] == -1).all()
        fine = [0, 4, 7, 8]
        assert all(torch.equal(a[fine], b[fine]) for a, b in zip((tokens, accepted), clean))


def test_drafts_from_the_targets_own_distribution_are_all_accepted(kernels):
    for rule in ("token", "block"):
        case = make(b=60, K=3, V=100, rule=rule)
        case["draft_logits"] = case["target_logits"][:, :3].clone()
        draws = [
            tigon.sample(case["draft_logits"][:, i], seeds=case["seeds"], positions=case["positions"] + i)
            for i in range(3)
        ]  # fmt: skip
        case["draft_tokens"] = torch.stack(draws, 1)
        tokens, accepted = launched("verify_draft", moved(case, kernels))
        assert (accepted == 3).all() and torch.equal(tokens[:, :3], case["draft_tokens"])


def test_certain_targets_and_impossible_drafts(kernels):
    """p one-hot; q(d) = 0 < p(d), which is accepted; p(d) = 0, which is not."""
    V, b = 20, 8
    for rule in ("token", "block"):
        for logits in (True, False):
            case = make(b=b, K=1, V=V, rule=rule, logits=logits, dtype=torch.float32)
            target = torch.full((b, 2, V), -INF)
            target[:, :, 11] = 3.0
            case["target_logits"] = guarded(target)
            case["draft_tokens"] = torch.tensor([[11]] * 4 + [[12]] * 4, dtype=torch.int32)
            if logits:
                case["draft_logits"][:2, :, 11] = -INF
            tokens, accepted = check("verify_draft", moved(case, kernels), exact=True)
            assert tokens.tolist() == [[11, 11]] * 4 + [[11, -1]] * 4
            assert accepted.tolist() == [1] * 4 + [0] * 4


def sequential(case: dict, count: int) -> torch.Tensor:
    """`count` tokens by sample(purpose="draft"), position by position."""
    shared = dict(
        seeds=case["seeds"],
        temperatures=None,
        top_ks=None,
        top_ps=None,
        temperature=0.9,
        top_k=0,
        top_p=0.95,
    )
    draws = [
        native.sample(case["target_logits"][:, i], positions=case["positions"] + i, purpose=0, **shared)
        for i in range(count)
    ]  # fmt: skip
    return torch.stack(draws, 1)


def test_strict_text_depends_neither_on_the_drafts_nor_on_their_number(kernels):
    K = 4
    case = moved(make(b=10, K=K, V=60, rule="strict", temperature=0.9, top_p=0.95), kernels)
    own = sequential(case, K + 1)
    for wrong in range(K + 1):
        for count in (K, wrong, 0):
            drafts = own[:, :K].clone()
            drafts[:, wrong:] = (drafts[:, wrong:] + 1) % 60
            change = dict(draft_tokens=drafts[:, :count].contiguous(), draft_logits=None)
            change["target_logits"] = case["target_logits"][:, : count + 1]
            tokens, accepted = launched("verify_draft", case | change)
            n = min(wrong, count)
            assert (accepted == n).all() and torch.equal(tokens[:, : n + 1], own[:, : n + 1].cpu())
            assert (tokens[:, n + 1 :] == -1).all()


def test_without_drafts_every_rule_is_a_plain_draw(kernels):
    case = moved(make(b=20, K=2, V=500, dtype=torch.float32), kernels)
    first = case["target_logits"][:, :1]
    names = (
        "seeds",
        "positions",
        "temperatures",
        "top_ks",
        "top_ps",
        "temperature",
        "top_k",
        "top_p",
    )
    plain = {name: case[name] for name in names}
    none = dict(target_logits=first, draft_tokens=case["draft_tokens"][:, :0], draft_logits=None)
    for rule, purpose in ((0, 3), (1, 3), (2, 0)):
        (want,) = launched("sample", plain | dict(logits=first[:, 0], purpose=purpose))
        for change in (none, dict(num_draft=torch.zeros(20, dtype=torch.int32, device=kernels))):
            tokens, accepted = launched("verify_draft", case | change | dict(rule=rule))
            assert torch.equal(tokens[:, 0], want) and not accepted.any()


def test_a_row_has_the_same_bits_in_any_batch_slot_and_layout(kernels):
    case = make(
        b=8, K=3, V=9000, rule="mixed", ragged=True, temperature="rows", top_k="rows", top_p="rows"
    )
    together = launched("verify_draft", moved(case, kernels))
    order = torch.tensor([5, 2, 7, 2])
    some = {k: guarded(v[order]) if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    for a, b in zip(launched("verify_draft", moved(some, kernels)), together, strict=True):
        assert torch.equal(a, b[order])


def test_own_draws_do_not_depend_on_the_chunks(kernels, monkeypatch):
    case = moved(make(b=5, K=2, V=3000, rule="strict"), kernels)
    whole = launched("verify_draft", case)
    monkeypatch.setattr(sampling, "CHUNK", 256)
    sampling.plan_sampling.cache_clear()
    assert torch.equal(launched("verify_draft", case)[0], whole[0])


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 6, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("rule", ["token", "block", "strict"])
def test_outcomes_have_the_targets_law(kernels, rule, options):
    """Chi-square of the first two tokens of 100,000 requests; contexts change both sides. Fewer where rows are cut on
    the host, where a search of the cut costs as much as a dozen draws."""
    # Token 0, whose noise is also the number of an acceptance, is often a replacement here: one stream for both fails.
    targets, drafts = eight_tokens(5)
    n = 100_000 if kernels.type == "cuda" or not options else 3_000
    counts, law = verified(targets, drafts, rule, n, 2, device=kernels, backend="kernel", **options)
    assert counts.sum() == n and chi_square(counts, law) > 1e-6


@pytest.mark.parametrize(
    "rule, stream, n",
    [
        ("token", Purpose.ACCEPT, 5_000),
        ("block", Purpose.ACCEPT, 5_000),
        ("token", Purpose.RESIDUAL, 30_000),
    ],
)
def test_a_shared_stream_breaks_the_law(kernels, rule, stream, n):
    """Drafts drawn with the noise of acceptance or of replacement: fewer requests than above show it."""
    targets, drafts = eight_tokens(7)
    counts, law = verified(
        targets, drafts, rule, n, 2, device=kernels, backend="kernel", stream=stream
    )
    assert chi_square(counts, law) < 1e-6


def test_a_thousand_tokens_have_the_targets_law(kernels, monkeypatch):
    """One draft, the first token alone, in the real blocks: rejection, replacement and acceptance over a vocabulary."""
    monkeypatch.setattr(sampling, "BLOCK", REAL_BLOCK)
    sampling.plan_sampling.cache_clear()
    n, V = 100_000 if kernels.type == "cuda" else 20_000, 1000
    g = torch.Generator().manual_seed(11)
    target, draft = (torch.randn(1, V, generator=g).to(kernels) for _ in "td")
    seeds = torch.arange(n, device=kernels)
    positions = torch.zeros_like(seeds)
    q = draft.expand(n, V)
    pieces = zip(q.split(4_000), seeds.split(4_000), positions.split(4_000))
    d = torch.cat([draw(*piece, Purpose.DRAFT) for piece in pieces])
    with tigon.backend("kernel"):
        keys = dict(seeds=seeds, positions=positions, rule="token")
        both = target.expand(n, 2, V)
        tokens, accepted = tigon.verify_draft(both, d[:, None], q[:, None], **keys)
    assert 0.3 < accepted.double().mean() < 0.7
    counts = torch.bincount(tokens[:, 0].long().cpu(), minlength=V)
    assert chi_square(counts, target[0].double().softmax(-1)) > 1e-6


TREES = pairwise(
    N=[9, 1, 2, 32],
    V=[5, 2, 300],
    rule=["strict", "greedy"],
    sound=[True, False],
    nodes=[False, True],
    max_depth=[None, 0, "half"],
    top_k=[0, 2],
    top_p=[1.0, 0.8],
    temperature=[1.0, 0.0],
    dtype=[torch.float32, torch.bfloat16],
)


@pytest.mark.parametrize("case", TREES, ids=case_id)
def test_trees_are_walked_as_by_the_reference(kernels, case):
    depth = {"half": (case["N"] - 1) // 2}.get(case["max_depth"], case["max_depth"])
    arguments = moved(tree(b=8, **case | {"max_depth": depth}), kernels)
    check("verify_tree", arguments)
    names = ("first_child", "next_sibling")
    check("tree_ancestors", {name: arguments[name] for name in names}, exact=True)


def test_a_vocabulary_of_131072(kernels):
    """Sixteen chunks; more equal 16-bit logits at the cuts than a chunk has entries."""
    for change in (dict(rule="token"), dict(rule="block", top_k=40_000, top_p=0.9)):
        check("verify_draft", moved(make(b=2, K=2, V=131072, spread=0.3, **change), kernels))


def test_offsets_past_two_to_the_31_elements(kernels):
    far = 2**31 + 64
    case = make(b=2, K=1, V=64)
    memory = torch.empty(far + 4096, dtype=torch.bfloat16, device=kernels)
    spread = memory.as_strided((2, 2, 64), (far, 64, 1)).copy_(case["target_logits"])
    tokens, _ = launched("verify_draft", moved(case, kernels) | {"target_logits": spread})
    assert torch.equal(tokens, launched("verify_draft", moved(case, kernels))[0])


def test_empty_batches_launch_nothing(kernels):
    case = {k: v[:0] if isinstance(v, torch.Tensor) else v for k, v in make().items()}
    assert [t.shape for t in launched("verify_draft", moved(case, kernels))] == [(0, 4), (0,)]


def public(device):
    b, K, V = 4, 2, 40
    g = torch.Generator().manual_seed(3)
    t, q = (torch.randn(b, n, V, generator=g).to(device) for n in (K + 1, K))
    keys = dict(seeds=torch.arange(b, device=device), positions=torch.arange(b, device=device))
    draw = dict(
        temperature=0.8, top_k=torch.full((b,), 9, dtype=torch.int32, device=device), top_p=0.9
    )
    d = torch.stack([tigon.sample(q[:, i], **keys, **draw) for i in range(K)], 1)
    out = [d, *tigon.verify_draft(t, d, q, rule="block", **keys, **draw)]
    links = (torch.tensor([[1, -1, -1]] * b, dtype=torch.int32, device=device) for _ in "cs")
    child, sibling = links
    sibling = torch.tensor([[-1, 2, -1]] * b, dtype=torch.int32, device=device)
    nodes = torch.tensor([[0, 3, 4]] * b, dtype=torch.int32, device=device)
    out += tigon.verify_tree(t[..., :5].contiguous(), nodes, child, sibling, **keys)
    return [*out, *tigon.tree_ancestors(child, sibling)]


def test_public_functions_reach_the_kernels(kernels):
    results = []
    for backend in ("kernel", "reference"):
        with tigon.backend(backend):
            results.append(public(kernels))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_nothing_waits_for_the_device(kernels, no_host_sync):
    with tigon.backend("kernel"):
        public(kernels)


def test_explain_shows_the_launches(kernels):
    t, q = (
        torch.empty(32, 6, 131072, dtype=torch.bfloat16),
        torch.empty(32, 5, 131072, dtype=torch.bfloat16),
    )
    keys = dict(
        seeds=torch.empty(32, dtype=torch.int64), positions=torch.empty(32, dtype=torch.int64)
    )
    d = torch.empty(32, 5, dtype=torch.int32)
    told = {
        rule: list(tigon.explain("verify_draft", t, d, q, rule=rule, arch=90, **keys).launch)
        for rule in ("token", "block", "strict")
    }
    assert told["token"] == ["logit_stats", "draw_tokens", "emit_tokens"]
    assert told["block"] == ["logit_stats", "block_masses", "draw_tokens", "emit_tokens"]
    assert told["strict"] == ["draw_tokens", "emit_tokens"]
    cut = tigon.explain("sample", t[:, 0], top_k=5, arch=90, **keys).launch
    assert list(cut) == ["logit_stats", "logit_cuts", "draw_tokens", "emit_tokens"]
    with pytest.raises(ValueError, match="are over 2147483647 chunks"):
        sampling.plan_sampling(2**20, 17, 16, 2**20, "bf16", 0, True, False, False)
