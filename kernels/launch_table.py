"""Tuned launch tables: what was measured on a GPU, in place of single fields of what a planner chose.

A table is a JSON file, `kernels/tuned/sm_<arch>.json` of the package or the user's (TIGON_LAUNCH_TABLE):

    {"schema": 1, "arch": 90, "rows": [{
        "op": "ssd_scan", "kernel": "walk",
        "when": {"h": 128, "p": 64, "n": 128, "itemsize": 2, "b": [0, 1], "l": [4096, 8192]},
        "config": {"q": 64, "warps": 8},
        "evidence": {"seconds": …, "baseline_seconds": …, "gpu": …, "date": …, "versions": …}}]}

`when` names every size of STATIC, which must be equal, and any of MOVING as [low, high], powers of two or 0: low < size
<= high. Later rows win; the user's come after the package's. Rows are for aligned tensors. A row with a moving size is
not followed in batch-invariant mode, where a row's bits may not depend on how many there are; and an op whose launcher
does not know that mode has no moving sizes. A file is read once in a process, and checked whole: ValueError.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from tigon.kernels.launch import PLANNERS, SHARED_LIMIT, SMS

SHIPPED = Path(__file__).parent / "tuned"
KEYS = {"op", "kernel", "when", "config", "evidence"}

_NORM = ("d", "group_size", "itemsize")
_EXPERTS = ("k", "e", "m", "l", "itemsize", "gates")
_GROUPED = ("e", "n", "k", "itemsize")
STATIC: dict[str, tuple[str, ...]] = {
    "ssd_scan": ("h", "p", "n", "itemsize"),
    "ssd_scan_backward": ("h", "g", "p", "n", "itemsize"),
    "causal_conv1d": ("d", "width", "itemsize"),
    "causal_conv1d_backward": ("d", "width", "itemsize", "states"),
    "gated_rms_norm": _NORM,
    "gated_rms_norm_backward": _NORM,
    "scaled_mm": ("n", "k", "itemsize", "a_format", "b_format"),
    "grouped_mm": _GROUPED,
    "grouped_mm_backward": _GROUPED,
    "moe_experts": (*_EXPERTS, "format"),
    "moe_experts_backward": (*_EXPERTS, "save"),
    "attention_token_scores": ("hq", "hkv", "dim", "itemsize", "lse"),
    "ssd_token_scores": ("h", "n", "itemsize", "decay"),
}
# Plans of the same launches under other names.
SAME = {"rms_norm": "gated_rms_norm", "rms_statistics": "gated_rms_norm"}
# A convolution's outputs do not depend on its tiles; a norm's do, and its launcher knows of no mode.
MOVING: dict[str, tuple[str, ...]] = {
    "ssd_scan": ("b", "l"),
    "ssd_scan_backward": ("b", "l"),
    "causal_conv1d": ("b", "l"),
    "causal_conv1d_backward": ("b", "l"),
    "scaled_mm": ("m",),
    "grouped_mm": ("rows",),
    "grouped_mm_backward": ("rows",),
    "moe_experts": ("t",),
    "moe_experts_backward": ("t",),
    "attention_token_scores": ("nq",),
    "ssd_token_scores": ("nq",),
}
# What a call leaves out of its sizes.
DEFAULTS = {"states": False, "lse": False, "decay": False, "gates": 1, "format": "plain"}
# Fields of each config that a row may name: not those that follow from the shape or decide how results are rounded.
FIELDS: dict[str, tuple[str, ...]] = {
    "ScanConfig": ("block_p", "q", "warps", "stages", "np", "mix_first", "tma", "segment"),
    "SweepConfig": (
        "q", "heads", "block_p", "programs", "nq", "hoist", "warps", "stages", "walk_warps", "walk_stages"
    ),
    "ConvConfig": ("tokens", "block", "warps"),
    "NormConfig": ("rows", "block", "warps"),
    "GemmConfig": ("left", "right", "block_k", "warps", "stages", "tma", "band"),
    "GroupedConfig": ("rows", "columns", "block_k", "warps", "stages", "rows_left"),
    "CombineConfig": ("block", "warps"),
    "ScoreConfig": ("queries", "keys", "warps", "stages"),
    "ElapsedConfig": ("tokens", "heads", "warps"),
}  # fmt: skip
BY_BATCH = ("programs",)  # 1 in batch-invariant mode, so a row needs a moving size to name it
ANY_NUMBER = {"programs": 2**20, "heads": 64, "band": 64, "stages": 8, "walk_stages": 8}
MOST_WARPS = 16


@dataclass(frozen=True)
class Row:
    """One row of a table; source names file and row."""

    op: str
    kernel: str
    when: tuple[tuple[str, object], ...]
    config: tuple[tuple[str, object], ...]
    source: str

    @property
    def moving(self) -> bool:
        return any(isinstance(value, tuple) for _, value in self.when)

    def fits(self, sizes: Mapping[str, object]) -> bool:
        """Whether the row is for a call of these sizes."""
        if not sizes.get("aligned", True) or (self.moving and sizes.get("batch_invariant")):
            return False
        for name, wanted in self.when:
            size = sizes.get(name, DEFAULTS.get(name))
            if isinstance(wanted, tuple):
                if size is None or not wanted[0] < size <= wanted[1]:
                    return False
            elif size != wanted:
                return False
        return True


def tuned(
    op: str, arch: int, configs: dict[str, object], sizes: Mapping[str, object]
) -> tuple[dict[str, object], dict[str, str]]:
    """(configs with the fields of the rows that fit, the source of those by kernel)."""
    sources: dict[str, str] = {}
    op = SAME.get(op, op)
    for row in rows(arch, os.environ.get("TIGON_LAUNCH_TABLE", "")):
        if row.op == op and row.kernel in configs and row.fits(sizes):
            configs = replaced(configs, row.kernel, dict(row.config))
            sources[row.kernel] = row.source
    return configs, sources


def replaced(
    configs: Mapping[str, object], kernel: str, fields: Mapping[str, object]
) -> dict[str, object]:
    """`configs` with fields of one kernel replaced, and with what must go with them."""
    config = replace(configs[kernel], **fields)
    if unit := getattr(config, "q", 0):
        segment = getattr(config, "segment", 0)
        config = config if segment % unit == 0 else replace(config, segment=_up(segment, unit))
    if getattr(config, "split_k", 0) % (getattr(config, "block_k", 0) or 1):
        # Segments that overlap would be summed twice; one that starts past k's end adds zeros.
        config = replace(config, split_k=_up(config.split_k, config.block_k))
    same = {"add_splits": config} if kernel == "multiply" and "add_splits" in configs else {}
    return {**configs, kernel: config, **same}


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def size_class(size: int) -> tuple[int, int]:
    """The range of a moving size that a measurement at `size` speaks for: (low, high], powers of two."""
    high = 1 << max(0, size - 1).bit_length()
    return (high // 2 if high > 1 else 0), high


def when_of(op: str, sizes: Mapping[str, object]) -> dict[str, object]:
    """`when` of a row measured with these sizes."""
    found = {name: sizes.get(name, DEFAULTS.get(name)) for name in STATIC[op]}
    moving = {n: list(size_class(sizes[n])) for n in MOVING.get(op, ()) if n in sizes}
    return found | moving


@cache
def rows(arch: int, path: str = "") -> tuple[Row, ...]:
    """The package's rows for an architecture, then those of the file `path`. ValueError: file, row, what is wrong."""
    shipped = SHIPPED / f"sm_{arch}.json"
    found = read(shipped, arch) if shipped.is_file() else ()
    return (*found, *read(Path(path), arch)) if path else found


def read(path: Path, arch: int | None = None) -> tuple[Row, ...]:
    """The rows of a table, checked. arch: the one that it must be for."""
    found = parse(path)
    if arch is not None and found["arch"] != arch:
        raise ValueError(
            f"launch table {path} is for sm_{found['arch']}, not for sm_{arch}: unset TIGON_LAUNCH_TABLE there"
        )
    out = []
    for number, row in enumerate(found["rows"], 1):
        try:
            out.append(checked(row, found["arch"], f"row {number} of {path}"))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"launch table {path}, row {number}: {error}") from error
    return tuple(out)


def parse(path: Path) -> dict:
    """The file as it is. ValueError where it is not a table."""
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"launch table {path} cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("schema") != 1:
        raise ValueError(f"launch table {path} has no schema 1")
    if found.get("arch") not in SMS:
        raise ValueError(f"launch table {path}: arch={found.get('arch')!r} is not one of {[*SMS]}")
    if not isinstance(found.get("rows"), list):
        raise ValueError(f"launch table {path} has no list of rows")
    return found


def checked(row: object, arch: int, source: str = "") -> Row:
    """A row of a file. ValueError says what is wrong with it and what is allowed."""
    if not isinstance(row, dict) or not KEYS - {"evidence"} <= set(row) <= KEYS:
        raise ValueError(f"a row has {', '.join(sorted(KEYS))}, got {row!r}")
    op, kernel, when, fields = (row[name] for name in ("op", "kernel", "when", "config"))
    if op not in STATIC:
        raise ValueError(f"op {op!r} is not one of {', '.join(STATIC)}")
    sizes = _sizes(op, when)
    planned = PLANNERS[op](arch, **sizes)
    if kernel not in planned or kernel == "add_splits":
        raise ValueError(f"{op} has no kernel {kernel!r} there; it has {', '.join(planned)}")
    old = planned[kernel]
    if not fields:
        raise ValueError("config names no field")
    for name, value in fields.items():
        _check_field(old, name, value, arch)
        if name in BY_BATCH and not any(isinstance(v, list) for v in when.values()):
            raise ValueError(f"{name} depends on the batch: `when` must name one of {MOVING[op]}")
    if (
        fields.get("block_k", 0) > 128
        and "128" in f"{sizes.get('a_format')} {sizes.get('b_format')}"
    ):
        raise ValueError("block_k must be 128 at most where scales are of 128 k")
    new = replaced(planned, kernel, fields)[kernel]
    used = least_shared(kernel, new, sizes)
    if used > SHARED_LIMIT[arch] * 1024:
        raise ValueError(
            f"takes at least {used // 1024} KB of shared memory, sm_{arch} has {SHARED_LIMIT[arch]}"
        )
    frozen = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in when.items())
    return Row(op, kernel, frozen, tuple(fields.items()), source)


def _sizes(op: str, when: Mapping[str, object]) -> dict[str, object]:
    """Sizes of a call that `when` is for; a moving size that it does not name is 4,096."""
    static, moving = STATIC[op], MOVING.get(op, ())
    unknown = [name for name in when if name not in (*static, *moving)]
    if unknown:
        names = f"{', '.join(static)}" + (f" and may name {', '.join(moving)}" if moving else "")
        raise ValueError(f"`when` of {op} names {names}; not {', '.join(unknown)}")
    missing = [name for name in static if name not in when]
    if missing:
        raise ValueError(f"`when` of {op} must name {', '.join(missing)}")
    for name in moving:
        if name in when and not _is_range(when[name]):
            raise ValueError(
                f"{name}={when[name]!r} must be [low, high], powers of two (low may be 0)"
            )
    for name in static:
        if isinstance(when[name], (list, dict)) or when[name] is None:
            raise ValueError(f"{name}={when[name]!r} must be one value: it does not move")
    ends = {name: when[name][1] if name in when else 4096 for name in moving}
    return {name: when[name] for name in static} | ({"t": 4096} if static is _NORM else ends)


def _is_range(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    low, high = value
    powers = all(type(v) is int and (v > 0 and v & (v - 1) == 0) for v in (low or 1, high))
    return type(low) is int and powers and low < high


def _check_field(config: object, name: str, value: object, arch: int) -> None:
    kind = type(config).__name__
    if name not in FIELDS[kind]:
        raise ValueError(f"{name!r} is not a field to tune; {', '.join(FIELDS[kind])} are")
    old = getattr(config, name)
    if type(value) is not type(old):
        raise ValueError(f"{name}={value!r} must be {type(old).__name__}")
    if isinstance(value, bool):
        if name == "tma" and value and arch < 90:
            raise ValueError(f"sm_{arch} has no tensor descriptors (tma)")
        return
    if name == "segment":
        right, said = value > 0 and value % 64 == 0, "a multiple of 64"
    elif name in ANY_NUMBER:
        right, said = 1 <= value <= ANY_NUMBER[name], f"1 to {ANY_NUMBER[name]}"
    elif name in ("warps", "walk_warps"):
        right, said = value in (1, 2, 4, 8, 16), f"a power of two up to {MOST_WARPS}"
    else:
        right, said = 1 <= value <= 8192 and value & (value - 1) == 0, "a power of two up to 8192"
    if not right:
        raise ValueError(f"{name}={value} must be {said}")


def least_shared(kernel: str, config: object, sizes: Mapping[str, object]) -> int:
    """Bytes of shared memory that a kernel takes at least: the operands that a pipeline of its stages holds.

    A lower bound: what is over the limit cannot run, what is under it may still not. 0 where none is known: products of
    fp32 in three TF32 ones need not be pipelined (64 x 64 x 32 in 3 stages takes 9 KB on sm_120).
    """
    c, itemsize = asdict(config), int(sizes["itemsize"])
    ahead = max(0, c.get("stages", 1) - 1)
    kind = type(config).__name__
    if c.get("precision") == "tf32x3" and kind != "ScanConfig":
        return 0
    if kind == "ScanConfig":
        matrices = 2 if kernel == "walk" else 1  # B and C; x may go through registers
        return ahead * c["q"] * matrices * c["block_n"] * itemsize
    if kind == "GemmConfig":
        bits = {"nvfp4": 4}
        left, right = (sizes["b_format"], sizes["a_format"])
        if not c["swap"]:
            left, right = right, left
        both = sum(
            c[side] * (bits.get(f, 8) if f != "plain" else 8 * itemsize)
            for side, f in (("left", left), ("right", right))
        )
        return ahead * c["block_k"] * both // 8
    if kind == "GroupedConfig":
        if kernel == "weight_gradient":  # what is loaded by an index takes two stages more
            ahead = max(0, ahead - 2)
        format = sizes.get("format", "plain")
        weight = itemsize * 8 if format == "plain" else 4 if format == "nvfp4" else 8
        sides = (
            c["columns"] * weight + c["rows"] * itemsize * 8
        )  # of a gradient both are activations
        return ahead * c["block_k"] * sides // 8
    return 0
