"""Launch table of `scaled_mm`: tiles by what the MMA multiplies, architecture and shape.

What is multiplied ("kind") follows from the formats and the architecture:

    fp8      E4M3 and E5M2 codes as they are, from sm_90 on; scales of 128 k are applied tile by tile
    nvfp4    on sm_100 and sm_120: NVFP4 x NVFP4, block scales and all
    mxfp8    on sm_100 and sm_120: MXFP8 x MXFP8, block scales and all
    half     everything else, decoded to fp16 or bf16 on the way to the MMA
    fp32     an fp32 operand beside NVFP4, in three TF32 products
"""

from dataclasses import dataclass, replace

from tigon.kernels.launch import SMS, power_of_two

FEW = 64  # rows: up to here the weights are the MMA's left side and the other tile is as small as the rows
LEAST_SPLIT = 512  # of k: a shorter segment is mostly prologue and epilogue


@dataclass(frozen=True)
class GemmConfig:
    """A program multiplies a (left, block_k) by a (right, block_k) tile at a time; one of them is of `a` (m,k).

    swap: the left one is of `b`. kind: see above. promote: sums leave the MMA every block_k. quads: k in an order that
    suits 4-bit codes. tma: tiles through tensor descriptors. k is cut in `splits` segments of split_k: one a program,
    or all in one if walk.
    """

    left: int
    right: int
    block_k: int
    warps: int
    stages: int
    kind: str = "half"
    swap: bool = False
    promote: bool = False
    quads: bool = False
    tma: bool = False
    precision: str = "tf32"
    splits: int = 1
    split_k: int = 0
    walk: bool = False
    band: int = 8

    @property
    def scaled(self) -> bool:
        """Whether the MMA takes block scales."""
        return self.kind in ("nvfp4", "mxfp8")


def gemm_kind(arch: int, a_format: str, b_format: str, itemsize: int) -> str:
    """What the MMA multiplies; itemsize: bytes of an element of a plain operand."""
    if a_format == "plain" and itemsize == 4:
        return "fp32"
    if a_format == b_format and a_format in ("nvfp4", "mxfp8"):
        return a_format if arch >= 100 else "half"
    if a_format.startswith("fp8") and b_format.startswith("fp8"):
        return "fp8" if arch >= 90 else "half"
    return "half"


# Registers a thread and shared memory beside the rows; none of them spills (tests/codegen, Triton 3.9).
# left, right, block_k, warps, stages where both sides are long
WIDE = {
    ("fp8", 90): (128, 128, 128, 8, 4),  # 160, 128 KB; 1x128 by 128x128 148; by 1x128 251
    ("fp8", 100): (
        128,
        256,
        128,
        8,
        3,
    ),  # 206, 144 KB; blocks: 128 x 128 141, 96 KB; 128 x 64 188, 72 KB
    ("fp8", 120): (128, 128, 64, 8, 4),  # 118, 48 KB; blocks 174 and 244
    ("half", 80): (128, 128, 32, 8, 4),  # bf16 x nvfp4 167, 30 KB; fp8 128; nvfp4 157; mxfp8 169
    ("half", 90): (
        128,
        128,
        64,
        8,
        4,
    ),  # bf16 x nvfp4 128, 77 KB; fp8 x nvfp4 164, 1x128 175; nvfp4 163; mxfp8 128
    ("half", 100): (128, 128, 64, 8, 4),  # bf16 x nvfp4 98, 80 KB; fp8 x nvfp4 146, 1x128 192
    ("half", 120): (128, 128, 32, 8, 4),  # bf16 x nvfp4 136, 30 KB; fp8 x nvfp4 134, 1x128 182
    ("fp32", 80): (64, 64, 32, 8, 2),  # 188, 9 KB
    ("fp32", 90): (64, 64, 32, 8, 2),  # 96, 41 KB
    ("fp32", 100): (64, 64, 32, 8, 2),  # 64, 25 KB
    ("fp32", 120): (64, 64, 32, 8, 2),  # 160, 9 KB
    ("nvfp4", 100): (128, 256, 256, 8, 3),  # 206, 162 KB swizzled; 210, 108 KB linear
    ("nvfp4", 120): (128, 128, 128, 8, 4),  # 146, 54 KB
    ("mxfp8", 100): (128, 256, 128, 8, 3),  # 178, 149 KB; block_k 256 would take 297 KB
    ("mxfp8", 120): (128, 128, 128, 8, 3),  # 204, 66 KB
}
# left, block_k, warps, stages where one side has few rows; figures for 16
NARROW = {
    ("fp8", 90): (128, 128, 4, 4),  # 72, 72 KB; blocks 96
    ("fp8", 100): (128, 128, 4, 4),  # 48, 72 KB; blocks 88
    ("fp8", 120): (128, 128, 4, 3),  # 64, 36 KB; blocks 124
    ("half", 80): (128, 128, 4, 4),  # bf16 x nvfp4 125, 39 KB; fp8 96; nvfp4 178; mxfp8 128, 56 KB
    ("half", 90): (
        128,
        128,
        4,
        4,
    ),  # bf16 x nvfp4 163, 43 KB; fp8 x nvfp4 167; nvfp4 216; mxfp8 246, 60 KB
    ("half", 100): (128, 128, 4, 4),  # bf16 x nvfp4 118, 43 KB; fp8 x nvfp4 117
    ("half", 120): (128, 128, 4, 4),  # bf16 x nvfp4 122, 39 KB; fp8 x nvfp4 120
    ("fp32", 80): (64, 32, 4, 3),
    ("fp32", 90): (64, 32, 4, 3),
    ("fp32", 100): (64, 32, 4, 3),
    ("fp32", 120): (64, 32, 4, 3),
    ("nvfp4", 100): (128, 256, 4, 4),  # 72, 60 KB
    ("nvfp4", 120): (128, 256, 4, 3),  # 128, 40 KB
    ("mxfp8", 100): (128, 128, 4, 4),  # 56, 56 KB
    ("mxfp8", 120): (128, 128, 4, 3),  # 94, 37 KB
}


def gemm_tiles(
    arch: int,
    m: int,
    n: int,
    kind: str,
    weight_only: bool,
    blocks: int,
    invariant: bool,
    aligned: bool,
) -> GemmConfig:
    """The row for a shape. weight_only: only b is decoded; blocks: operands scaled 1x128. Batch-invariant: one row.

    Scales 1x128 belong to the left side where there is a choice: a thread holds few rows and many columns.
    """
    side = FEW if invariant else min(m, n)
    if side > FEW:
        left, right, block_k, warps, stages = WIDE[kind, arch]
        swap = weight_only and not blocks
        if blocks and arch == 100:
            right = 128 // blocks
        if not aligned:
            right = min(right, 64)
    else:
        left, block_k, warps, stages = NARROW[kind, arch]
        right = power_of_two(max(1, side))
        if right > 16:
            # Of 64 rows, 4 warps spill 8 to 440 bytes on sm_90 and sm_100, 8 warps at block_k 128 up to 104.
            warps = 4 if arch == 80 and not invariant else 8
            half = 32 if arch == 80 and invariant else 64
            block_k = half if kind == "half" else block_k
        swap = weight_only or invariant or m <= n
    row = GemmConfig(left, right, block_k, warps, stages, kind, swap)
    return replace(
        row,
        promote=blocks > 0 or (kind == "fp8" and arch == 90),
        quads=weight_only and kind == "half" and arch == 90 and right <= FEW,
        tma=side > FEW and arch >= 90 and aligned,
        precision="tf32x3" if kind == "fp32" else "tf32",
    )


def plan_scaled_mm(
    arch: int, *, m: int, n: int, k: int, itemsize: int, a_format: str, b_format: str,
    batch_invariant: bool = False, sms: int | None = None, aligned: bool = True, **_: int,
) -> dict[str, GemmConfig]:  # fmt: skip
    """Configs of `multiply` and, where k is split over programs, of `add_splits` (the same one).

    aligned: rows start on 16 bytes, which TMA needs. Where they do not, single elements are loaded, and their addresses
    spill 88 bytes on sm_80 and 48 on sm_90 at 128 x 128; 128 x 64 does not spill.
    """
    kind = gemm_kind(arch, a_format, b_format, itemsize)
    weight_only = b_format == "nvfp4" and a_format != "nvfp4"
    blocks = (a_format, b_format).count("fp8-1x128")
    row = gemm_tiles(arch, m, n, kind, weight_only, blocks, batch_invariant, aligned)
    rows, columns = (n, m) if row.swap else (m, n)
    if batch_invariant:
        columns = min(columns, row.right)
    tiles = max(1, -(-rows // row.left) * -(-columns // row.right))
    splits = max(1, min(2 * (sms or SMS[arch]) // tiles, k // LEAST_SPLIT))
    unit = max(128, row.block_k)
    split_k = max(1, -(-k // (splits * unit))) * unit
    splits = max(1, -(-k // split_k))
    walk = batch_invariant and splits > 1 and m > row.right
    row = replace(row, splits=splits, split_k=split_k, walk=walk)
    return {"multiply": row} | ({"add_splits": row} if splits > 1 and not walk else {})
