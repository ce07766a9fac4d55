"""LatentMoE against its formula written densely, and what keeps it exact: fp32 router, masks, balance, files."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import tigon
from tigon.modules import LatentMoE, router_losses

D, E, M, K, SHARED = 24, 12, 16, 3, 20
OPTIONS = {
    "latent": {},
    "full width": {"latent": None},
    "scaled": {"scale": 2.5},
    "groups": {"groups": 4, "top_groups": 2},
    "softmax": {"score": "softmax"},
    "weights as they are": {"normalize": False},
    "swiglu": {"activation": "swiglu"},
    "biases": {"bias": True},
    "scale on the output": {"scale": 2.5, "scale_placement": "output"},
    "weights before down": {"weight_placement": "before_down"},
    "relu saved": {"save": "relu"},
    "nothing saved": {"save": "nothing"},
    "no shared expert": {"shared_width": None},
}


def layer(dtype=torch.float64, **options) -> LatentMoE:
    torch.manual_seed(0)
    sizes = {"latent": 10, "shared_width": SHARED} | options
    latent, shared = sizes.pop("latent"), sizes.pop("shared_width")
    m = LatentMoE(D, latent, E, M, K, shared, **sizes, dtype=dtype)
    m.gate.e_score_correction_bias.normal_(std=0.2)
    return m


def activation(m, h):
    if not m.experts.gated:
        return F.relu(h).square()
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up


def dense(m, x):
    """The layer straight from its docstring: every expert sees every token, and the choice is a mask."""
    c, bias = m.choice, m.gate.e_score_correction_bias
    rows = x.flatten(0, -2)
    logits = rows @ m.gate.weight.T
    s = logits.sigmoid() if c["score"] == "sigmoid" else logits.softmax(-1)
    select = (s + bias).unflatten(-1, (c["groups"], -1))
    best = select.topk(min(2, select.shape[-1]), -1)[0].sum(-1).topk(c["top_groups"], -1)[1]
    open_groups = torch.zeros(select.shape[:2], dtype=torch.bool).scatter(1, best, True)
    select = select.masked_fill(~open_groups[..., None], float("-inf")).flatten(1)
    chosen = torch.zeros_like(s).scatter(1, select.topk(K, -1)[1], 1.0)
    w = s * chosen
    w = w / (w.sum(-1, keepdim=True) + 1e-20) if c["normalize"] else w
    z = rows if m.latent is None else m.fc1_latent_proj(rows)
    each = activation(m, torch.einsum("tl,eml->tem", z, m.experts.up))
    y = c["scale"] * torch.einsum("tem,elm,te->tl", each, m.experts.down_proj, w)
    y = y if m.latent is None else m.fc2_latent_proj(y)
    y = y.view(x.shape)
    return y if m.shared_experts is None else y + m.shared_experts(x)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_output_and_every_gradient_equal_the_formula(options):
    m = layer(**options)
    x = torch.randn(2, 35, D, dtype=torch.float64, requires_grad=True)
    got, want = m(x), dense(m, x)
    torch.testing.assert_close(got, want)
    weight, leaves = torch.randn_like(want), [x, *m.parameters()]
    grads = [torch.autograd.grad((y * weight).sum(), leaves) for y in (got, want)]
    names = ["x", *dict(m.named_parameters())]
    for name, a, b in zip(names, *grads, strict=True):
        assert b.abs().max() > 0, name
        torch.testing.assert_close(a, b, msg=lambda t, name=name: f"{name}: {t}")


def test_names_and_shapes_are_those_of_transformers():
    shapes = {k: tuple(v.shape) for k, v in layer().state_dict().items()}
    assert shapes == {
        "gate.weight": (E, D),
        "gate.e_score_correction_bias": (E,),
        "experts.up_proj": (E, M, 10),
        "experts.down_proj": (E, 10, M),
        "fc1_latent_proj.weight": (10, D),
        "fc2_latent_proj.weight": (D, 10),
        "shared_experts.up_proj.weight": (SHARED, D),
        "shared_experts.down_proj.weight": (D, SHARED),
    }
    names = set(layer(activation="swiglu", latent=None).state_dict())
    assert {"experts.gate_up_proj", "shared_experts.gate_proj.weight"} <= names
    assert not any("latent" in n or n == "experts.up_proj" for n in names)


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_state_dicts_with_an_expert_s_tensors_by_themselves_are_loaded(activation):
    m, other = layer(activation=activation), layer(activation=activation)
    single = {}
    for name, t in m.state_dict().items():
        if name == "experts.gate_up_proj":
            for j in range(E):
                single[f"experts.{j}.gate_proj.weight"] = t[j, :M]
                single[f"experts.{j}.up_proj.weight"] = t[j, M:]
        elif name.startswith("experts."):
            single |= {f"{name.replace('.', f'.{j}.')}.weight": t[j] for j in range(E)}
        else:
            single[name] = t
    for p in other.parameters():
        torch.nn.init.zeros_(p)
    other.load_state_dict(single)
    assert all(torch.equal(p, q) for p, q in zip(m.parameters(), other.parameters()))
    del single["experts.7.down_proj.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"experts.down_proj"'):
        other.load_state_dict(single)


def test_the_router_is_exact_in_every_dtype_and_under_autocast():
    m = layer(torch.float32)
    bias, x = m.gate.e_score_correction_bias.clone(), torch.randn(40, D)
    for cast in (m.bfloat16, m.half, lambda: m.to(torch.bfloat16), lambda: m.to("cpu"), m.float):
        cast()
        assert torch.equal(m.gate.e_score_correction_bias, bias)
    m.bfloat16()
    x = x.bfloat16()
    want = x.float() @ m.gate.weight.float().T
    torch.testing.assert_close(m.gate(x), want, rtol=0, atol=1e-6)
    assert m(x).dtype == torch.bfloat16
    assert copy.deepcopy(m).gate.e_score_correction_bias.dtype == torch.float32
    assert m.to("meta").gate.e_score_correction_bias.is_meta
    m = layer(torch.float32)
    routing = m.route(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, again = m(x.float(), return_routing=True)
        assert y.dtype == torch.bfloat16
    assert torch.equal(again.weights, routing.weights)


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
@torch.no_grad()
def test_bf16_is_near_to_fp64(activation):
    m = layer(activation=activation)
    x = torch.randn(50, D, dtype=torch.float64).bfloat16()
    low = copy.deepcopy(m).bfloat16()
    exact = copy.deepcopy(low).double()
    want, got = exact(x.double()), low(x).double()
    assert (got - want).norm() < 0.01 * want.norm()


def test_padding_reaches_no_expert_no_count_and_no_loss():
    m = layer(aux="sequence", z_loss=True)
    x = torch.randn(2, 20, D, dtype=torch.float64)
    mask = torch.arange(20) < torch.tensor([20, 11])[:, None]
    y, routing = m(x, mask, return_routing=True)
    torch.testing.assert_close(y[mask], m(x)[mask])
    bounds = torch.tensor([0, 20, 31])
    packed, other = m(x[mask][None], cu_seqlens=bounds, return_routing=True)
    torch.testing.assert_close(packed[0], y[mask])
    assert torch.equal(other.counts, routing.counts) and int(routing.counts.sum()) == 31 * K
    for losses in ((1.0, 0.0), (0.0, 1.0)):
        got = router_losses([routing], *losses)
        assert got > 0.1
        torch.testing.assert_close(got, router_losses([other], *losses))
    torch.testing.assert_close(y[~mask], m.shared_experts(x)[~mask])


def test_router_losses_are_the_formulas_and_push_the_router_only():
    m = layer(aux="sequence", z_loss=True)
    m.gate.e_score_correction_bias.zero_()
    x = torch.randn(2, 20, D, dtype=torch.float64)
    _, routing = m(x, return_routing=True)
    logits = x @ m.gate.weight.T
    s = logits.sigmoid()
    share = (s / s.sum(-1, keepdim=True)).sum(1)
    counts = F.one_hot(s.topk(K, -1)[1], E).sum((1, 2))
    aux = (E / (K * 20**2) * (share * counts).sum(-1)).mean()
    z = logits.logsumexp(-1).square().mean()
    loss = router_losses([routing, routing], 0.5, 0.25)
    torch.testing.assert_close(loss, 2 * (0.5 * aux + 0.25 * z))
    grads = torch.autograd.grad(loss, list(m.parameters()), allow_unused=True)
    assert [name for (name, _), g in zip(m.named_parameters(), grads) if g is not None] == [
        "gate.weight"
    ]
    want = torch.autograd.grad(2 * (0.5 * aux + 0.25 * z), m.gate.weight)[0]
    torch.testing.assert_close(grads[0], want)
    assert router_losses([], 1.0, 1.0) == 0
    with pytest.raises(ValueError, match="z_loss=True"):
        router_losses([layer().route(x)], 0.0, 1.0)


def test_update_bias_raises_rare_experts_and_lowers_frequent_ones():
    m = layer(torch.bfloat16)
    before = m.gate.e_score_correction_bias.clone()
    counts = torch.full((E,), 2**24, dtype=torch.int32)
    counts[0] += 1  # a difference that fp32 does not hold
    counts[1] -= 1
    m.update_bias(counts, 0.5)
    step = torch.zeros(E)
    step[0], step[1] = -0.5, 0.5
    torch.testing.assert_close(m.gate.e_score_correction_bias - before, step)
    m.update_bias(torch.arange(E), 0.25)
    step += torch.tensor([0.25] * (E // 2) + [-0.25] * (E // 2))
    torch.testing.assert_close(m.gate.e_score_correction_bias - before, step)


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from tigon.modules import LatentMoE
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
m = LatentMoE(8, None, 4, 8, 2, None)
counts = torch.tensor([[9, 0, 1, 2], [0, 5, 1, 6]][rank])
m.update_bias(counts, 1.0, dist.group.WORLD)
assert counts.tolist() == [[9, 0, 1, 2], [0, 5, 1, 6]][rank]
assert m.gate.e_score_correction_bias.tolist() == [-1, 1, 1, -1], m.gate.e_score_correction_bias
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_counts_of_two_processes_are_added_up(tmp_path):
    commands = [[sys.executable, "-c", TWO_PROCESSES, str(r), str(tmp_path / "s")] for r in (0, 1)]
    jobs = [subprocess.Popen(c, stderr=subprocess.PIPE, text=True) for c in commands]
    errors = [job.communicate(timeout=120)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], errors


@torch.no_grad()
def test_a_token_alone_has_the_same_bits_as_among_others_in_batch_invariant_mode():
    for options in ({}, {"groups": 4, "top_groups": 2}, {"activation": "swiglu", "latent": None}):
        m, x = layer(torch.float32, **options), torch.randn(3, 50, D)
        with tigon.batch_invariant():
            whole = m(x)
            for rows in (slice(0, 1), slice(7, 8), slice(20, 50)):
                assert torch.equal(m(x[1:2, rows]), whole[1:2, rows])
            assert torch.equal(m(x[1, 7]), whole[1, 7])


@pytest.mark.parametrize("shape", [(0, D), (0, 5, D), (2, 0, D)])
def test_empty_batches_give_empty_outputs_and_zero_gradients(shape):
    m = layer(aux="sequence", z_loss=True)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, routing = m(x, return_routing=True)
    assert y.shape == shape and int(routing.counts.sum()) == 0
    (y.sum() + router_losses([routing], 1.0, 1.0)).backward()
    assert x.grad.shape == shape
    assert all(p.grad is None or not p.grad.any() for p in m.parameters())


def test_weights_with_a_main_grad_get_their_gradients_there():
    m, plain = layer(torch.float32), layer(torch.float32)
    x = torch.randn(30, D)
    for w in (m.experts.up_proj, m.experts.down_proj):
        w.main_grad = torch.ones_like(w)
    for _ in range(2):
        m(x).square().sum().backward()
    plain(x).square().sum().backward()
    for name in ("up_proj", "down_proj"):
        w, want = getattr(m.experts, name), getattr(plain.experts, name).grad
        torch.testing.assert_close(w.main_grad, 1 + 2 * want)
        assert w.grad is None
    torch.testing.assert_close(m.gate.weight.grad, 2 * plain.gate.weight.grad)


@pytest.mark.parametrize("options", [{}, {"activation": "swiglu", "save": "nothing"}])
def test_a_compiled_layer_is_one_graph_with_the_same_gradients_and_routing(options):
    m = layer(torch.float32, aux="sequence", z_loss=True, **options)
    x = torch.randn(2, 9, D)
    torch._dynamo.reset()
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")

    def run(f):
        y, routing = f(x, return_routing=True)
        loss = y.square().sum() + router_losses([routing], 1.0, 1.0)
        return routing, torch.autograd.grad(loss, list(m.parameters()))

    (routing, grads), (other, got) = run(m), run(compiled)
    torch.testing.assert_close(got, grads)
    assert torch.equal(routing.counts, other.counts)


@torch.no_grad()
def test_the_layer_never_waits_for_the_device(no_host_sync):
    m = layer(torch.float32, aux="sequence", z_loss=True)
    y, routing = m(torch.randn(2, 9, D), torch.ones(2, 9, dtype=torch.bool), return_routing=True)
    router_losses([routing], 1.0, 1.0)
    m.update_bias(routing.counts)


def test_copies_and_pickles_are_layers_of_their_own():
    m = layer()
    x = torch.randn(5, D, dtype=torch.float64)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(other(x), m(x))
        other.update_bias(torch.arange(E), 5.0)
        assert not torch.equal(other(x), m(x))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"groups": 5}, "groups=5 must divide experts=12"),
        ({"groups": 4, "top_groups": 5}, "top_groups=5"),
        ({"groups": 6, "top_groups": 1}, "top_k=3 must lie in 1 to the 2 experts"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        layer(**options)
