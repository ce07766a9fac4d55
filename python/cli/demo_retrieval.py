"""`tigon demo --token-reduction`: a tiny hybrid learns two-hop retrieval; then who keeps the tokens that it needs?"""

import argparse
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from tigon.cli import OK, table
from tigon.cli import demo_retrieval_eval as evaluation
from tigon.cli.demo_retrieval_eval import AVERAGES, TOP, Result
from tigon.cli.demo_retrieval_task import draw
from tigon.cli.demo_retrieval_train import CHAINS, STEPS, config, train
from tigon.cli.demo_run import Progress
from tigon.models import HybridLM

QUESTIONS = 4  # a sequence, when it is measured
ROWS = 3  # sequences of a batch: on the CPU the time of attention scores grows with its square
GOAL = 0.95
Results = dict[str, dict[float, Result]]  # by method, by the average that was asked for


def run_retrieval(args: argparse.Namespace) -> int:
    """Train, measure, show. 0, whoever wins."""
    if args.seconds is None and args.steps is None:
        args.steps = STEPS
    torch.manual_seed(args.seed)
    model = HybridLM(config())
    count = sum(p.numel() for p in model.parameters())
    print(
        f"task: key -> pointer -> value in two of {_frames()} frames; {CHAINS[-1]} chains, "
        f"{QUESTIONS} questions a sequence\n"
        f"model: layers {model.config.pattern}, {count:,} parameters"
    )
    with Progress(args, lambda right: f"{100 * right:.0f} % answered") as report:
        history = train(
            model, seconds=args.seconds, steps=args.steps, seed=args.seed, report=report
        )
    steps = len(history.right)
    print(
        f"trained {steps} steps in {history.seconds:.0f} s, the last ones with "
        f"{history.chains[-1] if steps else 0} chains of {CHAINS[-1]}"
    )
    start = time.perf_counter()
    full, results = _measure(model, args.queries, args.seed)
    recall = evaluation.needle_recall(model, _batches(args.queries, args.seed))
    _show(full, results)
    _show_kept(model, results)
    _show_recall(model, recall)
    for line in verdict(full, results):
        print(line)
    print(f"measured in {time.perf_counter() - start:.0f} s")
    args.out.mkdir(parents=True, exist_ok=True)
    _plot(model, full, results, recall, args.out / "token_reduction.png")
    return OK


def _frames() -> int:
    return draw(1, CHAINS[-1], 1, torch.Generator()).needles.shape[-1]


def _batches(queries: int, seed: int):
    """The same sequences whenever it is called; none of them was trained on."""
    generator = torch.Generator().manual_seed(seed + 2**32)
    left = -(-queries // QUESTIONS)
    while left > 0:
        yield draw(min(ROWS, left), CHAINS[-1], QUESTIONS, generator)
        left -= ROWS


def _measure(model: HybridLM, queries: int, seed: int) -> tuple[Result, Results]:
    full = evaluation.measure(model, _batches(queries, seed), None)
    results: Results = {}
    for average in AVERAGES:
        for name, method in evaluation.methods(model, average, seed).items():
            found = evaluation.measure(model, _batches(queries, seed), method)
            results.setdefault(name, {})[average] = found
    return full, results


def _percent(result: Result | None) -> str:
    if result is None:
        return "out of reach"
    low, high = result.interval
    return f"{100 * result.accuracy:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _show(full: Result, results: Results) -> None:
    columns = ("accuracy, % (95 % interval)", "100 %", *(f"{100 * a:g} %" for a in AVERAGES))
    rows = [
        (name, _percent(full), *(_percent(found.get(a)) for a in AVERAGES))
        for name, found in results.items()
    ]
    table.show(columns, rows, f"{full.asked} questions, by layer-average of kept visual tokens:")
    worst = max(abs(r.average - a) for found in results.values() for a, r in found.items())
    print(f"averages as they came out: within {100 * worst:.1f} points of those asked for")


def _show_kept(model: HybridLM, results: Results) -> None:
    average = AVERAGES[1]
    hop = [l for l, kind in enumerate(model.config.pattern) if kind in "M*"]
    rows = [
        (name, *(f"{100 * r.kept[l, 0]:.0f}/{100 * r.kept[l, 1]:.0f}" for l in hop))
        for name, found in results.items()
        if (r := found.get(average)) is not None
    ]
    columns = ("needles kept, %", *(f"{l}{model.config.pattern[l]}" for l in hop))
    title = f"first/second record of a question still there, by layer, at {100 * average:g} %:"
    table.show(columns, rows, title)


def _show_recall(model: HybridLM, recall: dict[int, torch.Tensor]) -> None:
    names = {"M": "Mamba", "*": "attention"}
    rows = [
        (l, names[model.config.pattern[l]], f"{100 * first:.1f}", f"{100 * second:.1f}")
        for l, (first, second) in ((l, found.tolist()) for l, found in recall.items())
    ]
    title = (
        f"recall of the needle in the whole model: among the best {100 * TOP:g} % by the score of"
    )
    table.show(("layer", "score", "first record, %", "second record, %"), rows, title)


def verdict(full: Result, results: Results) -> list[str]:
    """Who wins at each average, and who is not told apart from the winner (intervals that overlap)."""
    lines = []
    if full.accuracy < GOAL:
        lines.append(
            f"the whole model answers {100 * full.accuracy:.1f} %, below {100 * GOAL:.0f} %: "
            "train longer before you read anything into the table"
        )
    for average in AVERAGES:
        here = {name: found[average] for name, found in results.items() if average in found}
        most = max(found.right for found in here.values())
        winners = [name for name, found in here.items() if found.right == most]
        low = here[winners[0]].interval[0]
        close = [n for n, r in here.items() if n not in winners and r.interval[1] >= low]
        line = (
            f"winner at {100 * average:g} %: {' and '.join(winners)}, {_percent(here[winners[0]])}"
        )
        if close:
            line += f"; within its interval: {', '.join(close)}"
        lines.append(line)
    return lines


def _plot(model: HybridLM, full: Result, results: Results, recall, path: Path) -> None:
    if find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed; pip install 'tigon[demo]'")
        return
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    for name, found in results.items():
        points = [(1.0, full), *sorted(found.items(), reverse=True)]
        x = [100 * average for average, _ in points]
        y = [100 * r.accuracy for _, r in points]
        ends = [r.interval for _, r in points]
        below = [v - 100 * low for v, (low, _) in zip(y, ends, strict=True)]
        above = [100 * high - v for v, (_, high) in zip(y, ends, strict=True)]
        left.errorbar(x, y, yerr=[below, above], marker="o", capsize=3, label=name)
    left.set_xscale("log", base=2)
    ticks = [100 * a for a in (1.0, *AVERAGES)]
    left.set_xticks(ticks, [f"{t:g}" for t in ticks])
    left.set(xlabel="kept visual tokens, mean over the layers, %", ylabel="questions answered, %")
    left.set_title(f"two-hop retrieval, {full.asked} questions, 95 % intervals")
    figure.legend(loc="outside lower left", ncols=4, fontsize="small")
    left.grid(alpha=0.3)
    for hop, name in enumerate(("first record", "second record")):
        shares = [100 * found[hop].item() for found in recall.values()]
        right.plot(list(recall), shares, marker="o", label=name)
    right.set_xticks(list(recall), [f"{l}{model.config.pattern[l]}" for l in recall])
    right.axhline(100 * TOP, color="gray", linestyle=":", label="by chance, without repeats")
    right.set(
        xlabel="layer whose score ranks: M Mamba-2, * attention",
        ylabel=f"needle in the best {100 * TOP:g} %, %",
    )
    right.set_title("recall of the needle, whole model")
    right.legend(fontsize="small")
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"saved {path}")
