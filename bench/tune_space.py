"""The launch configs that `tigon tune` tries: fields and values by kernel, and which of them cannot be any good.

What depends on the batch (segments of the scan, splits of k) stays with the planners, and so does what decides how
results are rounded. Pure data and arithmetic, as the launch tables themselves.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tigon.kernels import launch_table
from tigon.kernels.launch import PLANNERS, power_of_two

BOTH = (False, True)
_SCAN = {
    "block_p": (16, 32, 64, 128),
    "q": (16, 32, 64, 128),
    "warps": (4, 8),
    "stages": (1, 2, 3, 4),
    "np": BOTH,
    "tma": BOTH,
}
_GROUPED = {
    "rows": (16, 32, 64, 128),
    "columns": (64, 128, 256),
    "block_k": (32, 64, 128),
    "warps": (4, 8),
    "stages": (2, 3, 4, 5),
    "rows_left": BOTH,
}
_SCORES = {
    "queries": (16, 32, 64, 128),
    "keys": (16, 32, 64, 128, 256),
    "warps": (4, 8),
    "stages": (1, 2, 3, 4),
}
_CONV = {"tokens": (8, 16, 32, 64, 128, 256), "block": (64, 128, 256, 512, 1024), "warps": (1, 2, 4, 8)}  # fmt: skip
_NORM = {"rows": (1, 2, 4, 8, 16), "block": (256, 512, 1024, 2048, 4096, 8192), "warps": (1, 2, 4, 8, 16)}  # fmt: skip
SPACE: dict[str, dict[str, tuple]] = {
    "walk": {**_SCAN, "mix_first": BOTH},
    "segment_states": _SCAN,
    "sweep": {
        "q": (16, 32, 64),
        "block_p": (16, 32, 64),
        "heads": (1, 2, 4, 8, 16),
        "nq": BOTH,
        "hoist": BOTH,
        "warps": (4, 8),
        "stages": (1, 2, 3),
        "walk_warps": (4, 8),
        "walk_stages": (1, 2, 3),
    },
    "convolve": _CONV,
    "convolve_backward": _CONV,
    "gated_norm": _NORM,
    "gated_norm_backward": _NORM,
    "multiply": {
        "left": (64, 128, 256),
        "right": (16, 32, 64, 128, 256),
        "block_k": (32, 64, 128, 256),
        "warps": (4, 8),
        "stages": (2, 3, 4, 5),
        "tma": BOTH,
        "band": (4, 8, 16),
    },
    "up_activate": _GROUPED,
    "multiply_rows": _GROUPED,
    "activation_gradient": _GROUPED,
    "weight_gradient": {k: v for k, v in _GROUPED.items() if k != "rows_left"},
    "combine": {"block": (128, 256, 512, 1024, 2048), "warps": (1, 2, 4, 8)},
    "row_sums": _SCORES,
    "attention_scores": _SCORES,
    "ssd_scores": _SCORES,
    "elapsed": {"tokens": (32, 64, 128, 256), "heads": (4, 8, 16), "warps": (1, 2, 4, 8)},
}
# The size that a tile lies along: one more than twice as wide is mostly padding.
ALONG = {
    "walk": {"block_p": "p"},
    "segment_states": {"block_p": "p"},
    "sweep": {"block_p": "p"},
    "convolve": {"block": "d"},
    "convolve_backward": {"block": "d"},
    "gated_norm": {"block": "group_size"},
    "gated_norm_backward": {"block": "group_size"},
    "combine": {"block": "l"},
    "elapsed": {"heads": "h"},
}
# The two sides of the tile whose numbers lie in a program's registers, as fp32; "" is a side of 1.
HELD = {
    "walk": ("block_p", "block_n"),
    "segment_states": ("block_p", "block_n"),
    "multiply": ("left", "right"),
    **dict.fromkeys(
        ("up_activate", "multiply_rows", "activation_gradient", "weight_gradient"),
        ("rows", "columns"),
    ),
    **dict.fromkeys(("row_sums", "attention_scores", "ssd_scores"), ("queries", "keys")),
    **dict.fromkeys(("gated_norm", "gated_norm_backward"), ("rows", "block")),
    **dict.fromkeys(("convolve", "convolve_backward", "combine"), ("block", "")),
}
MOST_HELD = 192  # registers a thread for it, of 255


@dataclass(frozen=True)
class Kernel:
    """What there is to search for one kernel of a call. candidates: fields and values; pruned: how many, by reason."""

    op: str
    arch: int
    name: str
    sizes: Mapping[str, object]
    config: object
    candidates: tuple[Mapping[str, object], ...]
    pruned: Mapping[str, int]

    @property
    def present(self) -> dict[str, object]:
        """The fields that are searched, as the plan has them."""
        return {name: getattr(self.config, name) for name in SPACE[self.name]}

    @property
    def when(self) -> dict[str, object]:
        return launch_table.when_of(self.op, self.sizes)


def kernels(op: str, arch: int, sizes: Mapping[str, object]) -> list[Kernel]:
    """The kernels that a plan names, each with its candidates: nearest to the present config first."""
    op = launch_table.SAME.get(op, op)
    configs, _ = launch_table.tuned(op, arch, PLANNERS[op](arch, **sizes), sizes)
    found = []
    for name, config in configs.items():
        if name not in SPACE:  # add_splits follows multiply
            continue
        kept, pruned = [], Counter()
        present = {field: getattr(config, field) for field in SPACE[name]}
        for fields in every(name, config):
            if fields == present:
                continue
            why = useless(op, arch, name, config, fields, sizes)
            if why:
                pruned[why] += 1
            else:
                kept.append(fields)
        kept.sort(key=lambda fields: distance(name, fields, present))
        found.append(Kernel(op, arch, name, sizes, config, tuple(kept), dict(pruned)))
    return found


def values(name: str, config: object) -> dict[str, tuple]:
    """What each field of a kernel may be: the space, and what the config has now."""
    return {field: tuple(sorted({*v, getattr(config, field)})) for field, v in SPACE[name].items()}


def every(name: str, config: object) -> Iterator[dict[str, object]]:
    """Every combination."""
    space = values(name, config)
    for combination in itertools.product(*space.values()):
        yield dict(zip(space, combination))


def useless(
    op: str,
    arch: int,
    name: str,
    config: object,
    fields: Mapping[str, object],
    sizes: Mapping[str, object],
) -> str | None:
    """Why a candidate cannot run or cannot be any good, in a few words; None if it is worth a try."""
    for field, size in ALONG.get(name, {}).items():
        wider = fields[field] > max(16, power_of_two(sizes[size], 1))
        if wider and fields[field] != getattr(config, field):
            return "wider than the tensor"
    if name == "sweep" and fields["heads"] > max(1, sizes["h"] // sizes["g"]):
        return "more heads than a group has"
    if name in HELD:
        one, other = (fields.get(side, getattr(config, side, 1)) for side in HELD[name])
        if one * other > MOST_HELD * 32 * fields["warps"]:
            return "too large for the registers"
        if one * other < 32 * fields["warps"]:
            return "more threads than numbers"
    row = {
        "op": op,
        "kernel": name,
        "when": launch_table.when_of(op, sizes),
        "config": dict(fields),
    }
    try:
        launch_table.checked(row, arch)
    except ValueError as error:
        return "too large for shared memory" if "shared memory" in str(error) else str(error)
    return None


def distance(name: str, one: Mapping[str, object], other: Mapping[str, object]) -> int:
    """Steps along the values of each field."""
    steps = 0
    for field, space in SPACE[name].items():
        order = sorted({*space, one[field], other[field]})
        steps += abs(order.index(one[field]) - order.index(other[field]))
    return steps
