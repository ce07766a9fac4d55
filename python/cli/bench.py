"""``tigon bench``: how fast an op is here, beside other packages that are installed.

A correctness gate runs first: a wrong result prints no time and exits with 2. --mode backward times a training step,
forward and backward together. Bytes and FLOPs are the least that the op needs, so GB/s and TFLOP/s are comparable.
--batch-invariant also times the op in batch-invariant mode, side by side: what that costs.
"""

import json
import shlex
import sys
from pathlib import Path

from tigon import cli
from tigon.cli import arguments, table
from tigon.registry import OPS


def add_arguments(parser) -> None:
    arguments.add_case(parser, every=True)
    arguments.add_backend(parser)
    parser.add_argument("--mode", choices=("forward", "backward"), default="forward")
    parser.add_argument("--peers", default="auto", help="auto, none, or names: transformers,…")
    parser.add_argument("--batch-invariant", action="store_true", help="time that mode too")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--repeat", type=int, help="rounds (default: as many as fit)")
    parser.add_argument("--time-budget", type=float, default=10.0, help="seconds of rounds an op")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a busy machine"
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--dry-run", action="store_true", help="print what would run; needs no GPU")
    parser.add_argument("--arch", type=int, default=90, help="for --dry-run without a GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")


def run(args) -> int:
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    codes, records = [cli.OK], []
    ops = arguments.ops(args.op)
    several = len(ops) > 1
    cases = [
        (op, variant) for op in ops for variant in arguments.variants(op, args.variant, several)
    ]
    for op, variant in cases:
        if args.mode == "backward" and not OPS[op].backward:
            print(f"{op} has no backward\n")
            codes.append(cli.OK if "all" in args.op else cli.USAGE)
            continue
        try:
            sizes = arguments.sizes_of(op, args.shape, OPS[op].sizes, several)
            with arguments.backend(args):
                if args.dry_run:
                    dry_run(op, sizes, variant, args)
                else:
                    codes.append(measure(op, sizes, variant, args, device, records))
        except (ValueError, TypeError) as error:
            print(error)
            codes.append(cli.USAGE)
    if args.json and records:
        args.json.write_text(json.dumps(records, indent=2) + "\n")
    return max(codes)


def dry_run(op: str, sizes: dict[str, int], variant: str | None, args) -> None:
    """Shapes, bytes, FLOPs and launch configs."""
    import torch

    import tigon
    from tigon.bench import workloads
    from tigon.bench.work import work
    from tigon.cli.explain import own_arch

    dtype = getattr(torch, args.dtype)
    load = workloads.make(op, sizes, dtype, "meta", variant=variant)
    counted = work(op, sizes, dtype.itemsize, args.mode, variant)
    print(heading(load, args.mode))
    for name, t in load.inputs.items():
        shown = f"{tuple(t.shape)} {str(t.dtype)[6:]}" if isinstance(t, torch.Tensor) else repr(t)
        print(f"  {name:<12} {shown}")
    print(
        f"  {counted.bytes / 1e6:.4g} MB, {counted.flops / 1e9:.4g} GFLOP, "
        f"{counted.flops / counted.bytes:.3g} FLOP a byte"
    )
    print(tigon.explain(op, **load.call(), arch=own_arch() or args.arch), "\n")


def measure(op: str, sizes: dict[str, int], variant: str | None, args, device, records) -> int:
    """Run one case, print its table, note its record."""
    import torch

    from tigon.bench.environment import environment
    from tigon.bench.run import record, run_case

    case = run_case(
        op,
        sizes,
        getattr(torch, args.dtype),
        device,
        args.mode,
        args.peers.split(","),
        args.seed,
        memory=not args.no_memory,
        variant=variant,
        invariant=args.batch_invariant,
        repeat=args.repeat,
        budget=args.time_budget,
        clock=args.clock,
    )
    command = "tigon " + shlex.join(sys.argv[1:])
    records.append(record(case, command, environment(device)))
    print(heading(case.workload, args.mode))
    wrong = [row for row in case.gate if not row.ok]
    if wrong:
        for row in wrong:
            again = "" if row.repeats else ", and another call gave other bits"
            print(f"  WRONG {row.name}: error {row.error:.2e}, limit {row.limit:.2e}{again}")
        return cli.WRONG_RESULT
    where = "" if case.gate_sizes == sizes else f" at {shape_text(case.gate_sizes)}"
    against = "byte for byte" if case.workload.exact else "against fp64"
    print(f"  correct{where}: {len(case.gate)} tensors {against}; {device}, {method(case)}")
    table.show(*rows(case))
    for name, reason in case.missing.items():
        print(f"  {name}: {reason}")
    print()
    return cli.OK


def method(case) -> str:
    first = case.results[0].time
    return f"median of {first.n} rounds by {first.method}"


def rows(case) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Column names and one row a candidate; ratios are to Tigon."""
    own = case.results[0]
    columns = ("who", "ms", "p20", "p80", "GB/s", "TFLOP/s", "time", "peak MB", "memory", "error")
    out = []
    for r in case.results:
        t = r.time
        peak, ratio = ("-", "-") if r.peak is None else (f"{r.peak / 1e6:.1f}", "-")
        if r.peak is not None and own.peak:
            ratio = f"{r.peak / own.peak:.2f}x"
        out.append(
            (
                r.name,
                f"{t.median * 1e3:.4g}",
                f"{t.p20 * 1e3:.4g}",
                f"{t.p80 * 1e3:.4g}",
                f"{case.work.bytes / t.median / 1e9:.4g}",
                f"{case.work.flops / t.median / 1e12:.3g}",
                f"{t.median / own.time.median:.2f}x",
                peak,
                ratio,
                " ".join((f"{r.error:.1e}", *r.flags)),
            )
        )
    return columns, out


def shape_text(sizes) -> str:
    return ",".join(f"{k}={v}" for k, v in sizes.items())


def heading(load, mode: str) -> str:
    step = " (forward and backward)" if mode == "backward" else ""
    dtype = str(load.dtype).removeprefix("torch.")
    words = (load.op, load.variant, shape_text(load.sizes), dtype, mode)
    return " ".join(filter(None, words)) + step
