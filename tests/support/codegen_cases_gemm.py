"""Which launches of `scaled_mm` the code-generation gate compiles: shapes of Nemotron 3 Super's projections."""

import torch

IN_PROJ, OUT_PROJ, SHARED, EXPERT = (18560, 4096), (4096, 8192), (5376, 4096), (2688, 1024)  # n, k
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def operand(rows: int, k: int, format: str, swizzled: bool, dtype: torch.dtype) -> tuple:
    """(codes, scale, tensor_scale, format, swizzled) as `scaled_mm` takes them; dtype of a plain one or of codes."""
    if format == "plain":
        return meta(rows, k, dtype=dtype), None, None, format, False
    if format == "nvfp4":
        kp = -(-k // 16) * 16
        codes, scale = meta(rows, kp // 2, dtype=torch.uint8), (rows, kp // 16)
        scale, scale_dtype, tensor_scale = scale, E4M3, meta()
    else:
        codes, tensor_scale, scale_dtype = meta(rows, k, dtype=dtype), None, torch.float32
        scale = {
            "mxfp8": (rows, -(-k // 32)),
            "fp8-tensor": (),
            "fp8-row": (rows,),
            "fp8-1x128": (rows, -(-k // 128)),
            "fp8-128x128": (-(-rows // 128), -(-k // 128)),
        }[format]
        scale_dtype = torch.uint8 if format == "mxfp8" else scale_dtype
    if swizzled:
        scale = (-(-rows // 128) * 128 * -(-scale[1] // 4) * 4,)
    return codes, meta(*scale, dtype=scale_dtype), tensor_scale, format, swizzled


def scaled_mm(
    a: str, b: str, m: int, shape: tuple[int, int], codes=E4M3, swizzled=False, bias=False, relu2=False, grad=False,
    invariant=False,
):  # fmt: skip
    """As a linear layer calls it; grad: added to an fp32 gradient buffer."""

    def call(dtype):
        n, k = shape
        left = operand(m, k, a, swizzled, dtype if a == "plain" else codes)
        right = operand(n, k, b, swizzled, E4M3)
        out = meta(m, n) if grad else None
        added = meta(n, dtype=dtype) if bias else None
        rest = (k, added, relu2, torch.float32 if grad else torch.bfloat16, out, grad, invariant)

        def launch():
            from tigon.kernels.gemm import scaled_mm

            scaled_mm(*left, *right, *rest)

        return launch

    return call


HOPPER_FP8 = {90: "e4m3", 100: "f8f6f4", 120: "e4m3"}
BLACKWELL_FP4 = {100: "mxf4nvf4", 120: "mxf4nvf4"}
BLACKWELL_MX = {100: "mxf8f6f4", 120: "mxf8f6f4"}
FULL, FEW = 8192, 8

# name, call, instruction that must be there by architecture
GEMMS = [
    ("fp8 tensor", scaled_mm("fp8-tensor", "fp8-tensor", FULL, IN_PROJ), HOPPER_FP8),
    ("fp8 tensor m8", scaled_mm("fp8-tensor", "fp8-tensor", FEW, IN_PROJ), HOPPER_FP8),
    ("fp8 row e5m2", scaled_mm("fp8-row", "fp8-row", FULL, OUT_PROJ, codes=E5M2), {}),
    ("fp8 block", scaled_mm("fp8-1x128", "fp8-128x128", FULL, OUT_PROJ), HOPPER_FP8),
    ("fp8 block m8", scaled_mm("fp8-1x128", "fp8-128x128", FEW, OUT_PROJ), HOPPER_FP8),
    ("fp8 block grad", scaled_mm("fp8-1x128", "fp8-1x128", FULL, OUT_PROJ, grad=True), HOPPER_FP8),
    ("w4a16", scaled_mm("plain", "nvfp4", FULL, SHARED, relu2=True), {}),
    ("w4a16 m8", scaled_mm("plain", "nvfp4", FEW, SHARED, relu2=True, bias=True), {}),
    ("w4a16 m64", scaled_mm("plain", "nvfp4", 64, EXPERT), {}),
    ("w4a16 tails", scaled_mm("plain", "nvfp4", 77, (333, 1001)), {}),
    ("w4a16 invariant", scaled_mm("plain", "nvfp4", FULL, EXPERT, invariant=True), {}),
    ("w4a8 row", scaled_mm("fp8-row", "nvfp4", FULL, SHARED), {}),
    ("w4a8 row m8", scaled_mm("fp8-row", "nvfp4", FEW, SHARED), {}),
    ("w4a8 block", scaled_mm("fp8-1x128", "nvfp4", FULL, SHARED), {}),
    ("nvfp4", scaled_mm("nvfp4", "nvfp4", FULL, EXPERT, swizzled=True), BLACKWELL_FP4),
    ("nvfp4 linear", scaled_mm("nvfp4", "nvfp4", FULL, EXPERT), BLACKWELL_FP4),
    ("nvfp4 m8", scaled_mm("nvfp4", "nvfp4", FEW, EXPERT, swizzled=True), BLACKWELL_FP4),
    ("mxfp8", scaled_mm("mxfp8", "mxfp8", FULL, OUT_PROJ, swizzled=True), BLACKWELL_MX),
    ("mxfp8 m8", scaled_mm("mxfp8", "mxfp8", FEW, OUT_PROJ, swizzled=True), BLACKWELL_MX),
]
