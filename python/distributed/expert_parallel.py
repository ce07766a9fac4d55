"""Expert parallelism: each process holds some of the experts, tokens travel to them in the latent width.

    ExpertParallel(mesh).shard(model)        # every LatentMoE inside; then DDP or fully_shard, then train

torch.distributed does all communication (NCCL on GPUs, gloo on CPUs): the choices, their weights and the latent rows
out, one row a token and rank back. Process r holds experts r c to (r+1) c, c = ceil(experts / processes).
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from tigon.distributed.exchange import give_back, plan, send
from tigon.modules.experts import Experts
from tigon.modules.latent_moe import LatentMoE
from tigon.ops import Routing, moe_experts, moe_sort


class _Scaled(torch.autograd.Function):
    """The tensor itself; its gradient is multiplied."""

    @staticmethod
    def forward(ctx, t: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return t.view_as(t)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.factor, None


class ShardedExperts(nn.Module):
    """`Experts` of which this process holds a part; the same names, parameters as DTensors sharded by expert.

    forward(x (t,l), routing) -> (t,l), of this process's own tokens; every process of the mesh must call it.
    """

    def __init__(
        self,
        experts: Experts,
        mesh: DeviceMesh,
        capacity: int | None,
        gradients: Literal["mean", "sum"],
    ):
        super().__init__()
        self.mesh, self.capacity = mesh, capacity
        self.activation, self.weight_placement = experts.activation, experts.weight_placement
        self.save, self.up_name = experts.save, experts.up_name
        self.total = experts.down_proj.shape[0]
        self.scale = 1 / mesh.size() if gradients == "mean" else 1.0
        share = -(-self.total // mesh.size())
        rank = mesh.get_local_rank()
        self.first, self.last = (min(r * share, self.total) for r in (rank, rank + 1))
        for name, whole in experts.named_parameters(recurse=False):
            part = whole.detach()[self.first : self.last].clone()
            part = DTensor.from_local(
                part, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
            )
            self.register_parameter(name, nn.Parameter(part, requires_grad=whole.requires_grad))
        self.share = share
        dropped = torch.zeros((), dtype=torch.int64, device=experts.down_proj.device)
        self.register_buffer("dropped", dropped, persistent=False)

    def _local(self, name: str) -> Tensor:
        weight = getattr(self, name)
        weight = weight.to_local() if isinstance(weight, DTensor) else weight
        return _Scaled.apply(weight, self.scale) if self.scale != 1 else weight

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        group = self.mesh.get_group()
        # Not a buffer: `to_empty` after a start on "meta" would leave anything in it.
        owner = torch.arange(self.total, device=x.device) // self.share
        way = plan(routing.indices, owner, group, self.capacity)
        if self.capacity is not None:
            self.dropped += way.dropped
        indices = send(routing.indices, way, group, fill=self.total)
        weights = send(routing.weights, way, group)
        rows = send(x, way, group)
        elsewhere = (indices < self.first) | (indices >= self.last)
        here = moe_sort(indices.masked_fill(elsewhere, self.total), weights, experts=self.total)
        rows = moe_experts(
            *(rows, self._local(self.up_name), self._local("down_proj"), here),
            activation=self.activation,
            weight_placement=self.weight_placement,
            save=self.save,
            expert_range=(self.first, self.last),
        )
        return give_back(rows, way, group)

    def extra_repr(self) -> str:
        return f"{self.first} to {self.last} of {self.total}, capacity={self.capacity}"


class ExpertParallel:
    """Shards the experts of LatentMoE layers over the processes of a mesh.

    Args:
        mesh: one-dimensional; every process of it holds ceil(e / processes) experts (the last ones fewer or none).
        capacity: None: exactly the rows that are needed travel; their counts are read by the host, one wait a layer.
            A number of tokens, the same everywhere: every process sends every other one this many rows, padded, and
            nothing waits, so a CUDA graph can capture it. A token goes to a process once, so with as many as a call has
            tokens nothing is ever dropped; with fewer, tokens that find no room lose their choices there, and
            `ShardedExperts.dropped` counts them.
        gradients: of the expert weights: "mean", divided by the mesh's size as DDP and FSDP2 do with the others (the
            loss is a mean over processes), or "sum".

    Raises:
        ValueError: a mesh that is not one-dimensional, options out of range.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        *,
        capacity: int | None = None,
        gradients: Literal["mean", "sum"] = "mean",
    ):
        if mesh.ndim != 1:
            raise ValueError(f"ExpertParallel: mesh must have one dimension, got {mesh.ndim}")
        if capacity is not None and capacity < 1:
            raise ValueError(f"ExpertParallel: capacity must be None or positive, got {capacity}")
        if gradients not in ("mean", "sum"):
            raise ValueError(
                f"ExpertParallel: gradients must be 'mean' or 'sum', got {gradients!r}"
            )
        self.mesh, self.capacity, self.gradients = mesh, capacity, gradients

    def shard(self, module: nn.Module) -> nn.Module:
        """Replace the experts of every LatentMoE inside `module`, in place; the module itself.

        Every process must hold the same weights, as after the same seed or the same checkpoint. DistributedDataParallel
        of `module` leaves the sharded weights alone, for each process trains its own.
        """
        layers = [m for m in module.modules() if isinstance(m, LatentMoE)]
        if not layers:
            raise ValueError(f"ExpertParallel: there is no LatentMoE in {type(module).__name__}")
        for layer in layers:
            if isinstance(layer.experts, ShardedExperts):
                raise ValueError("ExpertParallel: the experts of this layer are sharded already")
            layer.experts = ShardedExperts(layer.experts, self.mesh, self.capacity, self.gradients)
        own = [name for name, p in module.named_parameters() if isinstance(p, DTensor)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, own)
        return module
