"""``tigon explain``: which backend and launch config a call would take, and why; runs nothing.

Needs no GPU: the tensors are on the meta device, --arch says which GPU to pretend.
"""

import json
from dataclasses import asdict, is_dataclass

from tigon import cli
from tigon.cli import arguments


def add_arguments(parser) -> None:
    arguments.add_case(parser)
    parser.add_argument(
        "--preset",
        help="sizes of a model, such as nemotron-3-nano (tigon list presets; default: Nemotron 3 Super's)",
    )
    arguments.add_arch(parser, "that of a call on a CPU")
    arguments.add_backend(parser)
    parser.add_argument("--json", action="store_true", help="print the explanation as JSON")


def run(args) -> int:
    import torch

    import tigon
    from tigon.bench import presets, workloads

    try:
        sizes = arguments.sizes_of(args.op, args.shape, presets.sizes(args.op, args.preset))
        work = workloads.make(
            args.op, sizes, getattr(torch, args.dtype), "meta", variant=args.variant
        )
        arch = args.arch or own_arch()
        with arguments.backend(args):
            found = tigon.explain(args.op, **work.call(), arch=arch)
    except (ValueError, TypeError, RuntimeError) as error:
        print(error)
        return cli.exit_code(error)
    if args.json:
        print(json.dumps(described(found, sizes, args.dtype), indent=2))
    else:
        shape = ", ".join(f"{k}={v}" for k, v in sizes.items())
        print(" ".join(filter(None, (work.variant, shape, str(work.dtype).removeprefix("torch.")))))
        print(found)
        if arch is None:
            print("  there is no GPU here; --arch 80, 90, 100 or 120 explains one")
    return cli.OK


def own_arch() -> int | None:
    """This machine's GPU, None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor


def described(found, sizes: dict[str, int], dtype: str) -> dict:
    """The explanation as plain data."""
    launch = {k: asdict(v) if is_dataclass(v) else v for k, v in found.launch.items()}
    return {"sizes": sizes, "dtype": dtype} | {**vars(found), "launch": launch}
