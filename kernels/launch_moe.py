"""Launch tables of the grouped products and expert MLPs: tiles by dtype, weight format, architecture, rows an expert.

Rows an expert are known to the host as a mean only. Weights are the MMA's left side (see
`grouped_gemm_rows`), so a tile of few rows costs no more than the weights it reads.
"""

from dataclasses import dataclass, replace

from tigon.kernels.launch import SMS, power_of_two

FEW = 64  # tokens: up to here a program takes all rows of an expert, without a list of tiles
INVARIANT_ROWS = 64  # of a tile, whatever the batch
LONG = 1536  # k of a product whose tile may have an SM for itself
LEAST_SPLIT = 512  # of k: a shorter segment is mostly prologue and epilogue


@dataclass(frozen=True)
class GroupedConfig:
    """A program multiplies (columns, block_k) of a matrix with (rows, block_k) at a time.

    For a gradient of a matrix its tile is (columns, rows), block_k rows of the batch at a time. rows_left: the rows are
    the MMA's left side, not the weights. quads: see `quad_order`. few: a program takes all rows of an expert. splits:
    segments of k, of split_k each (0: all), that programs of their own take.
    """

    rows: int
    columns: int
    block_k: int
    warps: int
    stages: int
    precision: str = "tf32"
    quads: bool = False
    rows_left: bool = False
    few: bool = False
    splits: int = 1
    split_k: int = 0


@dataclass(frozen=True)
class CombineConfig:
    """A program sums `block` columns of a token."""

    block: int
    warps: int


def rows_of_tile(rows: int, experts: int, itemsize: int, invariant: bool) -> int:
    """A power of two that most experts fit in, up to 128: a quarter above the mean."""
    most = 64 if itemsize == 4 else 128
    if invariant:
        return min(most, INVARIANT_ROWS)
    return min(most, power_of_two(max(1, 5 * rows // (4 * max(1, experts)))))


def product_tiles(
    arch: int, rows: int, n: int, k: int, itemsize: int, format: str = "plain"
) -> GroupedConfig:
    """Tiles of a product with (n,k) matrices, for tiles of `rows` rows; nothing spills.

    On sm_90 128 x 128 takes 123 to 128 registers and 96 KB, so that two programs share an SM; 256 x 128, 238 to 245 and
    192 KB, reads a third less from L2 (85 FLOP a byte for 64) and has the SM for itself: for a long k, whose start and
    end weigh little, and where few of its columns are beyond n. On sm_100 103 to 122 registers, and 177. 128 x 16 (few
    rows): 72 to 128 registers, 72 KB, three programs an SM. mma.sync holds 128 x 128 in 134 to 204 registers, rows
    on the left: a transposed matrix there would pass the registers on its way to shared memory.

    Codes are decoded in registers: of 128 k they would spill up to 104 bytes on sm_80, of 64 none (sm_90: 166). Few
    rows of NVFP4 take 128 k (227 registers; sm_120, where 8 bytes would spill, 64), FP8 64 (182; 128: 40 bytes).
    """
    tall, hopper = rows >= 64, arch in (90, 100)
    if itemsize == 4:
        return GroupedConfig(rows, 64, 32, 8 if tall else 4, 2 if tall else 3, "tf32x3")
    if n % 16 or k % 16:  # read element by element, each with an address of its own
        return GroupedConfig(min(rows, 32), 64, 32, 4, 2)
    if not tall:
        block_k = 128 if format == "nvfp4" and arch != 120 else 64
        quads = format == "nvfp4" and arch == 90
        return GroupedConfig(rows, 128, block_k, 4, 4 if hopper else 3, quads=quads)
    if format != "plain":
        return GroupedConfig(rows, 128, 64, 8, 4 if hopper else 3)
    if hopper and rows == 128 and k >= LONG and -(-n // 256) * 256 <= 1.06 * n:
        return GroupedConfig(rows, 256, 64, 8, 4)
    if hopper:
        return GroupedConfig(rows, 128, 64, 8, 3)
    return GroupedConfig(rows, 128, 32, 8, 3, rows_left=True)


def activation_tiles(
    arch: int, rows: int, m: int, l: int, itemsize: int, gates: int, again: bool
) -> GroupedConfig:
    """Of `activation_gradient`. again: h is a product too, its sums beside those of G.

    128 x 128 of G and h: sm_90 211 registers, 96 KB; again 246. sm_100 185; again with 64 rows, as 128 spill 128 bytes.
    """
    tiles = product_tiles(arch, rows, m, min(l, LONG - 1), itemsize)
    if again:
        most = 32 if itemsize == 4 else 64 if gates == 2 or arch >= 100 else 128
        tiles = replace(tiles, rows=min(tiles.rows, most))
    return replace(tiles, columns=max(32, tiles.columns // gates), rows_left=False)


def gradient_tiles(arch: int, n: int, k: int, itemsize: int, gather: bool) -> GroupedConfig:
    """Tiles of a matrix's gradient. An expert has few rows and programs are short, so two share an SM of sm_90.

    Loads through `order` take two more stages for as many tiles under way (123 registers, 96 KB; added to what is
    there, 186).
    """
    if itemsize == 4:
        return GroupedConfig(64, 64, 32, 8, 2, "tf32x3")
    if n % 16 or k % 16:
        return GroupedConfig(32, 64, 32, 4, 2)
    return GroupedConfig(128, 128, 64 if arch in (90, 100) else 32, 8, 5 if gather else 3)


def split(config: GroupedConfig, items: int, n: int, k: int, sms: int) -> GroupedConfig:
    """`config` with k cut until `items` experts fill the chip twice."""
    programs = max(1, items * -(-n // config.columns))
    splits = max(1, min(2 * sms // programs, k // LEAST_SPLIT))
    if splits == 1:
        return config
    split_k = -(-k // (splits * config.block_k)) * config.block_k
    return replace(config, splits=-(-k // split_k), split_k=split_k)


def combine_tiles(t: int, l: int) -> CombineConfig:
    """16 bytes a thread; narrow blocks where there are few tokens. No bit depends on it."""
    block = min(power_of_two(l), 256 if t <= FEW else 1024)
    return CombineConfig(block, max(1, block // 256))


def plan_moe_experts(
    arch: int, *, t: int, k: int, e: int, m: int, l: int, itemsize: int, format: str = "plain", down_format: str = "",
    gates: int = 1, batch_invariant: bool = False, sms: int | None = None, **_: int,
) -> dict[str, object]:  # fmt: skip
    """Configs of `up_activate`, `multiply_rows` (the second product) and `combine`."""
    rows = rows_of_tile(t * k, e, itemsize, batch_invariant)
    up = product_tiles(arch, rows, gates * m, l, itemsize, format)
    up = replace(up, columns=up.columns // gates)
    down = product_tiles(arch, rows, l, m, itemsize, down_format or format)
    if t <= FEW and not batch_invariant:
        sms, items = sms or SMS[arch], min(e, t * k)
        idle = items * -(-m // up.columns) < sms
        up = replace(up, few=True, columns=up.columns // 2 if idle else up.columns)
        down = split(replace(down, few=True), items, l, m, sms)
    return {"up_activate": up, "multiply_rows": down, "combine": combine_tiles(t, l)}


def plan_moe_experts_backward(
    arch: int, *, t: int, k: int, e: int, m: int, l: int, itemsize: int, gates: int = 1, save: str = "hidden",
    batch_invariant: bool = False, **_: int,
) -> dict[str, object]:  # fmt: skip
    """Configs of `activation_gradient`, `multiply_rows` (dx), `weight_gradient` and `combine`."""
    rows = rows_of_tile(t * k, e, itemsize, batch_invariant)
    return {
        "activation_gradient": activation_tiles(
            arch, rows, m, l, itemsize, gates, save == "nothing"
        ),
        "multiply_rows": product_tiles(arch, rows, l, gates * m, itemsize),
        "weight_gradient": gradient_tiles(arch, m, l, itemsize, True),
        "combine": combine_tiles(t, l),
    }


def plan_grouped_mm(
    arch: int, *, rows: int, e: int, n: int, k: int, itemsize: int, batch_invariant: bool = False, **_: int
) -> dict[str, object]:  # fmt: skip
    """Config of `multiply_rows`."""
    tile = rows_of_tile(rows, e, itemsize, batch_invariant)
    return {"multiply_rows": product_tiles(arch, tile, n, k, itemsize)}


def plan_grouped_mm_backward(
    arch: int, *, rows: int, e: int, n: int, k: int, itemsize: int, batch_invariant: bool = False, **_: int
) -> dict[str, object]:  # fmt: skip
    """Configs of `multiply_rows` (dx, a sum over n) and `weight_gradient`."""
    product = plan_grouped_mm(
        arch, rows=rows, e=e, n=k, k=n, itemsize=itemsize, batch_invariant=batch_invariant
    )
    return product | {"weight_gradient": gradient_tiles(arch, n, k, itemsize, False)}
