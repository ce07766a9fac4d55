"""Train the `tiny` preset twice from each of three seeds, plainly and with the NVFP4 recipe, and compare.

    python examples/nvfp4_training.py [--steps 200] [--seeds 3]

The recipe is Nemotron 3 Super's, without its high-precision last layers: NVFP4 for Mamba's in_proj and the MLP, MXFP8
for out_proj. Exit code 1 if the mean difference of held-out bits per byte is more than 3 %.
"""

import argparse
import sys
from statistics import mean

import torch

from tigon.cli.demo_lowprec import TRAINING, training_bits
from tigon.cli.demo_text import split_text

LIMIT = 0.03


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bytes", type=int, default=16_384, help="held-out bytes to measure on")
    args = parser.parse_args()
    training, held_out = (
        torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in split_text()
    )
    changes = []
    for seed in range(args.seeds):
        plain, low = (
            training_bits(
                training, held_out[: args.bytes], steps=args.steps, seed=seed, recipe=recipe
            )[0]
            for recipe in (None, TRAINING)
        )
        changes.append(low / plain - 1)
        print(
            f"seed {seed}: fp32 {plain:.4f} bits per byte, NVFP4 {low:.4f}, {changes[-1]:+.2%}",
            flush=True,
        )
    print(f"mean difference {mean(changes):+.2%}, at most {LIMIT:.0%} is expected")
    return int(mean(changes) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
