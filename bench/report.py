"""A run of `tigon bench` as one page: what ran where, what came out, plots, and the run itself to be downloaded.

    write(run, "report.html")        # run: schema 2 of bench/records.py

The page needs nothing but a browser: style, script and plots are in it, and its content security policy forbids it
to load anything. Whatever a record holds is text there, never markup. report.html is the page, report.css its style,
report.js sorts and filters the table; `page_table` and `page_parts` make the pieces.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template

from tigon.bench import labels, page_parts, page_table

HERE = Path(__file__).parent
TITLES = {
    "roofline": "Roofline: FLOP/s against FLOPs a byte",
    "speedups": "Speed-up over peers, by case",
    "sweeps": "Time and share of the roof by size",
}


def write(run: Mapping, path: str | Path) -> None:
    """The page of a run, as one file."""
    Path(path).write_text(page(run), encoding="utf-8")


def page(run: Mapping) -> str:
    script = file("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        **headline(run),
        "style": file("report.css"),
        "script": script,
        "script_hash": f"sha256-{digest}",
        "plots": plots(run),
        "run": embedded(run),
        **page_parts.parts(run),
        **page_table.parts(run),
    }
    return Template(file("report.html")).substitute(parts)


def file(name: str) -> str:
    """A file beside this one, without the newline at its end."""
    return (HERE / name).read_text(encoding="utf-8").rstrip("\n")


def embedded(run: Mapping) -> str:
    """JSON that can stand in a `<script>`: no "<" in it."""
    return json.dumps(run).replace("<", "\\u003c")


def headline(run: Mapping) -> dict[str, str]:
    env, gates = run["env"], [labels.green(item) for item in run["cases"]]
    red = gates.count(False)
    verdict = "All gates are green." if gates else "No case ran."
    if red:
        verdict = f"{red} of {len(gates)} gates {'is' if red == 1 else 'are'} red: a wrong result has no time."
    words = (env.get("date"), f"Tigon {env.get('tigon')}", env.get("commit"))
    title = f"Tigon benchmark · {env.get('device')}"
    file_name = f"tigon-bench-{env.get('date')}.json"
    return {
        "title": escape(f"{title} · {env.get('date')}"),
        "heading": escape(title),
        "subtitle": escape(" · ".join(str(word) for word in words if word)),
        "verdict": verdict,
        "verdict_class": "bad" if red or not gates else "good",
        "download": escape(file_name),
        "footer": escape(
            f"Written by tigon bench {env.get('tigon')}; the run is embedded as JSON (schema 2)."
        ),
    }


def plots(run: Mapping) -> str:
    """Those that exist, or why there are none."""
    try:
        import matplotlib  # noqa: F401  before anything is drawn
    except ImportError:
        said = "No plots: matplotlib was not installed (pip install 'tigon[bench]')."
        return f'<p class="soft">{escape(said)}</p>'
    from tigon.bench import plots

    drawn = [(name, getattr(plots, name)(run)) for name in TITLES]
    found = [figure(name, plots.svg(made, name)) for name, made in drawn if made is not None]
    return (
        "\n".join(found) or '<p class="soft">No case has a time, so there is nothing to plot.</p>'
    )


def figure(name: str, svg: str) -> str:
    said = f'<svg role="img" aria-label="{escape(TITLES[name])}" '
    box = f'<div role="region" aria-label="{escape(TITLES[name])}" tabindex="0">'
    return f'<figure id="plot-{name}">{box}{svg.replace("<svg ", said, 1)}</div></figure>'
