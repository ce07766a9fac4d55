"""The demo's expert load: how often each expert of each E layer is chosen, as numbers and as bars."""

import torch
from torch import Tensor

from tigon.models import HybridLM

WINDOW = 2048


@torch.no_grad()
def expert_load(model: HybridLM, text: Tensor) -> Tensor:
    """(E layers, e) share of the choices that each expert gets on `text` (t) int64, in windows of their own."""
    counts = None
    for ids in text.split(WINDOW):
        _, routings = model.backbone(ids[None], return_routing=True)
        if not routings:
            return torch.zeros(0, 0)
        new = torch.stack([r.counts for r in routings]).long()
        counts = new if counts is None else counts + new
    return counts / counts.sum(1, keepdim=True)


def print_load(model: HybridLM, load: Tensor) -> None:
    """One line a layer: each expert's share in percent, and the largest against the mean."""
    config = model.config
    layers = [i for i, kind in enumerate(config.pattern) if kind == "E"]
    print(
        f"expert load on the held-out text, {config.num_experts_per_tok} of {config.n_routed_experts} a byte, "
        "% of the choices:"
    )
    for i, shares in zip(layers, load, strict=True):
        numbers = " ".join(f"{100 * share:5.1f}" for share in shares.tolist())
        print(f"  layer {i}  {numbers}   largest {shares.max() * len(shares):.2f} times the mean")


def draw_load(axes, model: HybridLM, load: Tensor) -> None:
    """Bars by expert, one colour a layer, and a line where all would be even."""
    layers = [i for i, kind in enumerate(model.config.pattern) if kind == "E"]
    width = 0.8 / max(len(layers), 1)
    for j, (layer, shares) in enumerate(zip(layers, load, strict=True)):
        places = torch.arange(len(shares)) + (j - (len(layers) - 1) / 2) * width
        axes.bar(places, 100 * shares, width, label=f"layer {layer}")
    axes.axhline(100 / load.shape[1], color="gray", linestyle="--", label="even")
    axes.set(xlabel="expert", ylabel="% of the choices, held-out text", title="expert load")
    axes.set_xticks(range(load.shape[1]))
    axes.legend(loc="lower right")
