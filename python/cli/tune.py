"""``tigon tune``: search launch configs on this GPU and write a table of those that are faster.

Nothing is searched when an op runs; a table is followed where TIGON_LAUNCH_TABLE names it. Candidates must compile
without spills and be right against fp64, then beat the present config when both are timed alternately. --dry-run lists
them on any machine.
"""

from collections import Counter
from pathlib import Path

from tigon import cli
from tigon.cli import arguments, table
from tigon.registry import OPS

SHOWN = 20  # candidates that a dry run prints of a kernel
NO_GPU = "tigon tune needs a GPU, as it measures; --dry-run lists the candidates on any machine"


def add_arguments(parser) -> None:
    arguments.add_case(parser, every=True)
    arguments.add_backend(parser)
    parser.add_argument(
        "--preset",
        help="sizes of a model, such as nemotron-3-nano (tigon list presets; default: Nemotron 3 Super's)",
    )
    arguments.add_mode(parser)
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        help="default: cuda; cpu is Triton's interpreter, for tests",
    )
    parser.add_argument(
        "--budget",
        type=arguments.positive(float),
        default=60.0,
        metavar="SECONDS",
        help="of search a case (default: 60)",
    )
    parser.add_argument(
        "--graph",
        action="store_true",
        help="replay CUDA graphs, which leaves launch costs out (not with --mode backward)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the table to write or to add to (default: tigon-launch-sm_ARCH.json)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the candidates; runs nothing, needs no GPU"
    )
    arguments.add_arch(parser, "90; of --dry-run")


def run(args) -> int:
    import torch

    try:
        arguments.capturable(args)
        arguments.known_somewhere(arguments.ops(args.op), args.shape, args.variant)
    except ValueError as error:
        print(error)
        return cli.USAGE
    device = args.device or "cuda"
    codes, several = [cli.OK], len(arguments.ops(args.op)) > 1
    cases = []
    for op in arguments.ops(args.op):
        if OPS[op].kind == "cuda":
            print(
                f"{op}: a kernel of CUDA C++, whose launch is arithmetic (python/native); it has no table\n"
            )
            codes.append(cli.OK if "all" in args.op else cli.USAGE)
        elif args.mode != "forward" and not OPS[op].backward:
            print(f"{op} has no backward: --mode forward\n")
            codes.append(cli.OK if "all" in args.op else cli.USAGE)
        else:
            cases += [(op, variant) for variant in arguments.variants(op, args.variant, several)]
    if cases and not args.dry_run and device == "cuda" and not torch.cuda.is_available():
        print(NO_GPU)
        return cli.ENVIRONMENT
    for op, variant in cases:
        codes.append(
            guarded(dry_run if args.dry_run else search, op, variant, args, device, several)
        )
    return max(codes)


def guarded(function, op: str, *args) -> int:
    """The function's exit code, or that of what went wrong."""
    from tigon.bench.tune import Wrong

    try:
        return function(op, *args)
    except Wrong as error:
        print(f"WRONG: {error}\n")
        return cli.WRONG_RESULT
    except (ValueError, TypeError, RuntimeError) as error:
        print(f"{op}: {error}\n")
        return cli.exit_code(error)


def sizes_of(op: str, args, device: str, several: bool) -> dict[str, int]:
    from tigon.bench import presets

    return arguments.sizes_of(op, args.shape, presets.sizes(op, args.preset, device), several)


def heading(op: str, variant: str | None, sizes, args) -> str:
    shape = ",".join(f"{k}={v}" for k, v in sizes.items())
    return " ".join(filter(None, (op, variant, shape, args.dtype, args.mode)))


def dry_run(op: str, variant: str | None, args, device: str, several: bool) -> int:
    """Candidates by kernel, nearest to the present config first, and how many were pruned."""
    import torch

    from tigon.bench import tune
    from tigon.cli.explain import own_arch

    sizes = sizes_of(op, args, "cuda", several)
    dtype = getattr(torch, args.dtype)
    arch = args.arch or own_arch() or 90
    with arguments.backend(args):
        kernels = tune.planned(op, sizes, dtype, args.mode, arch, variant)
    print(heading(op, variant, sizes, args))
    for kernel in kernels:
        count = len(kernel.candidates)
        print(
            f"  {kernel.op} {kernel.name} on sm_{kernel.arch}: {count} candidates, {pruned(kernel)}"
        )
        print(f"    now  {words(kernel.present)}")
        for fields in kernel.candidates[:SHOWN]:
            print(f"         {words(fields)}")
        if count > SHOWN:
            print(f"         and {count - SHOWN} that are further away")
    print()
    return cli.OK


def pruned(kernel) -> str:
    reasons = "; ".join(f"{n} {why}" for why, n in kernel.pruned.items())
    return f"{sum(kernel.pruned.values())} pruned{f' ({reasons})' if reasons else ''}"


def words(fields) -> str:
    return " ".join(f"{name}={value}" for name, value in fields.items())


def search(op: str, variant: str | None, args, device: str, several: bool) -> int:
    """Search one case, print what came out, write the rows."""
    from functools import partial

    import torch

    from tigon.bench import timing, tune

    sizes = sizes_of(op, args, device, several)
    print(heading(op, variant, sizes, args))
    found, path = [], args.output
    timer = partial(timing.measure, graph=args.graph)
    with arguments.backend(args):
        for one in tune.tune(
            op, sizes, getattr(torch, args.dtype), device, args.mode, variant, args.seed, args.budget, timer
        ):  # fmt: skip
            arch = one.kernel.arch
            path = path or Path(f"tigon-launch-sm_{arch}.json")
            if not found:
                tune.merged(
                    path, arch, []
                )  # a file that cannot be added to is told before the search goes on
            found.append(one)
            if one.row:
                tune.write(path, arch, [one.row])
    table.show(COLUMNS, [cells(one) for one in found])
    for one in found:
        dropped = Counter((t.outcome, t.why) for t in one.trials if t.why)
        for (outcome, why), count in dropped.items():
            print(f"  {one.kernel.name}: {count} {outcome}: {why}")
    if any(one.row for one in found):
        print(f"  written to {path}; followed where TIGON_LAUNCH_TABLE={path}")
    else:
        print("  nothing is faster than what is there")
    print()
    return cli.OK


COLUMNS = ("kernel", "candidates", "tried", "wrong", "failed", "time", "best")


def cells(one) -> tuple[str, ...]:
    counts = [str(one.count(outcome)) for outcome in ("wrong", "failed")]
    changed = one.best and {k: v for k, v in one.best.items() if one.kernel.present[k] != v}
    best = words(changed) if changed else "as it is"
    kernel = f"{one.kernel.op} {one.kernel.name}"
    total = str(len(one.kernel.candidates))
    return (kernel, total, str(len(one.trials)), *counts, f"{one.ratio:.3f}x", best)
