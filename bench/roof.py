"""The roof of a machine: what its memory and its matrix units do at best, measured before anything is compared with it.

A call cannot end before its bytes have moved and its FLOPs are done:

    seconds at the roof = max(bytes / copy, FLOPs / gemm)

copy: bytes a second of a large copy, read and written. gemm: FLOPs a second of a large torch product by dtype; work in
a dtype may also use the units of a wider one. Without the machine at hand (`--dry-run`) datasheets stand in.
"""

import math
from dataclasses import dataclass, field

import torch

from tigon.bench.variants import VARIANTS
from tigon.bench.work import Work

ROUNDS = {"cpu": 5, "cuda": 20}
COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}
GEMM_SIZE = {"cpu": 1536, "cuda": 8192}
NARROW_TO_WIDE = ("float4_e2m1fn", "float8_e4m3fn", "bfloat16", "float32")


@dataclass(frozen=True)
class Roof:
    """copy in bytes/s; gemm in FLOP/s by dtype; source: "measured" or "datasheet"."""

    device: str
    source: str
    copy: float
    gemm: dict[str, float] = field(default_factory=dict)

    def flops(self, dtype: str) -> float:
        """The most that products of this dtype reach: on its own units, or on those of a wider dtype."""
        dtype = "bfloat16" if dtype == "float16" else dtype
        at = NARROW_TO_WIDE.index(dtype) if dtype in NARROW_TO_WIDE else 0
        return max(
            (self.gemm[name] for name in NARROW_TO_WIDE[at:] if name in self.gemm), default=math.inf
        )

    def seconds(self, work: Work, dtype: str) -> float:
        """The least time of `work`, of which FLOPs are done in `dtype`."""
        return max(work.bytes / self.copy, work.flops / self.flops(dtype))

    def bound(self, work: Work, dtype: str) -> str:
        """ "memory" or "compute": which of the two takes longer."""
        return "memory" if work.bytes / self.copy >= work.flops / self.flops(dtype) else "compute"


# Dense rates of NVIDIA's datasheets: A100 80GB SXM, H200 SXM, B200, RTX PRO 6000 Blackwell; sums in fp32.
DATASHEETS = {
    80: Roof("A100", "datasheet", 2.04e12, {"float32": 156e12, "bfloat16": 312e12}),
    90: Roof(
        "H200",
        "datasheet",
        4.8e12,
        {"float32": 495e12, "bfloat16": 989e12, "float8_e4m3fn": 1979e12},
    ),
    100: Roof(
        "B200",
        "datasheet",
        8.0e12,
        {"float32": 1.1e15, "bfloat16": 2.25e15, "float8_e4m3fn": 4.5e15, "float4_e2m1fn": 9e15},
    ),
    120: Roof(
        "RTX PRO 6000",
        "datasheet",
        1.79e12,
        {"float32": 252e12, "bfloat16": 503e12, "float8_e4m3fn": 1007e12, "float4_e2m1fn": 2015e12},
    ),
}


def operands(op: str, variant: str | None, dtype: str) -> str:
    """The dtype in which an op's FLOPs may be done: of its wider operand."""
    if op != "scaled_mm":
        return dtype
    formats = VARIANTS[op][variant or next(iter(VARIANTS[op]))]
    if "plain" in formats:
        return dtype
    return "float4_e2m1fn" if formats == ("nvfp4", "nvfp4") else "float8_e4m3fn"


def measure(device: str) -> Roof:
    """Copy and products on this machine, the fastest of several: some two seconds on a CPU, less on a GPU."""
    name = torch.cuda.get_device_name() if device == "cuda" else device
    gemm = {}
    for dtype in ("float32", "bfloat16", "float8_e4m3fn"):
        rate = _gemm(device, getattr(torch, dtype))
        if rate is not None:
            gemm[dtype] = rate
    return Roof(name, "measured", _copy(device), gemm)


def _fastest(call, device: str) -> float:
    """Seconds of the fastest call: a roof is what the machine can do, not what it does beside other work."""
    from tigon.bench.timing import sample

    call()
    return min(sample([call], 1, device) for _ in range(ROUNDS[device]))


def _copy(device: str) -> float:
    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)


def _gemm(device: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of a square product; fp32 with TF32 units, which Tigon's kernels use too. None where torch refuses."""
    size = GEMM_SIZE[device] // (2 if dtype == torch.float32 and device == "cuda" else 1)
    a = torch.randn(size, size, device=device).to(dtype)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        if dtype == torch.float8_e4m3fn:
            if device != "cuda":
                return None
            one = torch.ones((), device=device)
            seconds = _fastest(
                lambda: torch._scaled_mm(
                    a, a.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
                ),
                device,
            )
        else:
            seconds = _fastest(lambda: a @ a, device)
    except RuntimeError:  # a chip without the units
        return None
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * size**3 / seconds
