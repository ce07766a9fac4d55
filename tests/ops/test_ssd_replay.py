"""State rollback by replay at op level, on the reference backend: exact against the recurrence in fp64, bit for bit
across histories. Several names are failures that users of other packages met. The kernels' tests are in tests/csrc.
"""

import pytest
import torch
from replay_cases import OPTIONS, Decoder, conv_oracle, oracle, sequences, tree, tree_bits

import tigon
from tigon.native.mamba2 import replay_flush
from tigon.ops import ReplayCache, ReplayCursor, replay_advance, replay_commit
from tigon.reference.state_format import decode_state, encode_state

TIGHT = dict(rtol=1e-12, atol=1e-12)
E4M3 = torch.float8_e4m3fn
FORMATS = [
    (torch.float64, False),
    (torch.float32, False),
    *(
        (dtype, s)
        for dtype in (torch.bfloat16, torch.float16, torch.int8, E4M3)
        for s in (False, True)
    ),
]
DRAFTED = [(4, 2), (4, 4), (1, 1), (3, 1), (4, 3), (2, 1), (4, 1), (4, 4), (1, 1)]  # 18 tokens
PLAIN = [(1, 1)] * 18


def check_rows(decoder: Decoder, ys, vs, conv: bool = True) -> None:
    """Outputs of the committed tokens, states and windows against the oracle, in fp64."""
    current, window = decoder.current(), decoder.window()
    for row, (y, v, done) in enumerate(zip(ys, vs, decoder.done, strict=True)):
        expected, state, _ = oracle(decoder, row, done)
        torch.testing.assert_close(y, expected, **TIGHT)
        torch.testing.assert_close(current[row], state, **TIGHT)
        if not conv:
            continue
        torch.testing.assert_close(v, conv_oracle(decoder.seqs, row, done), **TIGHT)
        u = decoder.seqs.tokens["u"][row, :done]
        last = torch.cat([torch.zeros_like(u[:3]), u])[-3:]
        assert torch.equal(window[row].T, last)


@pytest.mark.parametrize("flush", [4, 5, 8])
@pytest.mark.parametrize("accepted", range(5))
def test_every_accepted_count_gives_the_sequential_state_and_window(accepted, flush):
    """From every distance to the next write of the state."""
    for before in range(flush):
        decoder = Decoder(sequences(), [2, 0], flush=flush)
        history = [(1, 1)] * before + [(4, accepted), (4, 2), (1, 1), (4, 4)]
        check_rows(decoder, *decoder.run(history))


@pytest.mark.parametrize(("dtype", "stochastic"), FORMATS, ids=str)
@pytest.mark.parametrize("start", [0, 7])
def test_states_of_every_format_are_rounded_at_multiples_of_flush_and_nowhere_else(
    dtype, stochastic, start
):
    decoder = Decoder(sequences(), [1, 2], flush=4, state=dtype, stochastic=stochastic, start=start)
    check_rows(decoder, *decoder.run(DRAFTED), conv=start == 0)
    decoder.step(1, 1)  # folds what is due
    for row in range(2):
        stored = oracle(decoder, row, decoder.done[row] - 1)[2]
        slot = decoder.indices[row]
        scale = None if decoder.scale is None else decoder.scale[slot]
        held = decode_state(decoder.state[slot], scale, torch.float64)
        torch.testing.assert_close(held, stored, **TIGHT)


@pytest.mark.parametrize(("dtype", "stochastic"), FORMATS[1:], ids=str)
@pytest.mark.parametrize("invariant", [False, True])
def test_state_bits_do_not_depend_on_grouping_drafts_slots_or_batch_mates(
    dtype, stochastic, invariant
):
    """And in batch-invariant mode neither do those of outputs."""
    seqs = sequences(b=3, dtype=torch.float32, p=5, n=9)
    found = []
    with tigon.batch_invariant(invariant):
        for rows, slots, history in (
            ([0, 1, 2], [0, 1, 2], PLAIN),
            ([0, 1, 2], [5, 1, 3], DRAFTED),
            ([2], [4], [(3, 3)] * 6),
        ):
            part = seqs.rows(rows)
            seeds = torch.tensor([9, 2**40 + 1, -5])[rows]
            kw = {"state": dtype, "stochastic": stochastic, "seeds": seeds}
            decoder = Decoder(part, slots, flush=4, **kw)
            ys, vs = decoder.run(history)
            decoder.step(1, 1)
            found.append((ys, vs, decoder))
    (ys, vs, plain), *others = found
    for other_ys, other_vs, decoder in others:
        rows = range(3) if len(other_ys) == 3 else [2]
        for i, row in enumerate(rows):
            assert torch.equal(vs[row], other_vs[i])
            if invariant:
                assert torch.equal(ys[row], other_ys[i])
            mine, theirs = plain.indices[row], decoder.indices[i]
            one, two = plain.state[mine], decoder.state[theirs]
            assert torch.equal(one.view(torch.uint8), two.view(torch.uint8))
            if plain.scale is not None:
                assert torch.equal(plain.scale[mine], decoder.scale[theirs])
            assert torch.equal(plain.current()[row], decoder.current()[i])


def test_undrafted_step_after_a_drafted_one_reads_the_last_accepted_state():
    decoder = Decoder(sequences(), [0, 1])
    check_rows(decoder, *decoder.run([(4, 2), (1, 1), (4, 1), (1, 1), (4, 3), (1, 1), (1, 1)]))


def test_rows_accept_different_counts_and_zero_drafts_cost_nothing_but_themselves():
    decoder = Decoder(sequences(b=3), [2, 0, 1])
    check_rows(
        decoder, *decoder.run([(4, [1, 4, 2]), (4, [3, 1, 0]), (1, [0, 1, 1]), (4, [4, 2, 1])])
    )


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_a_write_of_the_state_that_falls_on_a_step_boundary_is_neither_lost_nor_done_twice(m):
    decoder = Decoder(sequences(), [0, 1], flush=4)
    check_rows(decoder, *decoder.run([(m, m)] * (24 // m)))


def test_rejected_tokens_leave_the_convolution():
    decoder = Decoder(sequences(), [1, 0])
    for m, accepted in DRAFTED:
        decoder.step(m, accepted)
        u, done = decoder.seqs.tokens["u"], decoder.done[0]
        last = torch.cat([torch.zeros_like(u[:, :3]), u[:, :done]], 1)[:, -3:]
        assert torch.equal(decoder.window(), last.transpose(1, 2))


def test_padded_tail_of_a_row_does_not_advance_its_state():
    """num_tokens below m, 0 included: the tokens behind it are whatever the buffer held."""
    decoder = Decoder(sequences(), [0, 1])
    ys, vs = [[], []], [[], []]
    for counts in ([4, 1], [0, 3], [2, 0], [3, 4], [1, 1]):
        given = {}
        for name, t in decoder.seqs.tokens.items():
            given[name] = torch.full((2, 4, *t.shape[2:]), float("nan"), dtype=t.dtype)
            for row, count in enumerate(counts):
                done = decoder.done[row]
                given[name][row, :count] = t[row, done : done + count]
        y, v = decoder.call({k: t.nan_to_num(7.0) for k, t in given.items()}, counts, counts)
        for row, count in enumerate(counts):
            assert not y[row, count:].any() and not v[row, count:].any()
            ys[row].append(y[row, :count])
            vs[row].append(v[row, :count])
    check_rows(decoder, [torch.cat(t) for t in ys], [torch.cat(t) for t in vs])


def snapshot(decoder: Decoder) -> list[torch.Tensor]:
    held = [decoder.state, decoder.scale, *decoder.cache.tensors(), *decoder.cursor.tensors()]
    return [t.clone().view(torch.uint8) for t in held if t is not None]


def test_padding_rows_touch_nothing():
    decoder = Decoder(sequences(), [1, 2], pool=4, state=torch.int8)
    decoder.run(DRAFTED[:3])
    before = snapshot(decoder)
    live, decoder.indices = decoder.indices, torch.tensor([-1, -1])
    y, v = decoder.step(3, 2)
    assert not y.any() and not v.any()
    assert all(map(torch.equal, snapshot(decoder), before))
    decoder.indices, decoder.done = live, [7, 7]
    y, v = decoder.step(2, 2)
    torch.testing.assert_close(y[0], oracle(decoder, 0, 9)[0][-2:], **TIGHT)


def test_a_recycled_slot_keeps_nothing_of_its_former_request():
    seqs = sequences()
    first = Decoder(seqs, [1, 0])
    first.run(DRAFTED)
    again = Decoder(sequences(seed=1), [0, 1])
    for name in ("state", "cache", "cursor"):
        mine, theirs = getattr(first, name), getattr(again, name)
        if name == "state":
            mine.copy_(theirs)
        setattr(again, name, mine)
    again.cursor.start(again.indices, torch.tensor([0, 0]))
    check_rows(again, *again.run(DRAFTED))


def test_a_preempted_request_goes_on_in_another_slot_and_a_fork_shares_its_past():
    decoder = Decoder(sequences(), [0, 1], pool=6)
    ys, vs = decoder.run(DRAFTED[:4])
    pools = [decoder.state, *decoder.cache.tensors(), *decoder.cursor.tensors()]
    for pool in (
        pools
    ):  # row 0 moves from slot 0 to 5, row 1 is copied to slot 3 and its own slot goes on elsewhere
        pool[5], pool[3] = pool[0].clone(), pool[1].clone()
        pool[0] = 0
    decoder.step(4, 3)
    decoder.indices, decoder.done = torch.tensor([5, 3]), [8, 8]
    more_ys, more_vs = decoder.run(DRAFTED[4:])
    check_rows(
        decoder,
        *(
            [torch.cat(pair) for pair in zip(a, b, strict=True)]
            for a, b in ((ys, more_ys), (vs, more_vs))
        ),
    )


def test_order_of_rows_in_a_call_is_free():
    one, two = (Decoder(sequences(b=3), [0, 1, 2]) for _ in range(2))
    for m, accepted in DRAFTED:
        torch.manual_seed(m)
        y, v = one.step(m, accepted)
        torch.manual_seed(m)
        y_other, v_other = two.step(m, accepted, order=[2, 0, 1])
        torch.testing.assert_close(y, y_other, **TIGHT)
        torch.testing.assert_close(v, v_other, **TIGHT)
    torch.testing.assert_close(one.state, two.state, **TIGHT)


def test_a_draft_of_nan_harms_nobody_else():
    decoder = Decoder(sequences(), [0, 1])
    ys, vs = decoder.run([(4, 2)])
    given = {
        k: torch.full((2, 4, *t.shape[2:]), float("nan"), dtype=t.dtype)
        for k, t in decoder.seqs.tokens.items()
    }
    for name, t in decoder.seqs.tokens.items():
        given[name][:, 0] = t[:, 2]
    with tigon.batch_invariant():
        y, v = decoder.call(given, [1, 1])
    more_ys, more_vs = decoder.run(DRAFTED)
    check_rows(
        decoder,
        [torch.cat([a, b[:1], c]) for a, b, c in zip(ys, y, more_ys, strict=True)],
        [torch.cat([a, b[:1], c]) for a, b, c in zip(vs, v, more_vs, strict=True)],
    )


def test_long_steps_and_long_windows():
    decoder = Decoder(sequences(l=100), [0, 1], flush=32, m=32)
    check_rows(decoder, *decoder.run([(32, 5), (32, 32), (1, 1), (20, 19), (32, 31)]))


def test_plain_decode_that_lags_by_one_token():
    decoder = Decoder(sequences(), [0, 1], flush=1, m=1)
    check_rows(decoder, *decoder.run(PLAIN))


def test_a_scan_goes_on_from_the_rings_and_hands_back():
    """Prefill in pieces around decoding: the state and window that a scan needs, and those that it leaves."""
    decoder = Decoder(sequences(), [1, 0], flush=4)
    ys, vs = decoder.run(DRAFTED[:5])  # 11 tokens
    seqs, done = decoder.seqs, decoder.done[0]
    t = {k: v[:, done : done + 9] for k, v in seqs.tokens.items()}
    v, window = tigon.causal_conv1d(
        t["u"], seqs.weight, seqs.bias, initial_state=decoder.window(), return_final_state=True
    )
    y, state = tigon.ssd_scan(
        *(t["x"], t["dt"], seqs.A, t["B"], t["C"]),
        D=seqs.D,
        z=t["z"],
        dt_bias=seqs.dt_bias,
        initial_states=decoder.current(),
        return_final_states=True,
        **OPTIONS,
    )
    decoder.state[decoder.indices] = state
    lengths = torch.tensor([done + 9] * 2)
    decoder.cursor.start(decoder.indices, lengths)
    tigon.ops.replay_store_window(decoder.cache, lengths, decoder.indices, window)
    decoder.done = [done + 9] * 2
    more_ys, more_vs = decoder.run(DRAFTED[5:])
    check_rows(
        decoder,
        [torch.cat(parts) for parts in zip(ys, y, more_ys, strict=True)],
        [torch.cat(parts) for parts in zip(vs, v, more_vs, strict=True)],
    )


@pytest.mark.parametrize("before", [0, 3, 5, 11])
@pytest.mark.parametrize(
    "parents", [[-1, 0, 0, 1, 2, 2, 4, 0], [-1, 0, 1, 2, 3, 4, 5, 6], [-1] + [0] * 7]
)
def test_every_node_of_a_tree_is_its_path_alone(parents, before):
    """y and the convolution of each node against the recurrence over its path; then the tree's longest path is
    taken."""
    m, flush = len(parents), 8
    decoder = Decoder(sequences(), [1, 0], flush=flush, m=m)
    ys, vs = decoder.run([(1, 1)] * before)
    path = tree(parents, max(range(m), key=lambda node: len(tree(parents, node))))
    given = {
        k: torch.randn(2, m, *t.shape[2:], dtype=t.dtype) for k, t in decoder.seqs.tokens.items()
    }
    for name, t in decoder.seqs.tokens.items():  # the sequence's own tokens are on the longest path
        for depth, node in enumerate(path):
            given[name][:, node] = t[:, before + depth]
    y, v = decoder.call(given, None, ancestors=tree_bits(parents, 2))
    for node in range(m):
        nodes = tree(parents, node)
        alone = Decoder(decoder.seqs.rows([0, 1]), [0, 1], flush=flush, m=m)
        for name, t in alone.seqs.tokens.items():
            t = t.clone()
            t[:, before : before + len(nodes)] = given[name][:, nodes]
            alone.seqs.tokens[name] = t
        # As the tree does: no write of the state among its nodes.
        alone.flush = 10**6 if before % flush else flush
        for row in range(2):
            expected = oracle(alone, row, before + len(nodes))[0][-1]
            torch.testing.assert_close(y[row, node], expected, **TIGHT)
            conv = conv_oracle(alone.seqs, row, before + len(nodes))[-1]
            torch.testing.assert_close(v[row, node], conv, **TIGHT)
    count = torch.tensor([len(path), 1])
    rest = torch.full((2, m), -1, dtype=torch.int32)
    rest[0, : len(path) - 1] = torch.tensor(path[1:])
    replay_commit(decoder.cache, decoder.cursor, decoder.indices, rest, count)
    decoder.advance(count.tolist())
    taken = [path, [0]]
    ys = [torch.cat([a, b[nodes]]) for a, b, nodes in zip(ys, y, taken, strict=True)]
    vs = [torch.cat([a, b[nodes]]) for a, b, nodes in zip(vs, v, taken, strict=True)]
    more_ys, more_vs = decoder.run([(4, 3), (1, 1), (8, 8)])
    check_rows(
        decoder,
        [torch.cat(pair) for pair in zip(ys, more_ys, strict=True)],
        [torch.cat(pair) for pair in zip(vs, more_vs, strict=True)],
    )


@pytest.mark.usefixtures("no_host_sync")
def test_nothing_waits_for_the_device():
    decoder = Decoder(sequences(dtype=torch.float32), [0, 2], state=torch.int8, stochastic=True)
    for m, accepted in DRAFTED:
        decoder.step(m, accepted, num_tokens=[m, 1])
    bits = tree_bits([-1, 0, 0, 1], 2)
    given = {k: t[:, :4] for k, t in decoder.seqs.tokens.items()}
    decoder.call(given, None, ancestors=bits)
    path = torch.tensor([[1, 3], [-1, -1]], dtype=torch.int32)
    replay_commit(decoder.cache, decoder.cursor, decoder.indices, path, torch.tensor([3, 1]))
    decoder.current(), decoder.window()
    lengths = torch.tensor([5, 6])
    tigon.ops.replay_store_window(decoder.cache, lengths, decoder.indices, decoder.window())


def opcheck_arguments(ancestors):
    decoder = Decoder(sequences(dtype=torch.float32), [0, 2], state=torch.int8, stochastic=True)
    for ring in decoder.cache.tensors():
        ring.zero_()
    s, t = decoder.seqs, {k: v[:, :3] for k, v in decoder.seqs.tokens.items()}
    bits = tree_bits([-1, 0, 0], 2) if ancestors else None
    index, count = torch.tensor([0, -1], dtype=torch.int32), torch.tensor([2, 3], dtype=torch.int32)
    rings = decoder.cache.tensors()
    ssd = (decoder.state, decoder.scale, *rings[:3], *decoder.cursor.tensors())
    ssd += (t["x"], t["dt"], s.A, t["B"].contiguous(), t["C"].contiguous(), s.D, t["z"], s.dt_bias)
    ssd += (index, count, bits, decoder.seeds, 4, 3, True, 0.0, float("inf"))
    conv = (t["u"], rings[3], decoder.cursor.length, s.weight, s.bias, index, count, bits, True)
    return ssd, conv


@pytest.mark.parametrize("ancestors", [False, True])
def test_opcheck(ancestors):
    ssd, conv = opcheck_arguments(ancestors)
    torch.library.opcheck(torch.ops.tigon.ssd_replay.default, ssd)
    torch.library.opcheck(torch.ops.tigon.conv1d_replay.default, conv)


def test_num_new_below_zero_counts_as_zero_and_padding_stays():
    cursor = ReplayCursor.allocate(4, 4)
    cursor.start(None, torch.tensor([3, 5, 7, 9]))
    replay_advance(cursor, torch.tensor([2, -1, 0]), torch.tensor([-3, 9, 2]))
    assert cursor.length.tolist() == [5, 5, 7, 9] and cursor.checkpoint.tolist() == [3, 5, 7, 9]
    replay_advance(cursor, torch.tensor([0, -1]), torch.tensor([3, 1]))
    assert cursor.length.tolist() == [8, 5, 7, 9] and cursor.checkpoint.tolist() == [4, 5, 7, 9]


def small(**changes):
    sizes = dict(tokens=2, flush=4, heads=4, head_dim=3, groups=2, state_dim=8, channels=6, width=4)
    return ReplayCache.allocate(3, **(sizes | {"dtype": torch.float32} | changes))


REFUSED = {
    "short ring": (dict(tokens=1), {}, ValueError, r"cache holds L=5 tokens a slot, flush \+ 2m - 1 = 7 are needed"),
    "ring shape": (dict(heads=2, groups=1), {}, ValueError, "cache.x has shape"),
    "ring dtype": (dict(dtype=torch.bfloat16), {}, TypeError, "cache.x has dtype bfloat16, allowed: float32"),
    "positions": ({}, {"positions": torch.zeros(2).int()}, ValueError, "positions follow from the cursor"),
    "seeds": ({}, {"rounding": "stochastic"}, ValueError, "needs seeds"),
    "ancestors shape": ({}, {"ancestors": torch.ones(2, 3).int()}, ValueError, "ancestors has shape"),
    "ancestors dtype": ({}, {"ancestors": torch.ones(2, 2)}, TypeError, "ancestors has dtype float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_by_name(name):
    change, more, error, message = REFUSED[name]
    s = sequences(dtype=torch.float32)
    t = {k: v[:, :2] for k, v in s.tokens.items()}
    replay = (small(**change), ReplayCursor.allocate(3, 4))
    state = torch.zeros(3, 4, 3, 8)
    with pytest.raises(error, match=f"ssd_update: .*{message}"):
        tigon.ssd_update(state, t["x"], t["dt"], s.A, t["B"], t["C"], replay=replay, **more)


def test_bad_sizes_of_rings_and_cursors_are_refused_by_name():
    with pytest.raises(ValueError, match="flush=33 is not supported, 1 to 32 are"):
        ReplayCursor.allocate(3, 33)
    with pytest.raises(ValueError, match="5 tokens a call, allowed with flush=4: 1 to 4"):
        small(tokens=5)
    s, replay = sequences(dtype=torch.float32), (small(), ReplayCursor.allocate(3, 4))
    u = s.tokens["u"]
    with pytest.raises(ValueError, match=r"causal_conv1d_update: x has m=5 .* flush=4: 1 to 4"):
        tigon.causal_conv1d_update(u[:, :5], None, s.weight, replay=replay)
    with pytest.raises(
        ValueError, match=r"cache.conv holds Lc=5 inputs a slot, width - 1 \+ m = 7"
    ):
        tigon.causal_conv1d_update(u[:, :4], None, s.weight, replay=replay)
    with pytest.raises(ValueError, match=r"conv_state must be None or cache\.conv"):
        tigon.causal_conv1d_update(u[:, :2], torch.zeros(3, 6, 3), s.weight, replay=replay)
    with pytest.raises(ValueError, match="replay_advance: num_new has shape"):
        replay_advance(replay[1], torch.tensor([0, 1]), torch.tensor([1]))
    with pytest.raises(ValueError, match="replay_commit: state_indices names a slot twice"):
        replay_commit(*replay, torch.tensor([1, 1]), torch.ones(2, 1).int(), torch.tensor([1, 1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, E4M3])
def test_stochastic_rounding_of_a_state_is_unbiased(dtype):
    """A mean over many write positions within six standard errors, which nearest rounding misses by far."""
    S = torch.randn(1, 2, 3, 40) * 0.37 + 0.21
    count = 400
    at = {"seeds": torch.full((count,), 11), "positions": torch.arange(count), "layer": 5}
    drawn = decode_state(*encode_state(S.expand(count, -1, -1, -1), dtype, **at), torch.float64)
    error = (drawn.mean(0) - S[0].double()).abs()
    share = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.int8: 1 / 127, E4M3: 2**-3}[dtype]
    step = share * (S[0].abs().amax(-1, keepdim=True) if dtype == torch.int8 else S[0].abs())
    floor = S[0].abs().amax(-1, keepdim=True) * 2**-9 / 448 if dtype == E4M3 else 1e-8
    assert (error <= 6 * 0.5 * (step + floor) / count**0.5).all()
    near = decode_state(*encode_state(S, dtype), torch.float64)[0] - S[0].double()
    assert near.abs().max() > 3 * error.max()


def test_random_bits_are_named_by_seed_layer_position_and_element_alone():
    S = torch.randn(3, 2, 3, 8)
    S[1:] = S[0]

    def codes(seeds, positions, layer):
        given = {"seeds": torch.tensor(seeds), "positions": torch.tensor(positions), "layer": layer}
        return encode_state(S, torch.bfloat16, **given)[0]

    base = codes([5, 6, 5], [9, 9, 2**33 + 9], 1)
    assert not torch.equal(base[0], base[1]) and not torch.equal(base[0], base[2])
    assert not torch.equal(base[0], codes([5, 5, 5], [9, 10, 11], 2)[0])
    again = codes([1, 5, 6], [1, 9, 9], 1)
    assert torch.equal(again[1:], base[:2])


@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
@pytest.mark.parametrize("stochastic", [False, True])
def test_8_bit_states_hold_zeros_exactly_and_spread_nan_over_a_row_only(dtype, stochastic):
    S = torch.randn(1, 2, 3, 8)
    S[0, 0, 1], S[0, 1, 2, 3], S[0, 1, 0, 0] = 0, float("nan"), float("inf")
    at = {"seeds": torch.tensor([1]), "positions": torch.tensor([2])} if stochastic else {}
    codes, scale = encode_state(S, dtype, **at)
    back = decode_state(codes, scale, torch.float32)
    assert scale[0, 0, 1] == 0 and not back[0, 0, 1].any()
    assert back[0, 1, 2].isnan().all() and not back[0, 1, 0].isfinite().any()
    rest = torch.ones(2, 3, dtype=torch.bool)
    rest[1, 2] = rest[1, 0] = False
    unit = {torch.int8: 1 / 127, E4M3: 1 / 16}[dtype]
    assert (back - S)[0][rest].abs().max() <= unit * S[0][rest].abs().max()


def test_a_step_compiles_as_one_graph():
    """Both ops, the tree's commit and the cursor's move, on fake tensors first: nothing reads a value."""
    seqs = sequences(dtype=torch.float32)
    eager, traced = (Decoder(seqs, [0, 2], state=torch.int8) for _ in range(2))
    for decoder in (eager, traced):
        for ring in decoder.cache.tensors():
            ring.zero_()
    t = {k: v[:, :3].contiguous() for k, v in seqs.tokens.items()}
    bits, path = tree_bits([-1, 0, 0], 2), torch.tensor([[2], [-1]], dtype=torch.int32)
    count = torch.tensor([2, 1])

    def step(state, scale, cache, cursor, index):
        where = {"state_indices": index, "replay": (cache, cursor), "ancestors": bits}
        v = tigon.causal_conv1d_update(t["u"], None, seqs.weight, **where)
        y = tigon.ssd_update(
            state, t["x"], t["dt"], seqs.A, t["B"], t["C"], state_scale=scale, **where
        )
        replay_commit(cache, cursor, index, path, count)
        replay_advance(cursor, index, count)
        return y, v

    outs = []
    for decoder, run in (
        (eager, step),
        (traced, torch.compile(step, fullgraph=True, backend="aot_eager")),
    ):
        given = (decoder.state, decoder.scale, decoder.cache, decoder.cursor, decoder.indices)
        outs.append(run(*given))
    assert all(map(torch.equal, *outs))
    assert all(map(torch.equal, snapshot(eager), snapshot(traced)))
    assert eager.cursor.length.tolist() == [2, 0, 1]


def test_rings_that_are_strided_inside_a_slot_are_refused():
    s, cursor = sequences(dtype=torch.float32), ReplayCursor.allocate(3, 4)
    t = {k: v[:, :2] for k, v in s.tokens.items()}
    cache = small()
    cache.B = cache.B.transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ValueError, match=r"cache\.B must be contiguous inside a slot"):
        tigon.ssd_update(
            *(torch.zeros(3, 4, 3, 8), t["x"], t["dt"], s.A, t["B"], t["C"]),
            replay=(cache, cursor),
        )


def test_proposed_flush_holds_a_whole_step_and_is_none_where_little_is_saved():
    super_layer = {"heads": 128, "p": 64, "n": 128, "state_itemsize": 4}
    assert replay_flush(1, 1, **super_layer) == 1
    assert replay_flush(64, 1, **super_layer) == 16
    for tokens in range(2, 33):
        assert tokens <= replay_flush(1, tokens, **super_layer) <= 32
