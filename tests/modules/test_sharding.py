"""FSDP2 with mixed precision on one process: A_log, D and dt_bias enter the scan as they are stored."""

import pytest
import torch
import torch.distributed as dist

from tigon.models import PRESETS, HybridLM
from tigon.modules import Mamba2, fully_shard

fsdp = pytest.importorskip("torch.distributed.fsdp")


@pytest.fixture
def mesh(tmp_path):
    if not (dist.is_available() and hasattr(fsdp, "fully_shard") and not dist.is_initialized()):
        pytest.skip("no FSDP2, or a process group is up already")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_decay_rates_stay_fp32_while_matrices_train_in_bf16(mesh):
    torch.manual_seed(0)
    config = PRESETS["tiny"].replace(pattern="M*-M", vocab_size=50, hidden_size=64)
    model, exact = HybridLM(config), HybridLM(config)
    exact.load_state_dict(model.state_dict())
    policy = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.backbone.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)

    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, Mamba2):
            module.out_proj.register_forward_pre_hook(
                lambda _, args, name=name, m=module: seen.update(
                    {name: (m.A_log.dtype, args[0].dtype)}
                )
            )
    ids = torch.randint(0, 50, (2, 40))
    loss = model(ids[:, :-1], labels=ids[:, 1:])
    loss.backward()
    exact(ids[:, :-1], labels=ids[:, 1:]).backward()
    assert seen and set(seen.values()) == {(torch.float32, torch.bfloat16)}
    for (name, p), q in zip(model.named_parameters(), exact.parameters()):
        grad = p.grad.full_tensor()
        assert p.dtype == torch.float32, name
        error = (grad - q.grad).norm() / q.grad.norm()
        assert error < 0.1, f"{name}: {error}"
