"""Speed-up: times of the peers over Tigon's, a bar each, by case.

Whiskers go from the peer's 20th percentile over Tigon's 80th to the reverse.
"""

import math
from collections.abc import Mapping

from tigon.bench import labels
from tigon.bench.figures.style import INK, WIDTH, Plan, axes, heading, number, peer_looks

LEFT, RIGHT, TOP, BOTTOM = 3.35, 0.7, 0.6, 0.5  # inches
BAR, GAP, LEGEND = 0.21, 0.17, 0.22
ACROSS = 5  # names in a row of the legend


def plan(run: Mapping) -> Plan | None:
    items = [item for item in run["cases"] if labels.own(item) and labels.peers(item)]
    items = [item for item in items if not item["case"].get("sweep")] or items  # they have a plot
    if not items:
        return None
    names = [*dict.fromkeys(r["name"] for item in items for r in labels.peers(item))]
    doubt = any(labels.doubtful(*labels.measured(item)) for item in items)
    top = TOP + LEGEND * math.ceil((len(names) + doubt) / ACROSS) + 0.1
    # A case's two lines of words need the room of two bars.
    bars = sum(max(len(labels.peers(item)), 2) for item in items)
    height = top + BOTTOM + BAR * bars + GAP * len(items)
    return Plan(height, lambda panel: draw(panel, height, top, run, items, names, doubt))


def draw(panel, height: float, top: float, run: Mapping, items, names, doubt: bool) -> None:
    shared = labels.common(items)
    said = "Time of a peer over Tigon's: right of the line at 1, Tigon is faster. Whiskers: p20 to p80 of both."
    said += f" All: {', '.join(shared)}." if shared else ""
    heading(panel, height, "Speed-up over peers", said)
    tall = height - top - BOTTOM
    ax = axes(panel, height, LEFT, BOTTOM, WIDTH - LEFT - RIGHT, tall)
    ax.set(xscale="log", xlabel="× Tigon's time", ylim=(tall, 0), yticks=[])
    looks, y, ends = peer_looks(run), 0.0, [1.0]
    for item in items:
        room = BAR * max(len(labels.peers(item)), 2)
        words(ax, item, y + (GAP + room) / 2, shared)
        start = y + (GAP + room - BAR * len(labels.peers(item))) / 2
        for at, peer in enumerate(labels.peers(item)):
            ends += bar(ax, item, peer, start + BAR * (at + 0.5), looks[peer["name"]])
        y += room + GAP
        ax.axhline(y, color=INK, lw=0.5, alpha=0.15)
    ax.axvline(1, color=INK, lw=1.2)
    ax.set_xlim(min(ends) / 1.15, max(ends) * (max(ends) / min(ends)) ** 0.12 * 1.1)
    ticks(ax)
    legend(panel, height, looks, names, doubt)


def words(ax, item: Mapping, y: float, shared: list[str]) -> None:
    """Two lines left of the bars: what ran, and at which sizes."""
    case, place = item["case"], {"transform": ax.get_yaxis_transform(), "ha": "right"}
    ax.text(-0.015, y - 0.01, labels.short(labels.title(case), 46), va="bottom", size=9, **place)
    said = labels.short(labels.setting(case, shared), 56)
    ax.text(-0.015, y + 0.02, said, va="top", size=7.5, alpha=0.8, **place)


def bar(ax, item: Mapping, peer: Mapping, y: float, look: tuple[str, str, str]) -> list[float]:
    """One bar from 1, its whisker and its value; where the whisker ends."""
    colour, _, hatch = look
    mine, other = labels.own(item)["time"], peer["time"]
    times, doubt = labels.ratio(item, peer), labels.doubtful(labels.own(item), peer)
    low, high = other["p20"] / mine["p80"], other["p80"] / mine["p20"]
    face = {"facecolor": "none", "edgecolor": colour} if doubt else {"facecolor": colour}
    if hatch and not doubt:
        face |= {"hatch": hatch, "edgecolor": INK, "linewidth": 0}
    ax.barh(y, times - 1, BAR * 0.8, 1, zorder=2, **face)
    ax.plot([low, high], [y, y], color=INK, lw=1, zorder=3, solid_capstyle="butt")
    for end in (low, high):
        ax.plot([end, end], [y - 0.035, y + 0.035], color=INK, lw=1, zorder=3)
    said = f"{times:.3g}×" + (" (flagged)" if doubt else "")
    # fmt: off
    ax.annotate(said, (max(high, 1), y), xytext=(4, 0), textcoords="offset points", size=8,
                va="center_baseline", annotation_clip=False)
    # fmt: on
    return [low, high, times]


def ticks(ax) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(number)
    ax.grid(True, axis="x")


def legend(panel, height: float, looks, names, doubt: bool) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=looks[n][0], hatch=looks[n][2], label=labels.short(n, 26)) for n in names
    ]
    if doubt:
        handles.append(Patch(facecolor="none", edgecolor=INK, label="flagged: see the table"))
    # fmt: off
    panel.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.02 / WIDTH, 1 - 0.5 / height),
                 ncols=ACROSS, fontsize=8.5, handlelength=1.2, columnspacing=1.5)
    # fmt: on
