"""Which tokens of a video repeat the frame before: masks that need no query and no layer.

Plain tensor operations without a host sync; how many tokens stay depends on shapes and numbers alone (except with a
threshold). Give the mask to `select_tokens` as scores, or keep only these tokens' rows.

Sources: "Efficient Video Sampling" (arXiv 2510.14624) and its served form, which compares embeddings after the
projector; TimeChat-Online's Differential Token Drop (arXiv 2504.17343).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tigon.ops.checks import FLOATS, Check
from tigon.ops.quantize import one_of

PIXELS = (*FLOATS, torch.uint8)


def _check_grid(check: Check, grid: tuple[int, int, int]) -> tuple[int, int, int]:
    whole = len(grid) == 3 and all(isinstance(n, int) for n in grid)
    check.require(whole, f"grid must be three ints (T, H, W), got {grid!r}")
    T, H, W = grid
    check.require(T >= 0 and H >= 1 and W >= 1, f"grid={grid} must have T >= 0, H and W >= 1")
    return T, H, W


def retained_tokens(grid: tuple[int, int, int], rate: float) -> int:
    """How many tokens `video_redundancy_mask` keeps: max(H W, int(T H W (1 - rate))), at most all."""
    T, H, W = grid
    return min(T * H * W, max(H * W, int(T * H * W * (1 - rate))))


def video_redundancy_mask(
    embeddings: Tensor,
    grid: tuple[int, int, int],
    rate: float,
    *,
    mode: Literal["embedding", "pixel"] = "embedding",
) -> Tensor:
    """True for the tokens that differ most from the same place one frame earlier; all of frame 0 among them.

    d = 1 - cos(e[f], e[f-1]) in the embeddings' dtype ("embedding": bit for bit the mask of the served method, vLLM's
    `compute_retention_mask`), or mean |p[f] - p[f-1]| in fp32 ("pixel"). The `retained_tokens` with the largest d over
    the whole video stay, equal ones by lower index; a NaN is as large as can be.

    Args:
        embeddings: (T H W, c): tokens after the projector, frame by frame, or the pixels of each token's patch
            (fp32, bf16, fp16, fp64; pixels also uint8).
        grid: (T, H, W) in tokens, after any spatial merge. rate: the share that is removed, 0 to below 1.

    Returns:
        (T H W) bool. An empty video gives an empty mask.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or range, by name.
    """
    check = Check("video_redundancy_mask")
    T, H, W = _check_grid(check, grid)
    one_of(check, "mode", mode, ("embedding", "pixel"))
    dims = f"{T * H * W} c"
    check.tensor("embeddings", embeddings, dims, dtypes=PIXELS if mode == "pixel" else FLOATS)
    check.require(0 <= rate < 1, f"rate={rate} must lie in 0 to below 1")
    frames = embeddings.detach().unflatten(0, (T, H * W))
    if mode == "embedding":
        change = 1 - F.cosine_similarity(frames[1:], frames[:-1], dim=-1)
        first = 255 * torch.ones_like(frames[:1, :, 0])
    else:
        frames = frames.float()
        change = (frames[1:] - frames[:-1]).abs().mean(-1)
        first = torch.full_like(frames[:1, :, 0], torch.inf)
    order = torch.cat([first, change]).flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(T * H * W, dtype=torch.bool, device=embeddings.device)
    return mask.index_fill(0, order[: retained_tokens(grid, rate)], True)


def frame_difference_mask(
    frames: Tensor,
    grid: tuple[int, int, int],
    *,
    mode: Literal["pixel", "feature"] = "pixel",
    threshold: float | None = None,
    drop: float | None = None,
    patch: int = 28,
    temporal_patch: int = 2,
) -> Tensor:
    """False for the tokens that changed little since the frame before; each pair of frames is judged by itself.

    "pixel": d = mean |difference| over the channels and pixels of a token's patch, between the first picture of the
    token before and the last picture of this one; dropped where d < threshold. "feature": the cosine of both features;
    dropped where it is above threshold. With `drop` instead, int(drop H W) tokens of each frame go, those that changed
    least, equal ones by lower index. Frame 0 stays whole, and where a NaN is compared nothing is dropped by threshold.

    Args:
        frames: (T temporal_patch, ch, H patch, W patch) pictures of any scale (uint8 too), or (T H W, c) features.
        grid: (T, H, W) in tokens. threshold, drop: one of them; drop is a share, 0 to 1.
        patch: pixels of a token's side, merged patches included. temporal_patch: pictures a token spans.

    Returns:
        (T H W) bool.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or range, by name.
    """
    check = Check("frame_difference_mask")
    T, H, W = _check_grid(check, grid)
    one_of(check, "mode", mode, ("pixel", "feature"))
    check.require((threshold is None) != (drop is None), "give threshold or drop, one of them")
    check.require(drop is None or 0 <= drop <= 1, f"drop={drop} must lie in 0 to 1")
    if mode == "feature":
        check.tensor("frames", frames, f"{T * H * W} c", dtypes=FLOATS)
        tokens = frames.detach().unflatten(0, (T, H * W))
        same = F.cosine_similarity(tokens[1:], tokens[:-1], dim=-1)
    else:
        check.require(patch >= 1, f"patch={patch} must be 1 or more")
        check.require(temporal_patch >= 1, f"temporal_patch={temporal_patch} must be 1 or more")
        dims = f"{T * temporal_patch} ch {H * patch} {W * patch}"
        check.tensor("frames", frames, dims, dtypes=PIXELS)
        tubes = frames.detach().unflatten(0, (T, temporal_patch))
        change = (tubes[1:, -1].float() - tubes[:-1, 0].float()).abs()
        change = change.unflatten(-1, (W, patch)).unflatten(
            -3, (H, patch)
        )  # (T-1,ch,H,patch,W,patch)
        same = -change.mean((1, 3, 5)).flatten(1)
        threshold = None if threshold is None else -threshold
    if threshold is not None:
        dropped = same > threshold
    else:
        order = same.argsort(dim=-1, descending=True, stable=True)[:, : int(drop * H * W)]
        dropped = torch.zeros_like(same, dtype=torch.bool).scatter(1, order, True)
    whole = torch.ones(min(T, 1), H * W, dtype=torch.bool, device=frames.device)
    return torch.cat([whole, ~dropped]).flatten()
