"""ssd_update on the reference backend, and prefill in pieces that ends in decode.

The CUDA kernel's own tests are in tests/csrc.
"""

import pytest
import torch
from memory import guarded, sliced
from options import case_id, pairwise

import tigon
from tigon.reference.ssd import ssd_recurrence

INF = float("inf")


def make(b=3, m=2, h=4, p=5, g=2, n=6, D=None, z=False, bias=True, dtype=torch.float64, slots=None):
    beside = dtype if dtype == torch.float64 else torch.float32

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    return {
        "state": draw(slots or b, h, p, n, dtype=beside),
        "x": draw(b, m, h, p),
        "dt": draw(b, m, h),
        "A": -torch.rand(h, dtype=torch.float64).to(beside),
        "B": draw(b, m, g, n),
        "C": draw(b, m, g, n),
        "D": None if D is None else draw(*((h,) if D == "h" else (h, p)), dtype=beside),
        "z": draw(b, m, h, p) if z else None,
        "dt_bias": draw(h, dtype=beside) if bias else None,
    }


def update(inputs, **kw):
    positional = [inputs[k] for k in ("state", "x", "dt", "A", "B", "C")]
    named = {k: inputs[k] for k in ("D", "z", "dt_bias")}
    return tigon.ssd_update(*positional, **named, **kw)


def oracle_row(inputs, row, slot, tokens, softplus, limit):
    """(y, state) of one row by the recurrence in fp64."""
    take = slice(row, row + 1)
    seq = {k: inputs[k][take, :tokens].double() for k in ("x", "dt", "B", "C")}
    z = None if inputs["z"] is None else inputs["z"][take, :tokens].double()
    wide = {k: None if inputs[k] is None else inputs[k].double() for k in ("A", "D", "dt_bias")}
    before = inputs["state"][slot : slot + 1].double()
    return ssd_recurrence(
        *(
            seq["x"],
            seq["dt"],
            wide["A"],
            seq["B"],
            seq["C"],
            wide["D"],
            z,
            wide["dt_bias"],
            before,
        ),
        *(None, None, softplus, *limit),
    )[:2]


CASES = pairwise(
    D=[None, "h", "hp"],
    z=[False, True],
    bias=[True, False],
    softplus=[True, False],
    limit=[(0.0, INF), (0.2, 0.9)],
    m=[1, 3, 16],
    slots=["by row", "indexed"],
    tokens=["all", "ragged"],
    g=[1, 4],
)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_rows_equal_the_recurrence_and_padding_is_untouched(case):
    m = case["m"]
    indexed = case["slots"] == "indexed"
    inputs = make(
        b=4, m=m, slots=7 if indexed else None, **{k: case[k] for k in ("D", "z", "bias", "g")}
    )
    slots = [5, -1, 0, 3] if indexed else [0, 1, 2, 3]
    tokens = [m, m, 0, (m + 1) // 2] if case["tokens"] == "ragged" else [m] * 4
    before = inputs["state"].clone()
    expected = [
        oracle_row(inputs, r, s, t, case["softplus"], case["limit"]) if s >= 0 and t else None
        for r, (s, t) in enumerate(zip(slots, tokens, strict=True))
    ]
    y = update(
        inputs,
        dt_softplus=case["softplus"],
        dt_limit=case["limit"],
        state_indices=torch.tensor(slots, dtype=torch.int32) if indexed else None,
        num_tokens=torch.tensor(tokens, dtype=torch.int32) if case["tokens"] == "ragged" else None,
    )
    for r, (slot, count) in enumerate(zip(slots, tokens, strict=True)):
        if expected[r] is None:
            assert not y[r].any()
            continue
        torch.testing.assert_close(y[r : r + 1, :count], expected[r][0])
        torch.testing.assert_close(inputs["state"][slot : slot + 1], expected[r][1])
        assert not y[r, count:].any()
    live = {s for s, t in zip(slots, tokens, strict=True) if s >= 0 and t}
    for slot in set(range(len(before))) - live:
        assert torch.equal(inputs["state"][slot], before[slot])


def test_one_token_form_has_no_token_dimension():
    inputs = make(m=1, z=True)
    squeezed = {k: t[:, 0] if k in ("x", "dt", "B", "C", "z") else t for k, t in inputs.items()}
    squeezed["state"] = inputs["state"].clone()
    y = update(squeezed)
    assert y.shape == (3, 4, 5)
    torch.testing.assert_close(y, update(inputs)[:, 0], rtol=0, atol=0)


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_state_is_rounded_once_a_call(state_dtype):
    inputs = make(dtype=torch.float32, m=4)
    inputs["state"] = inputs["state"].to(state_dtype)
    wide = inputs | {"state": inputs["state"].float()}
    y, y_wide = update(inputs), update(wide)
    torch.testing.assert_close(y, y_wide)
    assert torch.equal(inputs["state"], wide["state"].to(state_dtype))


def test_all_rows_padding_changes_nothing():
    inputs = make()
    before = inputs["state"].clone()
    y = update(inputs, state_indices=torch.tensor([-1, -1, -1]))
    assert not y.any() and torch.equal(inputs["state"], before)


def test_a_row_does_not_depend_on_its_batch_mates():
    inputs = make(b=5, m=2, dtype=torch.float32, slots=9)
    index = torch.tensor([4, 0, 8, 2, 6])
    alone = inputs["state"].clone()
    y = update(inputs, state_indices=index)
    row = {k: t[2:3] if k in ("x", "dt", "B", "C") else t for k, t in inputs.items()}
    y_alone = update(row | {"state": alone}, state_indices=index[2:3])
    torch.testing.assert_close(y[2:3], y_alone, rtol=0, atol=0)
    assert torch.equal(alone[8], inputs["state"][8])


def test_slices_of_one_projection_are_taken_without_a_copy():
    inputs = make(dtype=torch.float32, z=True)
    strided = inputs | {k: sliced(inputs[k], 2) for k in ("x", "B", "C", "z")}
    strided["state"] = guarded(inputs["state"])
    args = [strided[k] for k in ("state", "x", "dt", "A", "B", "C")]
    assert tigon.explain("ssd_update", *args, z=strided["z"]).copies == ()
    torch.testing.assert_close(update(strided), update(inputs))


@pytest.mark.usefixtures("no_host_sync")
def test_nothing_waits_for_the_device():
    update(make(), state_indices=torch.tensor([2, -1, 0]), num_tokens=torch.tensor([1, 2, 0]))
    update(make(m=1))


def test_opcheck():
    i = make(dtype=torch.float32, D="h", z=True)
    index, count = (
        torch.tensor([0, -1, 2], dtype=torch.int32),
        torch.tensor([1, 2, 2], dtype=torch.int32),
    )
    args = [i[k] for k in ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    torch.library.opcheck(torch.ops.tigon.ssd_update.default, (*args, index, count, True, 0.0, INF))


def test_autocast_changes_nothing():
    """Nothing is cast in decode: no product in bf16, and no B of another dtype, which a kernel would misread."""
    inputs, again = make(dtype=torch.float32), make(dtype=torch.float32)
    again |= {k: t if t is None else t.clone() for k, t in inputs.items()}
    plain = update(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(update(again), plain)
        with pytest.raises(TypeError, match="B has dtype bfloat16"):
            update(again | {"B": again["B"].bfloat16()})


@pytest.mark.parametrize("pieces", [(40, 57, 3), (1, 99), (64, 36)])
def test_prefill_in_pieces_then_token_by_token_equals_one_scan(pieces):
    """The state handed from scan to scan and on to decode is the state of one long scan."""
    length, extra = sum(pieces), 6
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    x, dt, B, C = (
        draw(2, length + extra, 4, 5),
        draw(2, length + extra, 4),
        *draw(2, 2, length + extra, 2, 6),
    )
    z, A, D, bias = torch.randn_like(x), -draw(4).exp(), draw(4), draw(4)
    kw = {"D": D, "dt_bias": bias, "dt_softplus": True, "dt_limit": (0.01, 1.5)}
    whole, final = tigon.ssd_scan(x, dt, A, B, C, z=z, **kw, return_final_states=True)
    state, start, parts = torch.zeros(2, 4, 5, 6, dtype=torch.float64), 0, []
    for piece in pieces:
        t = slice(start, start + piece)
        y, state = tigon.ssd_scan(
            *(x[:, t], dt[:, t], A, B[:, t], C[:, t]),
            z=z[:, t],
            initial_states=state,
            return_final_states=True,
            **kw,
        )
        parts.append(y)
        start += piece
    parts.append(
        tigon.ssd_update(
            state, x[:, start], dt[:, start], A, B[:, start], C[:, start], z=z[:, start], **kw
        )[:, None]
    )
    t = slice(start + 1, None)
    parts.append(tigon.ssd_update(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], z=z[:, t], **kw))
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, final)


def test_an_unknown_rounding_is_refused():
    with pytest.raises(ValueError, match="rounding must be 'nearest' or 'stochastic'"):
        update(make(), rounding="up")


def test_an_input_that_wants_a_gradient_is_refused():
    inputs = make()
    inputs["B"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"ssd_update: B requires a gradient .* use ssd_scan"):
        update(inputs)
    with torch.no_grad():
        update(inputs)


REFUSED = {
    "state shape": ({"state": torch.zeros(3, 4, 5, 7)}, ValueError, "state has shape"),
    "state strides": ({"state": torch.zeros(3, 4, 6, 5).transpose(2, 3)}, ValueError, "must be contiguous"),
    "too few slots": ({"state": torch.zeros(2, 4, 5, 6)}, ValueError, "2 slots for b=3 rows; pass state_indices"),
    "too many tokens": (
        {"x": torch.zeros(3, 17, 4, 5), "dt": torch.zeros(3, 17, 4)}
        | {k: torch.zeros(3, 17, 2, 6) for k in "BC"}, ValueError, "m=17 tokens a row, allowed: 1 to 16"),
    "dt shape": ({"dt": torch.zeros(3, 2, 5)}, ValueError, "dt has shape"),
    "x dimensions": ({"x": torch.zeros(3, 20)}, ValueError, r"expected \(b, h, p\) or \(b, m, h, p\)"),
    "index dtype": ({"state_indices": torch.tensor([0.0, 1.0, 2.0])}, TypeError, "state_indices has dtype float32"),
    "index range": ({"state_indices": torch.tensor([0, 1, 3])}, ValueError, "state_indices must lie in"),
    "index twice": ({"state_indices": torch.tensor([1, 0, 1])}, ValueError, "names a slot twice"),
    "index shape": ({"state_indices": torch.tensor([0, 1])}, ValueError, "state_indices has shape"),
    "token counts": ({"num_tokens": torch.tensor([0, 3, 1])}, ValueError, r"num_tokens must lie in \[0, 2\]"),
    "dt_limit": ({"dt_limit": (2.0, 1.0)}, ValueError, "dt_limit must be"),
    "scale of a wide state": ({"state_scale": torch.ones(3, 4, 5)}, ValueError, "state_scale belongs to int8"),
    "8-bit state alone": (
        {"state": torch.zeros(3, 4, 5, 6, dtype=torch.int8)}, TypeError, "state_scale must be a Tensor"),
    "scale shape": (
        {"state": torch.zeros(3, 4, 5, 6, dtype=torch.int8), "state_scale": torch.ones(3, 4)}, ValueError,
        "state_scale has shape"),
    "no seeds": ({"rounding": "stochastic", "positions": torch.zeros(3).int()}, ValueError, "needs seeds"),
    "no positions": ({"rounding": "stochastic", "seeds": torch.zeros(3).long()}, ValueError, "needs positions"),
    "seeds dtype": ({"seeds": torch.zeros(3).int()}, TypeError, "seeds has dtype int32"),
    "layer": ({"layer": -1}, ValueError, "layer must be an int from 0"),
    "tree without replay": ({"ancestors": torch.ones(3, 2).int()}, ValueError, "they need replay"),
    "replay is no pair": ({"replay": 3}, TypeError, "replay must be a pair"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_by_name(name):
    change, error, message = REFUSED[name]
    inputs = make(dtype=torch.float32) | change
    with pytest.raises(error, match=f"ssd_update: .*{message}"):
        update(inputs, **{k: v for k, v in change.items() if k not in make()})
