"""How much an op must do: the least bytes it can move and the FLOPs of its formula, by mode.

Symbols as in the API; e bytes an activation, Q tokens a chunk of the scan. Forward and backward each read every
input once and write every output once; what stays on the chip is not counted. "backward" means a training step: forward
and backward together.

    ssd_scan      forward   FLOPs/token  Q N G + Q P H + 4 N P H                (causal, the minimum)
                  backward  FLOPs/token  6 Q N G + 3 Q P H + 10 N P H           (recomputes what it needs)
                  forward   bytes/token  2 H P e + 2 G N e + H e                (x, y, B, C, dt) + final states
                  backward  bytes/token  3 H P e + 4 G N e + 2 H e              (x, dy, dx, B, C, dB, dC, dt, ddt)
    ssd_update    FLOPs 6 per state element and token; bytes: the fp32 state read and written, inputs, outputs
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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


def ssd_update(e: int, b: int, m: int, h: int, p: int, g: int, n: int) -> tuple[Work]:
    state = b * h * p * n
    return (Work(8 * state + b * m * e * (2 * h * p + 2 * g * n + h), 6 * m * state),)


def causal_conv1d(e: int, b: int, l: int, d: int, width: int) -> tuple[Work, Work]:
    elements = b * l * d
    forward = Work(2 * elements * e + 4 * d * (width + 1), elements * (2 * width + 4))
    return forward, Work(3 * elements * e + 8 * d * (width + 1), elements * (6 * width + 8))


def causal_conv1d_update(e: int, b: int, m: int, d: int, width: int) -> tuple[Work]:
    moved = e * b * d * (2 * m + 2 * (width - 1)) + 4 * d * (width + 1)
    return (Work(moved, b * m * d * (2 * width + 4)),)


def gated_rms_norm(
    e: int, t: int, d: int, group_size: int = 0, gate: bool = True
) -> tuple[Work, Work]:
    elements, tensors = t * d, 1 + gate
    forward = Work(elements * e * (tensors + 1) + 4 * d, elements * (4 + 5 * gate))
    return forward, Work(elements * e * (2 * tensors + 1) + 8 * d, elements * (10 + 10 * gate))


def rms_norm(e: int, t: int, d: int) -> tuple[Work, Work]:
    return gated_rms_norm(e, t, d, gate=False)


COUNTERS: dict[str, Callable[..., tuple[Work, ...]]] = {
    count.__name__: count
    for count in (
        ssd_scan,
        ssd_update,
        causal_conv1d,
        causal_conv1d_update,
        gated_rms_norm,
        rms_norm,
    )
}


def work(op: str, sizes: Mapping[str, int], itemsize: int, mode: str = "forward") -> Work:
    """Bytes and FLOPs of one call of `op` ("forward"), or of a training step ("backward")."""
    forward, *rest = COUNTERS[op](itemsize, **sizes)
    if mode == "forward":
        return forward
    if not rest:
        raise ValueError(f"{op} has no backward")
    return forward + rest[0]
