"""How many visual tokens each layer keeps: schedules of progressive token reduction, and what they save.

A schedule gives each layer l of L a kept share r_l, 1 for the first and never rising. With x = l / (L - 1) and e the
share that the last layer keeps:

    power    r = 1 - (1 - e) x^gamma           removes ever faster for gamma > 1, ever slower for gamma < 1
    linear   r = 1 - (1 - e) x
    cosine   r = e + (1 - e) cos(pi x / 2)     removes ever faster
    stages   r = q^k in the k-th of `stages` equal runs of layers, e = q^(stages - 1)
    pyramid  as PyramidDrop: four stages, each keeping half of the one before (e = 1/8)
    fastv    as FastV: 1 up to layer K = 2, then e = 1/2

Two numbers say how much is removed, and they are far apart: the *final* share e, and the *average* of r_l over the
layers, which is what prefill costs. A ramp that removes ever faster (power with gamma >= 1, linear, cosine) has an
average of at least one half, whatever e is. So an average of 1/4 needs early removal (many stages, fastv, a gamma below
1), and a final share of 1/4 does not make prefill four times faster. A solved-for average leaves the last
layer a thousandth at least.

Only a mixer (Mamba-2, attention) has scores to choose by: where layer l - 1 is an MLP or a mixture of experts, layer l
keeps what layer l - 1 had. The first layer always runs on all tokens.

Standard library only. Sources: "FastV" (arXiv 2403.06764), "PyramidDrop" (arXiv 2410.17247), "Stateful Token
Reduction" (arXiv 2603.00198) for low-to-high schedules in hybrids; the families and the solver are ours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from tigon.models.config import HybridConfig

KINDS = ("power", "linear", "cosine", "stages", "pyramid", "fastv")
MIXERS = "M*"
CHUNK = 64  # tokens of a chunk of the scan, for its FLOPs
GAMMAS = (2.0**-12, 2.0**12)
LEAST = 0.001  # share that a solved-for average leaves the last layer; `final` may ask for less


@dataclass(frozen=True)
class LayerPlan:
    """kind: letter of the layer. share: of the visual tokens that are kept. visual, tokens: kept visual tokens, all
    tokens. flops, bytes: of this layer in prefill, the least it can do and move."""

    kind: str
    share: float
    visual: int
    tokens: int
    flops: int
    bytes: int


@dataclass(frozen=True)
class ReductionPlan:
    """What a schedule comes to. shares by layer; layers, full_flops, full_bytes only where a config and tokens were
    given: full_* are those of the unreduced model."""

    shares: tuple[float, ...]
    layers: tuple[LayerPlan, ...] = ()
    full_flops: int = 0
    full_bytes: int = 0

    @property
    def average(self) -> float:
        """Mean of the shares over all layers."""
        return sum(self.shares) / len(self.shares)

    @property
    def final(self) -> float:
        """Share that the last layer keeps."""
        return self.shares[-1]

    @property
    def flops(self) -> int:
        return sum(layer.flops for layer in self.layers)

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)

    def __str__(self) -> str:
        text = f"layer-average {self.average:.3f}, final {self.final:.3f}"
        if self.layers:
            text += (
                f"; {self.full_flops / max(1, self.flops):.2f}x fewer FLOPs in the layers' prefill"
            )
        return text


@dataclass(frozen=True)
class ReductionSchedule:
    """A family of kept shares and a budget for it.

    Args:
        kind: one of the families above.
        average, final: the budget, one of them or none (fastv then ends at 1/2, pyramid at 1/8, the others at 1/4).
            With "power" both may be given and gamma is solved for.
        gamma: of "power"; None: 2. stages: runs of layers of "stages". layer: K of "fastv".
        multiple: kept visual tokens are rounded up to one (GEMM tiles, graph buckets).

    Raises:
        ValueError: an argument, by name; from `plan`, a budget that cannot be reached, with the range that can.
    """

    kind: str
    average: float | None = None
    final: float | None = None
    gamma: float | None = None
    stages: int = 4
    layer: int = 2
    multiple: int = 1

    def __post_init__(self):
        def require(holds: bool, message: str) -> None:
            if not holds:
                raise ValueError(f"ReductionSchedule: {message}")

        known = ", ".join(map(repr, KINDS))
        require(self.kind in KINDS, f"kind={self.kind!r} is not one of {known}")
        for name in ("average", "final"):
            share = getattr(self, name)
            require(share is None or 0 <= share <= 1, f"{name}={share} must lie in 0 to 1")
        both = self.average is not None and self.final is not None
        solvable = self.kind == "power" and self.gamma is None
        require(not both or solvable, "average and final together need kind='power' and no gamma")
        require(self.gamma is None or self.kind == "power", "gamma is an argument of kind='power'")
        require(self.gamma is None or self.gamma > 0, f"gamma={self.gamma} must be above 0")
        require(self.stages >= 2, f"stages={self.stages} must be 2 or more")
        require(self.layer >= 1, f"layer={self.layer} must be 1 or more")
        require(self.multiple >= 1, f"multiple={self.multiple} must be 1 or more")

    def plan(
        self,
        layers: int | str | HybridConfig,
        *,
        visual: int | None = None,
        text: int = 0,
        itemsize: int = 2,
        scored: str = MIXERS,
    ) -> ReductionPlan:
        """Kept shares by layer that meet the budget.

        Args:
            layers: a number of mixers, a pattern such as "M-M*-", or a config.
            visual, text: tokens of one prompt; with a config the plan then holds kept tokens, FLOPs and bytes by layer.
            itemsize: bytes of a weight or activation.
            scored: letters of the layers whose scores choose; others pass on the last ones. Before the first of them no
                layer drops anything.

        Raises:
            ValueError: the budget is out of this family's reach on these layers; says the range.
        """
        config = layers if isinstance(layers, HybridConfig) else None
        pattern = config.pattern if config else "M" * layers if isinstance(layers, int) else layers
        if not pattern:
            raise ValueError("ReductionSchedule: layers must be 1 or more")
        shares = self._solve(_choosers(pattern, scored))
        if config is None or visual is None:
            return ReductionPlan(shares)
        if visual < 0 or text < 0:
            raise ValueError(
                f"ReductionSchedule: visual={visual} and text={text} must be 0 or more"
            )
        rows = []
        for kind, share, kept in zip(pattern, shares, self.kept(shares, visual), strict=True):
            flops, moved = layer_work(config, kind, kept + text, itemsize)
            rows.append(LayerPlan(kind, share, kept, kept + text, flops, moved))
        full = [layer_work(config, kind, visual + text, itemsize) for kind in pattern]
        return ReductionPlan(shares, tuple(rows), *map(sum, zip(*full, strict=True)))

    def kept(self, shares: tuple[float, ...], visual: int) -> list[int]:
        """Visual tokens of each layer of a prompt that has `visual` of them."""
        found, kept = [], visual
        for share in shares:
            wanted = math.ceil(share * visual - 1e-9)
            kept = min(kept, -(-wanted // self.multiple) * self.multiple)
            found.append(kept)
        return found

    def _ramp(self, x: float, l: int, count: int, final: float, gamma: float) -> float:
        """The share that layer l would keep if every layer could choose."""
        if self.kind == "fastv":
            return final if l >= self.layer else 1.0
        if self.kind in ("stages", "pyramid"):
            runs = 4 if self.kind == "pyramid" else self.stages
            run = l * runs // count
            return final ** (run / (runs - 1)) if run else 1.0
        if self.kind == "cosine":
            return final + (1 - final) * math.cos(math.pi * x / 2)
        return 1 - (1 - final) * x**gamma

    def _shares(self, pattern: str, final: float, gamma: float) -> tuple[float, ...]:
        count, shares = len(pattern), [1.0]
        for l in range(1, count):
            share = shares[-1]
            if pattern[l - 1] in MIXERS:
                share = min(share, self._ramp(l / (count - 1), l, count, final, gamma))
            shares.append(share)
        return tuple(shares)

    def _solve(self, pattern: str) -> tuple[float, ...]:
        gamma = 1.0 if self.kind == "linear" else self.gamma or 2.0
        if self.average is None:
            final = {"fastv": 0.5, "pyramid": 0.125}.get(self.kind, 0.25)
            final = final if self.final is None else self.final
            # The last layers may have nothing to choose by: what the ramp reaches is what they keep.
            shares = self._shares(pattern, final, gamma)
            if shares[-1] > final + 1e-9 and self.final is not None:
                return self._search(pattern, lambda s: s[-1], "final", self.final, gamma)
            return shares
        if self.final is not None:
            return self._search_gamma(pattern)
        return self._search(pattern, _mean, "average", self.average, gamma)

    def _search(
        self, pattern: str, measure: Callable, name: str, wanted: float, gamma: float
    ) -> tuple[float, ...]:
        """The shares whose `measure`, which rises with the ramp's end, is `wanted`."""

        def shares(final: float) -> tuple[float, ...]:
            return self._shares(pattern, final, gamma)

        least = LEAST if name == "average" else 0.0
        low, high = measure(shares(least)), measure(shares(1.0))
        if not low - 1e-9 <= wanted <= high + 1e-9:
            self._refuse(pattern, f"{name}={wanted:g}", name, low, high)
        return shares(_bisect(lambda final: measure(shares(final)) >= wanted, least, 1.0))

    def _search_gamma(self, pattern: str) -> tuple[float, ...]:
        """The shares of a power ramp to `final` whose average is `average`; it rises with gamma."""

        def shares(log_gamma: float) -> tuple[float, ...]:
            return self._shares(pattern, self.final, 2.0**log_gamma)

        ends = [math.log2(g) for g in GAMMAS]
        low, high = (_mean(shares(end)) for end in ends)
        if not low - 1e-9 <= self.average <= high + 1e-9:
            asked = f"average={self.average:g} with final={self.final:g}"
            self._refuse(pattern, asked, "average", low, high)
        return shares(_bisect(lambda end: _mean(shares(end)) >= self.average, *ends))

    def _refuse(self, pattern: str, asked: str, name: str, low: float, high: float) -> None:
        hint = ""
        if name == "average" and self.kind == "stages":
            hint = "; more stages remove earlier"
        if name == "average" and self.kind in ("power", "linear", "cosine") and self.final is None:
            hint = (
                "; a ramp that removes ever faster averages at least 0.5: a lower average needs early removal "
                "('stages', 'fastv', or 'power' with a gamma below 1)"
            )
        # Inwards, so that what the message names can be reached; not by what float arithmetic adds.
        low, high = math.ceil(1e3 * low - 1e-9) / 1e3, math.floor(1e3 * high + 1e-9) / 1e3
        raise ValueError(
            f"ReductionSchedule: {asked} cannot be reached by {self.kind!r} on {len(pattern)} layers: {name} can be "
            f"{low:.3f} to {high:.3f}{hint}"
        )


def _choosers(pattern: str, scored: str) -> str:
    """The pattern with '-' for every mixer that has no scores yet to choose by."""
    first = next((l for l, kind in enumerate(pattern) if kind in scored), len(pattern))
    return "-" * first + pattern[first:]


def _mean(shares: tuple[float, ...]) -> float:
    return sum(shares) / len(shares)


def _bisect(reached: Callable[[float], bool], low: float, high: float) -> float:
    """The least argument at which `reached` holds, to the last bit that matters."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def layer_work(config: HybridConfig, kind: str, tokens: int, itemsize: int = 2) -> tuple[int, int]:
    """(FLOPs, least bytes) of one layer's prefill: products, scan or causal attention; weights once, the hidden states
    in and out, and what the layer leaves in its cache. Norms and activations are not counted."""
    d, n = config.hidden_size, tokens
    moved = 2 * n * d
    if kind == "M":
        h, p, g, s = (
            config.mamba_num_heads,
            config.mamba_head_dim,
            config.n_groups,
            config.ssm_state_size,
        )
        weights = d * (2 * config.d_inner + 2 * g * s + h) + config.d_inner * d
        conv = 2 * config.conv_kernel * (config.d_inner + 2 * g * s)
        flops = n * (2 * weights + conv + CHUNK * s * g + CHUNK * p * h + 4 * s * p * h)
        return flops, itemsize * (weights + moved) + 4 * h * p * s
    if kind == "*":
        weights = config._attention()
        width = config.num_attention_heads * config.head_dim
        cache = 2 * n * config.num_key_value_heads * config.head_dim
        return n * 2 * weights + 2 * width * n * (n + 1), itemsize * (weights + moved + cache)
    if kind == "-":
        weights = 2 * d * config.intermediate_size
        return n * 2 * weights, itemsize * (weights + moved)
    e, k, latent = config.n_routed_experts, config.num_experts_per_tok, config.moe_latent_size
    expert = 2 * config.moe_intermediate_size * (latent or d)
    shared = 2 * d * config.moe_shared_expert_intermediate_size * config.n_shared_experts
    shared += 2 * d * latent if latent else 0
    touched = round(e * (1 - (1 - k / e) ** n))  # by tokens that choose uniformly
    flops = n * 2 * (k * expert + shared + d * e)
    return flops, itemsize * (touched * expert + shared + d * e + moved)
