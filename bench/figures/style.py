"""How plots look. No matplotlib here but inside functions.

A plot is planned first: `Plan(height, draw)`, where `draw(panel)` fills a matplotlib Figure or SubFigure of WIDTH by
height inches. Colours are told apart with any colour vision and stand out (3:1) on white and on near-black, each with a
marker of its own; lines and words are in INK, which `plots.svg` turns into the text colour around it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from tigon.bench import labels

WIDTH = 9.6  # inches
INK = "#1d2126"
TIGON = "#2878b5"
COLOURS = ("#d55e00", "#009e73", "#b66aa0", "#a07900", "#7a828a")
MARKERS = ("s", "^", "D", "v", "X")
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # names may hold a dollar
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.minor.visible": False,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: to be found, copied and read aloud
    "svg.hashsalt": "tigon",
}


class Plan(NamedTuple):
    height: float  # inches
    draw: Callable[[object], None]


@contextmanager
def styled() -> Iterator[None]:
    """matplotlib's defaults and STYLE, whatever the user's settings are; those are back afterwards."""
    from matplotlib import style

    with style.context(["default", STYLE]):
        yield


def axes(panel, height: float, left: float, bottom: float, width: float, tall: float):
    """Axes at a place given in inches from the lower left corner of a panel of that height."""
    return panel.add_axes((left / WIDTH, bottom / height, width / WIDTH, tall / height))


def heading(panel, height: float, title: str, said: str) -> None:
    """Title and one line of explanation, in the uppermost half inch."""
    panel.text(0.12 / WIDTH, 1 - 0.10 / height, title, va="top", size=12, weight="bold")
    panel.text(0.12 / WIDTH, 1 - 0.33 / height, said, va="top", size=8.5, alpha=0.8)


def looks(names: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """(colour, marker, hatch) of every name; Tigon's is its own, the others' repeat with another hatch."""
    found = {"tigon": (TIGON, "o", "")}
    for name in names:
        if name not in found:
            at = len(found) - 1
            turn, place = divmod(at, len(COLOURS))
            found[name] = (COLOURS[place], MARKERS[place], ("", "///", "...", "xxx")[turn % 4])
    return found


def peer_looks(run: Mapping) -> dict[str, tuple[str, str, str]]:
    """`looks` of all that were measured: the same in every plot of a run."""
    return looks(r["name"] for item in run["cases"] for r in labels.measured(item))


def family_looks() -> dict[str, tuple[str, str, str]]:
    """`looks` of the families of ops: the first has Tigon's colour, which is no one's else here."""
    kinds = ((TIGON, "o", ""), *zip(COLOURS, MARKERS, ("",) * len(COLOURS)))
    return dict(zip(labels.FAMILIES, kinds))


def number(value: float, _position=None) -> str:
    """A tick's label: "0.25", "32", "1 T"."""
    return f"{value:g}" if 1e-3 <= value < 1e4 else labels.quantity(value).replace(" ", "")
