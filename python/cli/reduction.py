"""``tigon reduction``: kept tokens, FLOPs and bytes by layer of a schedule on a preset; runs nothing."""

import json
from dataclasses import asdict

from tigon import cli
from tigon.cli import arguments, table
from tigon.models.reduction_schedule import KINDS, ReductionSchedule


def add_arguments(parser) -> None:
    from tigon.models.presets import PRESETS

    parser.add_argument("preset", choices=tuple(PRESETS), metavar="PRESET", help=", ".join(PRESETS))
    parser.add_argument("--kind", choices=KINDS, default="power", help="family of the schedule")
    parser.add_argument("--average", type=float, help="kept share, mean over the layers")
    parser.add_argument("--final", type=float, help="kept share of the last layer")
    parser.add_argument("--gamma", type=float, help="exponent of 'power' (default: 2)")
    parser.add_argument("--stages", type=int, default=4, help="runs of layers of 'stages'")
    parser.add_argument("--layer", type=int, default=2, help="where 'fastv' removes")
    parser.add_argument("--multiple", type=int, default=1, help="of the kept visual tokens")
    parser.add_argument("--visual", type=arguments.size, default=32768, help="visual tokens: 32k")
    parser.add_argument("--text", type=arguments.size, default=128, help="text tokens")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(args) -> int:
    from tigon.models.presets import preset

    names = ("kind", "average", "final", "gamma", "stages", "layer", "multiple")
    try:
        schedule = ReductionSchedule(**{name: getattr(args, name) for name in names})
        plan = schedule.plan(preset(args.preset), visual=args.visual, text=args.text)
    except ValueError as error:
        print(error)
        return cli.USAGE
    if args.json:
        print(json.dumps(asdict(plan) | {"average": plan.average, "final": plan.final}, indent=2))
        return cli.OK
    rows = [
        (l, row.kind, f"{row.share:.3f}", row.visual, f"{row.flops / 1e9:.1f}", f"{row.bytes / 1e6:.1f}")
        for l, row in enumerate(plan.layers)
    ]  # fmt: skip
    columns = ("layer", "kind", "share", "visual tokens", "GFLOP", "MB")
    table.show(
        columns, rows, f"{args.preset}: {args.kind}, {args.visual} visual + {args.text} text"
    )
    print(plan)
    return cli.OK
