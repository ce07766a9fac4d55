"""The demo's drafts: how often the trained drafter is right, what drafting costs and brings, what undoing takes."""

import time

import torch
from torch import Tensor

from tigon.cli import table
from tigon.generation import generate
from tigon.models import HybridLM
from tigon.modules.mamba_cache import MambaCache

MOST = 6  # drafts a step
PROMPTS, PROMPT, NEW = 6, 96, 64  # rows, bytes of each, bytes to add
HELD_OUT = 8192  # bytes on which drafts are compared with the true text
ROUNDS = 2  # of all K in turn; the faster one counts
LOOP, PERIOD = 24, 48  # so many bytes that repeat what stood at most PERIOD before are a loop


def compare_drafts(model: HybridLM, held_out: Tensor, seed: int) -> None:
    """Print the tables for prompts from the held-out text (t) int64."""
    prompts = [held_out[i * 2048 : i * 2048 + PROMPT] for i in range(PROMPTS)]
    prompts = [p for p in prompts if p.numel() == PROMPT]
    print(f"\ndrafts: {len(prompts)} held-out prompts of {PROMPT} bytes, {NEW} new ones each")
    _acceptance(model, held_out, prompts, seed)
    _speed(model, prompts, seed)
    _memory(model)
    _same_text(model, prompts)


def _acceptance(model: HybridLM, held_out: Tensor, prompts: list[Tensor], seed: int) -> None:
    """Shares of drafts that are kept, with all before them, by depth."""
    ids = held_out[: HELD_OUT + 1]
    windows = ids[None, :-1], ids[None, 1:]
    with torch.no_grad():
        hidden = model.backbone(windows[0])
        forced = model.mtp_losses(hidden, *windows, depths=MOST).accepted
    drawn = _kept(model, prompts, temperature=1.0, seed=seed)
    outside, inside, share = _greedy(model, prompts)
    rows = (
        ("given the true text", [float(a) for a in forced], "its likeliest bytes against the text"),
        ("drawn, temperature 1", drawn, "rule token"),
        ("greedy, outside loops", outside, f"{100 * (1 - share):.0f} % of the steps"),
        ("greedy, inside loops", inside, "text that repeats itself is easy to guess"),
    )
    depths = [f"depth {i + 1}" for i in range(MOST)]
    table.show(
        ("drafts kept, %", *depths, ""),
        [
            (name, *(f"{100 * a:.0f}" for a in shares or [float("nan")] * MOST), note)
            for name, shares, note in rows
        ],
    )


def _kept(model, prompts, **options) -> list[float]:
    _, report = generate(
        model, prompts, NEW, draft_tokens=MOST, stop_ids=(), return_report=True, **options
    )
    return report.acceptance


def _greedy(model, prompts) -> tuple[list[float], list[float], float]:
    """Shares kept in steps outside and inside loops, and the share of the steps inside."""
    counts = torch.zeros(2, MOST + 1)
    for prompt in prompts:
        text: list[int] = []
        steps: list[int] = []  # where each step's bytes begin
        generate(
            *(model, [prompt], NEW),
            draft_tokens=MOST,
            stop_ids=(),
            streamer=lambda _, new, text=text, steps=steps: (
                steps.append(len(text)),
                text.extend(new),
            ),
        )
        for first, end in zip(steps[1:], [*steps[2:], len(text)]):  # the first one is the prompt's
            kept = end - first - 1
            looped = int(in_loop(text[:first]))
            counts[looped, 0] += 1
            counts[looped, 1 : kept + 1] += 1
    shares = [(row[1:] / row[0]).tolist() if row[0] else [] for row in counts]
    return shares[0], shares[1], (counts[1, 0] / counts[:, 0].sum()).item()


def in_loop(text: list[int]) -> bool:
    """Whether the last LOOP bytes repeat what stood 1 to PERIOD places before them."""
    return any(
        len(text) >= LOOP + period and text[-LOOP:] == text[-LOOP - period : -period]
        for period in range(1, PERIOD + 1)
    )


def _speed(model: HybridLM, prompts: list[Tensor], seed: int) -> None:
    """Bytes a second by K, in turns, and where the time goes."""
    best = {}
    for _ in range(ROUNDS):
        for k in range(MOST + 1):
            start = time.perf_counter()
            _, report = generate(
                *(model, prompts, NEW),
                draft_tokens=k,
                temperature=1.0,
                seed=seed,
                stop_ids=(),
                return_report=True,
            )
            report.seconds = time.perf_counter() - start
            if k not in best or report.tokens_per_second > best[k].tokens_per_second:
                best[k] = report
    plain = best[0].tokens_per_second
    columns = (
        "K",
        "bytes a step",
        "bytes/s",
        "to K = 0",
        "draft ms",
        "verify ms",
        "accept ms",
        "commit ms",
    )
    rows = []
    for k, report in best.items():
        each = {name: 1e3 * seconds / report.steps for name, seconds in report.parts.items()}
        parts = (f"{each.get(n, 0.0):.1f}" for n in ("draft", "model", "accept", "commit"))
        rate = report.tokens_per_second
        rows.append(
            (k, f"{report.acceptance_length:.2f}", f"{rate:.0f}", f"{rate / plain:.2f}x", *parts)
        )
    table.show(columns, rows, f"drawn at temperature 1, {len(prompts)} rows, milliseconds a step:")
    print(verdict({k: r.tokens_per_second for k, r in best.items()}, best[1]))


def verdict(rates: dict[int, float], one) -> str:
    """Which K was the fastest; where it is none, by how much and why. one: the report of K = 1."""
    k = max(rates, key=rates.get)
    if k:
        return f"fastest: K = {k}, {rates[k] / rates[0]:.2f} times K = 0"
    best = max((n for n in rates if n), key=rates.get)
    draft, model = (one.parts[name] / one.steps for name in ("draft", "model"))
    return (
        f"no drafts are the fastest here: K = {best} is {100 * (1 - rates[best] / rates[0]):.0f} % slower. A draft "
        f"costs {draft / model:.2f} of a pass of the model (its calls are as small as the model's own, "
        f"{model * 1e3:.0f} ms), and {one.acceptance[0]:.0%} of the first drafts are kept"
    )


def _memory(model: HybridLM) -> None:
    """Bytes of recurrent state of one request, by how tokens are undone."""
    rows = []
    for name, options in (
        ("no drafts", {}),
        ("replay, K = 3", {"rollback": "replay", "tokens": 4}),
        ("snapshots, K = 3", {"rollback": "snapshot", "tokens": 4}),
        ("replay, K = 6", {"rollback": "replay", "tokens": 7}),
        ("snapshots, K = 6", {"rollback": "snapshot", "tokens": 7}),
    ):
        rows.append((name, f"{model.allocate_cache(1, 1, **options).nbytes(MambaCache):,}"))
    table.show(("Mamba state of a request", "bytes"), rows)


def _same_text(model: HybridLM, prompts: list[Tensor]) -> None:
    """Greedy text with drafts beside greedy text without: the first difference, with its margin, or none."""
    plain = generate(model, prompts, NEW, draft_tokens=0, stop_ids=())
    drafted = generate(model, prompts, NEW, draft_tokens=3, stop_ids=())
    for row, (a, b) in enumerate(zip(plain, drafted)):
        if torch.equal(a, b):
            continue
        at = int((a != b).nonzero()[0])
        with torch.no_grad():
            logits = model(torch.cat([prompts[row], a[:at]])[None])[0, -1]
        first, second = logits.topk(2).values.tolist()
        print(
            f"greedy text with 3 drafts leaves that without in row {row} at byte {at}: the two likeliest bytes' logits "
            f"are {first - second:.1e} apart"
        )
        return
    print(f"greedy text with 3 drafts is that without, all {len(prompts)} rows")
