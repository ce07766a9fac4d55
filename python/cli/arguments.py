"""Arguments that several subcommands share: ops, shapes in human sizes, dtypes."""

import argparse
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from tigon.registry import PUBLIC

DTYPES = ("float32", "bfloat16", "float16")
SUFFIXES = {"k": 2**10, "m": 2**20}


def size(text: str) -> int:
    """An integer such as 128, 4k (4,096) or 1M (1,048,576)."""
    factor = SUFFIXES.get(text[-1:].lower(), 1)
    digits = text[:-1] if factor > 1 else text
    if not digits.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 128, 4k or 1M")
    return int(digits) * factor


def shape(text: str) -> dict[str, int]:
    """Sizes by the API's letters: h=128,l=4k."""
    sizes = {}
    for part in filter(None, text.split(",")):
        name, found, value = part.partition("=")
        if not found:
            raise argparse.ArgumentTypeError(f"{part!r} is not LETTER=SIZE, as in h=128,l=4k")
        sizes[name.strip()] = size(value.strip())
    return sizes


def sweep(text: str) -> str | tuple[str, list[int]]:
    """ "auto", "none", or a letter and its values: l=1k,4k,16k."""
    if text in ("auto", "none"):
        return text
    name, found, values = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, none or LETTER=SIZE,SIZE,…")
    return name.strip(), [size(value.strip()) for value in values.split(",")]


def sizes_of(
    op: str, given: Mapping[str, int], defaults: Mapping[str, int], several: bool = False
) -> dict[str, int]:
    """`defaults` with what was given in their place.

    ValueError for a letter that the op does not have; where several ops run, each takes the letters that it has.
    """
    if several:
        given = {name: value for name, value in given.items() if name in defaults}
    unknown = [name for name in given if name not in defaults]
    if unknown:
        raise ValueError(
            f"{op} has no size {', '.join(unknown)}; it has {', '.join(f'{k}={v}' for k, v in defaults.items())}"
        )
    return {**defaults, **given}


def add_case(parser: argparse.ArgumentParser, every: bool = False) -> None:
    """OP, --shape, --dtype, --seed, --variant. every: "all" is an op too, and several may be named."""
    names = tuple(PUBLIC)
    known = f"{', '.join(names)}{', or all' if every else ''}"
    if every:
        parser.add_argument("op", nargs="+", choices=(*names, "all"), metavar="OP", help=known)
    else:
        parser.add_argument("op", choices=names, metavar="OP", help=known)
    parser.add_argument(
        "--shape", type=shape, default={}, help="sizes by the API's letters: h=128,l=4k"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the activations")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    parser.add_argument("--variant", help=f"formats or options{', or all' if every else ''}")


def add_backend(parser: argparse.ArgumentParser) -> None:
    choices = ("auto", "reference", "kernel")
    parser.add_argument("--backend", choices=choices, help="in place of TIGON_BACKEND")


def backend(args: argparse.Namespace) -> AbstractContextManager:
    """The backend that was asked for, if any."""
    import tigon

    return tigon.backend(args.backend) if args.backend else nullcontext()


def variants(op: str, wanted: str | None, several: bool = False) -> tuple[str | None, ...]:
    """The variants of `op` to run; where several ops run, one that an op does not have is nobody's mistake."""
    from tigon.bench.variants import variants as known

    if wanted == "all":
        return known(op)
    return (wanted,) if wanted in (None, *known(op)) or not several else ()


def ops(names: list[str]) -> list[str]:
    """The ops that were named, in order, each once."""
    return list(dict.fromkeys(op for name in names for op in (PUBLIC if name == "all" else [name])))
