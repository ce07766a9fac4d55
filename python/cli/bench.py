"""``tigon bench``: how fast ops are here, beside other packages that are installed.

A correctness gate runs first: a wrong result prints no time and exits with 2. Bytes and FLOPs are the least that the
op needs; the roof of this machine (a large copy, large products) is measured before anything else, and every row says
its share of it. docs/benchmarks.md explains the columns.
"""

import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tigon import cli
from tigon.cli import arguments, bench_output
from tigon.registry import OPS

BUDGET = {"one": 10.0, "several": 1.5}  # seconds of rounds a case, on a CPU
SWEEP_SHARE = 0.5  # of the budget, for each smaller size of a sweep


def add_arguments(parser) -> None:
    arguments.add_case(parser, every=True)
    arguments.add_backend(parser)
    parser.add_argument(
        "--preset",
        help="sizes of models, such as nemotron-3-super,nemotron-3-nano (tigon list presets; "
        "default: Nemotron 3 Super's; on a CPU a slice of them)",
    )
    parser.add_argument(
        "--sweep",
        type=arguments.sweep,
        metavar="l=1k,4k",
        help="these sizes of one letter too; auto takes a sixteenth and a quarter of the size that grows "
        "with the input, none nothing (default: none, with --html auto)",
    )
    arguments.add_mode(parser)
    parser.add_argument(
        "--peers",
        default="auto",
        help="auto (all that are installed, the default), none, names (tigon list peers): transformers,torchao, "
        "or all but some: auto,no-torch_compiled",
    )
    parser.add_argument(
        "--batch-invariant", action="store_true", help="time Tigon in batch-invariant mode too"
    )
    arguments.add_device(parser)
    caches = parser.add_mutually_exclusive_group()
    caches.add_argument(
        "--cold",
        action="store_true",
        default=True,
        help="calls take turns on copies of the inputs, which so come from memory (the default)",
    )
    caches.add_argument("--hot", action="store_true", help="the same inputs at every call")
    parser.add_argument(
        "--graph",
        action="store_true",
        help="replay CUDA graphs, which leaves launch costs out (a GPU; not with --mode backward)",
    )
    parser.add_argument(
        "--repeat",
        type=arguments.positive(int),
        help="rounds (default: as many as fit the time budget, at least 3)",
    )
    parser.add_argument(
        "--time-budget",
        type=arguments.positive(float),
        metavar="SECONDS",
        help=f"of rounds a case (default: {BUDGET['one']:g}; of several ops on a CPU {BUDGET['several']:g})",
    )
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="on a CPU: wall time (the default), or cpu, the process's own time, for a busy machine",
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--no-roof", action="store_true", help="do not measure the machine's roof")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print shapes, bytes, FLOPs, launch configs and the time at a datasheet's roof; runs "
        "nothing, writes nothing, needs no GPU",
    )
    arguments.add_arch(parser, "90; of --dry-run")
    for kind, what in bench_output.FILES.items():
        parser.add_argument(f"--{kind}", type=Path, metavar="FILE", help=what)


@dataclass(frozen=True)
class Chosen:
    """One case to run. sweep: the letter of which this is a smaller size."""

    op: str
    preset: str | None
    variant: str | None
    sizes: dict[str, int]
    sweep: str | None = None


def run(args) -> int:
    try:
        check(args)
        device = args.device or "cuda" if args.dry_run else arguments.device(args)
    except (ValueError, RuntimeError) as error:
        print(error)
        return cli.exit_code(error)
    if args.graph and device == "cpu" and not args.dry_run:
        print("--graph needs a GPU")
        return cli.USAGE
    codes, chosen = [cli.OK], []
    for op in arguments.ops(args.op):
        if args.mode != "forward" and not OPS[op].backward:
            print(f"{op} has no backward: --mode forward\n")
            codes.append(cli.OK if "all" in args.op else cli.USAGE)
            continue
        try:
            chosen += list(cases(op, args, device))
        except ValueError as error:
            print(error)
            codes.append(cli.USAGE)
    if args.dry_run:
        return max(*codes, *(guarded(dry_run, case, args, device) for case in chosen), cli.OK)
    if not chosen:
        return max(codes)
    return max(*codes, measure_all(chosen, args, device))


def check(args) -> None:
    """ValueError for what would be found to be wrong after minutes of measurement only, or silently do nothing."""
    from tigon.bench.peers import find

    arguments.capturable(args)
    arguments.known_somewhere(arguments.ops(args.op), args.shape, args.variant)
    find.names(peers_of(args))
    given = {kind: path for kind in bench_output.FILES if (path := getattr(args, kind))}
    if args.arch and not args.dry_run:
        raise ValueError("--arch is for --dry-run: a benchmark runs on the GPU that is here")
    if given and args.dry_run:
        raise ValueError(f"--dry-run measures nothing to write: leave out --{', --'.join(given)}")
    for kind, path in given.items():
        bench_output.check(kind, path)


def peers_of(args) -> list[str]:
    return args.peers.replace("-", "_").split(",")


def cases(op: str, args, device: str) -> Iterator[Chosen]:
    """Presets x variants x sizes of one op. ValueError for a letter, variant or preset that does not exist."""
    from tigon.bench import presets
    from tigon.bench.variants import chosen as known_variant

    several = len(arguments.ops(args.op)) > 1
    named = args.preset.split(",") if args.preset else [None]
    for preset in named:
        try:
            defaults = presets.sizes(op, preset, "cuda" if args.dry_run else device)
        except presets.NoSuchLayer as error:
            if not several and len(named) == 1:
                raise
            print(f"{error}\n")
            continue
        sizes = arguments.sizes_of(op, args.shape, defaults, several)
        for variant in arguments.variants(op, args.variant, several):
            known_variant(op, variant)
            yield Chosen(op, preset, variant, sizes)
            for letter, value in points(op, sizes, args):
                yield Chosen(op, preset, variant, sizes | {letter: value}, letter)


def points(op: str, sizes: dict[str, int], args) -> list[tuple[str, int]]:
    """The other sizes of a sweep; --html wants one by itself."""
    from tigon.bench import presets

    wanted = args.sweep or ("auto" if args.html else "none")
    if wanted == "none":
        return []
    if wanted == "auto":
        letter, values = presets.sweep(op, sizes)
    else:
        letter, values = wanted
        if letter not in sizes:
            raise ValueError(f"{op} has no size {letter}; it has {', '.join(sizes)}")
    return [(letter, value) for value in values if value != sizes[letter]]


def guarded(function, case: Chosen, *args) -> int:
    """What the function says, or the exit code of what went wrong; other cases go on."""
    try:
        return function(case, *args)
    except (ValueError, TypeError, RuntimeError) as error:
        said = str(error).splitlines()[0] if isinstance(error, RuntimeError) else str(error)
        print(f"{case.op}: {said.removeprefix(f'{case.op}: ')}\n")
        return cli.exit_code(error)


def dry_run(case: Chosen, args, device: str) -> int:
    """Shapes, bytes, FLOPs, the time at the roof, and launch configs."""
    import torch

    import tigon
    from tigon.bench import roof, workloads
    from tigon.bench.work import work
    from tigon.cli.explain import own_arch
    from tigon.kernels.launch import table_arch

    arch = args.arch or own_arch() or 90
    load = workloads.make(
        case.op, case.sizes, getattr(torch, args.dtype), "meta", variant=case.variant
    )
    counted = work(case.op, case.sizes, load.dtype.itemsize, args.mode, case.variant)
    limit = roof.DATASHEETS[table_arch(arch)]
    kind = roof.operands(case.op, load.variant, str(load.dtype).removeprefix("torch."))
    print(bench_output.heading(load, args.mode, case.preset))
    for name, t in load.inputs.items():
        shown = f"{tuple(t.shape)} {str(t.dtype)[6:]}" if isinstance(t, torch.Tensor) else repr(t)
        print(f"  {name:<12} {shown}")
    print(
        f"  {counted.bytes / 1e6:.4g} MB, {counted.flops / 1e9:.4g} GFLOP, "
        f"{counted.flops / counted.bytes:.3g} FLOP a byte\n"
        f"  at the roof of an {limit.device} ({limit.copy / 1e12:.4g} TB/s, "
        f"{limit.flops(kind) / 1e12:.4g} TFLOP/s, datasheet): {limit.seconds(counted, kind) * 1e6:.4g} us, "
        f"{limit.bound(counted, kind)}-bound"
    )
    with arguments.backend(args):
        print(tigon.explain(case.op, **load.call(), arch=arch), "\n")
    return cli.OK


def measure_all(chosen: list[Chosen], args, device: str) -> int:
    """The roof, then every case as it ends, then the files."""
    from dataclasses import asdict

    from tigon.bench import records, roof
    from tigon.bench.environment import environment

    env = environment(device)
    limit = None if args.no_roof else roof.measure(device)
    print(records.machine_line(env))
    if limit is not None:
        print(records.roof_line(asdict(limit)))
    print()
    record = {
        "schema": 2,
        "command": "tigon " + shlex.join(sys.argv[1:]),
        "env": env,
        "roof": limit and asdict(limit),
        "cases": [],
    }
    several = len({case.op for case in chosen}) > 1
    budget = args.time_budget or BUDGET["several" if several and device == "cpu" else "one"]
    codes = []
    for case in chosen:
        codes.append(guarded(measure, case, args, device, limit, budget, record["cases"]))
        if args.json and record["cases"]:
            keep(record, args.json)
    for kind in bench_output.FILES:
        if getattr(args, kind) and record["cases"]:
            bench_output.write(kind, record, getattr(args, kind))
    return max(codes)


def keep(record: dict, path: Path) -> None:
    """What there is so far, so that a run that is cut off has left its results; the file is whole at every moment."""
    from tigon.bench import records

    if not path.exists() or path.is_file():
        part = path.with_name(path.name + ".new")
        records.save(record, part)
        os.replace(part, path)


def measure(case: Chosen, args, device: str, limit, budget: float, records: list) -> int:
    """Run one case, print its table, note its record."""
    import torch

    from tigon.bench.run import Settings, record, run_case

    settings = Settings(
        mode=args.mode,
        peers=peers_of(args),
        seed=args.seed,
        memory=not args.no_memory,
        invariant=args.batch_invariant,
        cold=not args.hot,
        graph=args.graph,
        repeat=args.repeat,
        budget=budget * SWEEP_SHARE if case.sweep else budget,
        clock=args.clock,
    )
    with arguments.backend(args):
        dtype = getattr(torch, args.dtype)
        found = run_case(case.op, case.sizes, dtype, device, settings, case.variant, limit)
    records.append(record(found, case.preset, args.backend, case.sweep))
    bench_output.show(found, case.preset)
    return cli.OK if found.ok else cli.WRONG_RESULT
