"""Query-free masks against transcriptions of their published definitions, token by token in Python."""

import math

import pytest
import torch

import tigon


def served_mask(embeddings, T, H, W, rate):
    """EVS as it is served: dissimilarity to the frame before, 255 for frame 0, the largest stay, a stable order."""
    rows = [
        255.0
        if i < H * W
        else float(
            1 - torch.nn.functional.cosine_similarity(embeddings[i], embeddings[i - H * W], dim=0)
        )
        for i in range(T * H * W)
    ]
    count = max(H * W, int(T * H * W * (1 - rate)))
    best = sorted(range(len(rows)), key=lambda i: (-rows[i], i))[:count]
    return [i in set(best) for i in range(len(rows))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [(5, 2, 3), (1, 4, 4), (9, 1, 1), (4, 3, 5)])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.7, 0.95])
def test_the_served_mask(dtype, grid, rate):
    T, H, W = grid
    x = torch.randn(T * H * W, 16)
    x[H * W :: 3] = x[: -H * W : 3][: len(x[H * W :: 3])]  # places that do not change: ties
    x = x.to(dtype)
    mask = tigon.video_redundancy_mask(x, grid, rate)
    assert mask.tolist() == served_mask(x, *grid, rate)
    assert mask[: H * W].all() and mask.sum() == max(H * W, int(T * H * W * (1 - rate)))


def test_the_pixel_mask_goes_by_mean_absolute_difference():
    pixels = torch.randint(256, (4 * 6, 3 * 5), dtype=torch.uint8)
    pixels[6:12] = pixels[:6]
    change = [math.inf] * 6 + [
        (pixels[i].float() - pixels[i - 6].float()).abs().mean().item() for i in range(6, 24)
    ]
    best = sorted(range(24), key=lambda i: (-change[i], i))[:12]
    mask = tigon.video_redundancy_mask(pixels, (4, 2, 3), 0.5, mode="pixel")
    assert mask.nonzero().flatten().tolist() == sorted(best)
    assert mask[:6].all() and not mask[6:12].any()


def test_pixel_differences_as_timechat_online_takes_them():
    """Between the first picture of the token before and the last one of this."""
    T, H, W, patch, span = 3, 2, 3, 4, 2
    frames = torch.rand(T * span, 3, H * patch, W * patch)
    change = torch.zeros(T, H, W)
    for f in range(1, T):
        for y in range(H):
            for x in range(W):
                box = (
                    slice(None),
                    slice(y * patch, (y + 1) * patch),
                    slice(x * patch, (x + 1) * patch),
                )
                before, now = frames[(f - 1) * span][box], frames[f * span + span - 1][box]
                change[f, y, x] = (before - now).abs().mean()
    options = dict(mode="pixel", patch=patch, temporal_patch=span)
    cut = change[1:].median().item() + 1e-6
    mask = tigon.frame_difference_mask(frames, (T, H, W), threshold=cut, **options)
    assert mask.view(T, H, W)[0].all()
    assert torch.equal(mask.view(T, H, W)[1:], change[1:] >= cut)
    mask = tigon.frame_difference_mask(frames, (T, H, W), drop=0.5, **options).view(T, -1)
    for f in range(1, T):
        least = sorted(range(6), key=lambda i: (change[f].flatten()[i].item(), i))[:3]
        assert mask[f].logical_not().nonzero().flatten().tolist() == sorted(least)


def test_features_are_dropped_where_they_are_alike():
    x = torch.randn(3, 8, 16)
    x[1, 2] = 2 * x[0, 2]
    similar = torch.nn.functional.cosine_similarity(x[1:], x[:-1], dim=-1)
    mask = tigon.frame_difference_mask(x.flatten(0, 1), (3, 2, 4), mode="feature", threshold=0.9)
    assert torch.equal(mask.view(3, 8)[1:], similar <= 0.9) and not mask[8 + 2]
    mask = tigon.frame_difference_mask(x.flatten(0, 1), (3, 2, 4), mode="feature", drop=0.3)
    assert mask.view(3, 8).sum(1).tolist() == [8, 6, 6] and not mask[8 + 2]


def test_an_empty_video_and_a_single_frame():
    assert tigon.video_redundancy_mask(torch.empty(0, 4), (0, 2, 2), 0.5).shape == (0,)
    assert tigon.video_redundancy_mask(torch.randn(4, 4), (1, 2, 2), 0.9).all()
    assert tigon.frame_difference_mask(
        torch.empty(0, 4), (0, 2, 2), mode="feature", drop=0.5
    ).shape == (0,)
    assert tigon.frame_difference_mask(torch.randn(4, 4), (1, 2, 2), mode="feature", drop=1.0).all()


def test_nothing_waits_for_the_device(no_host_sync):
    tigon.video_redundancy_mask(torch.randn(12, 4), (3, 2, 2), 0.5)
    tigon.video_redundancy_mask(torch.randn(12, 4), (3, 2, 2), 0.5, mode="pixel")
    tigon.frame_difference_mask(torch.randn(6, 3, 4, 4), (3, 2, 2), patch=2, drop=0.5)
    tigon.frame_difference_mask(torch.randn(12, 4), (3, 2, 2), mode="feature", threshold=0.5)


def test_masks_compile_and_run_on_meta():
    def mask(x):
        return tigon.video_redundancy_mask(x, (3, 2, 2), 0.5)

    x = torch.randn(12, 4)
    assert torch.equal(torch.compile(mask, fullgraph=True, backend="aot_eager")(x), mask(x))
    assert mask(torch.empty(12, 4, device="meta")).shape == (12,)


WRONG = [
    (tigon.video_redundancy_mask, dict(rate=1.0), "rate=1.0 must lie in 0 to below 1"),
    (tigon.video_redundancy_mask, dict(rate=0.5, mode="x"), "mode='x' is not one of"),
    (tigon.frame_difference_mask, dict(mode="feature"), "give threshold or drop, one of them"),
    (tigon.frame_difference_mask, dict(mode="feature", drop=2), "drop=2 must lie in 0 to 1"),
]


@pytest.mark.parametrize("function, options, message", WRONG, ids=lambda v: str(v)[:30])
def test_wrong_arguments_are_named(function, options, message):
    with pytest.raises(ValueError) as caught:
        function(torch.randn(12, 4), (3, 2, 2), **options)
    assert message in str(caught.value)
    with pytest.raises(ValueError, match=r"has shape \(11, 4\), expected \(12, c\)"):
        tigon.video_redundancy_mask(torch.randn(11, 4), (3, 2, 2), 0.5)
    with pytest.raises(ValueError, match=r"grid must be three ints"):
        tigon.video_redundancy_mask(torch.randn(12, 4), (3, 4), 0.5)
