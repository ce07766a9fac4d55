"""Arguments that several subcommands share: ops, shapes in human sizes, dtypes."""

import argparse
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from tigon.cli import meant
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


def op_name(text: str) -> str:
    if text not in (*PUBLIC, "all"):
        raise argparse.ArgumentTypeError(
            f"no op {text!r}{meant(text, PUBLIC)} (tigon list shows all)"
        )
    return text


def one_op(text: str) -> str:
    if text == "all":
        raise argparse.ArgumentTypeError("one op at a time")
    return op_name(text)


def positive(kind: type) -> type:
    """The type of an option that must be above 0; `kind` is int or float."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not value > 0:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} above 0")
        return value

    return parse


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
    known = f"{', '.join(PUBLIC)}{', or all' if every else ''}"
    if every:
        parser.add_argument("op", nargs="+", type=op_name, metavar="OP", help=known)
    else:
        parser.add_argument("op", type=one_op, metavar="OP", help=known)
    parser.add_argument(
        "--shape",
        type=shape,
        default={},
        metavar="h=128,l=4k",
        help="sizes in place of the defaults, by the letters that tigon list shows; k is 1024, m its square",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="of the activations (default: bfloat16); an op of one dtype keeps it",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default: 0)")
    parser.add_argument(
        "--variant",
        help="formats or options of the op: see tigon list variants"
        + (", or all" if every else ""),
    )


def add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        choices=("auto", "reference", "kernel"),
        help="in place of TIGON_BACKEND (default: auto, kernels on CUDA tensors)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="default: cuda if there is a GPU; CUDA_VISIBLE_DEVICES says which one",
    )


def device(args: argparse.Namespace) -> str:
    """The device that was asked for, or the GPU if there is one. RuntimeError for a GPU that is not there."""
    import torch

    there = torch.cuda.is_available()
    if args.device == "cuda" and not there:
        raise RuntimeError("--device cuda: torch finds no GPU here; tigon doctor says why")
    return args.device or ("cuda" if there else "cpu")


def add_mode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mode",
        choices=("forward", "backward", "step"),
        default="forward",
        help="backward: the gradients alone; step: forward and backward (default: forward)",
    )


def capturable(args: argparse.Namespace) -> None:
    """ValueError for --graph of gradients alone: autograd runs them on the stream of their forward, not the graph's."""
    if args.graph and args.mode == "backward":
        raise ValueError("--graph captures forward or step: gradients alone cannot be captured")


def add_arch(parser: argparse.ArgumentParser, otherwise: str) -> None:
    """otherwise: what stands for it without a GPU."""
    parser.add_argument(
        "--arch",
        type=positive(int),
        help=f"compute capability: 80, 90, 100 or 120 (default: this GPU's; without one {otherwise})",
    )


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


def known_somewhere(names: list[str], shape: Mapping[str, int], variant: str | None) -> None:
    """ValueError for a letter or a variant that none of several ops has: each of them would pass it over."""
    from tigon.bench.variants import variants as known

    letters = {letter for name in names for letter in PUBLIC[name].sizes}
    stray = [letter for letter in shape if letter not in letters]
    if stray and len(names) > 1:
        raise ValueError(
            f"none of these ops has a size {', '.join(stray)}; tigon list shows what they have"
        )
    formats = {v for name in names for v in known(name) if v}
    if len(names) > 1 and variant not in (None, "all", *formats):
        raise ValueError(
            f"none of these ops has a variant {variant!r}; they have {', '.join(sorted(formats)) or 'none'}"
        )


def ops(names: list[str]) -> list[str]:
    """The ops that were named, in order, each once."""
    return list(dict.fromkeys(op for name in names for op in (PUBLIC if name == "all" else [name])))
