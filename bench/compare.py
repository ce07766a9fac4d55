"""Two records of `tigon bench` beside each other: which rows are the same, faster, slower, or cannot be told apart.

    SAME      the medians lie within the limit
    FASTER    beyond the limit, and the intervals from p20 to p80 do not overlap
    SLOWER    likewise
    UNCLEAR   beyond the limit but overlapping, too few samples, or measured under other conditions: `reasons` says
    WRONG     the second record's gate is red, so it has no time

Ratios are the second time over the first. Standard library only: it answers in milliseconds.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tigon.bench import records

SAME, FASTER, SLOWER, UNCLEAR, WRONG = "SAME", "FASTER", "SLOWER", "UNCLEAR", "WRONG"
LIMIT = 0.05
LEAST_SAMPLES = 3
CLOCK_LIMIT = 0.05  # share by which SM clocks may differ
KEY = ("op", "variant", "mode", "preset", "shape", "dtype", "cold", "graph", "backend", "sweep")


@dataclass(frozen=True)
class Row:
    """One result that is in both records, or a wrong case of the second.

    before, after: medians in seconds; ratio: after over before; low, high: where the intervals from p20 to p80 put it.
    """

    case: Mapping[str, object]
    name: str
    verdict: str
    before: float | None = None
    after: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    reasons: tuple[str, ...] = ()

    @property
    def own(self) -> bool:
        """Whether it is Tigon's, not a peer's."""
        return is_own(self.name)


@dataclass(frozen=True)
class Comparison:
    """rows are in both records, wrong in the second; the others, (case, name), in one of them only."""

    rows: tuple[Row, ...]
    only_first: tuple[tuple[Mapping[str, object], str], ...]
    only_second: tuple[tuple[Mapping[str, object], str], ...]

    def wrong(self) -> list[Row]:
        return [row for row in self.rows if row.verdict == WRONG]

    def slower(self, limit: float = 0.0, peers: bool = False) -> list[Row]:
        """Rows that are SLOWER by more than `limit`, Tigon's or all."""
        found = (row for row in self.rows if row.verdict == SLOWER and (row.own or peers))
        return [row for row in found if row.ratio > 1 + limit]


def is_own(name: str) -> bool:
    return name == "tigon" or name.startswith("tigon,")


def read(path: str | Path) -> dict:
    """A record in schema 2. ValueError where the file is not one or lacks what a comparison needs."""
    run = records.load(Path(path))
    try:
        for _ in _results(run), _wrong(run):
            list(_)
        run["env"]["device"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a whole record of tigon bench: {type(error).__name__} {error}"
        ) from error
    return run


def _key(case: Mapping) -> tuple:
    shape = tuple(sorted(case["shape"].items()))
    return tuple(shape if name == "shape" else case.get(name) or None for name in KEY)


def _results(run: Mapping) -> Iterator[tuple[tuple, tuple[Mapping, Mapping]]]:
    """((key of the case, result's name, which of several such), (case as recorded, result))."""
    seen: dict[tuple, int] = {}
    for found in run["cases"]:
        for result in found["results"]:
            key = (_key(found["case"]), result["name"])
            times = result["time"]
            for field in ("median", "p20", "p80", "n", "method"):
                times[field]
            seen[key] = seen.get(key, -1) + 1
            yield (*key, seen[key]), (found, result)


def _wrong(run: Mapping) -> Iterator[tuple[tuple, Mapping]]:
    for found in run["cases"]:
        if not found["check"]["ok"]:
            yield _key(found["case"]), found


def compare(first: Mapping, second: Mapping, limit: float = LIMIT) -> Comparison:
    """Rows of the second record beside those of the first. limit: share by which medians may differ and be the SAME."""
    old, new = dict(_results(first)), dict(_results(second))
    rows = []
    for key, found in _wrong(second):
        names = [row["name"] for row in found["check"]["rows"] if _is_red(row)]
        reason = f"wrong: {', '.join(names) or 'its gate is red'}"
        rows.append(Row(found["case"], "tigon", WRONG, reasons=(reason,)))
        old = {k: v for k, v in old.items() if k[0] != key}
    for key, (found, after) in new.items():
        if key in old:
            before_case, before = old[key]
            reasons = conditions(first["env"], before_case, before, second["env"], found, after)
            rows.append(verdict(found["case"], before, after, limit, reasons))
    return Comparison(
        tuple(rows),
        tuple((c["case"], r["name"]) for key, (c, r) in old.items() if key not in new),
        tuple((c["case"], r["name"]) for key, (c, r) in new.items() if key not in old),
    )


def _is_red(row: Mapping) -> bool:
    return not (row["error"] <= row["limit"] and row["repeats"])


def verdict(
    case: Mapping, before: Mapping, after: Mapping, limit: float, reasons: tuple[str, ...] = ()
) -> Row:
    """Of two results. reasons: why they cannot be compared, if they cannot."""
    old, new = before["time"], after["time"]
    ratio, low, high = (
        new["median"] / old["median"],
        new["p20"] / old["p80"],
        new["p80"] / old["p20"],
    )
    same = 1 / (1 + limit) <= ratio <= 1 + limit
    if not reasons and not same and low <= 1 <= high:
        reasons = ("the intervals overlap",)
    word = UNCLEAR if reasons else SAME if same else SLOWER if ratio > 1 else FASTER
    times = (old["median"], new["median"], ratio, low, high)
    return Row(case, after["name"], word, *times, reasons)


def conditions(
    env: Mapping, found: Mapping, result: Mapping, env2: Mapping, found2: Mapping, result2: Mapping
) -> tuple[str, ...]:
    """What makes two results incomparable, in words. Threads count on a CPU only."""
    reasons = []

    def differ(what: str, one: object, other: object) -> None:
        if one != other:
            reasons.append(f"other {what}: {one}, {other}")

    differ("devices", env["device"], env2["device"])
    if env["device"] == env2["device"] == "cpu":
        differ("numbers of threads", env.get("threads"), env2.get("threads"))
    differ("methods of timing", result["time"]["method"], result2["time"]["method"])
    few = min(result["time"]["n"], result2["time"]["n"])
    if few < LEAST_SAMPLES:
        reasons.append(f"{few} sample{'s' * (few != 1)}; {LEAST_SAMPLES} are needed")
    one, other = (_sm_clock(part) for part in (found, found2))
    if one and other and max(one, other) > (1 + CLOCK_LIMIT) * min(one, other):
        reasons.append(f"other SM clocks: {one} and {other} MHz")
    for which, part in (("first", found), ("second", found2)):
        if slowed := _throttled(part):
            reasons.append(f"the {which} was throttled: {', '.join(slowed)}")
    return tuple(reasons)


def _sm_clock(found: Mapping) -> float | None:
    """After the measurement: before it the GPU may have been idle."""
    return ((found.get("clocks") or {}).get("after") or {}).get("sm_mhz")


def _throttled(found: Mapping) -> list[str]:
    clocks = found.get("clocks") or {}
    times = (clocks.get(when) or {} for when in ("before", "after"))
    return list(dict.fromkeys(why for part in times for why in part.get("throttle") or ()))


def label(case: Mapping) -> str:
    """A case in words, without its shape."""
    words = [case["op"], case.get("variant"), case["mode"], case.get("preset"), case["dtype"]]
    words += [name for name in ("cold", "graph") if case.get(name)]
    return " ".join(filter(None, (*words, case.get("backend"))))


COLUMNS = ("verdict", "case", "shape", "who", "before ms", "after ms", "ratio", "interval", "why")


def cells(comparison: Comparison) -> list[tuple[str, ...]]:
    """The rows as text, by COLUMNS; last those that are in one record only."""
    out = []
    for row in comparison.rows:
        times = ["-"] * 4
        if row.ratio is not None:
            times = [f"{row.before * 1e3:.4g}", f"{row.after * 1e3:.4g}", f"{row.ratio:.3f}x"]
            times.append(f"{row.low:.3f} to {row.high:.3f}")
        where = (label(row.case), records.shape_text(row.case["shape"]), row.name)
        out.append((row.verdict, *where, *times, "; ".join(row.reasons)))
    for which, rows in (("first", comparison.only_first), ("second", comparison.only_second)):
        for case, name in rows:
            where = (label(case), records.shape_text(case["shape"]), name)
            out.append((f"only in {which}", *where, *["-"] * 4, ""))
    return out


def to_json(comparison: Comparison) -> dict[str, object]:
    """As plain data."""

    def alone(rows):
        return [{"case": dict(case), "name": name} for case, name in rows]

    return {
        "rows": [asdict(row) for row in comparison.rows],
        "only_first": alone(comparison.only_first),
        "only_second": alone(comparison.only_second),
    }


def to_markdown(comparison: Comparison, first: Mapping, second: Mapping) -> str:
    """A table, over it what was compared."""
    lines = [f"- first: {records.machine_line(first['env'])}: `{first['command']}`"]
    lines += [f"- second: {records.machine_line(second['env'])}: `{second['command']}`", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for row in cells(comparison):
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |")
    return "\n".join(lines) + "\n"
