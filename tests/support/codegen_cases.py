"""Which launches the code-generation gate compiles: one line a case.

A case names a launcher's call with tensors on the meta device, for a dtype. Kernels are imported inside the call, so
that this list can be read in a process where Triton interprets.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from codegen_cases_gemm import GEMMS
from codegen_cases_moe import EXPERTS
from codegen_cases_tokens import SCORES

HALF, WIDE = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    """name; call(dtype) -> a function without arguments that launches. dtypes are compiled in CI, all_dtypes by
    `make codegen-all`. native: sm_90 and sm_100 must use their own matrix instruction, not the older mma.sync
    (tiles under 64 rows cannot). wide: rows must be read and written 16 bytes at a time. needs: an instruction that an
    architecture must use (a name of compile.py's list)."""

    name: str
    call: Callable[[torch.dtype], Callable[[], object]]
    dtypes: tuple[torch.dtype, ...] = (HALF,)
    all_dtypes: tuple[torch.dtype, ...] = (HALF, torch.float16, WIDE)
    native: bool = True
    wide: bool = False
    needs: dict[int, str] = field(default_factory=dict)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ssd_forward(
    p: int, n: int, b=1, l=8192, h=128, g=8, z=False, D="h", packed=False, unaligned=False, initial=WIDE,
):  # fmt: skip
    """As a Mamba-2 layer calls it: x, B, C are slices of one projection, A, D and dt_bias are fp32.

    initial: dtype of the initial states, which may be any."""

    def call(dtype):
        width = h * p + 2 * g * n + int(unaligned)
        x, B, C = meta(b, l, width, dtype=dtype)[..., int(unaligned) :].split(
            [h * p, g * n, g * n], -1
        )
        B, C = (t.unflatten(-1, (g, n)) for t in (B, C))
        cu = meta(5, dtype=torch.int32) if packed else None
        positions = meta(3, dtype=torch.int64) if packed else None
        skip = {"h": meta(h), "hp": meta(h, p), None: None}[D]
        gate = meta(b, l, h, p, dtype=dtype) if z else None
        states = meta(4 if packed else b, h, p, n, dtype=initial)
        args = (x.unflatten(-1, (h, p)), meta(b, l, h, dtype=dtype), meta(h), B, C, skip, gate)
        rest = (meta(h), states, cu, positions, True, 0.0, float("inf"))

        def launch():
            from tigon.kernels.ssd_forward import ssd_forward

            ssd_forward(*args, *rest)

        return launch

    return call


def ssd_backward(
    p: int, n: int, b=1, l=8192, h=128, g=8, z=False, D="h", packed=False, initial=WIDE
):
    """As autograd calls it for `ssd_forward`, with gradients of every output."""

    def call(dtype):
        x, B, C = meta(b, l, h * p + 2 * g * n, dtype=dtype).split([h * p, g * n, g * n], -1)
        B, C = (t.unflatten(-1, (g, n)) for t in (B, C))
        rows = 4 if packed else b
        cu = meta(5, dtype=torch.int32) if packed else None
        positions = meta(3, dtype=torch.int64) if packed else None
        grads = (
            meta(b, l, h, p, dtype=dtype),
            meta(rows, h, p, n),
            meta(3, h, p, n) if packed else None,
        )
        skip = {"h": meta(h), "hp": meta(h, p), None: None}[D]
        gate = meta(b, l, h, p, dtype=dtype) if z else None
        args = (x.unflatten(-1, (h, p)), meta(b, l, h, dtype=dtype), meta(h), B, C, skip, gate)
        rest = (meta(h), meta(rows, h, p, n, dtype=initial), cu, positions, True, 0.0, float("inf"))

        def launch():
            from tigon.kernels.ssd_backward import ssd_backward

            ssd_backward(*grads, *args, *rest)

        return launch

    return call


def causal_conv1d(d: int, width: int, backward: bool, states: bool):
    """As a Mamba-2 layer calls it: x is a slice of one projection, weight and bias are fp32."""

    def call(dtype):
        x = meta(1, 8192, 2 * d, dtype=dtype)[..., d:]
        initial = meta(4, d, width - 1) if states else None
        cu = meta(5, dtype=torch.int32) if states else None
        given = (x, meta(d, width), meta(d), initial, cu, True)
        dfinal = meta(4, d, width - 1, dtype=dtype) if states else None

        def launch():
            from tigon.kernels.causal_conv1d import conv1d_backward, conv1d_forward

            if backward:
                conv1d_backward(meta(1, 8192, d, dtype=dtype), dfinal, *given)
            else:
                conv1d_forward(*given)

        return launch

    return call


def gated_norm(d: int, size: int, backward: bool, gate: bool = True, last: bool = False):
    def call(dtype):
        x, dy = meta(8192, d, dtype=dtype), meta(8192, d, dtype=dtype)
        z = meta(8192, 2 * d, dtype=dtype)[:, :d] if gate else None
        given = (x, z, meta(d), 1e-5, size, last)

        def launch():
            from tigon.kernels.gated_norm import norm_backward, norm_forward

            if backward:
                norm_backward(dy, *given)
            else:
                norm_forward(*given)

        return launch

    return call


CASES = [
    Case("ssd_forward p64 n128", ssd_forward(64, 128), (HALF, WIDE)),
    Case("ssd_forward p64 n128 z", ssd_forward(64, 128, z=True, D="hp")),
    Case("ssd_forward p64 n128 packed", ssd_forward(64, 128, packed=True, initial=HALF)),
    Case("ssd_forward p64 n128 unaligned", ssd_forward(64, 128, unaligned=True, z=True)),
    Case("ssd_forward p80 n128", ssd_forward(80, 128, h=112)),
    Case("ssd_forward p64 n256", ssd_forward(64, 256), (HALF, WIDE)),
    Case("ssd_forward p128 n64", ssd_forward(128, 64)),
    Case("ssd_forward p3 n17", ssd_forward(3, 17, z=True), (HALF, WIDE), native=False),
    Case("ssd_backward p64 n128", ssd_backward(64, 128), (HALF, WIDE)),
    Case("ssd_backward p64 n128 z packed", ssd_backward(64, 128, z=True, D="hp", packed=True)),
    Case("ssd_backward p128 n128", ssd_backward(128, 128), native=False),
    Case("ssd_backward p64 n256", ssd_backward(64, 256), native=False),
    Case(
        "ssd_backward p3 n17",
        ssd_backward(3, 17, g=1, D=None, initial=torch.float64),
        native=False,
    ),
    *(
        Case(
            f"causal_conv1d {way} d{d} width{width}{' states' * states}",
            causal_conv1d(d, width, way == "backward", states),
            dtypes,
            wide=d % 16 == 0,
        )
        for way in ("forward", "backward")
        for d, width, states, dtypes in (
            (10240, 4, False, (HALF, WIDE)),
            (10240, 4, True, (HALF,)),
            (77, 3, False, (WIDE,)),
        )
    ),
    *(
        Case(
            f"gated_norm {way} {name}",
            gated_norm(d, size, way == "backward", **kw),
            dtypes,
            wide=True,
        )
        for way in ("forward", "backward")
        for name, d, size, kw, dtypes in (
            ("group 1024", 8192, 1024, {}, (HALF, WIDE)),
            ("group 640 last", 5120, 640, {"last": True}, (HALF,)),
            ("row 4096", 4096, 4096, {"gate": False}, (HALF,)),
            ("row 8192", 8192, 8192, {}, (HALF,)),
        )
    ),
    *(
        Case(
            f"scaled_mm {name}",
            call,
            (HALF, WIDE) if name == "w4a16" else (HALF,),
            all_dtypes=(HALF, torch.float16, WIDE) if name.startswith("w4a16") else (HALF,),
            needs=needs,
        )
        for name, call, needs in GEMMS
    ),
    *(
        Case(
            f"moe_experts {name}",
            call,
            (HALF, WIDE) if wide else (HALF,),
            (HALF, torch.float16, WIDE) if wide else (HALF, torch.float16),
        )
        for name, call, wide in EXPERTS
    ),
    *(
        Case(f"token_scores {name}", call, (HALF, WIDE) if wide else (HALF,), native=False)
        for name, call, wide in SCORES
    ),
]
