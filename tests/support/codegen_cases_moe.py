"""Which launches of the expert MLPs the code-generation gate compiles: shapes of Nemotron 3 Super and Nano."""

import torch

SUPER = dict(l=1024, m=2688, e=512, k=22)
NANO = dict(l=2688, m=1856, e=128, k=6)
E4M3 = torch.float8_e4m3fn
FULL, FEW = 8192, 8


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def matrices(e: int, n: int, k: int, format: str, dtype: torch.dtype) -> tuple:
    """(codes, scale, outer, format) as `moe_experts` takes them."""
    if format == "plain":
        return meta(e, n, k, dtype=dtype), None, None, format
    if format == "nvfp4":
        codes, scale = meta(e, n, k // 2, dtype=torch.uint8), meta(e, n, k // 16, dtype=E4M3)
        return codes, scale, meta(), format
    scale = meta() if format == "fp8-tensor" else meta(e, n)
    return meta(e, n, k, dtype=E4M3), scale, None, format


def places(t: int, e: int, k: int) -> tuple:
    """(indices, offsets, order, inverse)"""
    sizes = ((t, k), (e + 1,), (t * k,), (t * k,))
    return tuple(meta(*size, dtype=torch.int32) for size in sizes)


def forward(
    t: int, l: int, m: int, e: int, k: int, swiglu=False, before=False, save="hidden", format="plain", invariant=False,
):  # fmt: skip
    def call(dtype):
        gates = 2 if swiglu else 1
        up = matrices(e, gates * m, l, format, dtype)
        down = matrices(e, l, m, format, dtype)
        args = (meta(t, l, dtype=dtype), *up, *down, meta(t, k), *places(t, e, k))
        mlp = ("swiglu" if swiglu else "relu2", before, save, 0, e, invariant)

        def launch():
            from tigon.kernels.grouped_gemm import moe_experts

            moe_experts(*args, *mlp)

        return launch

    return call


def backward(t: int, l: int, m: int, e: int, k: int, swiglu=False, save="hidden", buffers=False):
    """buffers: gradients of the matrices are added to fp32."""

    def call(dtype):
        gates = 2 if swiglu else 1
        x, dy = meta(t, l, dtype=dtype), meta(t, l, dtype=dtype)
        up, down = meta(e, gates * m, l, dtype=dtype), meta(e, l, m, dtype=dtype)
        kept = meta(t * k, gates * m, dtype=dtype) if save != "nothing" else meta(0, dtype=dtype)
        args = (dy, x, up, down, meta(t, k), *places(t, e, k), kept)
        mlp = ("swiglu" if swiglu else "relu2", False, save, 0, e)
        given = (meta(*up.shape), meta(*down.shape)) if buffers else (None, None)

        def launch():
            from tigon.kernels.grouped_gemm import moe_experts_backward

            moe_experts_backward(*args, *mlp, *given, buffers)

        return launch

    return call


def grouped(rows: int, e: int, n: int, k: int):
    def call(dtype):
        x, w, dy = (
            meta(rows, k, dtype=dtype),
            meta(e, n, k, dtype=dtype),
            meta(rows, n, dtype=dtype),
        )
        offsets = meta(e + 1, dtype=torch.int32)

        def launch():
            from tigon.kernels.grouped_gemm import grouped_mm, grouped_mm_backward

            grouped_mm(x, w, offsets)
            grouped_mm_backward(dy, x, w, offsets)

        return launch

    return call


# name, call, whether fp32 is compiled too
EXPERTS = [
    ("super", forward(FULL, **SUPER), True),
    ("super before relu", forward(FULL, **SUPER, before=True, save="relu"), False),
    ("super t512", forward(512, **SUPER, save="nothing"), False),
    ("super t8", forward(FEW, **SUPER, save="nothing"), True),
    ("super swiglu", forward(FULL, **SUPER, swiglu=True), False),
    ("super t8 swiglu", forward(FEW, **SUPER, swiglu=True, save="nothing"), False),
    ("super invariant", forward(FULL, **SUPER, save="nothing", invariant=True), False),
    *(
        (f"super {format} t{t}", forward(t, **SUPER, save="nothing", format=format), False)
        for format in ("nvfp4", "fp8-tensor")
        for t in (FULL, FEW)
    ),
    ("nano", forward(FULL, **NANO, save="relu"), False),
    ("nano t1", forward(1, **NANO, save="nothing"), False),
    ("nano t8 fp8-row", forward(FEW, **NANO, save="nothing", format="fp8-row"), False),
    ("tails", forward(77, l=88, m=40, e=7, k=3), False),
    ("backward super", backward(FULL, **SUPER), True),
    ("backward super nothing", backward(FULL, **SUPER, save="nothing", buffers=True), True),
    ("backward super swiglu", backward(FULL, **SUPER, swiglu=True), False),
    ("backward super swiglu nothing", backward(FULL, **SUPER, swiglu=True, save="nothing"), False),
    ("backward super t64", backward(64, **SUPER, save="relu"), False),
    ("backward nano", backward(FULL, **NANO, save="relu"), False),
    ("backward tails", backward(77, l=88, m=40, e=7, k=3), False),
    ("grouped_mm", grouped(180224, 512, 2688, 1024), False),
]
