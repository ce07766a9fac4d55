"""How much an op must do: the least bytes it can move and the FLOPs of its formula, by mode.

Symbols as in the API; e bytes an activation, Q tokens a chunk of the scan. Forward and backward each read every
input once and write every output once; what stays on the chip is not counted. Modes: "forward", "backward" (gradients
alone), "step" (both, as in training).

    ssd_scan      forward   FLOPs/token  Q N G + Q P H + 4 N P H                (causal, the minimum)
                  backward  FLOPs/token  6 Q N G + 3 Q P H + 10 N P H           (recomputes what it needs)
                  forward   bytes/token  2 H P e + 2 G N e + H e                (x, y, B, C, dt) + final states
                  backward  bytes/token  3 H P e + 4 G N e + 2 H e              (x, dy, dx, B, C, dB, dC, dt, ddt)
    ssd_update    FLOPs 6 per state element and token; bytes: the state and its scales read and written, inputs, outputs
                  replay: 4 per state element and token and the products of pairs of tokens; bytes: the state read, and
                  written once in `flush` tokens, half a window of the rings read, and what a write of the state folds
    quantize_*    FLOPs 3 an element and copy (magnitude, product, rounding), 6 more with the Hadamard transform;
                  bytes: x once, codes and scales of every copy
    scaled_mm     FLOPs 2 M N K; bytes: codes and scales of both operands, the output
    moe_route     bytes: logits once, choices, weights and both orders; backward: compact gradients in, dlogits out
    grouped_mm    FLOPs 2 rows N K; bytes: rows in and out, the matrices that rows go to
    moe_experts   FLOPs 4 T K M L (6 with a gate), twice that in backward and the first product where it is done again;
                  bytes: x and y, the matrices of experts that tokens choose (uniformly), what is kept, all gradients
    sample        bytes: the logits once; FLOPs 4 a logit and pass (shift, scale, power, sum)
    verify_*      bytes: the logits once; those of masses (`block`) and of a replaced draft again
    *_token_scores  FLOPs 2 nq nk times all heads' widths (attention: twice, for the rows' log-sum-exp), 4 a weight;
                  bytes: the queries' and keys' rows once, the scores
    select_tokens   bytes: scores once, the index and its inverse
    compact_tokens  bytes: kept rows in and out; backward: kept rows in, all rows out
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tigon.bench.variants import VARIANTS, chosen

MODES = ("forward", "backward", "step")
Q = 64  # tokens a chunk: with states on the chip, the fewest FLOPs that fill a tensor core tile


@dataclass(frozen=True)
class Work:
    bytes: int
    flops: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)


def ssd_scan(e: int, b: int, l: int, h: int, p: int, g: int, n: int) -> tuple[Work, Work]:
    tokens, states = b * l, 4 * b * h * p * n
    forward = Work(
        tokens * e * (2 * h * p + 2 * g * n + h) + states,
        tokens * (Q * n * g + Q * p * h + 4 * n * p * h),
    )
    backward = Work(
        tokens * e * (3 * h * p + 4 * g * n + 2 * h) + states,
        tokens * (6 * Q * n * g + 3 * Q * p * h + 10 * n * p * h),
    )
    return forward, backward


STATE_BYTES = {"float32": 4, "float16": 2, "int8": 1, "float8_e4m3fn": 1}


def ssd_update(e: int, choice: dict, b: int, m: int, h: int, p: int, g: int, n: int) -> tuple[Work]:
    elements, size = b * h * p * n, STATE_BYTES[choice.get("state", "float32")]
    state = elements * size + (4 * b * h * p if size == 1 else 0)
    moved = b * m * e * (2 * h * p + 2 * g * n + h)
    if "flush" not in choice:
        return (Work(2 * state + moved, 6 * m * elements),)
    flush, seen = choice["flush"], (choice["flush"] - 1) // 2
    token = e * (h * p + g * n) + 4 * h  # in the rings
    # A call writes m tokens, reads what is pending, and every token once more when the state is written.
    moved += b * token * (seen + 2 * m)
    pairs = b * m * (seen + m) * 2 * (g * n + h * p)
    return (Work(state + state * m // flush + moved, 4 * m * elements + pairs),)


def causal_conv1d(e: int, b: int, l: int, d: int, width: int) -> tuple[Work, Work]:
    elements = b * l * d
    forward = Work(2 * elements * e + 4 * d * (width + 1), elements * (2 * width + 4))
    return forward, Work(3 * elements * e + 8 * d * (width + 1), elements * (6 * width + 8))


def causal_conv1d_update(e: int, choice: dict, b: int, m: int, d: int, width: int) -> tuple[Work]:
    window = width - 1 + (m if "flush" in choice else width - 1)  # a ring takes the new inputs only
    moved = e * b * d * (2 * m + window) + 4 * d * (width + 1)
    return (Work(moved, b * m * d * (2 * width + 4)),)


def gated_rms_norm(
    e: int, t: int, d: int, group_size: int = 0, gate: bool = True
) -> tuple[Work, Work]:
    elements, tensors = t * d, 1 + gate
    forward = Work(elements * e * (tensors + 1) + 4 * d, elements * (4 + 5 * gate))
    return forward, Work(elements * e * (2 * tensors + 1) + 8 * d, elements * (10 + 10 * gate))


def rms_norm(e: int, t: int, d: int) -> tuple[Work, Work]:
    return gated_rms_norm(e, t, d, gate=False)


def stored(format: str, rows: int, k: int, e: int) -> int:
    """Bytes of a (rows, k) matrix: codes and scales, or e an element ("plain")."""
    if format == "plain":
        return rows * k * e
    if format == "nvfp4":
        return rows * -(-k // 16) * 9 + 4
    if format == "mxfp8":
        return rows * (k + -(-k // 32))
    wide = -(-k // 128)
    scales = {"tensor": 1, "row": rows, "1x128": rows * wide, "128x128": -(-rows // 128) * wide}
    return rows * k + 4 * scales[format.removeprefix("fp8-")]


def _quantize(format: str, choice: dict, e: int, m: int, k: int) -> tuple[Work]:
    both = choice.get("axis") == "both"
    moved = m * k * e + stored(format, m, k, e) + both * stored(format, k, m, e)
    return (Work(moved, m * k * (3 * (1 + both) + 6 * ("hadamard" in choice))),)


def quantize_nvfp4(e: int, choice: dict, m: int, k: int) -> tuple[Work]:
    return _quantize("nvfp4", choice, e, m, k)


def quantize_mxfp8(e: int, choice: dict, m: int, k: int) -> tuple[Work]:
    return _quantize("mxfp8", choice, e, m, k)


def quantize_fp8(e: int, choice: dict, m: int, k: int) -> tuple[Work]:
    return _quantize(f"fp8-{choice['granularity']}", choice, e, m, k)


def dequantize(e: int, choice: str, m: int, k: int) -> tuple[Work]:
    return (Work(stored(choice, m, k, e) + m * k * e, m * k),)


def scaled_mm(e: int, choice: tuple[str, str], m: int, n: int, k: int) -> tuple[Work]:
    left, right = choice
    moved = stored(left, m, k, e) + stored(right, n, k, e) + m * n * e
    return (Work(moved, 2 * m * n * k),)


def moe_route(itemsize: int, choice: dict, t: int, e: int, k: int) -> tuple[Work, Work]:
    losses, dense, compact = "aux" in choice, 4 * t * e, 4 * t * k
    sorted_ = moe_sort(itemsize, t, e, k)[0].bytes
    forward = Work(dense + 2 * compact + sorted_ + losses * 8 * e, 6 * t * e)
    again = losses or choice.get("score") == "softmax"
    return forward, Work((1 + again) * dense + 3 * compact, t * k * 8 + again * t * e * 6)


def moe_sort(itemsize: int, t: int, e: int, k: int) -> tuple[Work]:
    return (Work(12 * t * k + 4 * (2 * e + 1), t * k),)


def touched(e: int, share: float, draws: int) -> int:
    """How many of e experts are chosen by `draws` tokens that each choose a share of them."""
    return round(e * (1 - (1 - share) ** draws))


def grouped_mm(itemsize: int, rows: int, e: int, n: int, k: int) -> tuple[Work, Work]:
    matrices = touched(e, 1 / e, rows) * n * k
    forward = Work(itemsize * (rows * (k + n) + matrices) + 4 * (e + 1), 2 * rows * n * k)
    return forward, Work(itemsize * (rows * (2 * k + n) + matrices + e * n * k), 4 * rows * n * k)


def moe_experts(
    itemsize: int, choice: dict, t: int, k: int, e: int, m: int, l: int
) -> tuple[Work, ...]:
    hidden = 2 * m if choice.get("activation") == "swiglu" else m
    active, save = touched(e, k / e, t), choice.get("save", "hidden")
    format = choice.get("format", "plain")
    matrices = active * (stored(format, hidden, l, itemsize) + stored(format, l, m, itemsize))
    product = 2 * t * k * hidden * l
    flops = product + 2 * t * k * m * l
    forward = Work(2 * t * l * itemsize + matrices + 12 * t * k, flops)
    if format != "plain":
        return (forward,)
    kept = 0 if save == "nothing" else 2 * t * k * hidden * itemsize
    gradients = e * (hidden + m) * l * itemsize
    moved = 3 * t * l * itemsize + matrices + gradients + kept + 16 * t * k
    return forward, Work(moved, 2 * flops + (save == "nothing") * product)


def sample(itemsize: int, choice: dict, b: int, V: int) -> tuple[Work]:
    return (Work(b * V * itemsize + 20 * b, 4 * b * V),)


def verify_draft(itemsize: int, choice: dict, b: int, K: int, V: int) -> tuple[Work]:
    rejects, both = choice["rule"] in ("token", "block"), bool(choice["draft_logits"])
    once = b * V * (K + 1 + K * both)
    again = rejects * b * V * (1 + both)
    if choice["rule"] == "block":
        again += b * V * max(K - 1, 0) * (1 + both)
    return (Work((once + again) * itemsize + b * (8 * K + 28), 4 * (once + again)),)


def verify_tree(itemsize: int, choice: dict, b: int, N: int, V: int) -> tuple[Work]:
    return (Work(b * N * (V * itemsize + 20), 4 * b * N * V),)


def tree_ancestors(itemsize: int, b: int, N: int) -> tuple[Work]:
    return (Work(16 * b * N, 0),)


def attention_token_scores(
    itemsize: int, nq: int, nk: int, hq: int, hkv: int, dim: int
) -> tuple[Work]:
    moved = itemsize * dim * (nq * hq + nk * hkv) + 4 * (nq + 2 * nk)
    return (Work(moved, nq * nk * hq * (4 * dim + 8)),)


def ssd_token_scores(
    itemsize: int, choice: dict, nq: int, nk: int, h: int, g: int, n: int
) -> tuple[Work]:
    weights = h if choice.get("decay") else g
    moved = itemsize * n * g * (nq + nk) + 4 * (nk * h + nq + 2 * nk)
    return (Work(moved, nq * nk * (2 * n * g + 4 * weights)),)


def select_tokens(itemsize: int, t: int, s: int, keep: int) -> tuple[Work]:
    return (Work(itemsize * t + 4 * (t + s * (keep + 2)), 4 * t),)


def compact_tokens(itemsize: int, t: int, d: int, kept: int) -> tuple[Work, Work]:
    forward = Work(2 * kept * (2 * d * itemsize + 8) + 4 * kept, 0)
    return forward, Work(2 * d * itemsize * (kept + t) + 4 * t, 0)


COUNTERS: dict[str, Callable[..., tuple[Work, ...]]] = {
    count.__name__: count
    for count in (
        ssd_scan,
        ssd_update,
        causal_conv1d,
        causal_conv1d_update,
        gated_rms_norm,
        rms_norm,
        quantize_nvfp4,
        quantize_mxfp8,
        quantize_fp8,
        dequantize,
        scaled_mm,
        moe_route,
        moe_sort,
        grouped_mm,
        moe_experts,
        sample,
        verify_draft,
        verify_tree,
        tree_ancestors,
        attention_token_scores,
        ssd_token_scores,
        select_tokens,
        compact_tokens,
    )
}


def work(
    op: str,
    sizes: Mapping[str, int],
    itemsize: int,
    mode: str = "forward",
    variant: str | None = None,
) -> Work:
    """Bytes and FLOPs of one call of `op`: its forward, its backward, or a training step of both."""
    variant = chosen(op, variant)
    choice = (VARIANTS[op][variant],) if variant else ()
    forward, *rest = COUNTERS[op](itemsize, *choice, **sizes)
    if mode == "forward":
        return forward
    if not rest:
        raise ValueError(f"{op} has no backward")
    return rest[0] if mode == "backward" else forward + rest[0]
