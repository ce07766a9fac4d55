"""The other pieces of a report: red gates, tiles, peers, reasons, flags, gates, clocks, machine, roof. HTML by name."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from statistics import geometric_mean, median

from tigon.bench import labels


def parts(run: Mapping) -> dict[str, str]:
    """Pieces of report.html by name."""
    return {
        "red": red(run),
        "tiles": tiles(run),
        "peers": peers(run),
        "missing": missing(run),
        "flags": flags(run),
        "gates": gates(run),
        "clocks": clocks(run),
        "command": escape(run.get("command") or "unknown"),
        "machine": machine(run["env"]),
        "roof": roof(run.get("roof")),
    }


def table(name: str, columns: Sequence[str], rows: Iterable[Sequence], numbers: str = "") -> str:
    """A table in a box of its own. numbers: the columns that are, as "0110"; a cell is text, or (text, class)."""
    kinds = [" n" if at < len(numbers) and numbers[at] == "1" else "" for at in range(len(columns))]

    def cell(value, kind: str) -> str:
        text, extra = value if isinstance(value, tuple) else (value, "")
        return f'<td class="{extra}{kind}">{breakable(str(text))}</td>'

    head = "".join(f'<th scope="col" class="{k}">{escape(c)}</th>' for c, k in zip(columns, kinds))
    body = "\n".join(f"<tr>{''.join(cell(v, k) for v, k in zip(row, kinds))}</tr>" for row in rows)
    inside = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="box" role="region" aria-label="{escape(name)}" tabindex="0">{inside}</div>'


def breakable(text: str) -> str:
    """Lines may end after a comma."""
    return escape(text).replace(",", ",<wbr>")


def full(case: Mapping) -> str:
    return f"{labels.title(case)} {labels.setting(case)}"


def error(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else "not finite"


GATE = ("case", "gate at", "tensor", "error", "baseline", "limit", "same bits again", "verdict")


def gate_rows(item: Mapping) -> Iterable[tuple]:
    check = item["check"]
    at = labels.shape_text(check["shape"])
    for row in check["rows"]:
        right = row["error"] <= row["limit"] and row["repeats"]
        verdict = ("right", "good") if right else ("wrong", "bad")
        again = "yes" if row["repeats"] else ("no", "bad")
        numbers = (error(row[part]) for part in ("error", "baseline", "limit"))
        yield (full(item["case"]), "text"), (at, "shape"), row["name"], *numbers, again, verdict


def red(run: Mapping) -> str:
    """What came out wrong, above everything else."""
    wrong = [item for item in run["cases"] if not labels.green(item)]
    if not wrong:
        return ""
    rows = [row for item in wrong for row in gate_rows(item) if row[-1][0] == "wrong"]
    said = "These results are wrong, so they have no time here: what is fast and wrong is not fast."
    shown = table("Wrong results", GATE, rows, "00011100")
    return (
        '<section class="red" aria-labelledby="red-title"><h2 id="red-title">Red gates</h2>'
        f"<p>{said}</p>{shown}</section>"
    )


def tiles(run: Mapping) -> str:
    cases = run["cases"]
    bad = sum(not labels.green(item) for item in cases)
    results = [r for item in cases for r in labels.measured(item)]
    shares = [
        r["share"] for item in cases if (r := labels.own(item)) and r.get("share") is not None
    ]
    suspects = sum(any(f.startswith("suspect") for f in r["flags"]) for r in results)
    flagged = sum(bool(r["flags"]) for r in results)
    ops = len({item["case"]["op"] for item in cases})
    ran = {r["name"] for item in cases for r in labels.peers(item)}
    said = [
        (len(cases), f"cases of {ops} op{'s' * (ops != 1)}", ""),
        (f"{len(cases) - bad} / {len(cases)}", "gates green", "bad" if bad else "good"),
        (f"{100 * median(shares):.0f} %" if shares else "–", "of the roof: Tigon's median", ""),
        (len(ran), f"peer{'s' * (len(ran) != 1)} ran", ""),
        (f"{flagged}", f"flagged, {suspects} of them suspect", "warn" if flagged else ""),
    ]
    return "".join(
        f'<div class="tile"><b class="{kind}">{escape(str(n))}</b>{escape(text)}</div>'
        for n, text, kind in said
    )


def peers(run: Mapping) -> str:
    """Who ran, and how its times compare where no flag speaks against it."""
    found: dict[str, list[float]] = {}
    ran: dict[str, int] = {}
    for item in run["cases"]:
        for r in labels.peers(item):
            ran[r["name"]] = ran.get(r["name"], 0) + 1
            mine = labels.own(item)
            if mine and not labels.doubtful(mine, r):
                found.setdefault(r["name"], []).append(labels.ratio(item, r))
    if not ran:
        return '<p class="soft">No peer ran.</p>'
    rows = []
    for name, count in ran.items():
        times = found.get(name)
        mean = f"{geometric_mean(times):.2f}" if times else "–"
        ends = f"{min(times):.2f} to {max(times):.2f}" if times else "–"
        rows.append((name, count, len(times or ()), mean, ends))
    columns = ("peer", "cases", "compared", "× Tigon's time, geometric mean", "from, to")
    return f"<h3>Peers that ran</h3>{table('Peers', columns, rows, '01111')}"


def missing(run: Mapping) -> str:
    """Who did not run, by reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for item in run["cases"]:
        for peer, reason in item["missing"].items():
            found.setdefault((peer, reason), []).append(item["case"]["op"])
    if not found:
        return ""
    rows = []
    for (peer, reason), ops in sorted(found.items(), key=lambda x: x[0][::-1]):
        those = "all" if len(ops) == len(run["cases"]) > 1 else ", ".join(dict.fromkeys(ops))
        rows.append((peer, (reason, "text"), len(ops), (those, "text")))
    columns = ("peer", "reason", "cases", "ops")
    return f"<h3>Peers that did not run</h3>{table('Missing peers', columns, rows, '0010')}"


def flags(run: Mapping) -> str:
    rows = [
        ((full(item["case"]), "text"), r["name"], (flag, "warn text"))
        for item in run["cases"]
        for r in labels.measured(item)
        for flag in r["flags"]
    ]
    if not rows:
        return ""
    return f"<h3>Flagged results</h3>{table('Flagged results', ('case', 'who', 'flag'), rows)}"


def gates(run: Mapping) -> str:
    rows = [row for item in run["cases"] for row in gate_rows(item)]
    if not rows:
        return '<p class="soft">No gate ran.</p>'
    said = f"<summary>{len(rows)} tensors of {len(run['cases'])} cases</summary>"
    return f"<details>{said}{table('Gates', GATE, rows, '00011100')}</details>"


def clocks(run: Mapping) -> str:
    """Of the cases that recorded them, before and after; none on a CPU."""
    rows = []
    for item in run["cases"]:
        if item.get("clocks"):
            pair = [item["clocks"][when] or {} for when in ("before", "after")]
            reasons = sorted({why for seen in pair for why in seen.get("throttle") or ()})
            said = [
                " → ".join(known(p.get(k)) for p in pair)
                for k in ("sm_mhz", "memory_mhz", "power_w")
            ]
            rows.append(((full(item["case"]), "text"), *said, (", ".join(reasons), "warn")))
    if not rows:
        return ""
    slow = sum(bool(row[-1][0]) for row in rows)
    columns = ("case", "SM MHz", "memory MHz", "power W", "throttled by")
    said = f"<summary>Clocks before and after {len(rows)} cases; {slow} throttled</summary>"
    return f"<details>{said}{table('Clocks', columns, rows, '01110')}</details>"


def known(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f}"


def definitions(pairs: Iterable[tuple[str, object]]) -> str:
    shown = (f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in pairs if v)
    return f"<dl>{''.join(shown)}</dl>"


def machine(env: Mapping) -> str:
    system, driver = (env.get(part) or {} for part in ("os", "driver"))
    arch, cuda = env.get("arch"), driver.get("cuda")
    packages = [
        f"{name} {version}" for name, version in (env.get("packages") or {}).items() if version
    ]
    pairs = [
        ("device", f"{env.get('device')} (sm_{arch})" if arch else env.get("device")),
        (
            "driver",
            driver.get("version") and f"{driver['version']}{f', CUDA {cuda}' if cuda else ''}",
        ),
        ("Tigon", f"{env.get('tigon')}, commit {env.get('commit') or 'unknown'}"),
        ("date", env.get("date")),
        (
            "system",
            " · ".join(str(system[k]) for k in ("name", "kernel", "machine") if system.get(k)),
        ),
        ("Python", (env.get("python") or {}).get("version")),
        ("threads", env.get("threads")),
        ("packages", " · ".join(packages)),
    ]
    return definitions(pairs)


def roof(found: Mapping | None) -> str:
    if not found:
        return '<p class="soft">Not measured.</p>'
    rates = sorted(found.get("gemm", {}).items(), key=lambda x: x[1])
    pairs = [("source", f"{found['source']}, {found['device']}")]
    pairs += [("copy", labels.quantity(found["copy"], "B/s"))]
    pairs += [(f"product in {dtype}", labels.quantity(rate, "FLOP/s")) for dtype, rate in rates]
    return definitions(pairs)
