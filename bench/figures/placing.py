"""Numbers beside markers, where nothing else is. Boxes are (left, bottom, right, top) in pixels."""

import math

from tigon.bench.figures.style import INK

Box = tuple[float, float, float, float]
MARKER, LETTER, LINE = 3.5, 2.6, 4.0  # points: half a marker, half a digit's width and height
DISTANCES = (9, 13, 18, 25, 34, 45, 58, 72)  # points
TURNS = (1, 7, 3, 5, 0, 4, 2, 6)  # eighths of a circle: diagonals first
LEADER = 10  # points; a number that is farther away has a line to its marker


def along(start, towards, length: float, half: float) -> list[Box]:
    """Boxes of 2 half by 2 half that cover a line."""
    out = []
    for step in range(math.ceil(length / (2 * half)) + 1):
        x, y = (a + d * step * 2 * half for a, d in zip(start, towards))
        out.append((x - half, y - half, x + half, y + half))
    return out


def overlap(a: Box, b: Box) -> float:
    """The area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def beside(text: str, x: float, y: float, unit: float, boxes: list[Box]):
    """(dx, dy) in points and the box of `text` near (x, y), at the first place that is free, or at the freest."""
    wide, tall, best = (LETTER * len(text) + 0.8) * unit, LINE * unit, None
    for distance in DISTANCES:
        for turn in TURNS:
            dx = distance * math.cos(turn * math.pi / 4)
            dy = distance * math.sin(turn * math.pi / 4)
            cx, cy = x + dx * unit, y + dy * unit
            box = (cx - wide, cy - tall, cx + wide, cy + tall)
            hits = sum(overlap(box, other) for other in boxes)
            if best is None or hits < best[0]:
                best = hits, (dx, dy), box
            if hits == 0:
                return best[1:]
    return best[1:]


def numbers(ax, anchors, markers, occupied: list[Box]) -> None:
    """Write each (text, place in data) of `anchors`; `markers` are centres in pixels."""
    unit = ax.get_figure(root=True).dpi / 72
    half = MARKER * unit
    centres = {
        (round(x / half) * half, round(y / half) * half) for x, y in markers
    }  # one of many alike
    boxes = [*occupied, *((x - half, y - half, x + half, y + half) for x, y in sorted(centres))]
    for text, at in anchors:
        (dx, dy), box = beside(text, *ax.transData.transform(at), unit, boxes)
        boxes.append(box)
        arrow = {"arrowstyle": "-", "lw": 0.5, "color": INK, "shrinkA": 3.5, "shrinkB": 3}
        # fmt: off
        ax.annotate(text, at, xytext=(dx, dy), textcoords="offset points", size=7.5, weight="bold", zorder=5,
                    ha="center", va="center", arrowprops=arrow if math.hypot(dx, dy) > LEADER else None)
        # fmt: on
