"""The public functions on the kernel backend: what users call reaches the kernels, gradients too.

Natively on a GPU; elsewhere in Triton's interpreter and the host build of csrc. The kernels' own tests, with
all options, are in tests/kernels and tests/csrc.
"""

import math

import host_build
import pytest
import torch

import tigon
from tigon import native
from tigon.ops import dispatch


@pytest.fixture(autouse=True)
def kernel_backend(device):
    if device.type == "cpu":
        if reason := host_build.missing():
            pytest.skip(reason)
        native.use_host_library(host_build.build("fibers"))
    with tigon.backend("kernel"):
        yield
    native.use_host_library(None)


def both(function, tensors):
    """Outputs and gradients with the kernel and with the reference."""
    runs = []
    for name in ("kernel", "reference"):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        with tigon.backend(name):
            out = function(*leaves)
            out = out if isinstance(out, tuple) else (out,)
            grads = torch.autograd.grad(sum((t * t).sum() for t in out), leaves)
        runs.append((*out, *grads))
    return zip(*runs, strict=True)


def close(pairs):
    for got, want in pairs:
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)


def test_ssd_scan(device):
    draw = lambda *shape: torch.randn(*shape, device=device) / math.sqrt(shape[-1])  # noqa: E731
    cu = torch.tensor([0, 5, 5, 24], dtype=torch.int32, device=device)
    positions = torch.tensor([7, 24], device=device)

    def scan(x, dt, A, B, C, D, z, bias, initial):
        return tigon.ssd_scan(
            *(x, dt, -A.exp(), B, C), D=D, z=z, dt_bias=bias, dt_softplus=True, initial_states=initial,
            cu_seqlens=cu, state_positions=positions, return_final_states=True,
        )  # fmt: skip

    shapes = (
        (1, 24, 2, 16),
        (1, 24, 2),
        (2,),
        (1, 24, 1, 16),
        (1, 24, 1, 16),
        (2,),
        (1, 24, 2, 16),
        (2,),
        (3, 2, 16, 16),
    )
    close(both(scan, [draw(*shape) for shape in shapes]))


def test_batch_invariant_mode_reaches_the_scans_kernels(device):
    draw = lambda *shape: torch.randn(*shape, device=device) / 4  # noqa: E731
    x, dt, B, C = draw(2, 40, 2, 16), draw(2, 40, 2), draw(2, 40, 1, 16), draw(2, 40, 1, 16)
    A = -torch.rand(2, device=device)

    def run(rows):
        leaves = [t[rows].detach().requires_grad_() for t in (x, dt, B, C)]
        y, final = tigon.ssd_scan(
            *leaves[:2], A, *leaves[2:], dt_softplus=True, return_final_states=True
        )
        return (y, final, *torch.autograd.grad((y * y).sum() + final.sum(), leaves))

    with tigon.batch_invariant():
        together, parts = run(slice(0, 2)), [run(slice(i, i + 1)) for i in range(2)]
    for t, *rows in zip(together, *parts, strict=True):
        assert torch.equal(t, torch.cat(rows))


@pytest.mark.parametrize("packed", [False, True])
def test_causal_conv1d(device, packed):
    draw = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    cu = torch.tensor([0, 1, 9], dtype=torch.int32, device=device) if packed else None

    def conv(x, weight, bias, initial):
        return tigon.causal_conv1d(
            x, weight, bias, initial_state=initial, cu_seqlens=cu, return_final_state=True
        )

    close(both(conv, [draw(1 if packed else 2, 9, 6), draw(6, 4), draw(6), draw(2, 6, 3)]))


def test_norms(device):
    draw = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    close(both(tigon.rms_norm, [draw(3, 5, 32), draw(32)]))
    for before in (False, True):

        def norm(x, z, weight, before=before):
            return tigon.gated_rms_norm(x, z, weight, group_size=16, norm_before_gate=before)

        close(both(norm, [draw(3, 5, 32), draw(3, 5, 32), draw(32)]))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_decode_steps(device, index_dtype):
    draw = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    slots = torch.tensor([4, -1, 0], dtype=index_dtype, device=device)
    count = torch.tensor([3, 3, 1], dtype=index_dtype, device=device)
    x, dt, B, C = draw(3, 3, 4, 8), draw(3, 3, 4), draw(3, 3, 2, 16), draw(3, 3, 2, 16)
    A, weight, bias, u = -draw(4).exp(), draw(6, 4), draw(6), draw(3, 3, 6)
    state, window = draw(5, 4, 8, 16), draw(5, 6, 3)
    results = []
    for name in ("kernel", "reference"):
        s, w = state.clone(), window.clone()
        with tigon.backend(name):
            y = tigon.ssd_update(
                s, x, dt, A, B, C, dt_softplus=True, state_indices=slots, num_tokens=count
            )
            v = tigon.causal_conv1d_update(
                u, w, weight, bias, state_indices=slots, num_tokens=count
            )
        results.append((y, s, v, w))
    close(zip(*results, strict=True))


@pytest.mark.parametrize("width", [1, 2, 8])
def test_decode_convolution_of_any_width(device, width):
    x, weight = torch.randn(2, 6, device=device), torch.randn(6, width, device=device)
    state = torch.randn(2, 6, width - 1, device=device)
    got = tigon.causal_conv1d_update(x, state.clone(), weight)
    with tigon.backend("reference"):
        torch.testing.assert_close(got, tigon.causal_conv1d_update(x, state.clone(), weight))


def test_the_kernels_really_ran(device, monkeypatch):
    """`backend("kernel")` never falls back: with no way to run one, it raises."""
    for op in ("ssd_scan", "ssd_update", "causal_conv1d", "causal_conv1d_update", "rms_norm"):
        assert dispatch.select(op, device, torch.float32).backend in ("triton", "cuda")
    if device.type == "cpu":
        native.use_host_library(None)
        with pytest.raises(RuntimeError, match="host build"):
            tigon.causal_conv1d_update(torch.zeros(1, 2), torch.zeros(1, 2, 3), torch.zeros(2, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_cuda_graph_captures_the_decode_step(device):
    state = torch.randn(4, 8, 64, 128, device=device)
    x, dt = torch.randn(4, 8, 64, device=device), torch.rand(4, 8, device=device)
    A, B, C = -torch.rand(8, device=device), *torch.randn(2, 4, 2, 128, device=device)
    expected_state = state.clone()
    expected = tigon.ssd_update(expected_state, x, dt, A, B, C)
    graph, captured = torch.cuda.CUDAGraph(), state.clone()
    with torch.cuda.graph(graph):
        y = tigon.ssd_update(captured, x, dt, A, B, C)
    captured.copy_(state)
    graph.replay()
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    torch.testing.assert_close(captured, expected_state, rtol=0, atol=0)
