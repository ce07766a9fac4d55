"""``tigon check``: is every output and gradient of an op right on this machine?

Runs the backend that a call would take (TIGON_BACKEND and --backend change it) beside the fp64 reference. Quantizers
must give the reference's bytes: their "error" is the share of bytes that differ. All variants of an op are run.
"""

from tigon import cli
from tigon.cli import arguments, table


def add_arguments(parser) -> None:
    arguments.add_case(parser, every=True)
    arguments.add_backend(parser)
    arguments.add_device(parser)


def run(args) -> int:
    import torch

    import tigon
    from tigon.bench import verify, workloads

    ops = arguments.ops(args.op)
    try:
        arguments.known_somewhere(ops, args.shape, args.variant)
        device = arguments.device(args)
    except (ValueError, RuntimeError) as error:
        print(error)
        return cli.exit_code(error)
    dtype = getattr(torch, args.dtype)
    wrong = []
    several = len(ops) > 1
    cases = [(op, v) for op in ops for v in arguments.variants(op, args.variant or "all", several)]
    for op, variant in cases:
        try:
            sizes = arguments.sizes_of(op, args.shape, workloads.SMALL[op], several)
            work = workloads.make(op, sizes, dtype, device, args.seed, variant)
        except ValueError as error:
            print(error)
            return cli.USAGE
        with arguments.backend(args):
            try:
                chosen = tigon.explain(op, **work.call())
                rows = verify.verify(work)
            except (ValueError, TypeError, RuntimeError) as error:
                print(error)
                return cli.exit_code(error)
        show(chosen, work, rows)
        wrong += [" ".join((op, *filter(None, (variant, row.name)))) for row in rows if not row.ok]
    if wrong:
        print(f"WRONG: {', '.join(wrong)}")
    return cli.WRONG_RESULT if wrong else cli.OK


def show(chosen, work, rows) -> None:
    """One table a case: relative RMS errors against fp64."""
    shape = ",".join(f"{k}={v}" for k, v in work.sizes.items())
    dtype = str(work.dtype).removeprefix("torch.")
    case = " ".join(filter(None, (chosen.op, work.variant, shape, dtype)))
    title = f"{case}: {chosen.backend}, because {chosen.reason}"
    columns = ("tensor", "error", "baseline", "limit", "same bits", "verdict")
    table.show(
        columns,
        [
            (
                row.name,
                f"{row.error:.2e}",
                f"{row.baseline:.2e}",
                f"{row.limit:.2e}",
                "yes" if row.repeats else "NO",
                "ok" if row.ok else "WRONG",
            )
            for row in rows
        ],
        title,
    )
    print()
