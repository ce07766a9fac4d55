"""What FP8Linear and NVFP4Linear share: forms, gradients in every setting, and what they refuse."""

import copy

import pytest
import torch
from quantized_products import run
from torch import nn
from torch._dynamo import lookup_backend
from torch.utils.checkpoint import checkpoint

from tigon.modules import FP8Linear, NVFP4Linear, fp8_linear, nvfp4_linear

K, N = 40, 24
KINDS = [
    pytest.param((FP8Linear, {"scaling": "tensor"}), id="fp8"),
    pytest.param((FP8Linear, {"scaling": "block"}), id="fp8-block"),
    pytest.param((FP8Linear, {"scaling": "mxfp8"}), id="mxfp8"),
    pytest.param((NVFP4Linear, {}), id="nvfp4"),
    pytest.param((NVFP4Linear, {"row_scaled": True}), id="nvfp4-row"),
]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def _layer(kind, **more):
    cls, options = kind
    return cls.from_linear(nn.Linear(K, N), **options, **more)


def _relative(got, expected) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def test_results_are_near_those_of_the_layer_it_was_made_from(kind):
    linear = nn.Linear(K, N)
    cls, options = kind
    layer = cls.from_linear(linear, **options)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    x, dy = torch.randn(64, K), torch.randn(64, N)
    limit = 0.06 if cls is FP8Linear else 0.35
    for got, exact in zip(run(layer, x, dy), run(linear, x, dy)):
        assert _relative(got, exact) < limit


def test_any_leading_shape_and_none_at_all(kind):
    for layer in (_layer(kind), _layer(kind, frozen=True)):
        for shape in ((), (3,), (2, 3), (0,), (2, 0), (2, 1, 3)):
            x = torch.randn(*shape, K, requires_grad=True)
            y = layer(x)
            y.sum().backward()
            assert y.shape == (*shape, N) and x.grad.shape == x.shape
    layer = _layer(kind)
    layer(torch.randn(0, K)).sum().backward()
    assert (layer.weight.grad == 0).all() and (layer.bias.grad == 0).all()


def test_main_grad_takes_the_weight_gradient_in_fp32(kind):
    layer = _layer(kind).bfloat16()
    x, dy = torch.randn(33, K).bfloat16(), torch.randn(33, N).bfloat16()
    results = []
    for steps in (1, 2):
        layer.weight.main_grad = torch.zeros(N, K)
        torch.manual_seed(3)
        for _ in range(steps):
            layer(x).backward(dy)
        assert layer.weight.grad is None
        results.append(layer.weight.main_grad)
    del layer.weight.main_grad
    torch.manual_seed(3)
    *_, dw, _ = run(layer, x, dy)
    torch.testing.assert_close(results[0].bfloat16(), dw)
    assert _relative(results[1], 2 * results[0]) < 0.3 and (results[1] != results[0]).any()


def test_autocast_takes_its_dtype_and_keeps_the_weight_gradient_in_fp32(kind):
    layer = _layer(kind)
    x, dy = torch.randn(16, K), torch.randn(16, N).bfloat16()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        x1 = x.clone().requires_grad_()
        y = layer(x1)
    y.backward(dy)
    low = copy.deepcopy(layer).bfloat16()
    torch.manual_seed(5)
    expected = run(low, x.bfloat16(), dy)
    assert y.dtype == torch.bfloat16 and x1.grad.dtype == layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y, expected[0], rtol=0.01, atol=0.01)  # the bias stays fp32
    torch.testing.assert_close(x1.grad.bfloat16(), expected[1])
    torch.testing.assert_close(layer.weight.grad.bfloat16(), expected[2])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert layer.freeze()(x).dtype == torch.bfloat16


def test_gradients_are_reproducible_and_the_same_with_activation_checkpointing(kind):
    layer = _layer(kind)
    x, dy = torch.randn(32, K), torch.randn(32, N)

    def gradients(forward):
        torch.manual_seed(9)
        x1 = x.clone().requires_grad_()
        forward(x1).backward(dy)
        grads = x1.grad, layer.weight.grad
        layer.weight.grad = None
        return grads

    first = gradients(layer)
    after = torch.get_rng_state()
    forwards = [lambda t, r=r: checkpoint(layer, t, use_reentrant=r) for r in (False, True)]
    for forward in (layer, *forwards):
        for a, b in zip(first, gradients(forward)):
            assert torch.equal(a, b)
        assert torch.equal(torch.get_rng_state(), after)  # what comes next draws the same too
    layer.eval()
    with torch.no_grad():
        layer(x)
    assert torch.equal(torch.get_rng_state(), after)
    layer.train()
    if isinstance(layer, NVFP4Linear):
        again = run(layer, x, dy)
        assert not torch.equal(again[1], first[0])  # another seed, other bits


@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_whole_with_the_same_results(kind, frozen):
    layer = _layer(kind, frozen=frozen)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (5, 21):
        x, dy = torch.randn(2, rows, K), torch.randn(2, rows, N)
        results = []
        for function in (layer, compiled):
            torch.manual_seed(2)
            x1 = x.clone().requires_grad_()
            y = function(x1)
            y.backward(dy)
            results.append([y.detach(), x1.grad, *[p.grad for p in layer.parameters()]])
            layer.zero_grad()
        for a, b in zip(*results):
            assert (a is None and b is None) or torch.equal(a, b)


def test_one_graph_trains_on_any_number_of_tokens(kind):
    layer, graphs = _layer(kind), []

    def backend(graph, inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for rows in (41, 65, 90):  # more than one block, and no other size
        results = []
        for function in (layer, compiled):
            torch.manual_seed(2)
            results.append(run(function, torch.ones(rows, K), torch.ones(rows, N)))
        assert all(map(torch.equal, *results))
    assert len(graphs) == 1


def test_without_gradients_x_is_quantized_along_its_rows_only(kind, monkeypatch):
    axes = []

    def noting(quantize):
        return lambda t, **options: (
            axes.append(options.get("axis", "row")) or quantize(t, **options)
        )

    for module in (fp8_linear, nvfp4_linear):
        for name in {"quantize_fp8", "quantize_mxfp8", "quantize_nvfp4"} & vars(module).keys():
            monkeypatch.setattr(module, name, noting(getattr(module, name)))
    layer, x = _layer(kind), torch.randn(7, K)
    y = layer(x)
    assert len(axes) > 2 or "both" in axes
    axes.clear()
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    assert axes == ["row", "row"]


def test_layers_on_the_meta_device_give_shapes(kind):
    for frozen in (False, True):
        layer = _layer(kind, frozen=frozen).to("meta")
        assert layer(torch.empty(2, 3, K, device="meta")).shape == (2, 3, N)


def test_nothing_waits_for_the_device(kind, no_host_sync):
    for layer in (_layer(kind), _layer(kind, frozen=True)):
        x = torch.randn(7, K, requires_grad=True)
        layer(x).sum().backward()


def test_frozen_layers_give_gradients_to_their_input_only(kind):
    layer = _layer(kind, frozen=True)
    x, dy = torch.randn(9, K), torch.randn(9, N)
    _, dx, dw, db = run(layer, x, dy)
    torch.testing.assert_close(dx, dy @ layer.quantized_weight.dequantize())
    assert dw is None and db is None
    layer.bias.requires_grad_()
    torch.testing.assert_close(run(layer, x, dy)[3], dy.sum(0))


def test_double_backward_is_refused(kind):
    for layer in (_layer(kind), _layer(kind, frozen=True)):
        x = torch.randn(4, K, requires_grad=True)
        (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            dx.square().sum().backward()


def test_codes_and_scales_survive_a_change_of_dtype(kind):
    layer, x = _layer(kind, frozen=True), torch.randn(8, K)
    before = {k: t.clone() for k, t in layer.state_dict().items()}
    layer.bfloat16()
    assert layer.dtype == layer.bias.dtype == torch.bfloat16
    for name, t in layer.state_dict().items():
        if name != "bias":
            assert t.dtype == before[name].dtype
            old = before[name]
            t, old = (a.view(torch.uint8) if a.element_size() == 1 else a for a in (t, old))
            assert torch.equal(t, old), name
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer.to("meta").weight.dtype == before["weight"].dtype


def test_state_is_read_into_an_empty_layer_and_a_pickled_one_is_the_same(kind):
    cls, options = kind
    layer, x = _layer(kind, frozen=True), torch.randn(8, K)
    empty = cls(K, N, True, frozen=True, **options)
    assert (empty(x) == 0).all()
    empty.load_state_dict(layer.state_dict())
    for other in (empty, copy.deepcopy(layer)):
        assert torch.equal(other(x), layer(x))
    meta = cls(K, N, True, frozen=True, device="meta", **options)
    meta.load_state_dict(layer.state_dict(), assign=True)
    for name, t in meta.state_dict().items():
        assert t.device.type == "cpu" and t.dtype == layer.state_dict()[name].dtype
    assert not any(p.requires_grad for p in layer.parameters())


def test_training_layers_built_on_the_meta_device_have_their_constants(kind):
    cls, options = kind
    layer = cls(K, N, device="meta", **options).to_empty(device="cpu")
    layer.reset_parameters()
    torch.manual_seed(0)
    x, dy = torch.randn(32, K), torch.randn(32, N)
    *_, dw, _ = run(layer, x, dy)
    assert _relative(dw, dy.T @ x) < 0.35
    assert set(layer.state_dict()) == {"weight"}


def test_quantizing_twice_and_freezing_twice_are_refused(kind):
    cls, options = kind
    frozen = _layer(kind, frozen=True)
    for layer in (frozen, _layer(kind)):
        with pytest.raises(TypeError, match="is quantized"):
            cls.from_linear(layer, **options)
    with pytest.raises(TypeError, match="frozen already"):
        frozen.freeze()
