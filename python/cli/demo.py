"""`tigon demo`: the whole way on real text. Train the `tiny` preset, compare, save, generate, check the decode path.
With --token-reduction another one: two-hop retrieval while tokens are dropped between the layers."""

import argparse
import os
from pathlib import Path

PROMPT = "The following example shows how a class "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--token-reduction",
        action="store_true",
        help="instead: train two-hop retrieval, then compare ways to drop tokens (a few minutes)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="to train, by the clock (default: 90 s; with --token-reduction 900 steps)",
    )
    parser.add_argument("--steps", type=int, help="train this many steps instead, however long")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-output"),
        help="folder to write to (default: demo-output)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default: 0)")
    parser.add_argument(
        "--prompt", default=PROMPT, help=f"text to go on from (default: {PROMPT!r})"
    )
    parser.add_argument(
        "--queries", type=int, default=1000, help="questions of --token-reduction (default: 1000)"
    )


def run(args: argparse.Namespace) -> int:
    """0 if all went well, 2 if the decode path's logits are not those of full recomputation."""
    # Read when torch loads OpenMP. Threads that spin while they wait stop each other on busy cores: with two
    # threads on two cores shared with other work, 20 s were 2 training steps spinning and 32 sleeping.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if args.token_reduction:
        from tigon.cli.demo_retrieval import run_retrieval

        return run_retrieval(args)
    if args.seconds is None:
        args.seconds = 90
    from tigon.cli.demo_run import run_demo

    return run_demo(args)
