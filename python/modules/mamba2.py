"""The Mamba-2 layer, with the constructor, parameter names and shapes of `mamba_ssm.Mamba2`.

    z0, x0, z, xBC, dt = in_proj(u)                     z0, x0 only where d_ssm < d_inner
    x, B, C = silu(conv1d(xBC))
    y = ssd_scan(x, dt, -exp(A_log), B, C, D)           softplus(dt + dt_bias), clamped to dt_limit
    out = out_proj([silu(z0) x0,  norm(y silu(z))])     norm_before_gate: norm(y) silu(z)

Source: Dao and Gu 2024 (arXiv 2405.21060), section 7.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tigon.modules.linear import Linear, activation_dtype
from tigon.modules.mamba_cache import MambaCache, allocate
from tigon.modules.mlp import silu
from tigon.modules.norm import GatedRMSNorm
from tigon.modules.state import check_feed
from tigon.ops import causal_conv1d, causal_conv1d_update, ssd_scan


class CausalConv1d(nn.Conv1d):
    """Parameters of a depthwise nn.Conv1d, weight (d,1,width), over tokens-major (b,l,d) inputs with SiLU."""

    def __init__(self, channels: int, width: int, bias: bool, device=None, dtype=None):
        super().__init__(
            channels,
            channels,
            width,
            groups=channels,
            padding=width - 1,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor, **options) -> Tensor | tuple[Tensor, Tensor]:
        """`causal_conv1d` of x; with `conv_state` among the options, `causal_conv1d_update`."""
        op = causal_conv1d_update if "conv_state" in options else causal_conv1d
        return op(x, weight=self.weight.squeeze(1), bias=self.bias, **options)


class Mamba2(nn.Module):
    """Mamba-2 mixer: u (b,l,d_model) -> (b,l,d_model).

    Args, as in mamba_ssm: d_model, d_state (n), d_conv, conv_init, expand, headdim (p), d_ssm (channels of the
        SSM, d_inner if None; the rest is a gated MLP beside it), ngroups, A_init_range, D_has_hdim, rmsnorm (False:
        the gate is applied in the scan), norm_before_gate, dt_min, dt_max, dt_init_floor (of the initial dt_bias),
        dt_limit (in decode too, unlike mamba_ssm), bias, conv_bias, layer_idx, device, dtype.
        chunk_size, use_mem_eff_path: accepted, without effect. process_group must be None; sequence_parallel
        says how one is used and so has no effect.
    And: d_inner, where it is not expand * d_model; norm_eps.

    Parameters: in_proj.weight (2 d_inner + 2 ngroups d_state + h, d_model), conv1d.weight (conv_dim,1,d_conv) and bias,
    dt_bias (h), A_log (h), D (h) or (d_ssm), norm.weight (d_ssm), out_proj.weight (d_model, d_inner). A_log, D and
    dt_bias are kept in whatever dtype they have and enter the scan in fp32 where that is fp32.

    Raises:
        ValueError: sizes that do not fit each other, by name. NotImplementedError: process_group.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group=None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        d_inner: int | None = None,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        if process_group is not None:
            raise NotImplementedError("Mamba2: process_group (tensor parallel) is not supported")
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner = int(expand * d_model) if d_inner is None else d_inner
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.headdim, self.ngroups = headdim, ngroups
        self.nheads = self.d_ssm // headdim
        self.D_has_hdim, self.rmsnorm = D_has_hdim, rmsnorm
        self.dt_limit = tuple(dt_limit)
        self.layer_idx = layer_idx
        self._check_sizes(A_init_range, dt_min, dt_max)
        self.conv_dim = self.d_ssm + 2 * ngroups * d_state
        d_mlp = self.d_inner - self.d_ssm
        self.splits = [d_mlp, d_mlp, self.d_ssm, self.conv_dim, self.nheads]

        factory = {"device": device, "dtype": dtype}
        self.in_proj = Linear(d_model, sum(self.splits), bias=bias, **factory)
        self.conv1d = CausalConv1d(self.conv_dim, d_conv, bias=conv_bias, **factory)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.dt_bias = nn.Parameter(
            _initial_dt_bias(self.nheads, dt_min, dt_max, dt_init_floor, **factory)
        )
        A = torch.empty(self.nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = nn.Parameter(A.log().to(dtype or torch.float32))
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device))
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True
        if rmsnorm:
            self.norm = GatedRMSNorm(
                self.d_ssm, norm_eps, self.d_ssm // ngroups, norm_before_gate, **factory
            )
        self.out_proj = Linear(self.d_inner, d_model, bias=bias, **factory)

    def _check_sizes(self, A_init_range, dt_min, dt_max) -> None:
        def require(holds: bool, message: str) -> None:
            if not holds:
                raise ValueError(f"Mamba2: {message}")

        require(
            0 < self.d_ssm <= self.d_inner,
            f"d_ssm={self.d_ssm} must lie in 1 to d_inner={self.d_inner}",
        )
        require(
            self.d_ssm % self.headdim == 0, f"headdim={self.headdim} must divide d_ssm={self.d_ssm}"
        )
        require(
            self.nheads % self.ngroups == 0,
            f"ngroups={self.ngroups} must divide the {self.nheads} heads",
        )
        require(
            0 < A_init_range[0] <= A_init_range[1],
            f"A_init_range must rise from above 0, got {A_init_range}",
        )
        require(
            0 < dt_min <= dt_max, f"dt_min={dt_min} and dt_max={dt_max} must be positive and rise"
        )

    def allocate_cache(
        self,
        slots: int,
        dtype: torch.dtype | None = None,
        ssm_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        **options,
    ) -> MambaCache:
        """Zeroed states for `slots` sequences: conv in `dtype` (the weights' if None), ssm in `ssm_dtype`.

        options: rounding="nearest" | "stochastic" of the states; rollback=None | "replay" | "snapshot" for calls of at
        most `tokens` tokens a row that may be undone, with the `cursor` (`ReplayCursor`) that the layers of a model
        share; lengths and seeds (slots) int64, which they share too. `HybridCache` gives all of them.
        """
        return allocate(
            slots,
            (self.nheads, self.headdim, self.ngroups, self.d_state),
            self.conv_dim,
            self.d_conv,
            dtype=dtype or activation_dtype(self.in_proj),
            ssm_dtype=ssm_dtype,
            device=self.in_proj.weight.device if device is None else device,
            layer=self.layer_idx or 0,
            **options,
        )

    def forward(
        self,
        u: Tensor,
        cu_seqlens: Tensor | None = None,
        cache: MambaCache | None = None,
        *,
        slots: Tensor | None = None,
        num_tokens: Tensor | None = None,
        ancestors: Tensor | None = None,
        watch: Callable[[Tensor, Tensor, Tensor], None] | None = None,
        counted: Tensor | None = None,
    ) -> Tensor:
        """Mix tokens; with a cache, continue its sequences and leave their new states there.

        Args:
            u: (b,l,d_model); packed sequences: (1,l,d_model).
            cu_seqlens: (s+1) int32 or int64 bounds of the packed sequences.
            cache: states to continue from. Up to `cache.most_tokens` tokens a row (16 without a rollback) take the
                decode ops where no gradient is wanted, all else the scan.
            slots: (b) or (s) int64, the slot of each row or sequence (`tigon.modules.state`). Needs cache.
            num_tokens: (b) int32 or int64, the real tokens of each row, padding on the right; outputs there are
                finite and mean nothing. Needs cache; packed batches have none.
            ancestors: (b,l) int32, the tokens are nodes of a tree: bit j of a node's is set for every node j on the way
                from the first one to it, itself included. Needs a cache with rollback="replay".
            watch: called with C, B (b,l,g,n) after the convolution and dt (b,l,h) after softplus and limit: token
                scores are made of them. Not in calls that the decode ops take.
            counted: (s) int64, tokens that the cache will count for each sequence, where some were dropped on the way
                here. Not in calls that the decode ops take.
        """
        check_feed("Mamba2", cu_seqlens, cache, slots, num_tokens)
        steps = cache is not None and cu_seqlens is None and u.shape[1] <= cache.most_tokens
        steps = steps and not self._wants_gradient(u)
        if ancestors is not None and not steps:
            raise ValueError(
                "Mamba2: ancestors need a cache with rollback='replay', its `tokens` at most, and torch.no_grad()"
            )
        z0, x0, z, xBC, dt = self.in_proj(u).split(self.splits, dim=-1)
        if cache is None:
            x, B, C = self._heads(self.conv1d(xBC, cu_seqlens=cu_seqlens))
            if watch is not None:
                watch(C, B, self._step_sizes(dt))
            y = ssd_scan(x, dt, B=B, C=C, cu_seqlens=cu_seqlens, **self._scan_arguments(z))
        elif steps:
            y = cache.step(
                *(self.conv1d, self._heads, xBC, dt, self._scan_arguments(z)),
                *(slots, num_tokens, ancestors),
            )
        else:
            feed = (xBC, dt, z, cu_seqlens, cache, slots, num_tokens)
            y = self._continue(*feed, watch, counted)
        y = y.flatten(-2)
        if self.rmsnorm:
            y = self.norm(y, z)
        if self.d_inner > self.d_ssm:
            y = torch.cat([silu(z0) * x0, y], dim=-1)
        return self.out_proj(y)

    def _heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b,l,conv_dim) -> x (b,l,h,p), B and C (b,l,g,n): views."""
        state = self.ngroups * self.d_state
        x, B, C = xBC.split([self.d_ssm, state, state], dim=-1)
        return (
            x.unflatten(-1, (self.nheads, self.headdim)),
            B.unflatten(-1, (self.ngroups, self.d_state)),
            C.unflatten(-1, (self.ngroups, self.d_state)),
        )

    def _decay(self) -> Tensor:
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def _scan_arguments(self, z: Tensor) -> dict:
        return {
            "A": self._decay(),
            "D": self.D.view(self.nheads, self.headdim) if self.D_has_hdim else self.D,
            "z": None if self.rmsnorm else z.unflatten(-1, (self.nheads, self.headdim)),
            "dt_bias": self.dt_bias,
            "dt_softplus": True,
            "dt_limit": self.dt_limit,
        }

    def _wants_gradient(self, u: Tensor) -> bool:
        """The decode ops have no gradient; the scan's stop at the states that the cache holds."""
        leaves = (u, *self.parameters())
        return torch.is_grad_enabled() and any(t.requires_grad for t in leaves)

    def _step_sizes(self, dt: Tensor) -> Tensor:
        """dt (…,h) as it enters the scan."""
        wide = torch.promote_types(dt.dtype, torch.float32)
        return F.softplus(dt.to(wide) + self.dt_bias.to(wide)).clamp(*self.dt_limit)

    def _continue(self, xBC, dt, z, cu_seqlens, cache, slots, num_tokens, watch, counted) -> Tensor:
        """Any number of tokens, dense or packed, from the cache's states to new ones."""
        shape = xBC.shape[:2]
        rows = shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        conv, ssm = cache.read(slots, rows, self._decay())
        added = counted
        if added is None:
            added = cache.lengths.added(rows, shape[1], num_tokens, cu_seqlens)
        ragged = num_tokens is not None
        if ragged:
            # Each row becomes two packed sequences, its tokens and its padding: states stop at the last real token.
            cu_seqlens = _row_bounds(num_tokens, shape[1])
            conv, ssm = _beside_zeros(conv), _beside_zeros(ssm)
            xBC, dt, z = (t.reshape(1, -1, t.shape[-1]) for t in (xBC, dt, z))
        xBC, conv = self.conv1d(
            xBC, cu_seqlens=cu_seqlens, initial_state=conv.to(xBC.dtype), return_final_state=True
        )
        x, B, C = self._heads(xBC)
        if watch is not None:
            watch(C, B, self._step_sizes(dt))
        y, ssm = ssd_scan(
            *(x, dt),
            B=B,
            C=C,
            cu_seqlens=cu_seqlens,
            initial_states=ssm,
            return_final_states=True,
            **self._scan_arguments(z),
        )
        if ragged:
            conv, ssm = conv[::2], ssm[::2]
        cache.write(slots, conv, ssm, added)
        return y.view(*shape, *y.shape[2:])


def _initial_dt_bias(heads, dt_min, dt_max, floor, device, dtype) -> Tensor:
    """softplus^-1 of a step size that is log-uniform in [dt_min, dt_max]."""
    low, high = math.log(dt_min), math.log(dt_max)
    dt = torch.exp(torch.rand(heads, device=device, dtype=dtype) * (high - low) + low)
    dt = dt.clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


def _row_bounds(num_tokens: Tensor, length: int) -> Tensor:
    """Bounds of 2b packed sequences: each row's real tokens, then its padding."""
    start = torch.arange(num_tokens.shape[0], device=num_tokens.device) * length
    real = start + num_tokens.to(torch.int64).clamp(0, length)
    bounds = torch.stack([start, real], 1).flatten()
    return torch.cat([bounds, bounds.new_full((1,), num_tokens.shape[0] * length)])


def _beside_zeros(state: Tensor) -> Tensor:
    """(r, ...) -> (2r, ...): zeros after each row."""
    return torch.stack([state, torch.zeros_like(state)], 1).flatten(0, 1)
