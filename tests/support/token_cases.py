"""Calls of the token selection and row moving kernels in guarded memory, checked against the reference, every bit."""

import torch
from memory import guarded
from quantize_cases import POISON, poisoned_outputs

from tigon import native
from tigon.native import tokens as launchers
from tigon.reference import select_tokens as reference

INF, NAN = float("inf"), float("nan")
LENGTHS = [[5], [0], [1030], [3, 0, 70, 1], [1024, 1023, 2500], [0, 0, 300], [2048]]


def scores_of(kind: str, t: int) -> torch.Tensor:
    """(t) scores: like those of layers, all over fp32, a few values only, or odd ones."""
    if kind == "layers":
        return torch.randn(t).mul(3).exp() * 1e-6
    if kind == "wide":
        return torch.randn(t) * torch.exp2(torch.randint(-140, 120, (t,)).float())
    if kind == "ties":
        return torch.randint(4, (t,)).float()
    odd = torch.tensor([0.0, -0.0, 1e-45, -1e-45, INF, -INF, NAN, -NAN, 1.0, -1.0])
    return odd[torch.randint(len(odd), (t,))]


def selection(
    lengths, kind="layers", keep=0.3, multiple=1, protect=0.0, wide=False, padding=0
) -> dict:
    """Arguments of select_tokens. keep: a share of each sequence."""
    t = sum(lengths) + padding
    dtype = torch.int64 if wide else torch.int32
    counts = torch.tensor([round(keep * n) for n in lengths], dtype=dtype)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=dtype)
    protected = guarded(torch.rand(t) < protect) if protect else None
    needed = reference.kept_counts(t, counts, bounds, protected, multiple).sum().item()
    return dict(
        scores=guarded(scores_of(kind, t)), keep=guarded(counts), cu_seqlens=guarded(bounds), protected=protected,
        multiple=multiple, capacity=needed + 5,
    )  # fmt: skip


def launched(name: str, arguments: dict, know=lambda *_: None):
    """The launcher's results; nothing beside them may be written."""
    with poisoned_outputs(know, launchers) as made:
        got = getattr(native, name)(**arguments)
    for buffer, start, size in made:
        around = torch.cat([buffer[:start], buffer[start + size :]])
        assert (around == POISON).all(), "memory beside an output changed"
    return got


def on_cpu(value):
    if isinstance(value, list):
        return [on_cpu(v) for v in value]
    return value.cpu() if isinstance(value, torch.Tensor) else value


def check_selection(arguments: dict, know=lambda *_: None) -> tuple[torch.Tensor, ...]:
    got = tuple(v.cpu() for v in launched("select_tokens", arguments, know))
    want = reference.select_tokens(**{k: on_cpu(v) for k, v in arguments.items()})
    for name, a, b in zip(("index", "cu_kept", "inverse"), got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    return got


def rows(t: int = 40, kept: int = 30) -> dict:
    """Arguments of gather_rows: tensors of every width and dtype, some strided or unaligned, and indices of no row."""
    tensors = [
        guarded(torch.randn(t, 96).bfloat16()),
        torch.randn(t, 50)[:, 3:20],
        guarded(torch.arange(t)),
        guarded(torch.arange(t, dtype=torch.int32)),
        torch.randint(256, (t, 7), dtype=torch.uint8),
        torch.randn(t, 2, 3).half(),
        guarded(torch.randn(t, 3, 5).double()),
        torch.rand(t) < 0.5,
        guarded(torch.randn(t, 700)),
    ]
    index = torch.randint(t, (kept,), dtype=torch.int32)
    index[: min(kept, 5)] = torch.tensor([-2, -1, t, t + 1, t - 1])[:kept]
    fills = [0.0, -1.0, -1.0, 7.0, 255.0, 0.5, 2.5, 1.0, 0.0]
    return dict(tensors=tensors, index=guarded(index), fills=fills)


def check_rows(arguments: dict, know=lambda *_: None) -> None:
    got = launched("gather_rows", arguments, know)
    want = reference.gather_rows(**{k: on_cpu(v) for k, v in arguments.items()})
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a.cpu(), b)
