# %% [markdown]
# # The SSD recurrence from scratch
#
# Mamba-2's layer is a linear recurrence. Here it is written three times, as a loop, as one matrix, and in chunks, and
# the three are shown to be equal; then their costs are compared. The chunked form is what `tigon.ssd_scan` computes.
#
# `python tutorials/02_ssd_from_scratch.py`. Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060).

# %%
import time

import torch

import tigon
from tigon.bench.work import work

torch.manual_seed(0)

# %% [markdown]
# ## The loop
#
# Each head has a state S (p,n). Token t scales it by a decay in (0, 1), adds an outer product, and reads it:
#
#     S_t = exp(A dt_t) S_{t-1} + dt_t x_t B_t^T        A < 0, dt_t > 0
#     y_t = S_t C_t
#
# Shapes, without batch and with one group: x (l,h,p), dt (l,h), A (h), B and C (l,n).


# %%
def loop(x, dt, A, B, C):
    S, y = x.new_zeros(*x.shape[1:], B.shape[1]), []
    for t in range(len(x)):
        S = torch.exp(A * dt[t])[:, None, None] * S + (dt[t][:, None] * x[t])[..., None] * B[t]
        y.append(S @ C[t])
    return torch.stack(y)


# %% [markdown]
# ## The matrix
#
# Unroll the recurrence: when token t reads what token s wrote, it has decayed by exp(A dt_k) for each k in between.
#
#     y_t = sum over s <= t of (C_t . B_s) L_ts dt_s x_s,        L_ts = exp(A sum_{k=s+1..t} dt_k)
#
# C stands where attention has queries, B where it has keys, dt x where it has values, and the decay L in place of mask
# and softmax. As exp of a difference of sums, clamped at 0 where s > t, it cannot overflow.


# %%
def matrix(x, dt, A, B, C):
    log = (A * dt).cumsum(0).T  # (h,l)
    L = torch.exp((log[:, :, None] - log[:, None, :]).clamp(max=0)).tril()  # (h,t,s)
    return torch.einsum("hts,ts,sh,shp->thp", L, C @ B.T, dt, x)


# %% [markdown]
# ## Chunks
#
# Inside a chunk of q tokens use the matrix; what came before reaches token t through the state at the chunk's entry:
#
#     y_t   = [matrix form within the chunk] + exp(A sum_{k<=t} dt_k) S_entry C_t
#     S_out = exp(A sum_k dt_k) S_entry + sum_s exp(A sum_{k>s} dt_k) dt_s x_s B_s^T        sums within the chunk


# %%
def chunked(x, dt, A, B, C, q=64):
    S, y = x.new_zeros(*x.shape[1:], B.shape[1]), []
    for chunk in zip(x.split(q), dt.split(q), B.split(q), C.split(q)):
        x, dt, B, C = chunk
        log = (A * dt).cumsum(0)  # (q,h): from the chunk's entry to each token
        before = torch.einsum("th,hpn,tn->thp", torch.exp(log), S, C)
        y.append(matrix(x, dt, A, B, C) + before)
        weight = torch.exp(log[-1] - log) * dt  # (q,h): from each token to the chunk's end
        S = torch.exp(log[-1])[:, None, None] * S + torch.einsum("sh,shp,sn->hpn", weight, x, B)
    return torch.cat(y)


# %% [markdown]
# ## They are equal
#
# In fp64, to rounding, for a length that is no multiple of the chunk; and so is `tigon.ssd_scan`, whose `chunk_size`
# changes nothing but rounding.


# %%
def draw(l, h=4, p=16, n=32, dtype=torch.float64):
    x, B, C = (torch.randn(l, *size, dtype=dtype) for size in ((h, p), (n,), (n,)))
    dt = torch.rand(l, h, dtype=dtype) * 0.1
    return x, dt, -torch.linspace(0.5, 8, h, dtype=dtype), B, C


def tigon_scan(x, dt, A, B, C):
    return tigon.ssd_scan(x[None], dt[None], A, B[None, :, None], C[None, :, None])[0]


inputs = draw(300)
y = loop(*inputs)
for form in (matrix, chunked, tigon_scan):
    error = ((form(*inputs) - y).norm() / y.norm()).item()
    print(f"{form.__name__:10} differs from the loop by {error:.1e}")
    assert error < 1e-12

# %% [markdown]
# ## What they cost
#
# FLOPs of one layer of Nemotron 3 Super: h = 128 heads of p = 64, state n = 128, g = 8 groups that share B and C. The
# matrix needs 2 l (n g + p h) a token, half of that as it is causal: it grows with l. The loop needs 6 n p h, but as
# products of single numbers, which matrix units cannot do, and its l steps wait for each other. Chunks need
# q (n g + p h) + 4 n p h, all of it products of matrices, and l/q steps wait: linear in l, and no step is small.

# %%
h, p, g, n, q = 128, 64, 8, 128, 64
print("GFLOPs               loop      matrix   chunked")
for l in (1024, 8192, 65536, 2**20):
    sizes = {"b": 1, "l": l, "h": h, "p": p, "g": g, "n": n}
    flops = [6 * n * p * h * l, l * l * (n * g + p * h), work("ssd_scan", sizes, 2).flops]
    print(f"l = {l:8}" + "".join(f"{f / 1e9:12,.0f}" for f in flops))
    assert flops[2] == l * (q * (n * g + p * h) + 4 * n * p * h)
assert flops[1] > 100 * flops[2]

# %% [markdown]
# Why not chunks of another length? FLOPs grow with q; steps that wait, and states that are passed on, fall with it.
# At q = 64 the products inside a chunk fill a tensor core's tile and are an eighth of all FLOPs.

# %%
for q in (1, 16, 64, 256, 1024):
    per_token = q * (n * g + p * h) + 4 * n * p * h
    print(
        f"q = {q:4}: {per_token / 1e6:5.2f} MFLOPs and {4 * n * p * h // q:9,} bytes of state a token"
    )

# %% [markdown]
# Measured here, one small layer in fp32: the matrix's time grows faster than l, that of the others with l.

# %%
seconds = {}
for form in (loop, matrix, chunked, tigon_scan):
    for l in (256, 512, 1024, 2048):
        inputs, times = draw(l, dtype=torch.float32), []
        for _ in range(3):
            start = time.perf_counter()
            form(*inputs)
            times.append(time.perf_counter() - start)
        seconds[form] = min(times)
        print(f"{form.__name__:10} l = {l:4}: {1e3 * seconds[form]:6.1f} ms")
assert seconds[chunked] < min(seconds[loop], seconds[matrix])  # at the last l
