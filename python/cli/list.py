"""``tigon list``: the ops and their variants, without torch; model presets; peers of ``tigon bench``."""

import json
import sys
from importlib import import_module, metadata

from tigon import cli
from tigon.cli import table
from tigon.registry import PUBLIC


def add_arguments(parser) -> None:
    parser.add_argument(
        "what",
        nargs="?",
        choices=tuple(LISTS),
        default="ops",
        help="ops (the default): family, language of the kernel, dtypes, default sizes; variants: the formats and "
        "options that --variant chooses from; presets: sizes of published models; peers: what tigon bench "
        "compares with, and which of them are installed",
    )
    parser.add_argument("--json", action="store_true", help="print the list as JSON")


def run(args) -> int:
    rows = LISTS[args.what]()
    if args.json:
        print(json.dumps(rows, indent=2))
    elif rows:
        table.show(tuple(rows[0]), [tuple(row.values()) for row in rows])
    return cli.OK


def ops() -> list[dict]:
    """One row an op: family, kernel language, what it computes."""
    return [
        {
            "op": op.name,
            "family": op.family,
            "kernel": op.kind,
            "backward": "yes" if op.backward else "no",
            "dtypes": " ".join(op.dtypes),
            "sizes": ",".join(f"{k}={v}" for k, v in op.sizes.items()),
            "summary": op.summary,
        }
        for op in PUBLIC.values()
    ]


def variants() -> list[dict]:
    """One row an op that has variants: the default, then the others."""
    from tigon.bench.variants import VARIANTS

    return [
        {"op": op, "default": first, "others": " ".join(others)}
        for op, (first, *others) in VARIANTS.items()
    ]


def presets() -> list[dict]:
    """One row a model preset: width, layers of each kind (pattern letters), Mamba heads and state."""
    from tigon.models.presets import PRESETS

    return [
        {
            "preset": name,
            "hidden_size": model.hidden_size,
            "layers": " ".join(
                f"{model.pattern.count(c)}{c}" for c in "M*-E" if c in model.pattern
            ),
            "mamba_heads": f"{model.mamba_num_heads} x {model.mamba_head_dim}",
            "state": model.ssm_state_size,
        }
        for name, model in PRESETS.items()
    ]


def peers() -> list[dict]:
    """One row a peer of `tigon bench`: its package, the version that is installed, where it runs, the ops it knows."""
    from tigon.bench.peers.find import FOLDER, NAMES

    rows, places = [], [*sys.path, str(FOLDER)]
    for name in NAMES:
        peer = import_module(f"tigon.bench.peers.{name}")
        found = next(iter(metadata.distributions(name=peer.PACKAGE, path=places)), None)
        rows.append(
            {
                "peer": name,
                "package": peer.PACKAGE,
                "version": found.version if found else "not installed",
                "devices": " ".join(getattr(peer, "DEVICES", ("cpu", "cuda"))),
                "ops": " ".join(peer.OPS),
            }
        )
    return rows


LISTS = {"ops": ops, "variants": variants, "presets": presets, "peers": peers}
