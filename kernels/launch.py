"""Launch tables: which tiles a kernel takes for an architecture and a shape. Pure data and arithmetic.

    plan(op, arch, **sizes) -> {kernel name: frozen config}

arch is 80, 90, 100 or 120 (`table_arch` maps others); the sizes are those of the op's arguments. Nothing here imports
torch or Triton, so every choice can be printed and tested on any machine; TIGON_PRINT_CONFIG=1 prints each
plan once. A family of kernels has one config class, one table and one planner, registered in PLANNERS; the
evidence for a row (registers a thread, spilled bytes, shared memory, from tests/codegen) stands beside it. What was
measured on a GPU (`tigon tune`) replaces single fields of what a planner chose: see `launch_table`.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial

SMS = {80: 108, 90: 132, 100: 148, 120: 188}  # of A100, H100/H200, B200, RTX PRO 6000
SHARED_LIMIT = {80: 163, 90: 227, 100: 227, 120: 99}  # KB a program may have


def table_arch(capability: int) -> int:
    """The table for a compute capability such as 86: the nearest one below."""
    return max((arch for arch in SMS if arch <= capability), default=80)


_assumed: ContextVar[tuple[int, int] | None] = ContextVar("assumed", default=None)


@contextmanager
def assume(arch: int, sms: int | None = None) -> Iterator[None]:
    """Within the block, launchers choose as on this architecture, whatever the device (tests, code generation)."""
    token = _assumed.set((arch, sms or SMS[arch]))
    try:
        yield
    finally:
        _assumed.reset(token)


def target(device: object) -> tuple[int, int]:
    """(arch, SM count) of a torch device; without a GPU, those of the interpreter's stand-in, an H100."""
    if _assumed.get() is not None:
        return _assumed.get()
    if device.type != "cuda":
        return 90, SMS[90]
    return _gpu(device.index)


@cache
def _gpu(index: int | None) -> tuple[int, int]:
    import torch

    facts = torch.cuda.get_device_properties(index)
    return table_arch(facts.major * 10 + facts.minor), facts.multi_processor_count


def power_of_two(size: int, least: int = 16) -> int:
    """The smallest block that covers `size`; tensor cores want 16 at least."""
    return max(least, 1 << (size - 1).bit_length())


# Process-wide, not per thread: autograd runs backward in threads of its own.
_overrides: tuple[tuple[str, str, tuple[tuple[str, object], ...]], ...] = ()
_seen: list[tuple[str, int, dict]] | None = None


@contextmanager
def override(op: str, kernels: Mapping[str, Mapping[str, object]]) -> Iterator[None]:
    """Within the block `plan` gives these fields to kernels of `op`, in the whole process (measurements)."""
    global _overrides
    before = _overrides
    _overrides += tuple((op, name, tuple(fields.items())) for name, fields in kernels.items())
    try:
        yield
    finally:
        _overrides = before


@contextmanager
def observe() -> Iterator[list[tuple[str, int, dict]]]:
    """The (op, arch, sizes) that `plan` is asked for within the block."""
    global _seen
    before, _seen = _seen, []
    try:
        yield _seen
    finally:
        _seen = before


def plan(op: str, arch: int, **sizes: int) -> dict[str, object]:
    """Configs of all kernels that `op` may launch for these sizes. KeyError for an op without Triton kernels.

    ValueError for a tuned table (`launch_table`) that is not right.
    """
    if _seen is not None:
        _seen.append((op, arch, sizes))
    return _plan(op, arch, _overrides, **sizes)


@lru_cache(maxsize=1024)
def _plan(op: str, arch: int, overrides: tuple, **sizes: int) -> dict[str, object]:
    from tigon.kernels import launch_table

    configs, sources = launch_table.tuned(op, arch, PLANNERS[op](arch, **sizes), sizes)
    for of, name, fields in overrides:
        if of == op and name in configs:
            configs = launch_table.replaced(configs, name, dict(fields))
    if os.environ.get("TIGON_PRINT_CONFIG") == "1":
        described = ", ".join(f"{name}={value}" for name, value in sizes.items())
        for name, config in configs.items():
            source = f" ({sources[name]})" if name in sources else ""
            print(f"tigon {op} sm_{arch} ({described}): {name} {config}{source}", file=sys.stderr)
    return configs


def sources(op: str, arch: int, **sizes: int) -> dict[str, str]:
    """By kernel: which rows of a tuned table `plan` follows."""
    from tigon.kernels import launch_table

    return launch_table.tuned(op, arch, PLANNERS[op](arch, **sizes), sizes)[1]


@dataclass(frozen=True)
class ScanConfig:
    """Tiles of one SSD forward kernel: a program's state is (block_p, block_n), its chunk q tokens.

    np: the state is held transposed, (block_n, block_p), so that its long side is the matrix instruction's. mix_first:
    C.B^T before C.R. tma: tiles through tensor descriptors. resident: programs an SM holds. precision: of fp32
    products. segment: tokens one program walks. An n above block_n is walked in several launches.
    """

    block_p: int
    block_n: int
    q: int
    warps: int
    stages: int = 2
    resident: int = 1
    np: bool = False
    mix_first: bool = False
    tma: bool = False
    precision: str = "tf32x3"
    segment: int = 0


def scan_tiles(arch: int, p: int, n: int, itemsize: int, tma: bool) -> ScanConfig:
    """The table: rows by architecture, dtype size and state width; a row says the largest block_p."""
    block_n = power_of_two(n)
    wide = block_n > 128
    if itemsize == 4:
        # tf32x3 holds every operand twice: 32 x 128 at q 16 with 8 warps is what stays in registers (255 on sm_80,
        # 52 KB). Of n 256 nothing does (16 x 256 spills 5 KB), so there n is walked in two launches of 16 x 128.
        row = ScanConfig(16 if wide else 32, min(block_n, 128), 16, 8, mix_first=True)
    elif arch in (80, 120):
        # mma.sync keeps accumulators and operands in registers: q 64 spills 600 bytes. q 32, 4 warps: 255 registers,
        # 38 KB on sm_80, where C.R first spills 24 bytes; 247 registers, 42 KB on sm_120, where C.B^T first spills 8
        # at n 64. n 256 in tiles of 32 x 256: 168 bytes with 4 warps, none with 8 (255 and 246 registers, 54 KB).
        warps, resident = (8, 1) if wide else (4, 2)
        first = arch == 80 or wide
        row = ScanConfig(32 if wide else 64, block_n, 32, warps, 2, resident, mix_first=first)
    else:
        # A warp group is 64 rows high, so 8 warps would do the q 64 products twice. sm_90: 255 registers, 96 KB, two
        # programs an SM; 56 KB and 255 registers without TMA. sm_100: 246 registers, 104 KB; without TMA 4 warps
        # spill 112 bytes, 8 do not. n 256 (32 x 256, transposed): 211 registers, 152 KB; sm_100: 223.
        warps = 8 if arch == 100 and not tma else 4
        row = ScanConfig(32 if wide else 64, block_n, 64, warps, 2, 1 if wide or warps == 8 else 2)
    block_p = min(row.block_p, power_of_two(p))
    native = arch in (90, 100) and itemsize < 4
    return replace(row, block_p=block_p, np=native and block_p < 64, tma=tma)


INVARIANT_SEGMENT = 1024  # tokens, whatever the batch: a row's bits must not depend on its mates
MIN_SEGMENT = 256  # tokens: a shorter walk is mostly prologue


def segment_tokens(programs: int, length: int, slots: int) -> int:
    """Tokens of a segment, for `programs` walks of `length` tokens on a chip that holds `slots` at once.

    More segments fill the chip; but all segments save a sequence's last are read twice (x, B, dt: 0.45 of
    a walk's bytes). The cheapest split wins; `programs` rounds up to whole waves.
    """

    def cost(split: int) -> float:
        waves = -(-programs * split // slots)
        return waves / split * (1 + 0.45 * (split - 1) / split)

    split = min(range(1, max(1, min(32, length // MIN_SEGMENT)) + 1), key=cost)
    return -(-length // (split * 64)) * 64


def plan_ssd_scan(
    arch: int, *, b: int, l: int, h: int, p: int, n: int, itemsize: int,
    sms: int | None = None, aligned: bool = True, batch_invariant: bool = False, **_: int,
) -> dict[str, ScanConfig]:  # fmt: skip
    """Walk and segment passes of `ssd_scan`. aligned: rows start on 16 bytes, which TMA needs."""
    tiles = scan_tiles(arch, p, n, itemsize, aligned and arch >= 90)
    segment = INVARIANT_SEGMENT
    if not batch_invariant:
        programs = max(1, b * h * -(-p // tiles.block_p))
        segment = segment_tokens(programs, max(1, l), tiles.resident * (sms or SMS[arch]))
    tiles = replace(tiles, segment=segment)
    return {"walk": tiles, "segment_states": tiles}


@dataclass(frozen=True)
class SweepConfig:
    """Tiles of the SSD backward kernels.

    A chunk has q tokens; its entry and exit states lie in memory. A sweep loops over at most `heads` heads of a group
    in tiles of block_p; nq: it holds dB and dC transposed, (n, q); hoist: what all heads share stays in registers.
    programs: wanted walks over states.
    """

    q: int
    heads: int
    block_p: int
    programs: int
    nq: bool = False
    hoist: bool = False
    warps: int = 8
    stages: int = 1
    walk_warps: int = 8
    walk_stages: int = 2
    precision: str = "tf32x3"


def plan_ssd_scan_backward(
    arch: int, *, h: int, g: int, p: int, n: int, itemsize: int, sms: int | None = None,
    batch_invariant: bool = False, **_: int,
) -> dict[str, SweepConfig]:  # fmt: skip
    """One config for the sweep and the walks, which share chunks. Batch-invariant: one walk a batch row.

    A sweep keeps dB and dC (q, n) and the tiles of one head in registers. At p 64, n 128 without spills: sm_90 255
    registers, 88 KB; sm_100 255 (219 with 1 stage), 152 KB; sm_80 255, 44 KB; sm_120 254, 46 KB. Where states
    are wider sm_90 has no clean row at q 64 (p 128 spills 72 bytes at best, n 256 200) and takes that of mma.sync;
    so does sm_100 at p and n 256 (456 bytes). fp32: tf32x3 spills 880 bytes even at q 16, IEEE products none.
    """
    block_n = power_of_two(n)
    wide = block_n > 128
    walks = 1 if batch_invariant else 2 * (sms or SMS[arch])
    heads = max(1, min(16, h // g))
    if itemsize == 4:
        row = SweepConfig(16, heads, 16, walks, hoist=True, stages=2, precision="ieee")
    elif arch == 100 and not (wide and p > 64):
        row = SweepConfig(64, heads, 64, walks, stages=1 if wide else 2)
    elif arch == 90 and p <= 64 and not wide:
        row = SweepConfig(64, heads, 64, walks, nq=True)
    elif wide:
        row = SweepConfig(16, heads, 32, walks, hoist=True, walk_stages=1)
    elif block_n == 16:
        row = SweepConfig(32, heads, 32, walks)
    else:
        block_p = 64 if arch == 80 and p <= 64 else 32
        row = SweepConfig(32, heads, block_p, walks, hoist=True, stages=2 if arch == 120 else 1)
    return {"sweep": row}


@dataclass(frozen=True)
class ConvConfig:
    """A program of causal_conv1d walks `tokens` tokens of `block` channels."""

    tokens: int
    block: int
    warps: int


def plan_causal_conv1d(
    arch: int, *, b: int, l: int, d: int, width: int, itemsize: int,
    backward: bool = False, states: bool = False, **_: int,
) -> dict[str, ConvConfig]:  # fmt: skip
    """16-byte accesses where registers allow, and enough programs to fill any chip. states: with gradients of states.

    Backward keeps two windows, the weights and their sums in registers. At width 4 in bf16 on sm_90, 8 channels a
    thread take 188 registers, and with states 254 (sm_120 then spills 16 bytes); 4 channels with states 163.
    """
    vector = 16 // itemsize
    if backward and width * vector > 32:
        vector //= 2
    if backward and states and width * vector > 16:
        vector //= 2
    warps = max(1, min(4, power_of_two(d) // (32 * vector)))
    block = 32 * vector * warps
    programs = b * -(-d // block)
    tokens = 16
    while tokens < 128 and programs * l >= 2 * tokens * 1024:
        tokens *= 2
    name = "convolve_backward" if backward else "convolve"
    return {name: ConvConfig(tokens, block, warps)}


@dataclass(frozen=True)
class NormConfig:
    """Tile of `rows` rows by `block` channels; `row_blocks`: shares of dweight, summed in fixed order."""

    rows: int
    block: int
    warps: int
    row_blocks: int = 0


def plan_gated_rms_norm(
    arch: int, *, t: int, d: int, group_size: int, itemsize: int, backward: bool = False, **_: int
) -> dict[str, NormConfig]:
    """At least 1,024 elements a tile, 8 to 32 a thread.

    Backward holds dy, x, z, u and the sum of dweight: groups of more than 16 KB go in pieces of 2,048 (at 4,096 a
    gated group of 16,384 spills 152 bytes in fp32; at 2,048 it is 72 on sm_120 and 32 on sm_90, and smaller groups
    do not spill).
    """
    block = power_of_two(group_size)
    if not backward:
        block = min(block, 8192)
        rows = max(1, 1024 // block)
        return {"gated_norm": NormConfig(rows, block, max(1, min(8, rows * block // 256)))}
    wide = group_size * itemsize > 16384
    block = min(block, 2048 if wide else 4096)
    rows = max(1, 1024 // block)
    warps = 16 if wide else max(1, min(16, rows * block // 256))
    row_blocks = max(1, min(-(-t // rows), max(64, 1024 * group_size // d)))
    return {"gated_norm_backward": NormConfig(rows, block, warps, row_blocks)}


def plan_scaled_mm(arch: int, **sizes: int) -> dict[str, object]:
    """As `launch_gemm`, which builds on this file, says."""
    from tigon.kernels.launch_gemm import plan_scaled_mm

    return plan_scaled_mm(arch, **sizes)


def plan_experts(op: str, arch: int, **sizes: int) -> dict[str, object]:
    """As `launch_moe`, which builds on this file, says."""
    from tigon.kernels import launch_moe

    return getattr(launch_moe, f"plan_{op}")(arch, **sizes)


def plan_tokens(op: str, arch: int, **sizes: int) -> dict[str, object]:
    """As `launch_tokens`, which builds on this file, says."""
    from tigon.kernels import launch_tokens

    return getattr(launch_tokens, f"plan_{op}")(arch, **sizes)


PLANNERS: dict[str, Callable[..., dict[str, object]]] = {
    "ssd_scan": plan_ssd_scan,
    "ssd_scan_backward": plan_ssd_scan_backward,
    "causal_conv1d": plan_causal_conv1d,
    "causal_conv1d_backward": partial(plan_causal_conv1d, backward=True),
    "gated_rms_norm": plan_gated_rms_norm,
    "gated_rms_norm_backward": partial(plan_gated_rms_norm, backward=True),
    "rms_norm": plan_gated_rms_norm,
    "rms_statistics": plan_gated_rms_norm,
    "scaled_mm": plan_scaled_mm,
    "grouped_mm": partial(plan_experts, "grouped_mm"),
    "grouped_mm_backward": partial(plan_experts, "grouped_mm_backward"),
    "moe_experts": partial(plan_experts, "moe_experts"),
    "moe_experts_backward": partial(plan_experts, "moe_experts_backward"),
    "attention_token_scores": partial(plan_tokens, "attention_token_scores"),
    "ssd_token_scores": partial(plan_tokens, "ssd_token_scores"),
}
