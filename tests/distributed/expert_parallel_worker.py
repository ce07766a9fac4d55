"""What one process of test_expert_parallel.py does: `torchrun expert_parallel_worker.py CHECK`."""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tigon.distributed import ExpertParallel
from tigon.modules import LatentMoE

WIDTH = 32
SIZES = (5, 0, 9, 3)  # tokens a process: none, too


class Model(nn.Module):
    """Two layers, so that one's gradient passes through the other's exchange."""

    def __init__(self, **options):
        super().__init__()
        layer = {"scale": 2.0, "activation": "relu2"} | options
        self.layers = nn.ModuleList(
            LatentMoE(WIDTH, 16, experts, 24, 3, 40, **layer) for experts in (6, 8)
        )

    def forward(self, x, bias=0.0):
        for layer in self.layers:
            x = x + layer(x)
        return x


def twins(**options) -> tuple[Model, Model]:
    """Two models of the same weights, the same in every process."""
    torch.manual_seed(0)
    one, other = Model(**options), Model(**options)
    other.load_state_dict(one.state_dict())
    return one, other


def tokens(sizes) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(n, WIDTH) for n in sizes]


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def compare(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6, msg=lambda m: f"{name}: {m}")


def check_layers(rank: int, world: int) -> None:
    """Outputs and every gradient are those of one process that has all tokens; uneven loads, an empty process, all
    tokens to one process, both forms of the exchange, both activations."""
    mesh = init_device_mesh("cpu", (world,))
    for options in (
        {},
        {"activation": "swiglu", "save": "nothing"},
        {"weight_placement": "before_down"},
    ):
        for capacity in (None, max(SIZES)):
            for crowded in (False, True):
                model, reference = twins(**options)
                for m in (model, reference):
                    for layer in m.layers:
                        layer.gate.e_score_correction_bias[:3] += 10 * crowded
                ExpertParallel(mesh, capacity=capacity, gradients="sum").shard(model)
                parts = tokens(SIZES[:world])
                x = parts[rank].clone().requires_grad_()
                y = model(x)
                y.square().sum().backward()
                everything = torch.cat(parts).requires_grad_()
                want = reference(everything)
                want.square().sum().backward()
                first = sum(SIZES[:rank])
                mine = slice(first, first + SIZES[rank])
                compare("y", y, want[mine])
                compare("dx", x.grad, everything.grad[mine])
                for (key, p), q in zip(model.named_parameters(), reference.parameters()):
                    if "experts" in key and "shared" not in key:
                        compare(key, whole(p.grad), q.grad)
                for layer in model.layers:
                    assert layer.experts.dropped == 0
                    assert layer.experts.last - layer.experts.first <= -(
                        -layer.experts.total // world
                    )


def check_dropping(rank: int, world: int) -> None:
    """Tokens without room lose their choices at that process, are counted, and get no gradient from it."""
    mesh = init_device_mesh("cpu", (world,))
    model, _ = twins()
    ExpertParallel(mesh, capacity=2).shard(model)
    x = tokens([7] * world)[rank].requires_grad_()
    model.layers[0](x).sum().backward()
    assert (
        model.layers[0].experts.dropped >= 5
    )  # of 7 tokens 2 fit; each wants one process at least
    assert x.grad.isfinite().all()


def steps(model: nn.Module, parts, rank: int | None, world: int) -> list[float]:
    """Losses of three steps of SGD on the mean over tokens: of this process's part, or of all parts in turn."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        mine = parts if rank is None else [parts[rank]]
        loss = sum(model(part).square().mean() for part in mine) / len(mine)
        loss.backward()
        optimizer.step()
        value = loss.detach().clone()
        if rank is not None:
            dist.all_reduce(value)
            value /= world
        losses.append(value.item())
    return losses


def check_ddp(rank: int, world: int) -> None:
    """Three steps of SGD under DDP leave the weights that one process gets."""
    model, reference = twins()
    ExpertParallel(init_device_mesh("cpu", (world,))).shard(model)
    parts = tokens([6] * world)
    got = steps(DistributedDataParallel(model), parts, rank, world)
    want = steps(reference, parts, None, world)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want))
    for (key, p), q in zip(model.named_parameters(), reference.parameters()):
        compare(key, whole(p.detach()), q.detach())


def check_fsdp(rank: int, world: int) -> None:
    """The same under FSDP2: with 4 processes experts are sharded by expert over two and again by FSDP over two."""
    model, reference = twins()
    if world == 2:
        mesh = init_device_mesh("cpu", (2,))
        ExpertParallel(mesh).shard(model)
        own = {p for layer in model.layers for p in layer.experts.parameters()}
        fully_shard(model, mesh=mesh, ignored_params=own)
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
        ExpertParallel(mesh["expert"]).shard(model)
        for layer in model.layers:
            fully_shard(layer.experts, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data", "expert"]._flatten("all"))
    parts = tokens([6] * world)
    got = steps(model, parts, rank, world)
    want = steps(reference, parts, None, world)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want))
    for (key, p), q in zip(model.named_parameters(), reference.parameters()):
        compare(key, whole(p.detach()), q.detach())


def check_killed(rank: int, world: int) -> None:
    """The last process dies in the middle of a step; the others must not wait for it for ever."""
    model, _ = twins()
    ExpertParallel(init_device_mesh("cpu", (world,))).shard(model)
    model(torch.randn(6, WIDTH)).sum().backward()
    print("one step done", flush=True)
    if rank == world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    model(torch.randn(6, WIDTH)).sum().backward()
    time.sleep(3600)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    globals()[f"check_{sys.argv[1]}"](dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()
