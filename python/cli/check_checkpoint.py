"""``tigon check-checkpoint DIR``: what is wrong with a quantized checkpoint, tensor by tensor.

Reads headers, configs and scales, one tensor at a time; builds no model and unpickles nothing.
"""

import json
import sys
from dataclasses import asdict

from tigon import cli

SHOWN = 40  # findings on a terminal; --json has all


def add_arguments(parser) -> None:
    parser.add_argument("dir", metavar="DIR", help="a folder of safetensors files and config.json")
    parser.add_argument(
        "--values",
        choices=("none", "scales", "all"),
        default="scales",
        help="which tensors to read: none (headers only), scales, or all (looks for NaN and inf everywhere)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args) -> int:
    from tigon.integrations.modelopt_validate import examine

    try:
        report = examine(args.dir, args.values)
    except NotADirectoryError as error:
        sys.stderr.write(f"{error}\n")
        return cli.USAGE
    if args.json:
        print(
            json.dumps(
                {"path": args.dir, "ok": not report.count("error")} | asdict(report), indent=2
            )
        )
    else:
        print(render(args.dir, report))
    return cli.WRONG_RESULT if report.count("error") else cli.OK


def render(path: str, report) -> str:
    """The report as text, errors first."""
    order = ("error", "warning", "note")
    findings = sorted(report.findings, key=lambda f: order.index(f.severity))
    lines = [f"{path}: {report.tensors} tensors, {report.bytes / 2**20:.1f} MiB, {held(report)}"]
    for f in findings[:SHOWN]:
        where = f"{f.file}: " if f.file and f.tensor else f.file
        lines.append(f"{f.severity}: {where}{f.tensor} {f.fault}")
        lines += [f"    {f.fix}"] * bool(f.fix)
    if len(findings) > SHOWN:
        lines.append(f"… and {len(findings) - SHOWN} more; --json has all")
    lines.append(f"{report.count('error')} errors, {report.count('warning')} warnings")
    return "\n".join(map(printable, lines))


def printable(line: str) -> str:
    """Names come from the files: what would steer the terminal is shown as an escape."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def held(report) -> str:
    """The quantized layers by algorithm."""
    layers = ", ".join(f"{count} {algo}" for algo, count in sorted(report.formats.items()))
    cache = f", KV cache in {report.kv_cache}" if report.kv_cache else ""
    return f"quantized layers: {layers or 'none'}{cache}"
