"""The table of results in a report: a row for each case and candidate, its values beside the words for sorting."""

from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import NamedTuple

from tigon.bench import labels

Cell = tuple[str, object]  # (HTML, what it is sorted by; None: last)


class Column(NamedTuple):
    """kind: the class of its cells, "n" for numbers. cell: of an entry of `cases` and a result (None: it has none)."""

    name: str
    kind: str
    cell: Callable[[Mapping, Mapping | None], Cell]


def parts(run: Mapping) -> dict[str, str]:
    """Pieces of report.html by name."""
    lines = [(item, r) for item in run["cases"] for r in labels.measured(item) or [None]]
    return {
        "columns": "".join(head(column) for column in COLUMNS),
        "rows": "\n".join(row(*line) for line in lines),
        "op_options": options(item["case"]["op"] for item in run["cases"]),
        "mode_options": options(item["case"]["mode"] for item in run["cases"]),
        "who_options": options(who(r) for _, r in lines),
    }


def options(values: Iterable[str]) -> str:
    return "".join(f"<option>{escape(value)}</option>" for value in dict.fromkeys(values))


def head(column: Column) -> str:
    kind = f' class="{column.kind}"' if column.kind else ""
    button = f'<button type="button">{escape(column.name)}</button>'
    return f'<th scope="col" aria-sort="none"{kind}>{button}</th>'


def who(result: Mapping | None) -> str:
    return "tigon" if result is None else result["name"]


def row(item: Mapping, result: Mapping | None) -> str:
    case, flags = item["case"], "" if result and not result["flags"] else "1"
    data = {"op": case["op"], "who": who(result), "mode": case["mode"], "flags": flags}
    said = "".join(f' data-{name}="{escape(value)}"' for name, value in data.items())
    tigon = ' class="tigon"' if who(result) == "tigon" else ""
    cells = "".join(cell(column, item, result) for column in COLUMNS)
    return f"<tr{tigon}{said}>{cells}</tr>"


def cell(column: Column, item: Mapping, result: Mapping | None) -> str:
    shown, value = column.cell(item, result)
    tag = "th" if column is COLUMNS[0] else "td"
    scope = ' scope="row"' if tag == "th" else ""
    kind = f' class="{column.kind}"' if column.kind else ""
    by = "" if value is None else escape(str(value))
    return f'<{tag}{scope}{kind} data-v="{by}">{shown}</{tag}>'


def word(value: object) -> Cell:
    return escape(str(value or "")), str(value or "")


def digits(value: float) -> str:
    """Four digits, and no exponent for what is large."""
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def measured(count: Callable[[Mapping, Mapping], float | None], show=digits):
    """A column of numbers, empty where there is none."""

    def made(item: Mapping, result: Mapping | None) -> Cell:
        value = None if result is None else count(item, result)
        return ("", None) if value is None else (escape(show(value)), value)

    return made


def shape(item: Mapping, result: Mapping | None) -> Cell:
    case = item["case"]
    extra = " ".join(filter(None, (case.get("preset"), *labels.conditions(case)[1:])))
    small = f' <small class="soft">{escape(extra)}</small>' if extra else ""
    text = labels.shape_text(case["shape"])
    return escape(text) + small, text


def spread(item: Mapping, result: Mapping | None) -> Cell:
    if result is None:
        return "", None
    low, high = (1e3 * result["time"][part] for part in ("p20", "p80"))
    return f"{digits(low)}–{digits(high)}", low


def share(item: Mapping, result: Mapping | None) -> Cell:
    value = None if result is None else result.get("share")
    if value is None:
        return "", None
    wide = max(0.0, min(1.0, value)) * 100
    return f'{100 * value:.1f}<span class="bar"><i style="width:{wide:.1f}%"></i></span>', value


def flags(item: Mapping, result: Mapping | None) -> Cell:
    if not labels.green(item):
        return '<strong class="bad">gate is red</strong>', "gate is red"
    text = "no result" if result is None else "; ".join(result["flags"])
    return f'<span class="warn">{escape(text)}</span>' if text else "", text


def a_second(what: str, unit: float):
    return lambda item, r: item["work"][what] / r["time"]["median"] / unit


def peak(item: Mapping, r: Mapping) -> float | None:
    return None if r["peak"] is None else r["peak"] / 1e6


COLUMNS = (
    Column("op", "", lambda item, _: word(item["case"]["op"])),
    Column("variant", "", lambda item, _: word(item["case"].get("variant"))),
    Column("mode", "", lambda item, _: word(item["case"]["mode"])),
    Column("shape", "shape", shape),
    Column("dtype", "", lambda item, _: word(item["case"]["dtype"])),
    Column("who", "who", lambda _, r: word(who(r))),
    Column("median ms", "n", measured(lambda _, r: 1e3 * r["time"]["median"])),
    Column("p20–p80", "n", spread),
    Column("GB/s", "n", measured(a_second("bytes", 1e9))),
    Column("TFLOP/s", "n", measured(a_second("flops", 1e12), lambda v: f"{v:.3g}")),
    Column("% of roof", "n", share),
    Column("× Tigon", "n", measured(labels.ratio, lambda v: f"{v:.2f}")),
    Column("peak MB", "n", measured(peak)),
    Column("error", "n", measured(lambda _, r: r["error"], lambda v: f"{v:.1e}")),
    Column("flags", "flags", flags),
)
