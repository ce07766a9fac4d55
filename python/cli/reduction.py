"""``tigon reduction``: kept tokens, FLOPs and bytes by layer of a schedule on a preset; runs nothing."""

import json
from dataclasses import asdict

from tigon import cli
from tigon.cli import arguments, table
from tigon.models.reduction_schedule import KINDS, ReductionSchedule


def add_arguments(parser) -> None:
    from tigon.models.presets import PRESETS

    parser.add_argument("preset", choices=tuple(PRESETS), metavar="PRESET", help=", ".join(PRESETS))
    parser.add_argument(
        "--kind", choices=KINDS, default="power", help="family of the schedule (default: power)"
    )
    parser.add_argument("--average", type=float, help="share kept, 0 to 1, mean over the layers")
    parser.add_argument("--final", type=float, help="share kept by the last layer, 0 to 1")
    parser.add_argument("--gamma", type=float, help="exponent of 'power' (default: 2)")
    parser.add_argument(
        "--stages", type=int, default=4, help="runs of layers of 'stages' (default: 4)"
    )
    parser.add_argument(
        "--layer", type=int, default=2, help="before which 'fastv' removes (default: 2)"
    )
    parser.add_argument(
        "--multiple", type=int, default=1, help="of which kept visual tokens are one (default: 1)"
    )
    parser.add_argument(
        "--visual", type=arguments.size, default=32768, help="visual tokens (default: 32k)"
    )
    parser.add_argument(
        "--text", type=arguments.size, default=128, help="text tokens (default: 128)"
    )
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
