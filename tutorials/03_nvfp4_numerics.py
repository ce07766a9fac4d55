# %% [markdown]
# # The numbers of NVFP4
#
# How a tensor becomes NVFP4 (by hand, byte for byte), how many dB each way of rounding keeps, what stochastic rounding
# is good for, and what a product loses.
#
# `python tutorials/03_nvfp4_numerics.py`. Sources: "Pretraining Large Language Models with NVFP4" (arXiv
# 2509.25149), "Four Over Six" (2512.02010), OCP Microscaling Formats v1.0.

# %%
import math

import torch

import tigon

torch.manual_seed(0)

# %% [markdown]
# ## The grid, and two scales
#
# A code is E2M1: a sign, two bits of exponent, one of mantissa. 16 neighbours share a block scale in E4M3, and the
# tensor a scale in fp32, which brings the block scales into E4M3's range: the largest is to be 448, the largest code 6.
#
#     g = max |x|    b = max |x of a block|    tensor scale g / (448 * 6)
#     block scale s = e4m3(b / 6 / tensor scale)    code = e2m1(x / (s * tensor scale))

# %%
grid = torch.tensor([e * (1 + m / 2) for e in (1, 2, 4) for m in (0, 1)])  # exponents 1, 2, 3
grid = torch.cat([torch.tensor([0, 0.5]), grid])  # exponent 0: no leading one
print("E2M1:", *grid.tolist())


def by_hand(x):
    encode = 2688 / x.abs().max()
    blocks = x.unflatten(-1, (-1, 16))
    largest = blocks.abs().amax(-1)
    scale = (largest * (encode * torch.tensor(1 / 6))).to(torch.float8_e4m3fn)
    v = blocks * (1 / (scale.float() * (1 / encode)))[..., None]  # in this order, or bits differ
    middle = (grid[1:] + grid[:-1]) / 2
    even = torch.arange(7) % 2 == 0  # a tie goes to the even code: down, where the lower is even
    a = v.abs()[..., None]
    code = torch.where(even, a > middle, a >= middle).sum(-1) + 8 * v.signbit()
    low, high = code.flatten(-2).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4, scale, x.abs().max() / 2688


x = torch.randn(512, 1024)
ties = torch.randint(-24, 25, x.shape) / 4  # quarters: with scales of 1, many lie between two codes
ties[:, ::16], ties[0, 0] = 6, 2688
for t in (x, ties):
    q, (codes, scale, tensor_scale) = tigon.quantize_nvfp4(t), by_hand(t)
    assert torch.equal(codes, q.codes) and torch.equal(tensor_scale, q.tensor_scale)
    assert torch.equal(scale.view(torch.uint8), q.block_scale.view(torch.uint8))
sizes = f"{codes.numel():,} bytes of codes, {scale.numel():,} of scales"
print(f"by hand and by tigon: the same {sizes}")

# %% [markdown]
# ## Decibels
#
# SQNR = 10 log10(sum x^2 / sum (x - x')^2). `outliers` is the same tensor with one value in 64 made 20 times larger.
#
# - nearest, ties to even;
# - stochastic: up with the probability that makes the mean right. Noisier for one tensor, better for a sum of many;
# - four over six: the grid has nothing between 4 and 6, so some blocks do better with their largest value at 4;
# - Hadamard: rotate each 16 neighbours by diag(signs) H / 4 first; a product of two tensors that are rotated alike is
#   the product. It spreads an outlier over its block. In blocks of 16 that costs energy (see also arXiv 2509.23202),
#   but far fewer of the outlier's neighbours become zero.

# %%
signs = torch.randint(0, 2, (16,)) * 2.0 - 1
H = torch.ones(1, 1)
while len(H) < 16:
    H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
rotation = signs[:, None] * H / 4  # orthogonal


def db(x, approximate):
    return 20 * math.log10(x.double().norm() / (x.double() - approximate).norm())


def through(x, hadamard=False, **options):
    if not hadamard:
        return tigon.dequantize(tigon.quantize_nvfp4(x, **options))
    rotated = tigon.dequantize(tigon.quantize_nvfp4(x, hadamard=signs, **options))
    return (rotated.unflatten(-1, (-1, 16)) @ rotation.T).flatten(-2)


ways = {
    "nearest": {},
    "stochastic": {"rounding": "stochastic", "seed": 1},
    "four over six": {"four_over_six": "mse"},
    "16x16 blocks": {"block": "16x16"},
    "Hadamard": {"hadamard": True},
}
outliers = torch.where(torch.rand_like(x) < 1 / 64, 20 * x, x)
near = (outliers.abs() > 8).unflatten(-1, (-1, 16)).any(-1).repeat_interleave(16, -1)
near &= outliers.abs() <= 8
found = {}
for name, way in ways.items():
    spiked = through(outliers, **way)
    found[name] = db(x, through(x, **way)), db(outliers, spiked), (spiked[near] == 0).float().mean()
    values = "gaussian {:5.2f} dB, outliers {:5.2f} dB, zeros beside them {:4.0%}"
    print(f"{name:14}", values.format(*found[name]))
assert found["stochastic"][0] < found["nearest"][0] < found["four over six"][0]
assert found["Hadamard"][1] < found["nearest"][1]
assert found["Hadamard"][2] < found["nearest"][2] / 4

# %% [markdown]
# ## Stochastic rounding averages out
#
# Quantize one row 4,000 times with other random bits and average. Nearest is wrong by the same amount every time; the
# error of a stochastic average falls with 1 / sqrt(draws), down to a bias: 8 random bits cut off 1/512 of a step of the
# grid on average, toward zero, and "stochastic" cuts values above 6 where E4M3 rounded their block's scale down, which
# "stochastic_unbiased" leaves room for. Errors are in steps of the grid.

# %%
row, draws = torch.randn(1024), 4000
for rounding in ("nearest", "stochastic", "stochastic_unbiased"):
    q = tigon.quantize_nvfp4(row.expand(draws, -1).contiguous(), rounding=rounding, seed=2)
    unit = (q.block_scale[0].float() * q.tensor_scale).repeat_interleave(16)
    a = (row / unit).abs()
    step = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0))
    error = (tigon.dequantize(q) / unit * row.sign() - a) / step  # (draws, elements)
    mean = error.mean(0)  # of each element's average
    ci = 1.96 * (error.var(0).sum() / draws).sqrt().item() / row.numel()  # 95 %, of their mean
    rms, bias = mean.square().mean().sqrt().item(), -mean.mean().item()
    print(f"{rounding:19} rms error of an average {rms:.4f}, toward zero {bias:+.5f} ± {ci:.5f}")
assert rms < 0.02 and abs(bias - 1 / 512) < 2 * ci

# %% [markdown]
# ## What a product loses
#
# x' w' - x w = dx w + x dw + dx dw: the powers of both errors add up. The sum over k changes nothing, since signal and
# noise grow alike. With one operand in 16 bits (W4A16) only the other's error is left.

# %%
w = torch.randn(256, 1024)
exact, qx, qw = x.double() @ w.double().T, tigon.quantize_nvfp4(x), tigon.quantize_nvfp4(w)
lost = 10 ** (-db(x, tigon.dequantize(qx)) / 10), 10 ** (-db(w, tigon.dequantize(qw)) / 10)
for name, left, power in (("W4A4", qx, sum(lost)), ("W4A16", x, lost[1])):
    y = tigon.scaled_mm(left, qw, out_dtype=torch.float32)
    expected = -10 * math.log10(power)
    print(f"{name:5} product {db(exact, y):5.2f} dB; from the operands' {expected:5.2f} dB")
    assert abs(db(exact, y) - expected) < 0.2
