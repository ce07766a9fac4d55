"""Grouped products and expert MLPs on routed tokens, forward and backward.

    grouped_mm    y_r = W_e x_r
    moe_experts   y_t = sum_j w_tj D_e act(U_e x_t),  e = indices[t,j]      act(h) = relu(h)^2, or silu(gate) up

x (t,l), U (e,m,l) (SwiGLU: (e,2m,l), gate rows first), D (e,l,m) in fp32, bf16 or fp16; for inference U and D may be
NVFP4 or FP8 codes, which are widened, exactly, on the way to the MMA. Products accumulate in fp32; what is rounded to
x's dtype is what `tigon.reference.experts` rounds, but for G, which is never stored. The launches:

    forward    [list_tiles]  up_activate  multiply_rows (D, rows in the order of choices)  combine
    backward   list_tiles  activation_gradient  multiply_rows (U^T)  combine  2 x weight_gradient  sum_shares

Rows are gathered where they are loaded and nothing is padded. No order of a sum depends on the run: there are no
atomics. In batch-invariant mode tiles are the same for every t, so that no bit of a token depends on its neighbours.
"""

import torch
import triton
from torch import Tensor

from tigon.kernels.experts_backward import activation_gradient, sum_shares
from tigon.kernels.experts_combine import combine
from tigon.kernels.experts_up import up_activate
from tigon.kernels.gemm_decode import FOLD
from tigon.kernels.grouped_gemm_rows import multiply_rows, zero_tail
from tigon.kernels.grouped_gemm_tiles import list_tiles, tile_bound
from tigon.kernels.grouped_gemm_weights import weight_gradient
from tigon.kernels.launch import plan, target
from tigon.kernels.launch_moe import GroupedConfig
from tigon.kernels.ssd_common import INTERPRETED

LIST_BLOCK = 128  # tiles that a program of list_tiles writes at a time
SHARES_BLOCK = 256


class _Matrices:
    """Weights of experts: kernel arguments, and what is compiled in. Row i of expert j is row j n + i of all."""

    def __init__(self, codes, scale=None, outer=None, format="plain"):
        self.codes, self.rows = codes, codes.shape[1]
        self.format = format.split("-")[0]
        self.scale = scale.view(torch.uint8) if self.format == "nvfp4" else None
        self.outer = {"plain": None, "fp8": scale, "nvfp4": outer}[self.format]
        self.e5m2 = codes.dtype == torch.float8_e5m2
        if self.format == "fp8" and (target(codes.device)[0] < 90 or INTERPRETED):
            self.codes = codes.view(torch.uint8)  # decoded by their bits

    def pointers(self):
        return self.codes, self.scale, self.outer

    def pitches(self):
        """Elements between rows, of codes and of block scales; 1 if every row has an outer scale."""
        step = 0 if self.outer is None or self.outer.dim() == 0 else 1
        return self.codes.shape[2], 0 if self.scale is None else self.scale.shape[2], step

    def constants(self):
        folded = FOLD.value if self.format == "nvfp4" else 1.0
        return dict(FORMAT=self.format, E5M2=self.e5m2, FOLDED=folded)


class _Places:
    """Where the rows of the experts from `first` to `last` - 1 are, and how programs find them."""

    def __init__(self, rows, offsets, first, last, order=None, indices=None):
        self.rows, self.first, self.experts = rows, first, last - first
        self.offsets = offsets[first : last + 1]
        self.order, self.indices = order, None if indices is None else indices.contiguous()
        self.lists = {}

    def find(self, config: GroupedConfig):
        """(programs for each column block, arguments of `find_rows` after the item)."""
        tiles = indices = None
        if config.few:
            items = min(self.rows, self.experts)
            indices = self.indices if self.rows < self.experts else None
        else:
            items = tile_bound(self.rows, self.experts, config.rows)
            tiles = self._tiles(config.rows, items)
        return items, (tiles, indices, self.order, self.offsets, self.first, self.experts)

    def _tiles(self, rows: int, bound: int) -> Tensor:
        if rows not in self.lists:
            self.lists[rows] = torch.empty(bound, 2, dtype=torch.int32, device=self.offsets.device)
            list_tiles[(self.experts,)](
                self.offsets, self.lists[rows], self.experts, bound,
                ROWS=rows, EXPERTS=triton.next_power_of_2(self.experts), BLOCK=LIST_BLOCK, num_warps=4,
            )  # fmt: skip
        return self.lists[rows]


def _pitch(t: Tensor) -> int:
    """Elements from row to row; what torch leaves there for a single row may be anything, so not that."""
    return t.stride(0) if t.shape[0] > 1 else t.shape[1]


def _plan(op: str, x: Tensor, **sizes):
    arch, sms = target(x.device)
    return plan(op, arch, itemsize=x.element_size(), sms=sms, **sizes)


def _tile(config: GroupedConfig) -> dict:
    return dict(
        PRECISION=config.precision,
        ROWS=config.rows,
        COLUMNS=config.columns,
        BLOCK_K=config.block_k,
        UPCAST=INTERPRETED,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def _multiply(
    x: Tensor,
    w: _Matrices,
    n: int,
    places: _Places,
    config: GroupedConfig,
    transposed: bool = False,
    scatter: bool = False,
) -> Tensor:
    """x (rows,k) in expert order times each expert's (n,k), or (k,n); (segments, rows, n) if k is split."""
    rows, k = x.shape
    shape = (rows, n) if config.splits == 1 else (config.splits, rows, n)
    dtype = x.dtype if config.splits == 1 else torch.float32
    out = torch.empty(shape, dtype=dtype, device=x.device)
    items, found = places.find(config)
    if out.numel() and items:
        multiply_rows[(items * triton.cdiv(n, config.columns), config.splits)](
            x, *w.pointers(), out, *found, rows, n, k, config.split_k or k, _pitch(x), *w.pitches(),
            **w.constants(), TRANSPOSED=transposed, SCATTER=scatter, QUADS=config.quads,
            WHOLE=k % config.block_k == 0, ROWS_LEFT=config.rows_left, **_tile(config),
        )  # fmt: skip
    return out


def _combine(
    rows: Tensor, weights, inverse, places: _Places, t: int, k: int, dtype, config
) -> Tensor:
    """(t,l) of dtype from (t k, l) in the order of choices, or (segments, t k, l) partial sums."""
    l = rows.shape[-1]
    y = torch.empty(t, l, dtype=dtype, device=rows.device)
    combine[(t * triton.cdiv(l, config.block),)](
        rows, weights, inverse, places.offsets, y, places.experts, t * k, l,
        TOP_K=k, SEGMENTS=rows.shape[0] if rows.dim() == 3 else 1, BLOCK=config.block,
        UPCAST=INTERPRETED, num_warps=config.warps,
    )  # fmt: skip
    return y


def _gradient(
    left: Tensor,
    right: Tensor,
    like: Tensor,
    buffer: Tensor | None,
    accumulate: bool,
    places: _Places,
    config: GroupedConfig,
    gather: str = "",
    top_k: int = 1,
) -> Tensor:
    """dW (e,n,k) = sum_r left_r right_r^T. gather: "left" or "right", that side's rows lie by token, not in order."""
    out = torch.empty_like(like) if buffer is None else buffer
    _, n, k = like.shape
    if out.numel():
        blocks = triton.cdiv(n, config.columns) * triton.cdiv(k, config.rows)
        weight_gradient[(places.experts * blocks,)](
            left, right, out, places.order, places.offsets, n, k, top_k, _pitch(left), _pitch(right),
            GATHER_LEFT=gather == "left", GATHER_RIGHT=gather == "right",
            ACCUMULATE=accumulate and buffer is not None, **_tile(config),
        )  # fmt: skip
    return out


def grouped_mm(x: Tensor, w: Tensor, offsets: Tensor, invariant: bool = False) -> Tensor:
    """y (rows,n): x (rows,k) in expert order, w (e,n,k). Rows past offsets[e] give zeros."""
    (rows, k), (e, n, _) = x.shape, w.shape
    config = _plan("grouped_mm", x, rows=rows, e=e, n=n, k=k, batch_invariant=invariant)
    places = _Places(rows, offsets, 0, e)
    return _cleared(_multiply(x, _Matrices(w), n, places, config["multiply_rows"]), places)


def _cleared(y: Tensor, places: _Places) -> Tensor:
    if y.numel():
        zero_tail[(min(y.shape[0], 256),)](
            y, places.offsets, places.experts, *y.shape, BLOCK=1024, num_warps=4
        )
    return y


def grouped_mm_backward(
    dy: Tensor, x: Tensor, w: Tensor, offsets: Tensor, invariant: bool = False
) -> tuple[Tensor, Tensor]:
    """(dx, dw); an expert without rows gets exact zeros."""
    (rows, k), (e, n, _) = x.shape, w.shape
    configs = _plan("grouped_mm_backward", x, rows=rows, e=e, n=n, k=k, batch_invariant=invariant)
    places = _Places(rows, offsets, 0, e)
    dx = _multiply(dy, _Matrices(w), k, places, configs["multiply_rows"], transposed=True)
    dw = _gradient(dy, x, w, None, False, places, configs["weight_gradient"])
    return _cleared(dx, places), dw


def moe_experts(
    x: Tensor,
    up: Tensor,
    up_scale: Tensor | None,
    up_outer: Tensor | None,
    up_format: str,
    down: Tensor,
    down_scale: Tensor | None,
    down_outer: Tensor | None,
    down_format: str,
    weights: Tensor,
    indices: Tensor,
    offsets: Tensor,
    order: Tensor,
    inverse: Tensor,
    activation: str,
    before_down: bool,
    save: str,
    first: int,
    last: int,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y (t,l), kept): kept is h (save "hidden") or relu(h) ("relu") in expert order, else empty. Rows of `kept` that
    no choice has are not written."""
    (t, l), k = x.shape, indices.shape[1]
    gates = 2 if activation == "swiglu" else 1
    m = up.shape[1] // gates
    rows = t * k
    kept = None
    if save != "nothing":
        kept = torch.empty(rows, gates * m, dtype=x.dtype, device=x.device)
    if not (rows and last > first and l and m):
        y = torch.zeros(t, l, dtype=x.dtype, device=x.device)
        return y, x.new_empty(0) if kept is None else kept
    configs = _plan(
        "moe_experts", x, t=t, k=k, e=last - first, m=m, l=l, gates=gates, format=up_format, down_format=down_format,
        batch_invariant=batch_invariant,
    )  # fmt: skip
    places = _Places(rows, offsets, first, last, order, indices)
    one = _Matrices(up, up_scale, up_outer, up_format)
    other = _Matrices(down, down_scale, down_outer, down_format)
    a = torch.empty(rows, m, dtype=x.dtype, device=x.device)
    config = configs["up_activate"]
    items, found = places.find(config)
    up_activate[(items * triton.cdiv(m, config.columns),)](
        x, *one.pointers(), weights if before_down else None, a, kept, *found, k, m, l, _pitch(x), *one.pitches(),
        **one.constants(), SWIGLU=gates == 2, KEEP_RELU=save == "relu", QUADS=config.quads,
        WHOLE=l % config.block_k == 0, ROWS_LEFT=config.rows_left, **_tile(config),
    )  # fmt: skip
    sums = _multiply(a, other, l, places, configs["multiply_rows"], scatter=True)
    weights = None if before_down else weights
    y = _combine(sums, weights, inverse, places, t, k, x.dtype, configs["combine"])
    return y, x.new_empty(0) if kept is None else kept


def moe_experts_backward(
    dy: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    weights: Tensor,
    indices: Tensor,
    offsets: Tensor,
    order: Tensor,
    inverse: Tensor,
    kept: Tensor,
    activation: str,
    before_down: bool,
    save: str,
    first: int,
    last: int,
    up_buffer: Tensor | None,
    down_buffer: Tensor | None,
    accumulate: bool,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dup, ddown, dweights). Given fp32 buffers take dup and ddown (added to with `accumulate`), which then come
    back empty. before_down changes forward's rounding only."""
    (t, l), k = x.shape, indices.shape[1]
    gates = 2 if activation == "swiglu" else 1
    m = up.shape[1] // gates
    rows = t * k
    places = _Places(rows, offsets, first, last, order)
    configs = _plan(
        "moe_experts_backward", x, t=t, k=k, e=last - first, m=m, l=l, gates=gates, save=save,
        batch_invariant=batch_invariant,
    )  # fmt: skip
    dh = torch.empty(rows, gates * m, dtype=x.dtype, device=x.device)
    act = torch.empty(rows, m, dtype=x.dtype, device=x.device)
    dweights = torch.zeros(t, k, dtype=torch.float32, device=x.device)
    dx = torch.zeros(t, l, dtype=x.dtype, device=x.device)
    if rows and last > first and l and m:
        dweights = _activation_gradient(
            dy, x, up, down, weights, None if save == "nothing" else kept, dh, act, gates, inverse, places,
            configs["activation_gradient"],
        ).view(t, k)  # fmt: skip
        config = configs["multiply_rows"]
        sums = _multiply(dh, _Matrices(up), l, places, config, transposed=True, scatter=True)
        dx = _combine(sums, None, inverse, places, t, k, x.dtype, configs["combine"])
    config = configs["weight_gradient"]
    dup = _gradient(dh, x, up, up_buffer, accumulate, places, config, "right", k)
    ddown = _gradient(dy, act, down, down_buffer, accumulate, places, config, "left", k)
    if up_buffer is not None:
        dup = ddown = x.new_empty(0)
    return dx, dup, ddown, dweights


def _activation_gradient(
    dy, x, up, down, weights, kept, dh, act, gates, inverse, places: _Places, config: GroupedConfig
) -> Tensor:
    """Fills dh and act; dweights (t k)."""
    (rows, m), l = act.shape, x.shape[1]
    blocks = triton.cdiv(m, config.columns)
    shares = torch.empty(blocks, rows, dtype=torch.float32, device=x.device)
    items, (tiles, *_) = places.find(config)
    activation_gradient[(items * blocks,)](
        dy, x, up, down, weights, kept, dh, act, shares, tiles, places.order, places.offsets, places.experts,
        rows, rows // x.shape[0], m, l, _pitch(dy), _pitch(x),
        SWIGLU=gates == 2, WHOLE=l % config.block_k == 0, ROWS_LEFT=config.rows_left, **_tile(config),
    )  # fmt: skip
    dweights = torch.empty(rows, dtype=torch.float32, device=x.device)
    sum_shares[(triton.cdiv(rows, SHARES_BLOCK),)](
        shares, inverse, places.offsets, dweights, places.experts, rows, blocks,
        BLOCK=SHARES_BLOCK, num_warps=4,
    )  # fmt: skip
    return dweights
