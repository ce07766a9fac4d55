"""The demo's low-precision part: the NVFP4 training recipe beside plain training, and the trained model in 4 bits.

On a CPU without FP4 units the products are those of FP4 units up to the order of their sums, so what is compared is
the recipe, not its speed.
"""

import copy
from collections import Counter

import torch
from torch import Tensor

from tigon.cli.demo_train import bits_per_byte, train
from tigon.models import HybridLM
from tigon.modules.quantize import quantize
from tigon.modules.recipe import Recipe

STEPS = 120
HELD_OUT = 16_384  # bytes that bits per byte are measured on
# The published recipe keeps its last layers, 15 %, in high precision; here, with a handful of layers, none.
TRAINING = Recipe.preset("nemotron-3-super-train").replace(keep_last=0)


def training_bits(
    text: Tensor, held_out: Tensor, *, steps: int, seed: int, recipe: Recipe | None
) -> tuple[float, HybridLM]:
    """(bits per byte on `held_out`, the model) after `steps` steps of `tiny` from `seed`, quantized by `recipe`.

    For one seed the initial weights and the batches are the same with any recipe and without one.
    """
    torch.manual_seed(seed)
    model = HybridLM("tiny")
    if recipe is not None:
        quantize(model, recipe)
    train(model, text, seconds=0, steps=steps, seed=seed)
    return bits_per_byte(model, held_out), model


def compare_precisions(model: HybridLM, text: Tensor, held_out: Tensor, steps: int, seed: int):
    """Print bits per byte of two short trainings, and of the trained `model` with and without 4-bit weights."""
    held_out = held_out[:HELD_OUT]
    plain, _ = training_bits(text, held_out, steps=steps, seed=seed, recipe=None)
    low, trained = training_bits(text, held_out, steps=steps, seed=seed, recipe=TRAINING)
    formats = Counter(type(m).__name__ for m in trained.modules() if "Linear" in type(m).__name__)
    layers = ", ".join(f"{count} {name}" for name, count in formats.items())
    whole = bits_per_byte(model, held_out)
    small = copy.deepcopy(model)
    report = quantize(small, "nvfp4-weight-only")
    four = bits_per_byte(small, held_out)
    rows = (
        ("fp32 training", plain, f"{steps} steps from seed {seed}"),
        ("nvfp4 training", low, f"{_change(low, plain)}; the same batches; {layers}"),
        ("this model, fp32", whole, f"{report.bytes_before:,} bytes"),
        ("weights in nvfp4", four, f"{_change(four, whole)}; {report.bytes_after:,} bytes"),
    )
    print(f"low precision, bits per byte on {held_out.numel():,} held-out bytes:")
    for name, bits, note in rows:
        print(f"  {name:17} {bits:6.3f}   {note}")


def _change(new: float, old: float) -> str:
    return f"{100 * (new / old - 1):+.2f} %"
