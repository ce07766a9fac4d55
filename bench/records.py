"""Results as plain data: what `tigon bench --json` writes, `tigon compare` and the report read.

Schema 2, one object a file:

    schema, command, env
    roof      device, source, copy (bytes/s), gemm (FLOP/s by dtype)
    cases     case      op, variant, mode, preset, shape, dtype, seed, cold, graph, backend, sweep (the letter varied)
              work      bytes, flops, roof_s (seconds at the roof), bound ("memory" or "compute")
              check     ok, shape, rows: name, error, baseline, limit, repeats
              results   name ("tigon", then peers), time (median, p20, p80, n, method; in s), peak, error, share, flags
              missing   why a peer did not run, by name
              clocks    before and after: sm_mhz, memory_mhz, power_w, throttle; null on a CPU

share is of the roof: roof_s / median. results is empty where the gate is red: a wrong result has no time.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

SUSPECT = 10.0  # times faster than a peer: rather a mistake than a triumph
COLUMNS = (
    "op", "variant", "mode", "preset", "dtype", "shape", "who", "ms", "p20", "p80", "GB/s", "TFLOP/s", "% of roof",
    "x", "peak MB", "error", "flags",
)  # fmt: skip


def save(run: Mapping, path: Path) -> None:
    path.write_text(json.dumps(run, indent=1) + "\n")


def load(path: Path) -> dict:
    """A run in schema 2. ValueError where the file is not one."""
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a record of tigon bench: {error}") from error
    if isinstance(found, list) and found and all(_schema(part) == 1 for part in found):
        return from_schema_1(found)
    if _schema(found) != 2:
        raise ValueError(f"{path} is not a record of tigon bench: it has no schema 1 or 2")
    return found


def _schema(found: object) -> int | None:
    return found.get("schema") if isinstance(found, dict) else None


def from_schema_1(cases: list[dict]) -> dict:
    """Schema 1 was a list of cases with an environment each, without a roof; its "backward" was a step."""
    modes = {"backward": "step"}
    first = {"variant": ""}  # its earliest files know no variants
    new = {"preset": None, "seed": 0, "cold": False, "graph": False, "backend": None, "sweep": None}
    return {
        "schema": 2,
        "command": cases[0]["repro"],
        "env": cases[0]["env"],
        "roof": None,
        "cases": [
            {
                "case": {
                    **first,
                    **c["case"],
                    **new,
                    "mode": modes.get(c["case"]["mode"], c["case"]["mode"]),
                },
                "work": c["work"] | {"roof_s": None, "bound": None},
                "check": c["check"],
                "results": [r | {"share": None} for r in c["results"]],
                "missing": c["missing"],
                "clocks": None,
            }
            for c in cases
        ],
    }


def shape_text(shape: Mapping[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in shape.items())


def rows(run: Mapping) -> Iterator[dict[str, object]]:
    """One flat row a result, by COLUMNS; None where something was not measured."""
    for found in run["cases"]:
        case, own = found["case"], found["results"][0] if found["results"] else None
        for result in found["results"]:
            seconds, peak, share = result["time"]["median"], result["peak"], result["share"]
            yield {
                "op": case["op"],
                "variant": case["variant"],
                "mode": case["mode"],
                "preset": case["preset"],
                "dtype": case["dtype"],
                "shape": shape_text(case["shape"]),
                "who": result["name"],
                "ms": seconds * 1e3,
                "p20": result["time"]["p20"] * 1e3,
                "p80": result["time"]["p80"] * 1e3,
                "GB/s": found["work"]["bytes"] / seconds / 1e9,
                "TFLOP/s": found["work"]["flops"] / seconds / 1e12,
                "% of roof": None if share is None else 100 * share,
                "x": seconds / own["time"]["median"],
                "peak MB": None if peak is None else peak / 1e6,
                "error": result["error"],
                "flags": "; ".join(result["flags"]),
            }


def text(value: object) -> str:
    """A cell for people: four digits, nothing for None."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def to_csv(run: Mapping) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(run))
    return out.getvalue()


def to_markdown(run: Mapping) -> str:
    """A table, over it the command and the machine, under it what is wrong and what could not run."""
    env, roof = run["env"], run["roof"]
    lines = [f"`{run['command']}`", "", machine_line(env)]
    if roof:
        lines += ["", roof_line(roof)]
    lines += ["", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for row in rows(run):
        cells = (text(row[name]).replace("|", "\\|") for name in COLUMNS)
        lines.append(f"| {' | '.join(cells)} |")
    for found in run["cases"]:
        name = " ".join(filter(None, (found["case"]["op"], found["case"]["variant"])))
        wrong = [
            r["name"] for r in found["check"]["rows"] if r["error"] > r["limit"] or not r["repeats"]
        ]
        if not found["check"]["ok"]:
            lines += ["", f"WRONG, so not timed: {name}: {', '.join(wrong)}"]
        if found["missing"]:
            reasons = (f"{peer} ({why})" for peer, why in found["missing"].items())
            lines += ["", f"{name} without {'; '.join(reasons)}"]
    return "\n".join(lines) + "\n"


def machine_line(env: Mapping) -> str:
    """What a reader must know to judge the numbers."""
    packages = env["packages"]
    versions = ", ".join(
        f"{name} {packages[name]}" for name in ("torch", "triton") if packages.get(name)
    )
    threads = f", {env['threads']} threads" if env["device"] == "cpu" else ""
    return f"{env['date']}, {env['device']}{threads}, {versions}, tigon {env['tigon']} ({env['commit']})"


def roof_line(roof: Mapping) -> str:
    rates = ", ".join(f"{dtype} {rate / 1e12:.4g} TFLOP/s" for dtype, rate in roof["gemm"].items())
    return (
        f"Roof of {roof['device']}, {roof['source']}: copy {roof['copy'] / 1e9:.4g} GB/s, {rates}"
    )
