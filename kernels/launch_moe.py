"""Launch tables of the grouped products and expert MLPs: tiles by dtype, weight format, architecture and rows an expert.

Rows an expert are known to the host as a mean only; how they are spread is not. Weights are the MMA's left side (see
`grouped_gemm_rows`), so a tile of few rows costs no more than the weights it reads.
"""

from dataclasses import dataclass, replace

from tigon.kernels.launch import SMS, power_of_two

FEW = 64  # tokens: up to here a program takes all rows of an expert, without a list of tiles
INVARIANT_ROWS = 64  # of a tile, whatever the batch
LEAST_SPLIT = 512  # of k: a shorter segment is mostly prologue and epilogue


@dataclass(frozen=True)
class GroupedConfig:
    """A program multiplies (columns, block_k) of a matrix with (rows, block_k) at a time.

    For a gradient of a matrix its tile is (columns, rows), block_k rows of the batch at a time. few: programs take whole
    experts. splits: segments of k, of split_k each (0: all), that programs of their own take. quads: see `quad_order`.
    """

    rows: int
    columns: int
    block_k: int
    warps: int
    stages: int
    precision: str = "tf32"
    quads: bool = False
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
    arch: int, rows: int, itemsize: int, format: str = "plain", aligned: bool = True
) -> GroupedConfig:
    """Tiles of a product, for tiles of `rows` rows. aligned: rows of memory are read 16 bytes at a time."""
    tall, hopper = rows >= 64, arch in (90, 100)
    if itemsize == 4:
        row = GroupedConfig(rows, 64, 32, 8 if tall else 4, 2 if tall else 3, "tf32x3")
    elif not aligned:
        row = GroupedConfig(min(rows, 64), 64, 32, 4, 2)
    elif tall:
        block_k = 64 if hopper or format != "plain" else 32
        row = GroupedConfig(rows, 128, block_k, 8, 3)
    else:
        block_k = 128 if format == "nvfp4" else 64
        row = GroupedConfig(rows, 128, block_k, 4, 4 if hopper else 3)
    return replace(row, quads=format == "nvfp4" and arch == 90 and row.block_k == 128)


def activation_tiles(tiles: GroupedConfig, itemsize: int, gates: int, again: bool) -> GroupedConfig:
    """Of `activation_gradient`, from those of a product. again: h is a product too, its sums beside those of G."""
    rows, columns = tiles.rows, tiles.columns // gates
    if again and (itemsize == 4 or gates == 2):
        rows = min(rows, 32 if itemsize == 4 else 64)
    return replace(tiles, rows=rows, columns=max(32, columns))


def gradient_tiles(arch: int, itemsize: int, aligned: bool) -> GroupedConfig:
    """Tiles of a matrix's gradient."""
    if itemsize == 4:
        return GroupedConfig(64, 64, 32, 8, 2, "tf32x3")
    if not aligned:
        return GroupedConfig(64, 64, 32, 4, 2)
    return GroupedConfig(128, 128, 64 if arch in (90, 100) else 32, 8, 4)


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
    few = t <= FEW and not batch_invariant
    up, down = (
        replace(product_tiles(arch, rows, itemsize, kind, m % 16 == l % 16 == 0), few=few)
        for kind in (format, down_format or format)
    )
    up = replace(up, columns=up.columns // gates)
    if few:
        down = split(down, min(e, t * k), l, m, sms or SMS[arch])
    return {"up_activate": up, "multiply_rows": down, "combine": combine_tiles(t, l)}


def plan_moe_experts_backward(
    arch: int, *, t: int, k: int, e: int, m: int, l: int, itemsize: int, gates: int = 1, save: str = "hidden",
    batch_invariant: bool = False, **_: int,
) -> dict[str, object]:  # fmt: skip
    """Configs of `activation_gradient`, `multiply_rows` (dx), `weight_gradient` and `combine`."""
    rows, aligned = rows_of_tile(t * k, e, itemsize, batch_invariant), m % 16 == l % 16 == 0
    tiles = product_tiles(arch, rows, itemsize, aligned=aligned)
    return {
        "activation_gradient": activation_tiles(tiles, itemsize, gates, save == "nothing"),
        "multiply_rows": tiles,
        "weight_gradient": gradient_tiles(arch, itemsize, aligned),
        "combine": combine_tiles(t, l),
    }


def plan_grouped_mm(
    arch: int, *, rows: int, e: int, n: int, k: int, itemsize: int, batch_invariant: bool = False, **_: int
) -> dict[str, object]:  # fmt: skip
    """Config of `multiply_rows`."""
    tile = rows_of_tile(rows, e, itemsize, batch_invariant)
    return {"multiply_rows": product_tiles(arch, tile, itemsize, aligned=n % 16 == k % 16 == 0)}


def plan_grouped_mm_backward(
    arch: int, *, rows: int, e: int, n: int, k: int, itemsize: int, **_: int
) -> dict[str, object]:
    """Configs of `multiply_rows` (dx) and `weight_gradient`."""
    product = plan_grouped_mm(arch, rows=rows, e=e, n=n, k=k, itemsize=itemsize)
    aligned = n % 16 == k % 16 == 0
    return product | {"weight_gradient": gradient_tiles(arch, itemsize, aligned)}
