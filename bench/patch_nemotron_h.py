"""How much faster `tigon.patch` makes a Mamba-heavy NemotronH: `python -m tigon.bench.patch_nemotron_h`.

One process holds the model and a patched twin that shares its weights. Prefill and decode run alternately on both,
so that drift of the machine hits both alike; the ratio is the median over rounds of (unpatched / patched) time.
The share of the dense GEMMs, which patching leaves alone, is the time inside nn.Linear: at a share s of the
unpatched time no patch is faster than 1 / s. On a busy machine use --clock cpu: processor time of all threads.
"""

import argparse
import contextlib
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import tigon
from tigon.bench.environment import environment

# Mamba layers with 64 heads of 64, 8 groups and state 128; one attention layer, since transformers cannot build the
# masks of a cached NemotronH without one.
LAYERS = (*["linear_attention"] * 4, "mlp", "full_attention")
SHAPE = {
    "hidden_size": 1024,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def build(layers: tuple[str, ...] = LAYERS, **shape: int) -> tuple[nn.Module, nn.Module]:
    """(model, patched): NemotronH with random weights on the CPU in fp32, and a patched twin on the same weights."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    torch.manual_seed(0)
    config = NemotronHConfig(layers_block_type=list(layers), **{**SHAPE, **shape})
    model = NemotronHForCausalLM(config).eval()
    weights = {id(t): t for t in (*model.parameters(), *model.buffers())}
    patched = copy.deepcopy(model, weights)  # the memo makes the twin keep the very same tensors
    tigon.patch(patched)
    return model, patched


class LinearClock:
    """Time spent inside the nn.Linear modules of a model, by the clock `now`."""

    def __init__(self, model: nn.Module, now: Callable[[], float]):
        self.seconds, self._start, self._now = 0.0, 0.0, now
        self._hooks = []
        for module in model.modules():
            if isinstance(module, nn.Linear):
                self._hooks.append(module.register_forward_pre_hook(self._enter))
                self._hooks.append(module.register_forward_hook(self._leave))

    def _enter(self, module, args):
        self._start = self._now()

    def _leave(self, module, args, out):
        self.seconds += self._now() - self._start

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def measure(
    model: nn.Module, run: Callable[[], None], now: Callable[[], float]
) -> tuple[float, float]:
    """(seconds, seconds in dense GEMMs) of one run."""
    with contextlib.closing(LinearClock(model, now)) as clock:
        start = now()
        run()
        return now() - start, clock.seconds


def prefill(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    """A run of the whole prompt, cache included."""
    return lambda: model(ids, use_cache=True, logits_to_keep=1)


def decode(model: nn.Module, ids: torch.Tensor, tokens: int) -> Callable[[], None]:
    """A run of `tokens` one-token steps after the prompt."""
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values

    def run() -> None:
        for t in range(tokens):
            model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)

    return run


def compare(pair: tuple, runs: tuple, rounds: int, now: Callable) -> dict[str, float]:
    """Medians over rounds: seconds of each, their ratio, and the dense share of each; one warm-up round."""
    rows = []
    for _ in range(rounds + 1):
        rows.append([measure(model, run, now) for model, run in zip(pair, runs, strict=True)])
    rows = rows[1:]
    return {
        "unpatched": statistics.median(a[0] for a, _ in rows),
        "patched": statistics.median(b[0] for _, b in rows),
        "ratio": statistics.median(a[0] / b[0] for a, b in rows),
        "dense_unpatched": statistics.median(a[1] / a[0] for a, _ in rows),
        "dense_patched": statistics.median(b[1] / b[0] for _, b in rows),
    }


@torch.inference_mode()
def benchmark(
    tokens: int = 1024,
    batch: int = 1,
    steps: int = 16,
    rounds: int = 5,
    clock: str = "wall",
    **shape: int,
) -> dict[str, dict[str, float]]:
    """{"prefill": ..., "decode": ...}: what `compare` returns, for one prompt and `steps` tokens after it."""
    pair = build(**shape)
    now = CLOCKS[clock]
    ids = torch.randint(3, pair[0].config.vocab_size, (batch, tokens))
    difference = (pair[0](ids[:, :256]).logits - pair[1](ids[:, :256]).logits).abs().max().item()
    if difference > 1e-4:
        raise AssertionError(f"patched logits differ by {difference:.2g}: nothing to time")
    return {
        "prefill": compare(pair, tuple(prefill(m, ids) for m in pair), rounds, now),
        "decode": compare(pair, tuple(decode(m, ids[:, :64], steps) for m in pair), rounds, now),
    }


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024, help="prompt length")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=16, help="tokens decoded in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden_size", type=int, default=SHAPE["hidden_size"])
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args(argv)
    shape = SHAPE | {"hidden_size": args.hidden_size}
    print(f"NemotronH on the CPU, fp32, layers {', '.join(LAYERS)}, {shape}")
    print(f"batch {args.batch}, {torch.get_num_threads()} threads, {args.clock} clock")
    options = {k: v for k, v in vars(args).items() if k != "json"}
    found = benchmark(**options)
    if args.json:
        record = {"env": environment("cpu"), "options": options, "shape": shape, "results": found}
        Path(args.json).write_text(json.dumps(record, indent=2) + "\n")
    for name, row in found.items():
        each = args.tokens * args.batch if name == "prefill" else args.steps * args.batch
        bound = 1 / row["dense_unpatched"]
        print(
            f"{name:8} unpatched {row['unpatched'] / each * 1e3:8.3f} ms/token, "
            f"patched {row['patched'] / each * 1e3:8.3f} ms/token: {row['ratio']:.2f}x "
            f"(dense GEMMs are {row['dense_unpatched']:.0%} of the time, {row['dense_patched']:.0%} once patched; "
            f"they bound the ratio at {bound:.2f}x)"
        )


if __name__ == "__main__":
    main()
