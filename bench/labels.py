"""Names and numbers of a record as readers see them, for tables and plots. Standard library only."""

import json
from collections.abc import Iterable, Iterator, Mapping

from tigon.bench.records import shape_text
from tigon.registry import OPS

OTHER = "other"  # the family of an op that this version does not know
FAMILIES = (*dict.fromkeys(op.family for op in OPS.values()), OTHER)
PREFIXES = {15: "P", 12: "T", 9: "G", 6: "M", 3: "k", 0: "", -3: "m", -6: "µ", -9: "n"}


def family(op: str) -> str:
    return OPS[op].family if op in OPS else OTHER


def green(item: Mapping) -> bool:
    """Whether the gate of an entry of `cases` let it through."""
    return bool(item["check"]["ok"])


def measured(item: Mapping) -> list[dict]:
    """The results of an entry of `cases`: none, whatever it holds, if its gate is red."""
    return [*item["results"]] if green(item) else []


def own(item: Mapping) -> dict | None:
    """Tigon's result."""
    return next((r for r in measured(item) if r["name"] == "tigon"), None)


def peers(item: Mapping) -> list[dict]:
    """The results of all others."""
    return [r for r in measured(item) if r["name"] != "tigon"]


def doubtful(*results: Mapping) -> bool:
    """Whether a flag speaks against comparing them: a suspect time, another result. A launch-bound time is a time."""
    return any(not flag.startswith("launch-bound") for r in results for flag in r["flags"])


def ratio(item: Mapping, result: Mapping) -> float | None:
    """Median time over Tigon's: above 1 is slower than Tigon."""
    first = own(item)
    return result["time"]["median"] / first["time"]["median"] if first else None


def title(case: Mapping) -> str:
    """Op, variant and mode: "ssd_update · int8", "ssd_scan · step"."""
    mode = "" if case["mode"] == "forward" else case["mode"]
    return " · ".join(filter(None, (case["op"], case.get("variant"), mode)))


def conditions(case: Mapping) -> list[str]:
    """How the shape was run: dtype and what was asked for beyond the default."""
    said = [case["dtype"], "cold" if case.get("cold") else None]
    said += ["graph" if case.get("graph") else None, case.get("backend")]
    return [*filter(None, said)]


def common(items: Iterable[Mapping]) -> list[str]:
    """The conditions that all of some entries of `cases` share: said once, not at each."""
    said = [conditions(item["case"]) for item in items]
    return [word for word in said[0] if all(word in words for words in said)] if said else []


def setting(case: Mapping, known: Iterable[str] = ()) -> str:
    """Shape and conditions in one line, without those `known`."""
    return " ".join((shape_text(case["shape"]), *(w for w in conditions(case) if w not in known)))


def sweeps(run: Mapping) -> Iterator[tuple[str, list[dict]]]:
    """(swept letter, entries of `cases` by rising size): those that differ in nothing but that size, two at least.

    The size that was asked for is a case as any other; only the sizes that a sweep adds are marked.
    """
    letters = {item["case"].get("sweep") for item in run["cases"]} - {None}
    for letter in sorted(letters):
        found: dict[str, dict[int, dict]] = {}
        marked = set()
        for item in run["cases"]:
            case = item["case"]
            if letter in case["shape"] and case.get("sweep") in (None, letter) and measured(item):
                rest = dict(case, sweep=None, shape=dict(case["shape"], **{letter: None}))
                key = json.dumps(rest, sort_keys=True)
                found.setdefault(key, {})[case["shape"][letter]] = item
                if case.get("sweep"):
                    marked.add(key)
        for key, sizes in found.items():
            if key in marked and len(sizes) > 1:
                yield letter, [sizes[size] for size in sorted(sizes)]


def quantity(value: float, unit: str = "") -> str:
    """Three digits with a prefix: "3.35 TB/s"."""
    power = max((p for p in PREFIXES if abs(value) >= 10.0**p), default=-9 if value else 0)
    return f"{value / 10.0**power:.3g} {PREFIXES[power]}{unit}".rstrip()


def short(text: str, most: int) -> str:
    """At most so many characters."""
    return text if len(text) <= most else text[: most - 1] + "…"
