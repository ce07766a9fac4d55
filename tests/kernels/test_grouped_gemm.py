"""Grouped products and expert MLPs against the fp64 reference: outputs, every gradient, quantized weights, determinism.

Operands lie in guarded memory, outputs start as NaN. Tiles are small but for the test of the shipped table, so that
there are several of each; programs that take whole experts split the second product.
"""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from interpreted_dots import rowwise_products
from memory import guarded, sliced
from numerics import assert_close_to_oracle
from options import case_id, pairwise

import tigon
from tigon.kernels import grouped_gemm
from tigon.kernels.grouped_gemm_tiles import find_rows, list_tiles, tile_bound
from tigon.kernels.launch import assume, plan
from tigon.kernels.launch_moe import GroupedConfig
from tigon.reference import experts as reference

ARCHS = [80, 90, 100, 120]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a launcher allocates without filling starts as NaN, or as an index far away."""

    def filled(original):
        def allocate(*args, **kwargs):
            t = original(*args, **kwargs)
            return t.fill_(float("nan") if t.is_floating_point() else 2**20)

        return allocate

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))


def shrunk(config, many, k=0):
    """The same launch in small tiles, of more rows if there are many."""
    if not isinstance(config, GroupedConfig):
        return replace(config, block=64 if many else 16)
    block_k = 64 if config.quads else 32
    config = replace(config, rows=32 if many else 16, columns=32, block_k=block_k, split_k=0)
    if config.few and k > block_k:
        config = replace(config, splits=-(-k // block_k), split_k=block_k)
    return config


@pytest.fixture
def small_tiles(monkeypatch):
    def small(op, *args, **sizes):
        configs = plan(op, *args, **sizes)
        longest = {"multiply_rows": sizes["m"]} if op == "moe_experts" else {}
        many = sizes.get("t", 0) > 20
        return {name: shrunk(c, many, longest.get(name, 0)) for name, c in configs.items()}

    monkeypatch.setattr(grouped_gemm, "plan", small)


def route(t, e, k, device, kind="random", skipped=False):
    """A Routing of the reference. skipped: every third token, and one choice, is none."""
    logits = torch.randn(t, e)
    if kind == "one expert":
        logits[:, min(1, e - 1)] += 100
    if kind == "empty experts":
        logits[:, ::2] -= 100
    weights, indices = torch.sigmoid(logits).topk(k, 1)
    if skipped:
        indices[1::3] = e
        indices[:1, -1:] = -1
    return sorted_by_expert(indices, weights, e, device)


def sorted_by_expert(indices, weights, e, device):
    with tigon.backend("reference"):
        routing = tigon.moe_sort(indices.cpu(), weights.cpu(), experts=e)
    return {
        name: guarded(getattr(routing, name).to(device))
        for name in ("weights", "indices", "offsets", "order", "inverse")
    }


def leaves(t, l, m, e, gates, dtype, device):
    """(x, up, down), in guarded memory, x with rows apart."""
    x, up, down = (
        torch.randn(shape, device=device) * scale
        for shape, scale in (
            ((t, l), 1.0),
            ((e, gates * m, l), l**-0.5),
            ((e, l, m), m**-0.5),
        )
    )
    return sliced(x.to(dtype), 1), guarded(up.to(dtype)), guarded(down.to(dtype))


def plain(up, down):
    return up, None, None, "plain", down, None, None, "plain"


def double(values):
    """fp64 copies of what is floating point, but for codes and their scales."""
    floats = (torch.float32, torch.bfloat16, torch.float16)
    return [v.double() if torch.is_tensor(v) and v.dtype in floats else v for v in values]


CASES = pairwise(
    sizes=[(20, 24, 40, 6, 3), (70, 40, 24, 6, 3), (3, 23, 37, 6, 1), (1, 24, 40, 16, 3), (20, 16, 48, 1, 1)],
    dtype=[torch.bfloat16, torch.float16, torch.float32],
    mlp=[("relu2", "hidden"), ("relu2", "relu"), ("relu2", "nothing"), ("swiglu", "hidden"), ("swiglu", "nothing")],
    before_down=[False, True],
    part=[None, (1, 5), (3, 3)],
    kind=["random", "one expert", "empty experts"],
    skipped=[False, True],
    invariant=[False, True],
    buffers=[None, "overwritten", "added to"],
    arch=[90, 80],
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_outputs_and_every_gradient_match_the_oracle(case, device, small_tiles):
    with assume(case["arch"]):
        check_outputs_and_gradients(case, device)


def check_outputs_and_gradients(case, device):
    t, l, m, e, k = case["sizes"]
    (activation, save), dtype = case["mlp"], case["dtype"]
    first, last = case["part"] if case["part"] and e > 4 else (0, e)
    gates = 2 if activation == "swiglu" else 1
    places = list(route(t, e, k, device, case["kind"], case["skipped"]).values())
    x, up, down = leaves(t, l, m, last - first, gates, dtype, device)
    mlp = (activation, case["before_down"], save, first, last)
    args = (x, *plain(up, down), *places, *mlp)
    y, kept = grouped_gemm.moe_experts(*args, case["invariant"])
    oracle, wide = reference.moe_experts(*double(args))
    baseline, rounded = reference.moe_experts(*args)
    assert_close_to_oracle("y", y, oracle, baseline)
    rows = (places[2][last] - places[2][first]).item()
    if save != "nothing":
        assert_close_to_oracle("kept", kept[:rows], wide[:rows], rounded[:rows])

    dy = sliced(torch.randn(t, l, device=device).to(dtype), 1)
    given = (dy, x, up, down, *places)
    buffers = [None, None]
    accumulate = case["buffers"] == "added to"
    if case["buffers"]:
        start = [torch.randn(w.shape, device=device) for w in (up, down)]
        buffers = [guarded(w if accumulate else w * float("nan")) for w in start]
    rest = (*mlp, None, None, False)
    got = list(
        grouped_gemm.moe_experts_backward(
            *given, kept, *mlp, *buffers, accumulate, case["invariant"]
        )
    )
    oracle = list(reference.moe_experts_backward(*double(given), wide, *rest))
    baseline = list(reference.moe_experts_backward(*given, rounded, *rest))
    if case["buffers"]:
        assert got[1].numel() == got[2].numel() == 0
        for i, (buffer, before) in enumerate(zip(buffers, start, strict=True), 1):
            got[i], before = buffer, before * accumulate
            oracle[i], baseline[i] = oracle[i] + before, baseline[i] + before
    names = ("dx", "dup", "ddown", "dweights")
    for name, *three in zip(names, got, oracle, baseline, strict=True):
        assert_close_to_oracle(name, *three)
    unused = places[2][first + 1 : last + 1] == places[2][first:last]
    for i in (1, 2):
        before = start[i - 1][unused] if accumulate else torch.zeros_like(got[i][unused])
        assert torch.equal(got[i][unused], before)


def quantized(w, format):
    """What the op takes from a quantized tensor."""
    with tigon.backend("reference"):
        if format == "nvfp4":
            q = tigon.quantize_nvfp4(w.float().cpu(), amax="row")
            return q.codes, q.block_scale, q.tensor_scale, format
        q = tigon.quantize_fp8(w.float().cpu(), granularity=format[4:])
        return q.codes, q.scale, None, format


QUANTIZED = pairwise(
    formats=[("nvfp4", "fp8-row"), ("fp8-tensor", "nvfp4")],
    dtype=[torch.bfloat16, torch.float16, torch.float32],
    arch=[80, 90],
    t=[3, 66],
)


@pytest.mark.parametrize("case", QUANTIZED, ids=case_id)
def test_quantized_weights_match_the_oracle(case, device, small_tiles):
    l, m, e, k = 72, 40, 4, 1
    formats, dtype, arch, t = case.values()
    gates = 2 if formats[0] == "nvfp4" else 1
    x, *matrices = leaves(t, l, m, e, gates, dtype, device)
    weights = [part for w, f in zip(matrices, formats, strict=True) for part in quantized(w, f)]
    weights = [w.to(device) if torch.is_tensor(w) else w for w in weights]
    activation = "swiglu" if gates == 2 else "relu2"
    args = (x, *weights, *route(t, e, k, device).values(), activation, False, "nothing", 0, e)
    with assume(arch):
        y, _ = grouped_gemm.moe_experts(*args)
    wide = (x.double(), *weights, args[9].double(), *args[10:])
    assert_close_to_oracle("y", y, reference.moe_experts(*wide)[0], reference.moe_experts(*args)[0])


@pytest.mark.parametrize("mode", ["batch-invariant", "default"])
def test_a_token_alone_has_the_bits_it_has_among_many(mode, device, small_tiles, monkeypatch):
    """y, dx and dweights; by default the same bits in every run of the same call."""
    rowwise_products(monkeypatch)
    t, l, m, e, k = 70, 24, 72, 4, 2
    dtype, invariant = torch.float32, mode == "batch-invariant"
    x, up, down = leaves(t, l, m, e, 1, dtype, device)
    dy = torch.randn(t, l, device=device).to(dtype)
    everything = route(t, e, k, device)

    def run(picked):
        places = everything
        if len(picked) < t:
            chosen = everything["indices"][picked], everything["weights"][picked]
            places = sorted_by_expert(*chosen, e, device)
        mlp = ("relu2", False, "hidden", 0, e)
        given = (up, down, *places.values())
        y, kept = grouped_gemm.moe_experts(
            x[picked], *plain(up, down), *places.values(), *mlp, invariant
        )
        dx, _, _, dweights = grouped_gemm.moe_experts_backward(
            dy[picked], x[picked], *given, kept, *mlp, None, None, False, invariant
        )
        return y, dx, dweights

    every = torch.arange(t, device=device)
    many = run(every)
    alone = [every] if mode == "default" else [every[:1], every[37:38], every[-3:]]
    for picked in alone:
        for one, all_rows in zip(run(picked), many, strict=True):
            assert torch.equal(one, all_rows[picked])


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("counts", [[5, 0, 20], [0, 0, 0], [33]], ids=str)
def test_grouped_products_match_the_oracle(counts, dtype, invariant, device, small_tiles):
    """Seven more rows than the experts have give zeros."""
    e, n, k, rows = len(counts), 40, 23, sum(counts) + 7
    x, dy = (sliced(torch.randn(rows, width, device=device).to(dtype), 1) for width in (k, n))
    w = guarded(torch.randn(e, n, k, device=device).to(dtype))
    offsets = torch.tensor([0, *counts], device=device).cumsum(0).to(torch.int32)
    offsets = guarded(offsets)
    y = grouped_gemm.grouped_mm(x, w, offsets, invariant)
    dx, dw = grouped_gemm.grouped_mm_backward(dy, x, w, offsets)
    oracle = reference.grouped_mm(x.double(), w.double(), offsets)
    assert_close_to_oracle("y", y, oracle, reference.grouped_mm(x, w, offsets))
    wide = reference.grouped_mm_backward(dy.double(), x.double(), w.double(), offsets)
    baseline = reference.grouped_mm_backward(dy, x, w, offsets)
    for name, *three in zip(("dx", "dw"), (dx, dw), wide, baseline, strict=True):
        assert_close_to_oracle(name, *three)
    assert not y[-7:].any() and not dx[-7:].any()
    assert not dw[torch.tensor(counts) == 0].any()


@pytest.mark.parametrize("begin", [0, 9])
@pytest.mark.parametrize("counts", [[5, 0, 40, 16, 1], [0, 0], [3000, 1]], ids=str)
def test_every_tile_is_listed_once(counts, begin, device):
    """In order, padded with -1; 3000 rows fill a program's block more than once."""
    rows, experts, total = 16, len(counts), sum(counts) + 50
    offsets = torch.tensor([begin, *counts], device=device).cumsum(0).to(torch.int32)
    bound = tile_bound(total, experts, rows)
    tiles = torch.empty(bound, 2, dtype=torch.int32, device=device)
    list_tiles[(experts,)](guarded(offsets), tiles, experts, bound, ROWS=rows, EXPERTS=8, BLOCK=32)
    expected = [
        [i, offsets[i].item() + row] for i, count in enumerate(counts) for row in range(0, count, rows)
    ]  # fmt: skip
    assert tiles[: len(expected)].tolist() == expected
    assert (tiles[len(expected) :, 0] == -1).all() and len(tiles) >= len(expected)


@triton.jit
def _find(indices_ptr, order_ptr, offsets_ptr, out_ptr, first, experts):
    item = tl.program_id(0).to(tl.int64)
    expert, row, end = find_rows(
        item, None, indices_ptr, order_ptr, offsets_ptr, first, experts, 16
    )
    tl.store(out_ptr + item * 3, expert)
    tl.store(out_ptr + (item * 3 + 1), row)
    tl.store(out_ptr + (item * 3 + 2), end)


@pytest.mark.parametrize("first, last", [(0, 40), (5, 30)])
def test_one_of_an_experts_choices_takes_its_rows(first, last, device):
    """Its weights are read once, however many chose it."""
    t, e, k = 6, 40, 3
    places = route(t, e, k, device, skipped=True)
    offsets = places["offsets"]
    found = torch.zeros(t * k, 3, dtype=torch.int64, device=device)
    _find[(t * k,)](places["indices"], places["order"], offsets[first:], found, first, last - first)
    taken = [row for row in found.tolist() if row[1] < row[2]]
    bounds = offsets.tolist()
    expected = [
        [i - first, bounds[i], bounds[i + 1]] for i in range(first, last) if bounds[i] < bounds[i + 1]
    ]  # fmt: skip
    assert sorted(taken) == expected


@pytest.mark.parametrize("t", [3, 70])
def test_the_shipped_table(t, device):
    l, m, e, k = 72, 136, 4, 2
    x, up, down = leaves(t, l, m, e, 1, torch.bfloat16, device)
    args = (x, *plain(up, down), *route(t, e, k, device).values(), "relu2", False, "hidden", 0, e)
    y, _ = grouped_gemm.moe_experts(*args)
    oracle, _ = reference.moe_experts(*double(args))
    assert_close_to_oracle("y", y, oracle, reference.moe_experts(*args)[0])


@pytest.mark.parametrize("save", ["hidden", "nothing"])
@pytest.mark.parametrize("t, k, part", [(0, 2, (0, 4)), (5, 2, (2, 2)), (5, 0, (0, 4))])
def test_no_rows_and_no_experts(t, k, part, save, device):
    first, last = part
    x, up, down = leaves(t, 24, 40, last - first, 1, torch.float32, device)
    places = list(route(t, 4, k, device).values())
    mlp = ("relu2", False, save, *part)
    y, kept = grouped_gemm.moe_experts(x, *plain(up, down), *places, *mlp)
    grads = grouped_gemm.moe_experts_backward(
        y, x, up, down, *places, kept, *mlp, None, None, False
    )
    like = (x, up, down, places[0])
    assert torch.equal(y, torch.zeros_like(x))
    assert kept.shape == ((t * k, 40) if save == "hidden" else (0,))
    for grad, t in zip(grads, like, strict=True):
        assert torch.equal(grad, torch.zeros_like(t))


@pytest.mark.parametrize("t", [3, 66])
def test_nan_stays_in_its_token_and_its_expert(t, device, small_tiles):
    """In x it reaches that token, in a matrix the tokens that chose its expert, and no other."""
    l, m, e, k, row, expert = 24, 24, 4, 1, 1, 2
    x, up, down = leaves(t, l, m, e, 1, torch.bfloat16, device)
    routing = route(t, e, k, device)
    places = list(routing.values())
    mlp = ("relu2", False, "nothing", 0, e)
    x[row, 5] = float("nan")
    y, _ = grouped_gemm.moe_experts(x, *plain(up, down), *places, *mlp)
    felt = torch.arange(t, device=device) == row
    assert torch.equal(y.isnan().all(1), felt) and torch.equal(y.isnan().any(1), felt)
    x[row, 5] = 0
    dy = torch.randn(t, l, device=device).to(x.dtype)
    for w in (up, down):
        w[expert] = float("nan")
        felt = (routing["indices"] == expert).any(1)
        y, _ = grouped_gemm.moe_experts(x, *plain(up, down), *places, *mlp)
        assert torch.equal(y.isnan().any(1), felt)
        dx, dup, ddown, _ = grouped_gemm.moe_experts_backward(
            dy, x, up, down, *places, x.new_empty(0), *mlp, None, None, False
        )
        assert torch.equal(dx.isnan().any(1), felt)
        assert not (
            torch.cat([dup, ddown.mT], 2).isnan().flatten(1).any(1).nonzero() != expert
        ).any()
        w[expert] = 0


def test_addresses_are_64_bit(device, small_tiles):
    """Rows lie 2^30 elements apart; the buffer is allocated but hardly touched."""
    far, t, l, m, e, k = 2**30, 3, 24, 16, 2, 1
    near, up, down = leaves(t, l, m, e, 1, torch.bfloat16, device)
    buffer = torch.empty_strided((2 * far + l,), (1,), dtype=torch.bfloat16, device=device)
    x = buffer.as_strided((t, l), (far, 1))
    x.copy_(near)
    places = list(route(t, e, k, device).values())
    mlp = ("relu2", False, "nothing", 0, e)
    results = []
    for rows in (near, x):
        y, kept = grouped_gemm.moe_experts(rows, *plain(up, down), *places, *mlp)
        results.append(
            (y, *grouped_gemm.moe_experts_backward(
                rows, rows, up, down, *places, kept, *mlp, None, None, False
            ))
        )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_op_takes_the_kernels(device, small_tiles):
    """Autograd through `tigon.moe_experts`, with gradients into buffers."""
    t, l, m, e, k = 5, 24, 40, 4, 2
    given = leaves(t, l, m, e, 1, torch.float32, device)
    with tigon.backend("reference"):
        routing = tigon.moe_route(torch.randn(t, e), top_k=k)
    buffers = tuple(torch.zeros_like(w) for w in given[1:])
    results = []
    for backend, into in (("reference", None), ("kernel", None), ("kernel", buffers)):
        x, up, down = (v.clone().requires_grad_() for v in given)
        with tigon.backend(backend):
            y = tigon.moe_experts(x, up, down, routing.to(device) if device.type == "cuda" else routing,
                                  grad_buffers=into, accumulate=into is not None)  # fmt: skip
            y.square().sum().backward()
        results.append((y, x.grad, *(into or (up.grad, down.grad))))
    for got in results[1:]:
        for a, b in zip(got, results[0], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_launch_table(arch):
    """All rows find a tile, splits cover k, and batch-invariant tiles are the same for every t."""
    sizes = dict(k=22, e=512, m=2688, l=1024)
    for itemsize in (2, 4):
        for format in ("plain", "nvfp4", "fp8-row"):
            invariant = set()
            for t in (1, 8, 64, 65, 512, 8192):
                configs = plan("moe_experts", arch, t=t, itemsize=itemsize, format=format, **sizes)
                down = configs["multiply_rows"]
                assert down.split_k == 0 or down.splits * down.split_k >= sizes["m"]
                assert down.split_k % down.block_k == 0 and (down.splits == 1) == (not down.split_k)
                assert down.few == (t <= 64) and (down.few or down.splits == 1)
                frozen = plan(
                    "moe_experts", arch, t=t, itemsize=itemsize, format=format, batch_invariant=True, **sizes
                )  # fmt: skip
                invariant.add((frozen["up_activate"], frozen["multiply_rows"]))
            assert len(invariant) == 1
    backward = {
        tuple(plan("moe_experts_backward", arch, t=t, itemsize=2, batch_invariant=True, **sizes).values())[:2]
        for t in (1, 8192)
    }  # fmt: skip
    assert len(backward) == 1
