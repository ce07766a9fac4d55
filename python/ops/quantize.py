"""Quantizers: NVFP4, MXFP8 and FP8, and `dequantize`.

    NVFP4   blocks of 16 (or 16x16): s_enc = 2688 / amax, block scale s = e4m3(b s_enc / 6), code e2m1(x s_enc / s)
    MXFP8   blocks of 32: e = ceil(log2(b / 448)), code e4m3(x 2^-e)
    FP8     a tensor, a row, 1x128 or 128x128: scale b / 448, code e4m3(x / scale)

b is a block's largest magnitude. The operations and their order are pinned (`tigon.reference.quantize`), so that every
device gives the same bytes, random bits included. Sizes are free: the last block of a row is padded with zeros.

Sources: "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149); OCP Microscaling Formats v1.0;
"FP8 Formats for Deep Learning" (arXiv 2209.05433); "Four Over Six" (arXiv 2512.02010).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tigon.ops.checks import Check, names
from tigon.ops.dispatch import call, inner, is_explaining, run
from tigon.ops.library import register
from tigon.ops.quantized import (
    FP8_DTYPES,
    GRANULARITIES,
    LAYOUTS,
    FP8Tensor,
    MXFP8Tensor,
    NVFP4Tensor,
    QuantizedTensor,
    round_up,
    scale_shape,
)

INPUTS = (torch.float32, torch.bfloat16, torch.float16)
AXES = ("row", "column", "both")
ROUNDINGS = ("nearest", "stochastic", "stochastic_unbiased")


@dataclass(frozen=True)
class RMSNorm:
    """Prologue: quantize rms_norm(x, weight, eps=eps). weight (K)."""

    weight: Tensor
    eps: float = 1e-5


@dataclass(frozen=True)
class GatedRMSNorm:
    """Prologue: quantize gated_rms_norm(x, z, weight, …). z like x, weight (K)."""

    z: Tensor
    weight: Tensor
    eps: float = 1e-5
    group_size: int | None = None
    norm_before_gate: bool = False


Prologue = Literal["relu2"] | RMSNorm | GatedRMSNorm | None
_PROLOGUE = "Tensor x, Tensor? z, Tensor? weight, Tensor? rstd, str prologue"


def _statistics(x, *rest):
    return run("rms_statistics", x, x, *rest)


def _statistics_fake(x, z, weight, eps, group_size, norm_before_gate):
    return x.new_empty((x.shape[0], x.shape[1] // group_size), dtype=torch.float32)


def _nvfp4(x, *rest):
    return run("quantize_nvfp4", x, x, *rest)


def _nvfp4_fake(
    x, z, weight, rstd, prologue, seed, offset, hadamard, amax, per_row, square, rounding, over,
    row, column, swizzled,
):  # fmt: skip
    m, k = x.shape
    results = []
    for wanted, rows, width in ((row, m, k), (column, k, m)):
        blocks = -(-width // 16)
        layout = "128x4" if swizzled else "linear"
        lead = (
            (rows,) if per_row or (amax is not None and amax.dim() and not (row and column)) else ()
        )
        codes, scale = ((rows, blocks * 8), scale_shape((rows,), blocks, layout))
        results += [
            x.new_empty(codes if wanted else 0, dtype=torch.uint8),
            x.new_empty(scale if wanted else 0, dtype=torch.float8_e4m3fn),
            x.new_empty(lead if wanted else 0, dtype=torch.float32),
        ]
    return tuple(results)


def _mxfp8(x, *rest):
    return run("quantize_mxfp8", x, x, *rest)


def _mxfp8_fake(x, z, weight, rstd, prologue, e5m2, row, column, swizzled):
    m, k = x.shape
    results = []
    for wanted, rows, width in ((row, m, k), (column, k, m)):
        scale = scale_shape((rows,), -(-width // 32), "128x4" if swizzled else "linear")
        results += [
            x.new_empty((rows, width) if wanted else 0, dtype=FP8_DTYPES[e5m2]),
            x.new_empty(scale if wanted else 0, dtype=torch.uint8),
        ]
    return tuple(results)


def _fp8(x, *rest):
    return run("quantize_fp8", x, x, *rest)


def _fp8_fake(x, z, weight, rstd, prologue, amax, granularity, e5m2, power_of_two, row, column):
    m, k = x.shape
    results = []
    for wanted, rows, width in ((row, m, k), (column, k, m)):
        scale = fp8_scale_shape((rows,), width, granularity)
        results += [
            x.new_empty((rows, width) if wanted else 0, dtype=FP8_DTYPES[e5m2]),
            x.new_empty(scale if wanted else 0, dtype=torch.float32),
        ]
    return tuple(results)


def _dequantize(codes, *rest):
    return run("dequantize", codes, codes, *rest)


def _dequantize_fake(codes, scale, tensor_scale, format, k, swizzled, dtype):
    return codes.new_empty((codes.shape[0], k), dtype=dtype)


def fp8_scale_shape(lead: tuple[int, ...], width: int, granularity: str) -> tuple[int, ...]:
    """Shape of an FP8 tensor's scales."""
    rows = 1
    for size in lead:
        rows *= size
    return {
        "tensor": (),
        "row": lead,
        "1x128": (*lead, -(-width // 128)),
        "128x128": (-(-rows // 128), -(-width // 128)),
    }[granularity]


register(
    "rms_statistics(Tensor x, Tensor? z, Tensor weight, float eps, int group_size, bool norm_before_gate) -> Tensor",
    _statistics,
    _statistics_fake,
)
register(
    f"quantize_nvfp4({_PROLOGUE}, Tensor? seed, SymInt offset, Tensor? hadamard, Tensor? amax, "
    "bool per_row, bool square, str rounding, str four_over_six, bool row, bool column, bool swizzled) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _nvfp4,
    _nvfp4_fake,
)
register(
    f"quantize_mxfp8({_PROLOGUE}, bool e5m2, bool row, bool column, bool swizzled) -> (Tensor, Tensor, Tensor, Tensor)",
    _mxfp8,
    _mxfp8_fake,
)
register(
    f"quantize_fp8({_PROLOGUE}, Tensor? amax, str granularity, bool e5m2, bool power_of_two, bool row, bool column) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fp8,
    _fp8_fake,
)
register(
    "dequantize(Tensor codes, Tensor scale, Tensor? tensor_scale, str format, SymInt k, bool swizzled, "
    "ScalarType dtype) -> Tensor",
    _dequantize,
    _dequantize_fake,
)


class _Input:
    """The checked input of a quantizer: x (m,k), its prologue unpacked, and what the results' shapes come from."""

    def __init__(self, op: str, x: Tensor, axis: str, prologue: Prologue):
        self.check = check = Check(op)
        if isinstance(x, Tensor) and x.dim() == 0:
            check.fail("x has shape (), expected (..., k)")
        rows = " ".join(f"t{i}" for i in range(x.dim() - 1)) if isinstance(x, Tensor) else ""
        dims = f"{rows} k".strip()
        check.tensor("x", x, dims, dtypes=INPUTS)
        check.no_gradient("FP8Linear or NVFP4Linear", x=x)
        one_of(check, "axis", axis, AXES)
        self.shape, self.op = tuple(x.shape), op
        self.row, self.column = axis != "column", axis != "row"
        self.mixed = (
            False,
            False,
        )  # whether the row-wise and the column-wise copy are mixed over blocks of 16
        self.x = self._matrix("x", x)
        self.m, self.k = self.x.shape
        self.prologue = self._prologue(prologue, dims)

    def _matrix(self, name: str, t: Tensor) -> Tensor:
        """(..., k) as (m,k), its rows strided at will."""
        t = inner(name, t, 1)
        return t.reshape(-1, t.shape[-1]) if t.numel() else t.new_empty(self._empty(t))

    @staticmethod
    def _empty(t: Tensor) -> tuple[int, int]:
        rows = 1
        for size in t.shape[:-1]:
            rows *= size
        return rows, t.shape[-1]

    def _prologue(self, prologue: Prologue, dims: str) -> tuple:
        """(z, weight, rstd, kind) for the op; the statistics of a norm are an op of their own."""
        if prologue is None:
            return None, None, None, "none"
        if isinstance(prologue, str):
            one_of(self.check, "prologue", prologue, ("relu2",))
            return None, None, None, "relu2"
        weight, z = getattr(prologue, "weight", None), getattr(prologue, "z", None)
        eps, gated = getattr(prologue, "eps", None), isinstance(prologue, GatedRMSNorm)
        if not isinstance(weight, Tensor) or eps is None or _is_other_norm(prologue):
            kind = type(prologue).__name__
            hint = "; of a module with a gate, pass GatedRMSNorm(z, weight, …)"
            self.check.fail(
                f"prologue must be None, 'relu2', RMSNorm or GatedRMSNorm, got {kind}"
                + (hint if hasattr(prologue, "group_size") else ""),
                TypeError,
            )
        if not eps >= 0:
            self.check.fail(f"prologue.eps must not be negative, got {eps}")
        self.check.tensor("prologue.weight", weight, "k", dtypes=INPUTS)
        self.check.tensor("prologue.z", z, dims, dtypes=(self.x.dtype,), optional=not gated)
        self.check.no_gradient("rms_norm before it", **{"prologue.weight": weight, "prologue.z": z})
        size = getattr(prologue, "group_size", None) or self.k
        if size <= 0 or self.k % size:
            self.check.fail(f"group_size={size} must divide k={self.k}")
        last = z is not None and prologue.norm_before_gate
        z = None if z is None else self._matrix("prologue.z", z)
        kind = "norm" if z is None else "gate_last" if last else "gate_first"
        weight = inner("prologue.weight", weight, 1)
        if is_explaining():
            return z, weight, None, kind
        rstd = torch.ops.tigon.rms_statistics(self.x, z, weight, float(eps), size, last)
        return z, weight, rstd, kind

    def call(self, *options, **told):
        """The registered op; `told`: what `explain` must know beside the sizes."""
        sizes = {"m": self.m, "k": self.k, "itemsize": self.x.element_size()}
        sizes |= {"row": self.row, "column": self.column} | told
        return call(self.op, self.x, (self.x, *self.prologue, *options), sizes)

    def pair(self, make, results: tuple[Tensor, ...]):
        """`make(shape, tensors)` of the copies that were asked for: one, or (row, column)."""
        half = len(results) // 2
        made = []
        if self.row:
            made.append(make(self._logical(self.shape, self.mixed[0]), results[:half]))
        if self.column:
            made.append(make(self._logical((self.k, self.m), self.mixed[1]), results[half:]))
        return made[0] if len(made) == 1 else tuple(made)

    @staticmethod
    def _logical(shape: tuple[int, ...], mixed: bool) -> tuple[int, ...]:
        """The shape of a copy. A last block that is mixed fills its padding too, so that belongs to it."""
        return (*shape[:-1], round_up(shape[-1], 16)) if mixed else shape


def _is_other_norm(prologue: object) -> bool:
    """Modules that have `weight` and `eps` but compute something else than an RMSNorm: with a mean, or a gate."""
    others = (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.modules.batchnorm._NormBase)
    gated = isinstance(prologue, torch.nn.Module) and hasattr(prologue, "group_size")
    return gated or isinstance(prologue, others)


def one_of(check: Check, name: str, value: object, allowed: tuple[str, ...]) -> None:
    """`value` is one of the words `allowed`."""
    if value not in allowed:
        check.fail(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def _lead(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(m, w) as (..., w), and (m) as (...), under the leading sizes of `shape`."""
    return t.view((*shape[:-1], *t.shape[1:]))


def quantize_nvfp4(
    x: Tensor,
    *,
    block: Literal["1x16", "16x16"] = "1x16",
    rounding: Literal["nearest", "stochastic", "stochastic_unbiased"] = "nearest",
    seed: int | Tensor | None = None,
    offset: int = 0,
    hadamard: Tensor | None = None,
    amax: Tensor | Literal["row"] | None = None,
    four_over_six: Literal["mae", "mse"] | None = None,
    axis: Literal["row", "column", "both"] = "row",
    scale_layout: Literal["linear", "128x4"] = "linear",
    prologue: Prologue = None,
) -> NVFP4Tensor | tuple[NVFP4Tensor, NVFP4Tensor]:
    """Quantize to NVFP4: E2M1 in blocks of 16, E4M3 block scales, one fp32 scale (formula at the top of the module).

    Args:
        x: (..., K) fp32, bf16 or fp16. Everything is computed in fp32.
        block: 16 neighbours along K, or tiles of 16x16 (weights: W and its transpose then quantize alike).
        rounding: to the nearest, ties to the even code; or stochastic, by 8 random bits an element; "unbiased" leaves
            17/16 of headroom, so that no element of a block is cut off when its E4M3 scale was rounded down.
        seed: of the random bits: an int, an int64 tensor () on x's device, or None to draw one from torch's generator.
            Element e of x (row-major, plus `offset`) takes byte e % 16 of Philox(seed; e // 16, stream), stream 0 in
            the row-wise copy, 1 in the column-wise one: the bits depend on nothing else.
        hadamard: (16,) signs s: blocks are multiplied with diag(s) H16 / 4 along the contraction before they are
            quantized. With axis="both" only the column-wise copy is. The copy's last size is then rounded up to 16: the
            padding of the last block holds values too, without which a product would lose them. Not for 16x16 blocks.
        amax: the largest magnitude, after prologue and Hadamard, where it is known: fp32 (), for axis="row" also one a
            row (m), for "both" also one a copy (2); for 16x16 blocks () only. "row": every row gets a tensor scale of
            its own. None: found here.
        four_over_six: per block, map its largest element to 6 or to 4, whichever has the smaller absolute or squared
            error (ties: 6); the tensor scale is then amax/1536. Only with rounding="nearest".
        axis: blocks along K ("row"), along the rows ("column": the quantized transpose, shape (K, M)), or both from
            one read of x.
        scale_layout: "128x4" is what tensor cores read: tiles of 128 rows by 4 scales, 512 bytes, zero padding.
        prologue: quantize relu(x)^2, rms_norm(x) or gated_rms_norm(x) without writing it out; the same bytes as in two
            steps.

    Returns:
        NVFP4Tensor, or (row-wise, column-wise) for axis="both".

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range, or options that exclude each other, by name.

    A NaN makes its block's scale NaN and, where the amax is found here, the tensor's scale too.
    """
    given = _Input("quantize_nvfp4", x, axis, prologue)
    check, device = given.check, x.device
    one_of(check, "block", block, ("1x16", "16x16"))
    one_of(check, "rounding", rounding, ROUNDINGS)
    one_of(check, "scale_layout", scale_layout, LAYOUTS)
    one_of(check, "four_over_six", four_over_six, (None, "mae", "mse"))
    square, random = block == "16x16", rounding != "nearest"
    check.require(not (square and hadamard is not None), "hadamard is not for block='16x16'")
    check.require(not (four_over_six and random), "four_over_six needs rounding='nearest'")
    if not 0 <= offset < 2**62:
        check.fail(f"offset={offset} must lie in [0, 2^62)")
    check.tensor("hadamard", hadamard, "16", optional=True)
    if hadamard is not None:
        given.mixed = (not given.column, given.column)
    per_row, amax = _amax(given, amax, square)
    results = given.call(
        make_seed(check, seed, device) if random else None,
        offset,
        None if hadamard is None else hadamard.float().contiguous(),
        amax,
        per_row,
        square,
        rounding,
        four_over_six or "",
        given.row,
        given.column,
        scale_layout == "128x4",
        rounding=four_over_six or rounding,
        square=square,
        static=amax is not None,
    )

    def make(shape, tensors):
        codes, scale, tensor_scale = tensors
        if scale_layout == "linear":
            scale = _lead(scale, shape)
        tensor_scale = _lead(tensor_scale, shape) if tensor_scale.dim() else tensor_scale
        return NVFP4Tensor(_lead(codes, shape), scale, tensor_scale, shape, scale_layout, block)

    return given.pair(make, results)


def _amax(given: _Input, amax, square: bool) -> tuple[bool, Tensor | None]:
    """(one amax a row, the known ones as the op takes them)."""
    check = given.check
    if amax is None:
        return False, None
    both = given.row and given.column
    if isinstance(amax, str):
        one_of(check, "amax", amax, ("row",))
        check.require(
            not given.column and not square, "amax='row' needs axis='row' and block='1x16'"
        )
        return True, None
    if isinstance(amax, Tensor) and amax.dim() and not both:
        if amax.shape == given.shape[:-1]:
            amax = amax.reshape(-1)
        check.require(
            not given.column and not square, "an amax a row needs axis='row' and block='1x16'"
        )
        check.sizes["m"], check.source["m"] = given.m, "x"
        check.tensor("amax", amax, "m", dtypes=(torch.float32,))
        return True, amax.contiguous()
    if both:
        # Square blocks have the same scales in both copies, so these have one amax.
        shapes = ("",) if square else ("", "2")
        check.one_of("amax", amax, *shapes, dtypes=(torch.float32,))
        return False, amax.expand(2).contiguous()
    check.tensor("amax", amax, "", dtypes=(torch.float32,))
    return False, amax


def make_seed(check: Check, seed: int | Tensor | None, device: torch.device) -> Tensor:
    """An int64 tensor () on the device; no wait. Nothing is drawn while explaining."""
    if seed is None and is_explaining():
        return None
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        check.tensor("seed", seed, "", dtypes=(torch.int64,))
        return seed
    if not -(2**63) <= seed < 2**64:
        check.fail(f"seed={seed} does not fit 64 bits")
    seed = seed - 2**64 if seed >= 2**63 else seed
    return torch.full((), seed, dtype=torch.int64, device=device)


def _fp8_dtype(check: Check, dtype: torch.dtype) -> bool:
    """Whether it is E5M2."""
    if dtype not in FP8_DTYPES:
        check.fail(f"dtype={dtype} is not one of {names(FP8_DTYPES)}", TypeError)
    return dtype == torch.float8_e5m2


def quantize_mxfp8(
    x: Tensor,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    axis: Literal["row", "column", "both"] = "row",
    scale_layout: Literal["linear", "128x4"] = "linear",
    prologue: Prologue = None,
) -> MXFP8Tensor | tuple[MXFP8Tensor, MXFP8Tensor]:
    """Quantize to MXFP8: FP8 in blocks of 32 with power-of-two scales, rounded up so that nothing is cut off.

    Args:
        x: (..., K) fp32, bf16 or fp16. dtype: float8_e4m3fn or float8_e5m2.
        axis, scale_layout, prologue: as in `quantize_nvfp4`.

    Returns:
        MXFP8Tensor, or (row-wise, column-wise) for axis="both".

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range, by name.
    """
    given = _Input("quantize_mxfp8", x, axis, prologue)
    one_of(given.check, "scale_layout", scale_layout, LAYOUTS)
    e5m2 = _fp8_dtype(given.check, dtype)
    results = given.call(e5m2, given.row, given.column, scale_layout == "128x4", e5m2=e5m2)

    def make(shape, tensors):
        codes, scale = tensors
        if scale_layout == "linear":
            scale = _lead(scale, shape)
        return MXFP8Tensor(_lead(codes, shape), scale, shape, scale_layout)

    return given.pair(make, results)


def quantize_fp8(
    x: Tensor,
    *,
    granularity: Literal["tensor", "row", "1x128", "128x128"] = "tensor",
    dtype: torch.dtype = torch.float8_e4m3fn,
    axis: Literal["row", "column", "both"] = "row",
    amax: Tensor | None = None,
    power_of_two: bool = False,
    prologue: Prologue = None,
) -> FP8Tensor | tuple[FP8Tensor, FP8Tensor]:
    """Quantize to FP8 with fp32 scales: scale = amax / (448 or 57344) of each granule, saturating.

    Args:
        x: (..., K) fp32, bf16 or fp16. dtype: float8_e4m3fn or float8_e5m2.
        granularity: what shares a scale: the tensor, a row, 128 neighbours along K, a tile of 128x128.
        amax: fp32 (), for granularity="tensor" where it is known (static scales).
        power_of_two: scales are powers of two, at or above the exact ones.
        axis, prologue: as in `quantize_nvfp4`.

    Returns:
        FP8Tensor, or (row-wise, column-wise) for axis="both".

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range, by name.

    Where a granule's largest magnitude is 0, infinite or NaN its scale is 1; a NaN stays a NaN.
    """
    given = _Input("quantize_fp8", x, axis, prologue)
    one_of(given.check, "granularity", granularity, GRANULARITIES)
    e5m2 = _fp8_dtype(given.check, dtype)
    if amax is not None:
        given.check.require(granularity == "tensor", "amax is for granularity='tensor'")
        given.check.tensor("amax", amax, "", dtypes=(torch.float32,))
    results = given.call(
        amax, granularity, e5m2, power_of_two, given.row, given.column,
        granularity=granularity, e5m2=e5m2, static=amax is not None,
    )  # fmt: skip

    def make(shape, tensors):
        codes, scale = tensors
        if granularity in ("row", "1x128"):
            scale = _lead(scale, shape)
        return FP8Tensor(_lead(codes, shape), scale, shape, granularity)

    return given.pair(make, results)


def unpack(q: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor | None, str, bool]:
    """(codes (m, …), scale, tensor scale, format, swizzled) as the registered ops take them."""
    m = q.rows
    codes = q.codes.reshape(m, q.codes.shape[-1])
    if isinstance(q, FP8Tensor):
        scale = q.scale
        if q.granularity in ("row", "1x128"):
            scale = scale.reshape(m, *scale.shape[q.ndim - 1 :])
        return codes, scale.contiguous(), None, f"fp8-{q.granularity}", False
    swizzled = q.scale_layout != "linear"
    scale = q.block_scale if swizzled else q.block_scale.reshape(m, q.block_scale.shape[-1])
    if isinstance(q, MXFP8Tensor):
        return codes, scale.contiguous(), None, "mxfp8", swizzled
    outer = q.tensor_scale
    outer = outer.reshape(m) if outer.dim() else outer
    return codes, scale.contiguous(), outer.contiguous(), "nvfp4", swizzled


def check_quantized(check: Check, name: str, q: QuantizedTensor) -> None:
    """The tensors of `q` have the shapes and dtypes that its logical shape asks for, on one device."""
    lead, k = tuple(q.shape[:-1]), q.shape[-1]
    if isinstance(q, NVFP4Tensor):
        width = round_up(k, 16)
        expected = {
            "codes": ((*lead, width // 2), (torch.uint8,)),
            "block_scale": (scale_shape(lead, width // 16, q.scale_layout), (torch.float8_e4m3fn,)),
            "tensor_scale": (lead if q.tensor_scale.dim() else (), (torch.float32,)),
        }
    elif isinstance(q, MXFP8Tensor):
        expected = {
            "codes": ((*lead, k), FP8_DTYPES),
            "block_scale": (scale_shape(lead, -(-k // 32), q.scale_layout), (torch.uint8,)),
        }
    else:
        one_of(check, f"{name}.granularity", q.granularity, GRANULARITIES)
        expected = {
            "codes": ((*lead, k), FP8_DTYPES),
            "scale": (fp8_scale_shape(lead, k, q.granularity), (torch.float32,)),
        }
    if not isinstance(q, FP8Tensor):
        one_of(check, f"{name}.scale_layout", q.scale_layout, LAYOUTS)
    for field, (shape, dtypes) in expected.items():
        t = getattr(q, field)
        # Sizes are spelled out where they are wrong: under torch.compile they may be symbols, which have no str.
        fits = isinstance(t, Tensor) and t.shape == shape
        dims = [f"{name}.{field}.{i}" if fits else str(size) for i, size in enumerate(shape)]
        check.tensor(f"{name}.{field}", t, " ".join(dims), dtypes=dtypes)


def dequantize(q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor that codes and scales stand for: (..., K) of `dtype`.

    NVFP4: (code * block scale), which is exact, times the tensor scale, rounded to fp32 once; MXFP8 and FP8: code times
    scale in fp32. Then to fp32, bf16 or fp16.

    Raises:
        TypeError: q is not an NVFP4Tensor, MXFP8Tensor or FP8Tensor, or the dtype is not one of these.
        ValueError: tensors in q whose shapes do not fit its logical shape.
    """
    check = Check("dequantize")
    if not isinstance(q, QuantizedTensor):
        kind = type(q).__name__
        check.fail(f"q must be an NVFP4Tensor, MXFP8Tensor or FP8Tensor, got {kind}", TypeError)
    if dtype not in INPUTS:
        check.fail(f"dtype={dtype} is not one of {names(INPUTS)}", TypeError)
    check_quantized(check, "q", q)
    codes, scale, outer, format, swizzled = unpack(q)
    sizes = {"m": codes.shape[0], "k": q.shape[-1], "itemsize": dtype.itemsize}
    args = (codes, scale, outer, format, q.shape[-1], swizzled, dtype)
    return call("dequantize", codes, args, sizes | {"format": format}).view(q.shape)
