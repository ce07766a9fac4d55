"""What `tigon demo` does, in order, and what it prints."""

import argparse
import copy
import math
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from tigon.cli import demo_lowprec
from tigon.cli.demo_drafts import compare_drafts
from tigon.cli.demo_experts import draw_load, expert_load, print_load
from tigon.cli.demo_text import lzma_bits, order_2_bits, split_text
from tigon.cli.demo_train import BATCH, LENGTH, History, bits_per_byte, train
from tigon.generation import generate
from tigon.models import HybridLM

OK, WRONG_RESULT = 0, 2
NEW_BYTES = 240
TOLERANCE = 1e-3  # of log-probabilities from fp32 logits of size 10: decode and prefill sum in different orders
EXACT = 1e-8  # of the same in fp64


def run_demo(args: argparse.Namespace) -> int:
    """The exit code: 2 if the decode path's logits are not those of full recomputation."""
    training, held_out = split_text(args.seed)
    torch.manual_seed(args.seed)
    model = HybridLM("tiny")
    count = sum(p.numel() for p in model.parameters())
    print(
        f"text: pydoc_data.topics, {len(training):,} bytes to train on, {len(held_out):,} held out (whole topics)\n"
        f"model: tiny, layers {model.config.pattern}, {count:,} parameters, bytes as tokens"
    )
    with Progress(args) as report:
        history = train(
            model,
            _ids(training),
            seconds=args.seconds,
            steps=args.steps,
            seed=args.seed,
            report=report,
        )
    steps = len(history.nats)
    print(f"trained {steps} steps of {BATCH * LENGTH} bytes in {history.seconds:.0f} s")
    model.save_pretrained(args.out / "model")
    print(f"saved {args.out / 'model'}")
    load = expert_load(model, _ids(held_out))
    _plot(history, model, load, args.out / "loss.png")
    _compare(model, training, held_out)
    print_load(model, load)
    compare_drafts(model, _ids(held_out), args.seed)
    # A quarter of the steps above at most: on a busy machine two short trainings take no longer than the long one.
    steps = max(1, min(demo_lowprec.STEPS, steps // 4))
    demo_lowprec.compare_precisions(model, _ids(training), _ids(held_out), steps, args.seed)
    return _generate(model, args.prompt, args.seed)


def _ids(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def _bits(nats: float) -> float:
    return nats / math.log(2)


class Progress:
    """A context that gives a function (progress, value) to call: a bar where rich is installed, else plain lines with
    what `say` makes of the running mean."""

    def __init__(self, args: argparse.Namespace, say=lambda nats: f"{_bits(nats):.2f} bits/byte"):
        self.say = say
        self.goal = f"{args.seconds:.0f} s" if args.steps is None else f"{args.steps} steps"
        self.mean, self.next_line, self.bar = None, 0.0, None

    def __enter__(self):
        if find_spec("rich") is not None:
            from rich.progress import Progress as Bar

            self.bar = Bar()
            self.bar.start()
            self.task = self.bar.add_task(f"training, {self.goal}", total=1.0)
        return self.report

    def report(self, progress: float, value: float) -> None:
        self.mean = value if self.mean is None else 0.95 * self.mean + 0.05 * value
        text = f"training, {self.goal}: {self.say(self.mean)}"
        if self.bar is not None:
            self.bar.update(self.task, completed=progress, description=text)
        elif progress >= self.next_line:
            print(f"{text}, {100 * progress:.0f} %", flush=True)
            self.next_line += 0.1

    def __exit__(self, *error) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=1.0)
            self.bar.stop()


def _plot(history: History, model: HybridLM, load: Tensor, path: Path) -> None:
    if find_spec("matplotlib") is None:
        print(
            "no picture of loss and expert load: matplotlib is not installed; pip install 'tigon[demo]'"
        )
        return
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    bits = torch.tensor(history.nats) / math.log(2)
    figure, (axes, bars) = pyplot.subplots(1, 2, figsize=(12, 4), layout="constrained")
    axes.plot(bits, alpha=0.3, label="step")
    width = min(20, len(bits))
    if width:
        smooth = bits.unfold(0, width, 1).mean(-1)
        axes.plot(range(width - 1, len(bits)), smooth, label=f"mean of {width} steps")
    axes.set(xlabel="step", ylabel="bits per byte, training text", title="tigon demo: tiny preset")
    axes.legend()
    axes.grid(alpha=0.3)
    draw_load(bars, model, load)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"saved {path}")


def _compare(model: HybridLM, training: bytes, held_out: bytes) -> None:
    """Bits per byte on the held-out text, every contender knowing the training text."""
    rows = (
        ("tiny", bits_per_byte(model, _ids(held_out)), "this model"),
        (
            "order-2",
            order_2_bits(training, held_out),
            "byte contexts of the training text, Witten-Bell",
        ),
        (
            "lzma",
            lzma_bits(training, held_out),
            "8 (size(training + held out) - size(training)) / bytes",
        ),
    )
    print("bits per byte on the held-out text:")
    for name, bits, note in rows:
        print(f"  {name:8} {bits:6.3f}   {note}")


def _generate(model: HybridLM, prompt: str, seed: int) -> int:
    """Continue the prompt greedily and at temperature 1; compare log-probabilities with full recomputation."""
    ids = _ids(prompt.encode())
    worst = 0.0
    for name, temperature in (("greedy", 0.0), ("temperature 1", 1.0)):
        start = time.perf_counter()
        (new,), (logprobs,) = generate(
            model, [ids], NEW_BYTES, temperature=temperature, seed=seed, logprobs=True, stop_ids=()
        )
        rate = NEW_BYTES / (time.perf_counter() - start)
        text = bytes(new.tolist()).decode(errors="replace")
        print(f"\n--- {name}, {rate:.0f} bytes/s with 3 drafts a step\n{prompt}{text}")
        worst = max(worst, _agreement(model, torch.cat([ids, new]), logprobs))
    verdict = "agree" if worst <= TOLERANCE else "DIFFER"
    print(
        f"\ndecode path and full recomputation {verdict}: "
        f"largest difference of a log-probability {worst:.1e}, allowed {TOLERANCE:.0e}"
    )
    return OK if worst <= TOLERANCE else WRONG_RESULT


def _agreement(model: HybridLM, ids: Tensor, decoded: Tensor) -> float:
    """`_difference`; where fp32 leaves a doubt, that of both paths in fp64.

    Of two experts with nearly the same score, rounding lets decode choose one and recomputation the other (a few
    tokens in a million): the logits then differ although both are right. In fp64 no such tie is met.
    """
    found = _difference(model, ids, decoded)
    if found <= TOLERANCE:
        return found
    exact = copy.deepcopy(model).double()
    exact.config = model.config.replace(mamba_ssm_cache_dtype="float64")
    start = ids.numel() - decoded.shape[0]
    again = _difference(exact, ids, _decode(exact, ids, start))
    if again > EXACT:
        return found
    print(f"(in fp32 they differ by {found:.1e}, in fp64 by {again:.0e}: a tie of two experts)")
    return again


@torch.no_grad()
def _decode(model: HybridLM, ids: Tensor, start: int) -> Tensor:
    """Log-probabilities (t - start) of ids[start:], one token at a time through the recurrent decode path."""
    cache = model.allocate_cache(1, ids.numel())
    logits = [model(ids[None, :start], cache=cache)[0, -1]]
    for token in ids[start:-1]:
        logits.append(model(token.view(1, 1), cache=cache)[0, 0])
    return _logprobs(torch.stack(logits), ids[start:])


def _logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


@torch.no_grad()
def _difference(model: HybridLM, ids: Tensor, decoded: Tensor) -> float:
    """max |decoded log-probabilities - those of one pass over everything|; NaN counts as infinite."""
    n = decoded.shape[0]
    full = _logprobs(model(ids[None])[0, -n - 1 : -1], ids[-n:])
    return (full - decoded).abs().max().nan_to_num(nan=math.inf).item()
