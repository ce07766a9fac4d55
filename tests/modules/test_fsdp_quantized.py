"""FSDP2 over two processes: quantized layers shard, and compute what they do in one piece."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tigon.models import PRESETS, HybridLM
from tigon.modules import FP8Linear, NVFP4Linear
from tigon.modules.quantize import quantize
from tigon.modules.sharding import fully_shard

fsdp = pytest.importorskip("torch.distributed.fsdp")
WORLD = 2


def test_two_processes_compute_what_one_does(tmp_path):
    if not (dist.is_available() and hasattr(fsdp, "fully_shard")):
        pytest.skip("no FSDP2")
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(Path(__file__)), str(tmp_path / "store")]
    ranks = [
        subprocess.Popen([*command, str(rank)], env=env, stderr=subprocess.PIPE, text=True)
        for rank in range(WORLD)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * WORLD, "\n".join(errors)


def _layers(frozen: bool) -> nn.Module:
    """Every format, of sizes that neither 16 nor two ranks divide."""
    options = [
        (FP8Linear, {"scaling": "tensor"}),
        (FP8Linear, {"scaling": "row"}),
        (FP8Linear, {"scaling": "block"}),
        (FP8Linear, {"scaling": "mxfp8"}),
        (NVFP4Linear, {}),
        (NVFP4Linear, {"row_scaled": True}),
    ]
    sizes = [37, 150, 41, 67, 33, 29, 15]
    layers = [
        kind.from_linear(nn.Linear(k, n, bias=True), frozen=frozen, **more)
        for (kind, more), k, n in zip(options, sizes, sizes[1:])
    ]
    return nn.Sequential(nn.Linear(19, sizes[0]), *layers)


def _check(name: str, whole: nn.Module, parts: nn.Module, run, exact: bool) -> None:
    """Same results, and the same gradients of all that trains."""
    results = []
    for model in (whole, parts):
        torch.manual_seed(7)
        loss = run(model)
        loss.backward()
        results.append(loss.detach())
    assert results[0].isfinite() and results[0] != 0
    torch.testing.assert_close(results[1], results[0], rtol=0 if exact else 1e-2, atol=0, msg=name)
    for (key, p), q in zip(parts.named_parameters(), whole.parameters()):
        if not q.requires_grad:
            assert p.grad is None, key
            continue
        got = p.grad.full_tensor()
        error = (got - q.grad).norm() / q.grad.norm()
        assert got.dtype == q.dtype and error <= (1e-6 if exact else 0.3), f"{name} {key}: {error}"


def _check_layers(mesh) -> None:
    x = torch.randn(5, 19)
    for frozen in (False, True):
        whole, parts = _layers(frozen), _layers(frozen)
        parts.load_state_dict(whole.state_dict())
        for layer in parts:
            fsdp.fully_shard(layer, mesh=mesh)
        fsdp.fully_shard(parts, mesh=mesh)
        assert parts[-1].weight.to_local().shape[0] < 15
        _check(f"frozen={frozen}", whole, parts, lambda m: m(x).square().sum(), exact=True)


def _check_model(mesh) -> None:
    """tigon's fully_shard with bf16 parameters: codes stay codes."""
    config = PRESETS["tiny"].replace(pattern="M*-", vocab_size=50, hidden_size=48)
    ids = torch.randint(0, 50, (2, 20))
    policy = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for recipe in ("nemotron-3-super-infer", "nemotron-3-super-train"):
        whole = HybridLM(config)
        parts = HybridLM(config)
        parts.load_state_dict(whole.state_dict())
        for model in (whole, parts):
            quantize(model, recipe)
        for block in parts.backbone.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(parts, mesh=mesh, mp_policy=policy)
        run = lambda m: m(ids[:, :-1], labels=ids[:, 1:])  # noqa: E731
        _check(recipe, whole, parts, run, exact=False)
        codes = parts.backbone.layers[0].mixer.out_proj.weight
        assert codes.dtype == (torch.float8_e4m3fn if "infer" in recipe else torch.float32)


def _main(store: str, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    _check_layers(mesh)
    _check_model(mesh)
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
