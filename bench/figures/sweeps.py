"""Sweeps: time and share of the roof against the size that varies, a row of two axes for each sweep."""

import math
from collections.abc import Mapping

from tigon.bench import labels
from tigon.bench.figures.style import INK, WIDTH, Plan, axes, heading, number, peer_looks

LEFT, RIGHT, TOP, BETWEEN = 0.85, 0.25, 0.6, 0.75  # inches
TITLE, TALL, BOTTOM, LEGEND = 0.45, 1.9, 0.55, 0.22
ACROSS = 6  # names in a row of the legend
MOST_TICKS = 9


def plan(run: Mapping) -> Plan | None:
    found = [*labels.sweeps(run)]
    if not found:
        return None
    results = [r for _, items in found for item in items for r in labels.measured(item)]
    names = [*dict.fromkeys(r["name"] for r in results)]
    top = TOP + LEGEND * math.ceil((len(names) + 1) / ACROSS)
    height = top + (TITLE + TALL + BOTTOM) * len(found)
    return Plan(height, lambda panel: draw(panel, height, top, run, found, names))


def draw(panel, height: float, top: float, run: Mapping, found, names) -> None:
    heading(panel, height, "Sweeps", "Median time, with p20 to p80 shaded, and share of the roof.")
    looks = peer_looks(run)
    legend(panel, height, looks, names)
    width = (WIDTH - LEFT - RIGHT - BETWEEN) / 2
    for row, (letter, items) in enumerate(found):
        y = height - top - (TITLE + TALL + BOTTOM) * row
        case = items[0]["case"]
        rest = {k: v for k, v in case["shape"].items() if k != letter}
        said = f"{labels.title(case)}   ({labels.setting(dict(case, shape=rest))})"
        panel.text(LEFT / WIDTH, (y - 0.3) / height, labels.short(said, 110), size=9, va="center")
        place = y - TITLE - TALL
        left = axes(panel, height, LEFT, place, width, TALL)
        right = axes(panel, height, LEFT + width + BETWEEN, place, width, TALL)
        times(left, items, letter, looks)
        shares(right, items, letter, looks)
        for ax in (left, right):
            sizes(ax, items, letter)


def series(items, letter: str) -> dict[str, list[tuple[int, dict]]]:
    """(size, result) by name."""
    out: dict[str, list[tuple[int, dict]]] = {}
    for item in items:
        for r in labels.measured(item):
            out.setdefault(r["name"], []).append((item["case"]["shape"][letter], r))
    return out


def times(ax, items, letter: str, looks) -> None:
    from matplotlib.ticker import LogLocator

    ax.set(yscale="log", ylabel="ms")
    for name, found in series(items, letter).items():
        xs = [x for x, _ in found]
        median, low, high = (
            [1e3 * r["time"][part] for _, r in found] for part in ("median", "p20", "p80")
        )
        ax.fill_between(xs, low, high, color=looks[name][0], alpha=0.2, lw=0)
        line(ax, xs, median, name, looks)
    known = [(i["case"]["shape"][letter], i["work"].get("roof_s")) for i in items]
    if all(roof for _, roof in known):
        ax.plot(*zip(*((x, 1e3 * roof) for x, roof in known)), color=INK, lw=1.2, ls="--")
    few = math.log10(ax.get_ylim()[1] / ax.get_ylim()[0]) < 2
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=9))


def shares(ax, items, letter: str, looks) -> None:
    from matplotlib.ticker import PercentFormatter

    ax.set_ylabel("share of the roof")
    highest = 1.0
    for name, found in series(items, letter).items():
        known = [(x, r["share"]) for x, r in found if r.get("share") is not None]
        if known:
            line(ax, *zip(*known), name, looks)
            highest = max(highest, *(share for _, share in known))
    ax.axhline(1, color=INK, lw=1.2, ls="--")
    ax.set_ylim(0, highest * 1.05)
    ax.yaxis.set_major_formatter(PercentFormatter(1, 0, " %"))


def line(ax, xs, ys, name: str, looks) -> None:
    colour, marker, hatch = looks[name]
    mine = name == "tigon"
    # fmt: off
    ax.plot(xs, ys, color=colour, lw=2 if mine else 1.2, marker=marker, markersize=5, zorder=3 if mine else 2,
            ls=":" if hatch else "-", markerfacecolor=colour if mine else "none")
    # fmt: on


def sizes(ax, items, letter: str) -> None:
    """The sizes themselves as ticks, every other one where they are many."""
    from matplotlib.ticker import NullLocator

    swept = sorted({item["case"]["shape"][letter] for item in items})
    ax.set_xscale("log", base=2)
    ax.set_xlabel(letter)
    ax.set_xticks(swept[:: math.ceil(len(swept) / MOST_TICKS)])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1e5 else number(value))
    ax.yaxis.set_minor_locator(NullLocator())
    if ax.get_yscale() == "log":
        ax.yaxis.set_major_formatter(number)
    ax.grid(True)


def legend(panel, height: float, looks, names) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for name in names:
        colour, marker, hatch = looks[name]
        face = colour if name == "tigon" else "none"
        handle = Line2D([], [], color=colour, marker=marker, markerfacecolor=face)
        handle.set(markersize=5, label=labels.short(name, 24), linestyle=":" if hatch else "-")
        handles.append(handle)
    handles.append(Line2D([], [], color=INK, ls="--", label="roof"))
    # fmt: off
    panel.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.02 / WIDTH, 1 - 0.5 / height),
                 ncols=ACROSS, fontsize=8.5, handlelength=1.8, columnspacing=1.5)
    # fmt: on
