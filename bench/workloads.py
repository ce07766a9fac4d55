"""What is checked and timed: the inputs of one call of an op, from its sizes.

    work = make("ssd_scan", {"b": 1, "l": 4096, …}, torch.bfloat16, device="cuda", seed=0)
    outputs = work.run()

Inputs look as they do in a trained layer: decays of a few to a few hundred tokens, activations of unit variance,
parameters in fp32. Every option of the op that a model uses is on. On the meta device nothing is allocated. Variants
of ops are in `bench/variants.py`; the decode steps, the low-precision ops, those of mixtures of experts, of sampling
and of token reduction have builders of their own (`bench/decode.py`, `bench/lowprec.py`, `bench/moe.py`,
`bench/sampling.py`, `bench/tokens.py`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import tigon
from tigon.bench import decode, lowprec, moe, sampling, tokens
from tigon.bench.variants import VARIANTS, chosen
from tigon.ops.quantized import QuantizedTensor
from tigon.ops.routing import Routing
from tigon.ops.select_tokens import Selection
from tigon.registry import OPS

SMALL = {
    "ssd_scan": {"b": 2, "l": 200, "h": 8, "p": 64, "g": 2, "n": 128},
    "causal_conv1d": {"b": 2, "l": 200, "d": 160, "width": 4},
    "gated_rms_norm": {"t": 100, "d": 1024, "group_size": 256},
    "rms_norm": {"t": 100, "d": 1024},
    **decode.SMALL,
    **lowprec.SMALL,
    **moe.SMALL,
    **sampling.SMALL,
    **tokens.SMALL,
}


@dataclass(frozen=True)
class Workload:
    """inputs: tensors by argument name; options: the other arguments; outputs: names of the tensors that come back.

    mutated: the input that the op changes in place; it counts as an output. oracle: what is right, where it is not the
    reference in fp64; exact: every byte of it. arguments: what the op is called with, made of the inputs. held: the
    mutated input as numbers, where it is codes. cap: the largest error allowed, where not the dtype's.
    """

    op: str
    sizes: Mapping[str, int]
    dtype: torch.dtype
    inputs: Mapping[str, Tensor]
    options: Mapping[str, object]
    outputs: tuple[str, ...]
    mutated: str | None = None
    variant: str = ""
    oracle: Callable[["Workload"], tuple[Tensor, ...]] | None = None
    exact: bool = False
    arguments: Callable[[Mapping[str, Tensor]], Mapping[str, object]] = dict
    held: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    cap: float | None = None

    @property
    def differentiable(self) -> bool:
        quantized = any(isinstance(t, QuantizedTensor) for t in self.inputs.values())
        return OPS[self.op].backward is not None and not quantized

    def call(self) -> dict[str, object]:
        """The arguments of the op, by name."""
        return {**self.arguments(self.inputs), **self.options}

    def run(self, inputs: Mapping[str, Tensor] | None = None) -> tuple[Tensor, ...]:
        """The op's outputs. Mutated inputs are changed for real: `verify` passes copies."""
        inputs = inputs or self.inputs
        out = tensors(getattr(tigon, self.op)(**self.arguments(inputs), **self.options))
        if self.mutated is None:
            return out
        return (*out, inputs[self.mutated] if self.held is None else self.held(inputs))

    def widened(self) -> "Workload":
        """The same in fp64."""
        wide = {k: t.double() if t.is_floating_point() else t for k, t in self.inputs.items()}
        return replace(self, inputs=wide, dtype=torch.float64)


def tensors(out: Tensor | QuantizedTensor | Routing | Selection | tuple) -> tuple[Tensor, ...]:
    """The tensors of what an op returned, in order."""
    if isinstance(out, QuantizedTensor):
        return tuple(out.tensors().values())
    if isinstance(out, Routing):
        return moe.tensors(out)
    if isinstance(out, Selection):
        return tuple(getattr(out, name) for name in Selection.TENSORS)
    return tuple(t for part in out for t in tensors(part)) if isinstance(out, tuple) else (out,)


class Draw:
    """Random tensors of one device and dtype from a seed."""

    def __init__(self, dtype: torch.dtype, device: str | torch.device, seed: int):
        self.dtype, self.device = dtype, torch.device(device)
        meta = self.device.type == "meta"
        self.generator = None if meta else torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        t = torch.randn(shape, device=self.device, generator=self.generator)
        return t.mul_(scale).to(dtype or self.dtype)

    def parameter(self, *shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        t = torch.rand(shape, device=self.device, generator=self.generator)
        return t.mul_(high - low).add_(low)


def ssd_scan(draw: Draw, b: int, l: int, h: int, p: int, g: int, n: int) -> dict:
    return {
        "inputs": {
            "x": draw.normal(b, l, h, p),
            "dt": draw.normal(b, l, h),
            "B": draw.normal(b, l, g, n, scale=1 / math.sqrt(n)),
            "C": draw.normal(b, l, g, n),
            **decode.step(draw, h),
        },
        "options": {"dt_softplus": True, "return_final_states": True},
        "outputs": ("y", "final_states"),
    }


def causal_conv1d(draw: Draw, b: int, l: int, d: int, width: int) -> dict:
    return {
        "inputs": {
            "x": draw.normal(b, l, d),
            "weight": draw.parameter(d, width),
            "bias": draw.parameter(d),
        },
        "options": {"return_final_state": True},
        "outputs": ("y", "final_state"),
    }


def gated_rms_norm(draw: Draw, t: int, d: int, group_size: int) -> dict:
    given = {"x": draw.normal(t, d), "z": draw.normal(t, d), "weight": draw.parameter(d, low=0.5)}
    return {"inputs": given, "options": {"group_size": group_size}, "outputs": ("y",)}


def rms_norm(draw: Draw, t: int, d: int) -> dict:
    given = {"x": draw.normal(t, d), "weight": draw.parameter(d, low=0.5)}
    return {"inputs": given, "options": {}, "outputs": ("y",)}


BUILDERS: dict[str, Callable[..., dict]] = (
    {
        build.__name__: build
        for build in (
            ssd_scan,
            causal_conv1d,
            gated_rms_norm,
            rms_norm,
        )
    }
    | decode.BUILDERS
    | lowprec.BUILDERS
    | moe.BUILDERS
    | sampling.BUILDERS
    | tokens.BUILDERS
)


def make(
    op: str,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    seed: int = 0,
    variant: str | None = None,
) -> Workload:
    """Inputs of `op` for `sizes` (every letter of the registry's sizes) and a variant of it, the first if None.

    An op that does not compute in `dtype` (routing) gets fp32.
    """
    dtype = dtype if str(dtype).removeprefix("torch.") in OPS[op].dtypes else torch.float32
    variant = chosen(op, variant)
    choice = (VARIANTS[op][variant],) if variant else ()
    built = BUILDERS[op](Draw(dtype, device, seed), *choice, **sizes)
    return Workload(op=op, sizes=dict(sizes), dtype=dtype, variant=variant, **built)
