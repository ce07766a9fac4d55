"""Train a small hybrid with its experts spread over processes, on one machine or several.

    torchrun --nproc-per-node=2 examples/expert_parallel.py [--steps 30]

Every process draws its own windows of text; the experts of a layer are shared out, all else is replicated by DDP. NCCL
where there are GPUs, gloo elsewhere. Prints the mean loss of all processes.
"""

import argparse
import os
import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from tigon.cli.demo_text import split_text
from tigon.distributed import ExpertParallel
from tigon.models import PRESETS, HybridLM

BATCH, LENGTH = 2, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps (default: 30)")
    steps = parser.parse_args().steps
    if "RANK" not in os.environ:
        parser.error(f"start it by torchrun: torchrun --nproc-per-node=2 {sys.argv[0]}")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same weights everywhere
    config = replace(
        PRESETS["tiny"],
        pattern="MEM*E",
        n_routed_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        moe_shared_expert_intermediate_size=128,
        moe_latent_size=64,
    )
    model = HybridLM(config).to(device)
    ExpertParallel(init_device_mesh(device.type, (world,))).shard(model)
    trained = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=False)

    text = torch.frombuffer(bytearray(split_text(0)[0]), dtype=torch.uint8).long()
    draw = torch.Generator().manual_seed(1 + rank)
    for step in range(steps):
        start = torch.randint(0, text.numel() - LENGTH, (BATCH, 1), generator=draw)
        ids = text[start + torch.arange(LENGTH + 1)].to(device)
        loss = trained(ids[:, :-1], labels=ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0 and (step % 10 == 9 or step == 0):
            print(
                f"step {step + 1:4}: {mean.item() / world:.3f} nats a byte, {world} processes",
                flush=True,
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
