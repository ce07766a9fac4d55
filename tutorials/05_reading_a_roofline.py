# %% [markdown]
# # Reading a roofline
#
# How fast can a call be at best, what holds it back, and how near is a measured time to that? Count bytes and FLOPs,
# measure the machine, divide.
#
# `python tutorials/05_reading_a_roofline.py [--plot DIR]`. Source: Williams, Waterman and Patterson, "Roofline: an
# insightful visual performance model for multicore architectures", Communications of the ACM 52(4), 2009.

# %%
import argparse
from pathlib import Path

import torch

from tigon.bench import roof, timing, workloads
from tigon.bench.presets import sizes
from tigon.bench.work import work

parser = argparse.ArgumentParser()
parser.add_argument("--plot", type=Path, help="folder to write a plot to")
args, _ = parser.parse_known_args()  # a notebook's kernel has arguments of its own
MODEL = "nemotron-3-super"

# %% [markdown]
# ## The machine
#
# Two numbers bound every call: bytes a second of a large copy, and FLOPs a second of a large product. Here they are
# measured; for a GPU that need not be at hand a datasheet gives what it cannot exceed. Their ratio is the *ridge*: a
# call that does fewer FLOPs for each byte it moves waits for memory (memory-bound), one that does more waits for
# arithmetic (compute-bound).

# %%
here = roof.measure("cpu")
gpu = roof.DATASHEETS[90]
for machine, dtype in ((here, "float32"), (gpu, "bfloat16")):
    ridge = machine.flops(dtype) / machine.copy
    rates = f"{machine.copy / 1e9:,.0f} GB/s, {machine.flops(dtype) / 1e9:,.0f} GFLOP/s in {dtype}"
    print(f"{machine.device} ({machine.source}): {rates}; ridge {ridge:.1f} FLOPs a byte")

# %% [markdown]
# ## The work
#
# Count what no implementation can avoid: each input read once, each output written once, the FLOPs of the formula. By
# hand for the decode step of one Mamba-2 layer, b rows of one token, fp32: a state of h p n numbers is read and
# written, x and y are h p numbers, B and C g n, dt h; each state element is decayed, added to and read: 6 FLOPs.

# %%
s = sizes("ssd_update", MODEL)  # b=64 m=1 h=128 p=64 g=8 n=128
state, tokens = s["h"] * s["p"] * s["n"], 2 * s["h"] * s["p"] + 2 * s["g"] * s["n"] + s["h"]
by_hand = s["b"] * 4 * (2 * state + tokens), s["b"] * 6 * state
counted = work("ssd_update", s, 4)
print(f"ssd_update {s}: {counted.bytes:,} bytes, {counted.flops:,} FLOPs")
assert by_hand == (counted.bytes, counted.flops)

# %% [markdown]
# FLOPs over bytes is the *arithmetic intensity*. The decode step has 0.75, whatever b is: every row brings a state of
# its own, used once. No batch size helps; a smaller state (fp16, int8) or several tokens a call do.

# %%
cases = {
    "ssd_scan, 8192 tokens": ("ssd_scan", {}, None),
    "ssd_update, 1 row": ("ssd_update", {"b": 1}, None),
    "ssd_update, 64 rows": ("ssd_update", {"b": 64}, None),
    "ssd_update, 64 rows, int8 state": ("ssd_update", {"b": 64}, "int8"),
    "ssd_update, 64 rows of 4 tokens": ("ssd_update", {"b": 64, "m": 4}, None),
    "moe_experts, 1 token": ("moe_experts", {"t": 1}, None),
    "moe_experts, 64 tokens": ("moe_experts", {"t": 64}, None),
    "moe_experts, 65536 tokens": ("moe_experts", {"t": 65536}, None),
    "scaled_mm W4A16, 1 row": ("scaled_mm", {"m": 1}, "w4a16"),
    "scaled_mm W4A16, 8192 rows": ("scaled_mm", {"m": 8192}, "w4a16"),
}
points = {}
columns = "FLOPs/byte       ms at least bound  "
print(f"\n{'':35}{here.device + ', fp32':^37}{gpu.device + ', bf16':^37}")
print(f"{'one call in ' + MODEL:35}{columns}{columns}")
for name, (op, changes, variant) in cases.items():
    row = f"{name:35}"
    for machine, dtype, itemsize in ((here, "float32", 4), (gpu, "bfloat16", 2)):
        w = work(op, sizes(op, MODEL) | changes, itemsize, variant=variant)
        milliseconds, bound = 1e3 * machine.seconds(w, dtype), machine.bound(w, dtype)
        points[name, machine.device] = (w.flops / w.bytes, bound)
        row += f"{w.flops / w.bytes:10.2f} {milliseconds:17,.3f} {bound:7}"
    print(row)

# %% [markdown]
# - A product of m rows with an (n,k) matrix reads the matrix once and does 2 m FLOPs with each of its numbers: its
#   intensity grows with m. Prefill and training have thousands of rows, decode has one for each request.
# - That is why decode is memory-bound: with few rows, every weight and every state is fetched for a handful of FLOPs.
#   Then 4-bit weights are faster because they are smaller, whatever the units can do with them.
# - Experts make it worse: 64 tokens with 22 choices each touch nearly all of 512 experts, with 3 rows each.
# - The scan's intensity does not depend on l: chunks of 64 tokens are multiplied as matrices, states stay on the chip.
#   It lies below this GPU's ridge, so that there the scan, too, waits for memory.

# %%
intensity = {name: points[name, gpu.device][0] for name in cases}
assert 0.7 < intensity["ssd_update, 1 row"] == intensity["ssd_update, 64 rows"] < 0.8
assert intensity["moe_experts, 64 tokens"] < 4 * intensity["moe_experts, 1 token"]
compute = [name for name in cases if points[name, gpu.device][1] == "compute"]
assert compute == ["moe_experts, 65536 tokens", "scaled_mm W4A16, 8192 rows"]

# %% [markdown]
# ## A measured call
#
# `share` = time at the roof / measured time. Near 1 only less work can be faster; far below, look for what else the
# call does: intermediate results, small steps, arithmetic that is no product. Above 1, bytes came from a cache.
# `tigon bench OP` prints this column for every op.

# %%
for op, slice_of in (("ssd_update", {"b": 32}), ("ssd_scan", {"l": 1024, "h": 64})):
    small = sizes(op, MODEL) | slice_of
    case = workloads.make(op, small, torch.float32)
    seconds = timing.measure({op: case.run}, "cpu", repeat=3)[op].median
    least = here.seconds(work(op, small, 4), "float32")
    bound = here.bound(work(op, small, 4), "float32")
    times = f"{1e3 * seconds:.1f} ms, at the roof {1e3 * least:.1f} ms ({bound})"
    print(f"{op} {small}: {times}, share {least / seconds:.2f}")
    assert 0.01 < least / seconds < 3

if args.plot:
    import matplotlib.pyplot as plt

    most = gpu.flops("bfloat16")
    plt.loglog([0.1, most / gpu.copy, 1e4], [0.1 * gpu.copy, most, most], "k")
    for name, at in intensity.items():
        plt.loglog(at, min(at * gpu.copy, most), "o", label=name)
    plt.xlabel("FLOPs a byte"), plt.ylabel(f"FLOP/s at most, {gpu.device}"), plt.legend(fontsize=7)
    plt.savefig(args.plot / "roofline.png")
