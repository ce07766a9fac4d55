"""Launch tables of the token scores: tiles of queries by keys, by dtype, architecture, width and number of queries."""

from dataclasses import dataclass

from tigon.kernels.launch import power_of_two

SPLIT = 1024  # keys of a sequence that one program of `row_sums` takes: fixed, so that no bit depends on the batch
MOST_QUERIES = 64  # of a tile; in batch-invariant mode always so many


@dataclass(frozen=True)
class ScoreConfig:
    """A program scores `keys` keys, `queries` at a time (for `row_sums`: rows, each a query and a head)."""

    queries: int
    keys: int
    warps: int
    stages: int
    precision: str = "tf32"


@dataclass(frozen=True)
class ElapsedConfig:
    """A program walks a sequence `tokens` at a time for `heads` heads."""

    tokens: int
    heads: int
    warps: int


def score_tiles(
    arch: int, queries: int, width: int, itemsize: int, batch_invariant: bool, decay: bool = False
) -> ScoreConfig:
    """Tiles of a product with rows of `width` numbers; nothing spills.

    64 x 64 with 8 warps: `attention_scores` 163 registers on sm_90, 178 on sm_80 (of 256 numbers 221 and 255);
    `ssd_scores` 128 and 173, with decay 253 and 219. With 4 warps the latter spill 240 bytes, 64 x 128 with 8 warps
    224. sm_100 takes 64 x 32 of 256 numbers and with decay (247 registers; of 64 x 64 it spills 8 to 56 bytes). Few
    queries take more keys. fp32 in tf32x3 holds every operand twice: 16 x 32, 254 registers; of 256 numbers it spills
    216 bytes even at 16 x 16, IEEE products none (158 registers).
    """
    rows = MOST_QUERIES if batch_invariant else min(MOST_QUERIES, power_of_two(max(1, queries)))
    wide = width > 128
    if itemsize == 4:
        return ScoreConfig(16, 32, 4, 1, "ieee" if wide else "tf32x3")
    if rows == 16:
        return ScoreConfig(16, 64 if wide else 128, 4, 2)
    keys = 32 if arch == 100 and (wide or decay) else 64
    return ScoreConfig(rows, keys, 8 if rows == 64 else 4, 2)


def plan_attention_token_scores(
    arch: int, *, nq: int, hq: int, hkv: int, dim: int, itemsize: int, lse: bool = False,
    batch_invariant: bool = False, **_: int,
) -> dict[str, object]:  # fmt: skip
    """Configs of `row_sums` (where lse is not given) and `attention_scores`."""
    scores = score_tiles(arch, nq, dim, itemsize, batch_invariant)
    if lse:
        return {"attention_scores": scores}
    rows = score_tiles(arch, nq * (hq // hkv), dim, itemsize, batch_invariant)
    return {"row_sums": rows, "attention_scores": scores}


def plan_ssd_token_scores(
    arch: int, *, nq: int, h: int, n: int, itemsize: int, decay: bool = False,
    batch_invariant: bool = False, **_: int,
) -> dict[str, object]:  # fmt: skip
    """Configs of `elapsed` (with decay) and `ssd_scores`."""
    scores = {"ssd_scores": score_tiles(arch, nq, n, itemsize, batch_invariant, decay)}
    return {"elapsed": ElapsedConfig(128, 8, 4)} | scores if decay else scores
