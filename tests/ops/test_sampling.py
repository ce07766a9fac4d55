"""Sampling and verification on the reference backend: rules, cuts, odd rows, trees, compilers, errors.

The laws are proved in test_sampling_laws.py; the CUDA kernels' own tests are in tests/csrc/test_verify_draft.py.
"""

import pytest
import torch

import tigon
from tigon.ops import VerifyRule
from tigon.reference import sampling as reference

INF, NAN = float("inf"), float("nan")


def inputs(b=5, K=3, V=11, dtype=torch.float32):
    g = torch.Generator().manual_seed(2)
    target, draft = (torch.randn(b, n, V, generator=g).to(dtype) for n in (K + 1, K))
    return dict(
        target_logits=target,
        draft_tokens=draft.argmax(-1).to(torch.int32),
        draft_logits=draft,
        seeds=torch.arange(b),
        positions=100 * torch.arange(b),
    )


def keys(b):
    return dict(seeds=torch.arange(b), positions=100 * torch.arange(b))


def kept_by_hand(row, k, p):
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    order = order[:k] if k else order
    e = torch.tensor([row[i] for i in order], dtype=torch.float64).softmax(0).tolist()
    mass, kept = 0.0, []
    for i, share in zip(order, e, strict=True):
        if kept and mass >= p:
            break
        kept.append(i)
        mass += share
    return set(kept)


@pytest.mark.parametrize(
    "k, p", [(0, 1.0), (1, 1.0), (4, 1.0), (0, 0.5), (6, 0.7), (3, 0.0), (99, 0.95)]
)
@pytest.mark.parametrize("ties", [False, True])
def test_top_k_and_then_top_p_keep_what_the_definition_says(k, p, ties):
    logits = torch.randn(6, 1, 12, dtype=torch.float64)
    logits = logits.round() if ties else logits
    settings = reference.Settings(None, 1.0, None, k, None, p)
    kept = settings.scaled(logits)[:, 0] > -INF
    for row, mask in zip(logits[:, 0].tolist(), kept, strict=True):
        assert set(mask.nonzero()[:, 0].tolist()) == kept_by_hand(row, k, p)


def test_settings_by_row_are_settings_by_number():
    case = inputs(b=4)
    t, k, p = [0.0, 1.0, 0.6, 2.0], [0, 3, 2, 99], [0.5, 1.0, 0.8, 0.0]
    rows = dict(
        temperature=torch.tensor(t), top_k=torch.tensor(k, dtype=torch.int32), top_p=torch.tensor(p)
    )
    for rule in ("token", "block", "strict", "greedy"):
        tokens, accepted = tigon.verify_draft(**case, **rows, rule=rule)
        for i in range(4):
            one = {name: v[i : i + 1] for name, v in case.items()}
            alone = tigon.verify_draft(**one, temperature=t[i], top_k=k[i], top_p=p[i], rule=rule)
            assert torch.equal(tokens[i], alone[0][0]) and accepted[i] == alone[1][0]


def test_rules_by_row_are_rules_by_name():
    case = inputs(b=8)
    codes = torch.tensor([r.value for r in VerifyRule] * 2, dtype=torch.int8)
    mixed = tigon.verify_draft(**case, rule=codes)
    for rule in VerifyRule:
        for got, want in zip(
            mixed, tigon.verify_draft(**case, rule=rule.name.lower()), strict=True
        ):
            assert torch.equal(got[codes == rule], want[codes == rule])


def test_temperature_0_is_greedy_under_every_rule():
    case = inputs()
    largest = case["target_logits"].argmax(-1)
    want = tigon.verify_draft(**case, rule="greedy")
    for rule in ("token", "block", "strict"):
        for got, right in zip(
            tigon.verify_draft(**case, rule=rule, temperature=0.0), want, strict=True
        ):
            assert torch.equal(got, right)
    for row, n, best in zip(*want, largest, strict=True):
        assert row[: n + 1].tolist() == best[: n + 1].tolist() and (row[n + 1 :] == -1).all()


def test_ragged_drafts_are_shorter_calls_and_padding_emits_nothing():
    case = inputs(b=5)
    counts = torch.tensor([-1, 0, 1, 2, 3], dtype=torch.int32)
    for rule in ("token", "block", "strict", "greedy"):
        tokens, accepted = tigon.verify_draft(**case, num_draft=counts, rule=rule)
        assert (tokens[0] == -1).all() and accepted[0] == -1
        for i, n in enumerate(counts.tolist()[1:], 1):
            short = {name: v[i : i + 1] for name, v in case.items()}
            short["target_logits"] = short["target_logits"][:, : n + 1]
            for name in ("draft_tokens", "draft_logits"):
                short[name] = short[name][:, :n]
            alone = tigon.verify_draft(**short, rule=rule)
            assert torch.equal(tokens[i, : n + 1], alone[0][0]) and accepted[i] == alone[1][0]
            assert (tokens[i, n + 1 :] == -1).all()


@pytest.mark.parametrize("wrong", [-1, 11, 2**31 - 1, -(2**31)])
def test_a_draft_that_is_no_token_ends_the_drafts(wrong):
    case = inputs()
    for rule in ("token", "block", "strict", "greedy"):
        changed = case | {"draft_tokens": case["draft_tokens"].clone()}
        changed["draft_tokens"][:, 1] = wrong
        got = tigon.verify_draft(**changed, rule=rule)
        want = tigon.verify_draft(**case, rule=rule, num_draft=torch.ones(5, dtype=torch.int32))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_bad_logits_give_minus_one():
    logits = torch.randn(6, 9)
    logits[0, 3], logits[1, 8], logits[2] = NAN, INF, -INF
    tokens = tigon.sample(logits, **keys(6))
    assert (tokens[:3] == -1).all() and (tokens[3:] >= 0).all()
    cold = tigon.sample(logits, **keys(6), temperature=0.0)
    assert cold.tolist()[:3] == [-1, 8, -1]


def test_nothing_left_over_by_rounding_is_replaced_by_the_likeliest_token():
    p = torch.tensor([[0.2, 0.5, 0.3], [0.25, 0.5, 0.25]])
    assert reference.residual(p, p).tolist() == [[0, 1, 0], [0, 1, 0]]
    assert reference.acceptance(p, p).eq(1).all()
    assert reference.block_acceptance(torch.ones(1), torch.zeros(1)) == 1


def test_strict_text_is_that_of_plain_draws():
    case = inputs(b=6)
    draws = [
        tigon.sample(
            case["target_logits"][:, i], seeds=case["seeds"], positions=case["positions"] + i
        )
        for i in range(4)
    ]
    own = torch.stack(draws, 1)
    for count in range(4):
        drafts = own[:, :3].clone()
        drafts[:, count:] = (drafts[:, count:] + 1) % 11
        tokens, accepted = tigon.verify_draft(**case | {"draft_tokens": drafts}, rule="strict")
        assert (accepted == count).all() and torch.equal(
            tokens[:, : count + 1], own[:, : count + 1]
        )


def test_a_chain_is_a_tree():
    b, K, V = 6, 3, 4
    case = inputs(b=b, K=K, V=V)
    line = torch.arange(1, K + 2, dtype=torch.int32)
    line[-1] = -1
    child, none = line.repeat(b, 1), torch.full((b, K + 1), -1, dtype=torch.int32)
    nodes = torch.nn.functional.pad(case["draft_tokens"], (1, 0))
    for rule in ("strict", "greedy"):
        path, tokens, accepted = tigon.verify_tree(
            case["target_logits"], nodes, child, none, rule=rule, **keys(b)
        )
        want = tigon.verify_draft(**case, rule=rule)
        assert torch.equal(tokens, want[0]) and torch.equal(accepted, want[1])
        steps = torch.arange(K)
        assert torch.equal(path, (steps + 1).where(steps < accepted[:, None], -1).int())


def walked(child, sibling, N):
    """(bits, depth) by the definition: from node 0 along the links."""
    bits, depth = [1 << i for i in range(N)], [0] * N

    def visit(node, level):
        depth[node] = level
        c = child[node]
        while c >= 0:
            bits[c] |= bits[node]
            visit(c, level + 1)
            c = sibling[c]

    visit(0, 0)
    return bits, depth


def test_ancestors_are_those_of_the_definition():
    from sampling_cases import tree

    case = tree(b=20, N=32)
    child, sibling = case["first_child"], case["next_sibling"]
    bits, depth = tigon.tree_ancestors(child, sibling)
    for i in range(20):
        want, levels = walked(child[i].tolist(), sibling[i].tolist(), 32)
        assert [v & 0xFFFFFFFF for v in bits[i].tolist()] == want and depth[i].tolist() == levels


@pytest.mark.parametrize(
    "child, sibling",
    [
        ([1, -1, -1], [-1, 1, -1]),
        ([0, 2, 1], [0, 1, 2]),
        ([7, -9, 1], [-1, 99, 0]),
        ([1, 0, 0], [-1, 2, 1]),
    ],
)
def test_links_that_make_no_tree_end(child, sibling):
    child, sibling = (torch.tensor([v], dtype=torch.int32) for v in (child, sibling))
    bits, depth = tigon.tree_ancestors(child, sibling)
    assert bits[0, 0] == 1 and depth[0, 0] == 0
    assert ((bits >> torch.arange(3)) & 1 == 1).all() and (depth < 3).all()
    nodes = torch.tensor([[0, 1, 1]], dtype=torch.int32)
    path, tokens, accepted = tigon.verify_tree(
        torch.randn(1, 3, 2), nodes, child, sibling, **keys(1)
    )
    assert 0 <= accepted[0] <= 2 and (tokens[0, : accepted[0] + 1] >= 0).all()


def test_loops_and_strays_have_their_own_bit_only():
    child = torch.tensor([[1, -1, 3, 2, -1]], dtype=torch.int32)
    bits, depth = tigon.tree_ancestors(child, torch.full((1, 5), -1, dtype=torch.int32))
    assert bits.tolist() == [[1, 3, 4, 8, 16]] and depth.tolist() == [[0, 1, 0, 0, 0]]


def calls():
    """Calls of the four ops with every optional argument, for compilers."""
    case, b = inputs(b=4), 4
    rows = dict(
        temperature=torch.tensor([0.0, 1.0, 0.6, 2.0]),
        top_k=torch.tensor([0, 3, 2, 99], dtype=torch.int32),
        top_p=torch.tensor([0.5, 1.0, 0.8, 0.0]),
    )
    codes = torch.tensor([r.value for r in VerifyRule], dtype=torch.int8)
    counts = torch.tensor([-1, 0, 2, 3], dtype=torch.int32)
    from sampling_cases import tree

    t = tree(b=b, N=4, V=11)
    links = [t[name] for name in ("tokens", "first_child", "next_sibling")]

    def everything(target, draft, d):
        keep = dict(seeds=case["seeds"], positions=case["positions"])
        out = [tigon.sample(target[:, 0], **keep, **rows), tigon.sample(target[:, 0], **keep)]
        out += tigon.verify_draft(target, d, draft, num_draft=counts, rule=codes, **keep, **rows)
        out += tigon.verify_draft(target, d, rule="block", **keep)
        out += tigon.verify_tree(target, *links, num_nodes=counts, **keep, **rows, max_depth=2)
        return [*out, *tigon.tree_ancestors(*links[1:])]

    return everything, (case["target_logits"], case["draft_logits"], case["draft_tokens"])


@pytest.mark.usefixtures("no_host_sync")
def test_nothing_waits_for_the_device():
    everything, arguments = calls()
    everything(*arguments)


def test_fullgraph_compile_gives_the_same():
    everything, arguments = calls()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*arguments), everything(*arguments), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("optional", [False, True])
def test_opcheck(optional):
    case, b = inputs(b=3), 3
    rows = (
        (torch.ones(b), torch.ones(b, dtype=torch.int32), torch.ones(b))
        if optional
        else (None,) * 3
    )
    tail = (case["seeds"], case["positions"], *rows)
    counts = torch.tensor([0, -1, 2], dtype=torch.int32) if optional else None
    codes = torch.tensor([0, 1, 2], dtype=torch.int8) if optional else None
    ops, target = torch.ops.tigon, case["target_logits"]
    links = (torch.tensor([[1, -1, 3, -1]] * b, dtype=torch.int32),) * 2
    check = torch.library.opcheck
    check(ops.sample.default, (target[:, 0], *tail, 0.5, 3, 0.9, 0))
    drafts = (case["draft_tokens"], case["draft_logits"] if optional else None)
    check(ops.verify_draft.default, (target, *drafts, counts, codes, *tail, 1, 0.5, 3, 0.9))
    nodes = torch.zeros(b, 4, dtype=torch.int32)
    check(ops.verify_tree.default, (target, nodes, *links, counts, *tail, 2, 0.5, 3, 0.9, 2))
    check(ops.tree_ancestors.default, links)


def test_strided_logits_are_taken_without_a_copy():
    wide = torch.randn(5, 4, 30)
    case = inputs() | {"target_logits": wide[..., 3:14]}
    assert tigon.explain("verify_draft", **case).copies == ()
    packed = case | {"target_logits": wide[..., 3:14].contiguous()}
    assert torch.equal(tigon.verify_draft(**case)[0], tigon.verify_draft(**packed)[0])


def changed(name, value):
    return lambda: tigon.verify_draft(**inputs() | {name: value})


def tree_call(**changes):
    b, N = 2, 3
    links = dict.fromkeys(
        ("tokens", "first_child", "next_sibling"), torch.zeros(b, N, dtype=torch.int32)
    )
    plain = dict(target_logits=torch.zeros(b, N, 4), **links, **keys(b))
    return lambda: tigon.verify_tree(**plain | changes)


i32 = torch.int32
REFUSED = {
    "too many drafts": (lambda: tigon.verify_draft(**inputs(K=17)), ValueError, r"K\+1=18 is not supported, 1 to 17"),
    "no vocabulary": (lambda: tigon.sample(torch.zeros(2, 0), **keys(2)), ValueError, "V=0 is not supported"),
    "rule": (changed("rule", "lossy"), ValueError, "rule must be one of token, block, strict, greedy, got 'lossy'"),
    "rule type": (changed("rule", 3), ValueError, "rule must be one of"),
    "rule codes": (changed("rule", torch.full((5,), 4, dtype=torch.int8)), ValueError, r"rule must lie in \[0, 3\]"),
    "rule dtype": (changed("rule", torch.zeros(5)), TypeError, "rule has dtype float32, allowed: int8"),
    "purpose": (lambda: tigon.sample(torch.zeros(2, 3), purpose="accept", **keys(2)), ValueError, "draft, bonus"),
    "temperature": (changed("temperature", -0.5), ValueError, r"temperature must lie in \[0, "),
    "temperature NaN": (changed("temperature", NAN), ValueError, "temperature must lie in"),
    "temperature row": (changed("temperature", torch.full((5,), -1.0)), ValueError, "temperature must lie in"),
    "temperature dtype": (changed("temperature", torch.ones(5, dtype=torch.float64)), TypeError, "temperature has"),
    "top_k": (changed("top_k", 1.5), TypeError, "top_k must be an int or a \\(b\\) tensor, got float"),
    "top_k range": (changed("top_k", -1), ValueError, "top_k must lie in"),
    "top_p": (changed("top_p", 1.5), ValueError, r"top_p must lie in \[0, 1\], got 1.5"),
    "seeds": (changed("seeds", torch.zeros(5)), TypeError, "seeds has dtype float32, allowed: int64"),
    "positions": (changed("positions", torch.zeros(4, dtype=torch.int64)), ValueError, "positions has shape"),
    "draft tokens": (changed("draft_tokens", torch.zeros(5, 3, dtype=torch.int64)), TypeError, "draft_tokens has"),
    "draft logits": (changed("draft_logits", torch.zeros(5, 3, 12)), ValueError, "draft_logits has shape"),
    "draft dtype": (changed("draft_logits", torch.zeros(5, 3, 11, dtype=torch.half)), TypeError, "draft_logits has"),
    "num_draft": (changed("num_draft", torch.full((5,), 4, dtype=i32)), ValueError, "num_draft must lie in"),
    "tree rule": (tree_call(rule="token"), ValueError, "rule must be one of strict, greedy, got 'token'"),
    "tree size": (tree_call(target_logits=torch.zeros(2, 33, 4)), ValueError, "N=33 is not supported, 1 to 32"),
    "depth": (tree_call(max_depth=3), ValueError, r"max_depth must be an int in \[0, 2\], got 3"),
    "nodes": (tree_call(num_nodes=torch.full((2,), 4, dtype=i32)), ValueError, "num_nodes must lie in"),
    "links": (lambda: tigon.tree_ancestors(torch.zeros(1, 2), torch.zeros(1, 2)), TypeError, "first_child has dtype"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_by_name(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()
