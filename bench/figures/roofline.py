"""Roofline: FLOP/s against FLOPs a byte, log by log. Tigon's markers are filled, those of its peers hollow.

Points of one op, variant, mode and dtype share a number, by which a key below the axes names them; sizes of a sweep are
joined by a line.
"""

import math
from collections.abc import Mapping

from tigon.bench import labels
from tigon.bench.figures.placing import along, numbers
from tigon.bench.figures.style import INK, WIDTH, Plan, axes, family_looks, heading, number

LEFT, RIGHT, TOP, BOTTOM, TALL = 0.85, 1.85, 0.65, 0.55, 4.3  # inches
ROW, COLUMNS = 0.17, 3  # of the key
ALIKE = 1.03  # ceilings closer than this are one line


def plan(run: Mapping) -> Plan | None:
    groups = grouped(run)
    if not groups:
        return None
    key = keyed(groups)
    columns = spread(key, COLUMNS)
    height = TOP + TALL + BOTTOM + ROW * (max(map(len, columns)) + 1)
    return Plan(height, lambda panel: draw(panel, height, run, groups, columns))


def intensity(item: Mapping) -> float:
    return item["work"]["flops"] / item["work"]["bytes"]


def grouped(run: Mapping) -> list[tuple[str, list[dict]]]:
    """(name, entries of `cases`) of all that has FLOPs and bytes and was measured, by family."""
    plain = len({item["case"]["dtype"] for item in run["cases"]}) < 2
    found: dict[tuple, list[dict]] = {}
    for item in run["cases"]:
        if labels.measured(item) and item["work"]["flops"] and item["work"]["bytes"]:
            case = item["case"]
            name = labels.title(case) + ("" if plain else f" · {case['dtype']}")
            found.setdefault((labels.family(case["op"]), name), []).append(item)
    order = labels.FAMILIES.index
    return [(name, found[kind, name]) for kind, name in sorted(found, key=lambda k: order(k[0]))]


def keyed(groups) -> list[tuple[str, str | None]]:
    """Lines of the key: (family, None) above the (family, "1  name") of its own."""
    lines: list[tuple[str, str | None]] = []
    for place, (name, items) in enumerate(groups, 1):
        kind = labels.family(items[0]["case"]["op"])
        if not lines or lines[-1][0] != kind:
            lines.append((kind, None))
        lines.append((kind, f"{place}  {labels.short(name, 44)}"))
    return lines


def spread(lines: list, columns: int) -> list[list]:
    """`lines` in columns of about one length, no heading last in its column."""
    most = math.ceil(len(lines) / columns)
    out: list[list] = [[]]
    for at, line in enumerate(lines):
        full = len(out[-1]) >= most or (line[1] is None and len(out[-1]) == most - 1)
        if full and len(out) < columns and at:
            out.append([])
        out[-1].append(line)
    return out


def ceilings(run: Mapping) -> list[tuple[float, str]]:
    """(FLOP/s, dtypes that reach them), from below."""
    out: list[tuple[float, str]] = []
    for dtype, rate in sorted((run.get("roof") or {}).get("gemm", {}).items(), key=lambda x: x[1]):
        if out and rate < out[-1][0] * ALIKE:
            out[-1] = (rate, f"{out[-1][1]}, {dtype}")
        else:
            out.append((rate, dtype))
    return out


def draw(panel, height: float, run: Mapping, groups, columns) -> None:
    said = "Filled: Tigon, hollow: peers. FLOPs and bytes are the least that the op needs."
    source = (run.get("roof") or {}).get("source")
    said += f" Roof: {source}." if source else ""
    bare = sum(bool(labels.measured(c)) and not c["work"]["flops"] for c in run["cases"])
    if bare:
        said += f" Without FLOPs, hence not shown: {bare} of {len(run['cases'])} cases."
    heading(panel, height, "Roofline", said)
    bottom = height - TOP - TALL
    ax = axes(panel, height, LEFT, bottom, WIDTH - LEFT - RIGHT, TALL)
    ax.set(xscale="log", yscale="log", ylabel="FLOP/s", xlabel="FLOPs a byte")
    ax.grid(True)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(number)
    limits(ax, run, groups)
    points(ax, groups, roof(ax, run))
    key(panel, height, columns)


def limits(ax, run: Mapping, groups) -> None:
    """All points, the ridge of the highest ceiling, and room for the words at the edges."""
    items = [item for _, found in groups for item in found]
    rates = [i["work"]["flops"] / r["time"]["median"] for i in items for r in labels.measured(i)]
    xs = [intensity(item) for item in items]
    tops = ceilings(run)
    if tops:
        rates += [top for top, _ in tops]
        xs.append(3 * tops[-1][0] / run["roof"]["copy"])
    ax.set_xlim(min(xs) / 2, max(xs) * 2)
    ax.set_ylim(min(rates) / 2, max(rates) * 2)


def roof(ax, run: Mapping) -> list[tuple[float, ...]]:
    """The slope of the memory and a ceiling by dtype. Boxes, in pixels, where lines and words are."""
    if not run.get("roof"):
        return []
    tops, copy = ceilings(run), run["roof"]["copy"]
    (low, high), (floor, _) = ax.get_xlim(), ax.get_ylim()
    ridge, start = tops[-1][0] / copy if tops else high, max(low, floor / copy)
    ax.plot([start, ridge], [copy * start, copy * ridge], color=INK, lw=1.4, zorder=1)
    words, lowest, boxes = {"size": 8, "textcoords": "offset points"}, -math.inf, []
    unit = ax.get_figure(root=True).dpi / 72
    for rate, dtypes in tops:
        ax.plot([rate / copy, high], [rate, rate], color=INK, lw=1.4, zorder=1)
        (x0, y0), (x1, _) = ax.transData.transform([(rate / copy, rate), (high, rate)])
        boxes += along((x0, y0), (1, 0), x1 - x0, 1.5 * unit)
        y = y0 / unit
        place = max(y, lowest + 10)  # no two in one line
        said, lowest = f"{labels.quantity(rate, 'FLOP/s')} {dtypes}", place
        ax.annotate(said, (high, rate), xytext=(5, place - y), va="center_baseline", **words)
    (x0, y0), (x1, y1) = ax.transData.transform([(start, copy * start), (ridge, copy * ridge)])
    slope, said = math.atan2(y1 - y0, x1 - x0), f"copy {labels.quantity(copy, 'B/s')}"
    dx, dy = math.cos(slope), math.sin(slope)
    at, tilt = start * 1.3, {"rotation": math.degrees(slope), "rotation_mode": "anchor"}
    ax.annotate(said, (at, copy * at), xytext=(-3, 4), va="bottom", **words, **tilt)
    x, y = ax.transData.transform((at, copy * at))
    boxes += along((x0, y0), (dx, dy), math.hypot(x1 - x0, y1 - y0), 1.5 * unit)
    text = (x - 7 * unit * dy, y + 7 * unit * dx)
    return boxes + along(text, (dx, dy), 5 * len(said) * unit, 6 * unit)


def points(ax, groups, occupied) -> None:
    """Markers, lines through sweeps, and the numbers where nothing else is."""
    looks, anchors, taken = family_looks(), [], []
    for place, (_, items) in enumerate(groups, 1):
        colour, marker, _ = looks[labels.family(items[0]["case"]["op"])]
        mine, others = [], []
        for item in items:
            for r in labels.measured(item):
                at = (intensity(item), item["work"]["flops"] / r["time"]["median"])
                (mine if r["name"] == "tigon" else others).append(at)
        taken += [ax.transData.transform(at) for at in mine + others]
        look = {"marker": marker, "ls": "none"}
        if mine:
            anchors.append((str(place), mine[0]))
            ax.plot(*zip(*sorted(mine)), color=colour, lw=0.8, alpha=0.7, zorder=2)
            ax.plot(*zip(*mine), ms=6.2, mfc=colour, mec=INK, mew=0.6, zorder=3, **look)
        if others:
            ax.plot(*zip(*others), ms=4.2, mfc="none", mec=colour, mew=0.9, **look)
    numbers(ax, anchors, taken, occupied)


def key(panel, height: float, columns) -> None:
    """What the numbers mean, below the axes."""
    from matplotlib.lines import Line2D

    looks, width = family_looks(), (WIDTH - LEFT) / COLUMNS
    for column, lines in enumerate(columns):
        for row, (kind, text) in enumerate(lines):
            x = LEFT + column * width
            y = height - TOP - TALL - BOTTOM - ROW * (row + 0.5)
            colour, marker, _ = looks[kind]
            if text is None:
                mark = Line2D([x / WIDTH], [y / height], transform=panel.transSubfigure)
                mark.set(marker=marker, color=colour, markeredgecolor=INK, markeredgewidth=0.6)
                panel.add_artist(mark)
            # fmt: off
            panel.text((x + 0.12) / WIDTH, y / height, text or kind, size=8, va="center_baseline",
                       weight="normal" if text else "bold")
            # fmt: on
