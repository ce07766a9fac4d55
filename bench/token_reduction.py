"""How much faster prefill is when tokens are dropped: `python -m tigon.bench.token_reduction`.

A model with the 62 layers of Nemotron Nano 2 12B (28 Mamba-2, 28 MLP, 6 attention) at a sixteenth of its width, random
weights, fp32 on the CPU, reads one prompt: visual tokens, then a question. The unreduced and the reduced model take
turns, so that drift of the machine hits both alike; the ratio is the median over rounds. `overhead` is the time inside
scoring, selection and compaction, as a share of the reduced prefill: what the budget's arithmetic leaves out. On a busy
machine use --clock cpu: processor time of all threads.

What the model chooses is not asked here: weights are random.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from tigon.bench.environment import environment
from tigon.models import HybridConfig, HybridLM
from tigon.models.presets import preset
from tigon.models.reduction_schedule import KINDS, ReductionSchedule
from tigon.modules import Mamba2, TokenReducer
from tigon.modules.reduced_stack import Tokens

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SHAPE = {
    "hidden_size": 320,
    "mamba_num_heads": 8,
    "mamba_head_dim": 80,
    "n_groups": 1,
    "ssm_state_size": 64,
    "intermediate_size": 1280,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 80,
    "vocab_size": 1024,
}
PATTERN = preset("nemotron-nano-2-12b").pattern
# Everything that a reduced prefill does and an unreduced one does not.
PARTS = {
    "score": ((Tokens, "_score_ssd"), (Tokens, "_score_attention"), (Mamba2, "_step_sizes")),
    "select_and_compact": ((Tokens, "enter"), (Tokens, "leave")),
}


@contextlib.contextmanager
def clocked(now: Callable[[], float]) -> Iterator[dict[str, float]]:
    """Seconds inside each of PARTS, while this lasts."""
    seconds, originals = dict.fromkeys(PARTS, 0.0), []

    def wrap(part: str, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[part] += now() - start

        return timed

    for part, methods in PARTS.items():
        for owner, name in methods:
            originals.append((owner, name, getattr(owner, name)))
            setattr(owner, name, wrap(part, getattr(owner, name)))
    try:
        yield seconds
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)


@torch.inference_mode()
def benchmark(
    schedule: ReductionSchedule,
    visual: int = 16384 - 64,
    text: int = 64,
    rounds: int = 3,
    clock: str = "cpu",
    pattern: str = PATTERN,
    **shape: int,
) -> dict:
    """Medians over rounds, after a warm-up of a short prompt: seconds of both, ratio, shares of the overhead."""
    torch.manual_seed(0)
    config = HybridConfig(pattern=pattern, **{**SHAPE, **shape})
    model, reducer, now = HybridLM(config).eval(), TokenReducer(schedule), CLOCKS[clock]
    plan = reducer.plan(config, visual=visual, text=text)

    def prefill(count: int, reduced: bool) -> tuple[float, dict[str, float]]:
        ids = torch.randint(0, config.vocab_size, (1, count + text))
        mask = (torch.arange(count + text) < count)[None]
        cache = model.allocate_cache(1, count + text)
        options = {"reduction": reducer, "reducible": mask} if reduced else {}
        with clocked(now) as seconds:
            start = now()
            hidden = model.backbone(ids, cache=cache, **options)
            model.logits(hidden[:, -1])
            return now() - start, seconds

    for reduced in (False, True):
        prefill(min(visual, 512), reduced)
    rows = []
    for i in range(rounds):
        full, (part, seconds) = prefill(visual, False)[0], prefill(visual, True)
        rows.append((full, part, seconds))
        print(f"round {i}: {full:.2f} s, {part:.2f} s", file=sys.stderr)
    shares = {
        name: statistics.median(seconds[name] / part for _, part, seconds in rows) for name in PARTS
    }
    return {
        "full_s": statistics.median(full for full, _, _ in rows),
        "reduced_s": statistics.median(part for _, part, _ in rows),
        "ratio": statistics.median(full / part for full, part, _ in rows),
        "overhead": sum(shares.values()),
        "overhead_parts": shares,
        "rounds": [(full, part) for full, part, _ in rows],
        "average": plan.average,
        "final": plan.final,
        "flops_ratio": plan.full_flops / plan.flops,
    }


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384, help="of the prompt")
    parser.add_argument("--text", type=int, default=64, help="of these, the question's")
    parser.add_argument("--kind", choices=KINDS, default="stages")
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument(
        "--gamma", type=float, help="of 'power'; below 1 it drops early, and everywhere"
    )
    parser.add_argument("--average", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args(argv)
    schedule = ReductionSchedule(
        args.kind, average=args.average, stages=args.stages, gamma=args.gamma
    )
    found = benchmark(schedule, args.tokens - args.text, args.text, args.rounds, args.clock)
    print(
        f"{args.tokens} tokens, {args.kind}: average {found['average']:.3f}, final {found['final']:.3f}; "
        f"{found['full_s']:.2f} s unreduced, {found['reduced_s']:.2f} s reduced: {found['ratio']:.2f}x "
        f"({found['flops_ratio']:.2f}x fewer FLOPs); scoring, selection and compaction {found['overhead']:.1%}"
    )
    if args.json:
        record = {
            "command": "python -m tigon.bench.token_reduction " + " ".join(argv or sys.argv[1:]),
            "env": environment("cpu"),
            "threads": torch.get_num_threads(),
            "pattern": PATTERN,
            "shape": SHAPE,
            "schedule": asdict(schedule),
            "results": found,
        }
        Path(args.json).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
