"""Plots of a run (schema 2 of bench/records.py) by matplotlib: roofline, speed-up over peers, sweeps of a size.

    figure = roofline(run)           # a matplotlib Figure; None where there is nothing to draw
    save(run, "plots.png")           # all that there are in one file; also .svg and .pdf

Nothing of matplotlib's global state is used, no backend chosen, no window opened. A red gate has no points.
"""

import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from tigon.bench.figures import roofline as _roofline
from tigon.bench.figures import speedups as _speedups
from tigon.bench.figures import sweeps as _sweeps
from tigon.bench.figures.style import INK, WIDTH, Plan, styled

PLANS: dict[str, Callable[[Mapping], Plan | None]] = {
    "roofline": _roofline.plan,
    "speedups": _speedups.plan,
    "sweeps": _sweeps.plan,
}
SUFFIXES = (".png", ".svg", ".pdf")
DPI = 160  # of a PNG
# A picture by itself follows the reader's colour scheme; in a page it has the text colour around it.
ALONE = "<style>svg{color:#1d2126}@media(prefers-color-scheme:dark){svg{color:#e4e7ea}}</style>"


def roofline(run: Mapping):
    """FLOP/s against FLOPs a byte of Tigon (filled) and its peers (hollow), under the roof of the machine."""
    return _one(_roofline.plan(run))


def speedups(run: Mapping):
    """Times of the peers over Tigon's, by case; whiskers from the 20th and 80th percentiles of both."""
    return _one(_speedups.plan(run))


def sweeps(run: Mapping):
    """Time and share of the roof against the size that a sweep varies, a row for each sweep."""
    return _one(_sweeps.plan(run))


def _one(plan: Plan | None):
    return None if plan is None else _stack([plan])


def _stack(plans: list[Plan]):
    """A Figure of all plans, one below the other."""
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(WIDTH, sum(plan.height for plan in plans)))
        heights = [plan.height for plan in plans]
        panels = figure.subfigures(len(plans), 1, height_ratios=heights, hspace=0, squeeze=False)
        for plan, panel in zip(plans, panels[:, 0]):
            panel.set_facecolor("none")
            plan.draw(panel)
    return figure


def check(path: Path) -> None:
    """ValueError for a suffix that plots are not written with."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"plots go to {', '.join(SUFFIXES)} files; got {path.name!r}")


def save(run: Mapping, path: str | Path) -> None:
    """All plots of the run in one file, by its suffix. ValueError for another suffix or a run without any plot."""
    path = Path(path)
    check(path)
    plans = [plan for plan in (make(run) for make in PLANS.values()) if plan]
    if not plans:
        raise ValueError("there is nothing to plot: no case of this run has a time")
    figure = _stack(plans)
    if path.suffix.lower() == ".svg":
        text = svg(figure, "all")
        head = text.index(">", text.index("<svg")) + 1
        path.write_text(text[:head] + ALONE + text[head:], encoding="utf-8")
        return
    with styled():
        figure.savefig(path, dpi=DPI, facecolor="white")


def svg(figure, name: str) -> str:
    """The `<svg>` element, to stand in a page: its ids start with `name`, its ink is the page's text colour."""
    out = io.StringIO()
    with styled():
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    return text.replace(INK, "currentColor")
