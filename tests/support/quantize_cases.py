"""Calls of the quantizer kernels in guarded memory, and their check against tigon.reference.quantize, byte for byte."""

from contextlib import contextmanager

import torch
from memory import guarded, sliced

from tigon import native
from tigon.native import quantize as launchers
from tigon.reference import quantize as reference

POISON = 0xA5
SIZES = [(33, 130), (1, 17), (130, 33), (17, 1), (16, 64), (257, 15), (15, 257), (128, 128)]


def numbers(m: int, k: int, dtype: torch.dtype, special: bool = False) -> torch.Tensor:
    """Rows of very different sizes; zeros, both of them, and ties of the formats among the values."""
    x = torch.randn(m, k) * torch.exp2(torch.randint(-12, 12, (m, 1)).float())
    x[torch.rand(m, k) < 0.1] = 0.0
    x[torch.rand(m, k) < 0.1] = -0.0
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    if m > 1:
        x[1] = ties[torch.arange(k) % 8]
    if special:
        x[m // 2, k // 2], x[0, -1], x[-1, 0] = float("nan"), float("inf"), float("-inf")
    return x.to(dtype)


def laid(t: torch.Tensor, layout: str) -> torch.Tensor:
    """In guarded memory: packed (rows on 16 bytes where the width allows), or rows of a wider, unaligned buffer."""
    return sliced(t, 1) if layout == "sliced" else guarded(t)


def source(m, k, dtype, prologue="none", layout="packed", weight=None, group=None, special=False):
    """(x, z, weight, rstd, prologue) of a launcher."""
    x = laid(numbers(m, k, dtype, special), layout)
    z = laid(torch.randn(m, k).to(dtype), layout) if prologue.startswith("gate") else None
    if prologue in ("none", "relu2"):
        return x, None, None, None, prologue
    groups = k // (group or k)
    w = guarded(torch.rand(k).add(0.5).to(weight or dtype))
    return x, z, w, guarded(torch.rand(m, groups).add(0.01)), prologue


def gated_exactly(x, z, weight, rstd, prologue) -> torch.Tensor:
    """The prologue with the gate as the kernels compute it on the host: exp2 in double, rounded to fp32."""
    z, x32 = z.float(), x.float()
    power = torch.exp2((z * -1.4426950408889634).double()).float()
    gate = z * (1 / (1 + power))
    r = rstd.repeat_interleave(x.shape[1] // rstd.shape[1], 1)
    if prologue == "gate_first":
        return (x32 * gate * r * weight.float()).to(x.dtype)
    return (x32 * r * weight.float() * gate).to(x.dtype)


def expected(name: str, arguments: dict) -> tuple[torch.Tensor, ...]:
    """The reference's results on the CPU."""
    arguments = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    if arguments.get("prologue", "").startswith("gate"):
        names = ("x", "z", "weight", "rstd", "prologue")
        y = gated_exactly(*(arguments[n] for n in names))
        arguments |= dict(x=y, z=None, weight=None, rstd=None, prologue="none")
    results = getattr(reference, name)(**arguments)
    return results if isinstance(results, tuple) else (results,)


@contextmanager
def poisoned_outputs(know, launchers=launchers):
    """Outputs of the launchers lie in guarded memory and begin as poison; yields what was allocated."""
    made = []

    def allocate(shape, dtype, device):
        size = torch.empty(shape, dtype=dtype, device="meta").nbytes
        buffer = torch.full((size + 512,), POISON, dtype=torch.uint8, device=device)
        start = (-buffer.data_ptr() - 64) % 256 + 64  # aligned as torch aligns, behind a margin
        made.append((buffer, start, size))
        know(buffer)
        if not size:
            return torch.empty(shape, dtype=dtype, device=device)
        return buffer[start : start + size].view(dtype).view(shape)

    before, launchers.allocate = launchers.allocate, allocate
    try:
        yield made
    finally:
        launchers.allocate = before


def as_bytes(t: torch.Tensor) -> torch.Tensor:
    """The bits, all NaNs made one: their signs are nobody's promise."""
    if t.is_floating_point() and t.numel():
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()]
        bits, wide = t.contiguous().view(integer), t.float()
        return torch.where(wide.isnan(), torch.full_like(bits, 0x7F), bits)
    return t.contiguous()


def check(name: str, arguments: dict, know=lambda *_: None) -> tuple[torch.Tensor, ...]:
    """Launch, and compare every byte of the results; nothing beside them may be written.

    know: is told of each output, and of the amax, as it is allocated.
    """
    with poisoned_outputs(know) as made:
        got = getattr(native, name)(**arguments)
    got = got if isinstance(got, tuple) else (got,)
    want = expected(name, arguments)
    assert len(got) == len(want)
    for i, (g, w) in enumerate(zip(got, want)):
        g = g.cpu()
        assert (g.shape, g.dtype) == (w.shape, w.dtype), f"result {i}: {g.shape} {w.shape}"
        wrong = (as_bytes(g) != as_bytes(w)).nonzero()
        assert not len(wrong), f"result {i}: {len(wrong)} of {g.numel()} differ, first {wrong[:4]}"
    for buffer, start, size in made:
        around = torch.cat([buffer[:start], buffer[start + size :]])
        assert (around == POISON).all(), "memory beside an output changed"
    return got


def nvfp4(x=None, m=33, k=130, dtype=torch.bfloat16, **changes) -> dict:
    """Arguments of quantize_nvfp4, some changed."""
    x = guarded(numbers(m, k, dtype)) if x is None else x
    return dict(
        x=x, z=None, weight=None, rstd=None, prologue="none", seed=None, offset=0, hadamard=None, amax=None,
        per_row=False, square=False, rounding="nearest", four_over_six="", row=True, column=False, swizzled=False,
    ) | changes  # fmt: skip


def signs() -> torch.Tensor:
    return guarded(torch.tensor([1.0, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]))


def moved(arguments: dict, device) -> dict:
    """On the device, strides and guards kept."""

    def move(t):
        if not isinstance(t, torch.Tensor) or device.type == "cpu":
            return t
        base = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
        return base.to(device).as_strided(t.shape, t.stride(), t.storage_offset())

    return {name: move(value) for name, value in arguments.items()}
