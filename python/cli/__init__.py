"""Kernels for hybrid Mamba-2 / LatentMoE models: what they do here, whether they are right, and how fast they are.

A subcommand is one line of ``COMMANDS`` and a module with ``add_arguments(parser)`` and
``run(args) -> int``; the module is imported only when its command is asked for, so that
``tigon doctor`` works where torch does not.
"""

import argparse
import difflib
import os
import sys
from importlib import import_module

from tigon._version import __version__

OK, USAGE, WRONG_RESULT, SLOWER, ENVIRONMENT = range(5)  # exit codes of every subcommand

COMMANDS = {
    "doctor": ("what works on this machine, what does not, and the fix", "tigon.cli.doctor"),
    "list": (
        "the ops, their variants, the model presets, the peers of tigon bench",
        "tigon.cli.list",
    ),
    "explain": ("which backend and launch config a call would take, and why", "tigon.cli.explain"),
    "check": ("whether an op's results and gradients are right here", "tigon.cli.check"),
    "bench": ("how fast an op is here, beside other packages", "tigon.cli.bench"),
    "compare": ("whether one benchmark is slower than another, or just noisy", "tigon.cli.compare"),
    "tune": ("search launch configs on this GPU and write a table of them", "tigon.cli.tune"),
    "check-checkpoint": (
        "what is wrong with a quantized checkpoint, tensor by tensor",
        "tigon.cli.check_checkpoint",
    ),
    "reduction": (
        "what a schedule of token reduction keeps and saves, layer by layer",
        "tigon.cli.reduction",
    ),
    "demo": ("train a tiny model on real text, compare, save, generate, check", "tigon.cli.demo"),
}
CODES = "exit codes: 0 fine, 1 usage, 2 a wrong result, 3 slower than the limit, 4 the environment"


def exit_code(error: Exception) -> int:
    """Of a command that failed: a wrong value is the user's, anything else the machine's."""
    return USAGE if isinstance(error, (ValueError, TypeError)) else ENVIRONMENT


class Parser(argparse.ArgumentParser):
    """argparse, but a usage error is exit code 1 (2 means a wrong result here), and says where to read on."""

    def error(self, message):
        self.exit(USAGE, f"{self.prog}: {message}\nsee: {self.prog} --help\n")


def meant(word: str, known) -> str:
    """ "; did you mean …?" where a known word is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's) and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="tigon", description=__doc__.splitlines()[0], epilog=CODES)
    parser.add_argument("--version", action="version", version=f"tigon {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    if chosen is not None and chosen not in COMMANDS:
        parser.error(f"no command {chosen!r}{meant(chosen, COMMANDS)}")
    try:
        for name, (summary, module_name) in COMMANDS.items():
            command = commands.add_parser(name, help=summary, epilog=CODES)
            if name == chosen:
                module, used = import_module(module_name), command
                command.description = module.__doc__.replace("`", "")
                module.add_arguments(command)
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            options = [word for action in used._actions for word in action.option_strings]
            used.error(f"no argument {' '.join(unknown)}{meant(unknown[0], options)}")
        return module.run(args)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("tigon"):
            raise
        sys.stderr.write(f"tigon {chosen} needs the package {error.name!r}; see: tigon doctor\n")
        return ENVIRONMENT
    except (
        BrokenPipeError
    ):  # `tigon list | head`: nobody reads on, and Python must not try to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        return 130
