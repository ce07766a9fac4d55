"""``tigon compare``: is the second record of ``tigon bench`` slower than the first, or is it noise?

A row is SLOWER or FASTER only if the medians differ by more than the limit and the intervals from p20 to p80 do not
overlap; rows measured under other conditions (device, threads, clocks) are UNCLEAR, and it says why. Ratios are
second over first. Exit code 3 if a row of Tigon's is SLOWER, 2 if the second record holds a wrong result.
"""

import argparse
import json
from pathlib import Path

from tigon import cli
from tigon.bench import compare
from tigon.cli import table


def add_arguments(parser) -> None:
    parser.add_argument(
        "first", type=Path, metavar="A.json", help="before: a file of tigon bench --json"
    )
    parser.add_argument("second", type=Path, metavar="B.json", help="after: another")
    parser.add_argument(
        "--limit",
        type=share,
        default=compare.LIMIT,
        metavar="5%",
        help="share by which medians may differ and still be SAME (default: 5%%)",
    )
    parser.add_argument(
        "--fail-on",
        type=fail_on,
        default=0.0,
        metavar="slower=5%",
        help="exit code 3 only where a SLOWER row is slower by more than this (default: any)",
    )
    parser.add_argument(
        "--peers", action="store_true", help="SLOWER rows of peers count for the exit code too"
    )
    parser.add_argument("--json", action="store_true", help="print the verdicts as JSON")
    parser.add_argument("--md", type=Path, metavar="FILE", help="also write a Markdown table there")


def share(text: str) -> float:
    """A share such as 5% or 0.05."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 10:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share; write 5% or 0.05")
    return value


def fail_on(text: str) -> float:
    word, found, value = text.partition("=")
    if word != "slower" or not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not slower=SHARE, as in slower=5%")
    return share(value)


def run(args) -> int:
    try:
        first, second = compare.read(args.first), compare.read(args.second)
    except ValueError as error:
        print(error)
        return cli.USAGE
    found = compare.compare(first, second, args.limit)
    wrong, slower = found.wrong(), found.slower(args.fail_on, args.peers)
    code = cli.WRONG_RESULT if wrong else cli.SLOWER if slower else cli.OK
    if not found.rows:
        code = cli.USAGE
    if args.md:
        args.md.write_text(compare.to_markdown(found, first, second))
    if args.json:
        print(json.dumps(compare.to_json(found) | {"limit": args.limit, "exit": code}, indent=2))
        return code
    if rows := compare.cells(found):
        table.show(compare.COLUMNS, rows)
    counts = {row.verdict: 0 for row in found.rows}
    for row in found.rows:
        counts[row.verdict] += 1
    print(", ".join(f"{n} {word}" for word, n in counts.items()) or "no row is in both files")
    if slower and not wrong:
        worst = max(slower, key=lambda row: row.ratio)
        print(f"slower, at most {worst.ratio:.3f}x: {compare.label(worst.case)}")
    return code
