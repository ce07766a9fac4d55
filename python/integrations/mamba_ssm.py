"""The functions of mamba_ssm and causal_conv1d, by their names and signatures, on Tigon's ops.

    from tigon.integrations.mamba_ssm import mamba_chunk_scan_combined, selective_state_update, causal_conv1d_fn

Neither package is imported. Signatures follow mamba-ssm 2.3.2 and causal-conv1d 1.7.0; keyword-only arguments are
Tigon's own. What differs from the originals:

- gradients flow through everything returned, per-sequence states included;
- `cu_seqlens` keeps sequences apart (in mamba_ssm it only picks states); it needs batch 1;
- `seq_idx`: a sequence is a run of equal ids in a row, a negative id is padding and gives zeros. Finding how many
  there are makes the host wait once for the device; pass `cu_seqlens`, or `max_sequences`, and nothing waits;
- initial states reach the first sequence of a row, whatever its id (in mamba_ssm only if its id is 0);
- states are carried and returned in fp32 whatever the activations; `state_dtype` casts those that are returned;
- D, dt_bias and biases may be None wherever the originals name them, and the decode step takes a `dt_limit`.

Refused by name: untied Mamba-1 forms and circular windows (see `selective_state_update`, `causal_conv1d_update`),
and whatever Tigon's ops refuse: dtypes that differ between activations, p or n over 256, more than 16 tokens a step.

Sources: github.com/state-spaces/mamba, github.com/Dao-AILab/causal-conv1d; formulas in tigon.ops.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tigon import ops
from tigon.integrations.packing import Packing, from_bounds, from_ids
from tigon.ops.checks import readable

_NO_LIMIT = (0.0, float("inf"))


def _packing(
    seq_idx: Tensor | None, cu_seqlens: Tensor | None, rows: Tensor, max_sequences: int | None
) -> Packing | None:
    """How `rows` (b,l,...) are packed, or None if they are not."""
    if seq_idx is not None and seq_idx.shape != rows.shape[:2]:
        raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}, not {tuple(rows.shape[:2])}")
    if max_sequences is not None and max_sequences < 1:
        raise ValueError(f"max_sequences must be positive, got {max_sequences}")
    if cu_seqlens is None:
        return None if seq_idx is None else from_ids(seq_idx, max_sequences)
    if rows.shape[0] != 1:
        raise ValueError(f"cu_seqlens needs batch 1, got batch {rows.shape[0]}")
    packing = from_bounds(cu_seqlens)
    if seq_idx is None:
        return packing
    if readable(seq_idx) and not torch.equal(
        from_ids(seq_idx).cu_seqlens.unique(), cu_seqlens.unique().to(torch.int32)
    ):
        raise ValueError("seq_idx and cu_seqlens disagree on where sequences begin")
    return Packing(packing.cu_seqlens, packing.first, packing.last, packing.real, seq_idx < 0)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
    *,
    max_sequences: int | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """The Mamba-2 scan, `tigon.ssd_scan`: S_t = exp(A dt') S + dt' x B^T, y = (S C + D x) silu(z).

    Args:
        x, z: (b,l,h,p). dt: (b,l,h). A, dt_bias: (h). B, C: (b,l,g,n). D: (h) or (h,p).
        chunk_size: accepted; the result does not depend on it beyond rounding.
        initial_states: (b,h,p,n), for the first sequence of each row; with cu_seqlens also (s,h,p,n), one each.
        seq_idx: (b,l) int32 ids. cu_seqlens: (s+1) bounds, batch 1. With both they must agree; cu_seqlens is used.
        state_dtype: of the states that are returned; fp32 if None.
        max_sequences: a bound on the runs of ids in seq_idx, padding included; outputs are NaN if it is exceeded.

    Returns:
        y like x; then, if asked for, final states (b,h,p,n) of each row's last sequence and the end states
        (s,h,p,n) of all sequences.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device, by name; return_varlen_states without cu_seqlens.
    """
    if return_varlen_states and cu_seqlens is None:
        raise ValueError("return_varlen_states needs cu_seqlens")
    packing = _packing(seq_idx, cu_seqlens, x, max_sequences)
    options = {
        "chunk_size": chunk_size,
        "D": D,
        "dt_bias": dt_bias,
        "dt_softplus": dt_softplus,
        "dt_limit": dt_limit,
        "return_final_states": True,
    }
    if packing is None:
        y, final = ops.ssd_scan(x, dt, A, B, C, z=z, initial_states=initial_states, **options)
        ends = None
    else:
        each = cu_seqlens is not None and initial_states is not None
        each = each and initial_states.shape[0] == packing.sequences
        flat = (packing.tokens(t) for t in (x, dt, B, C, z))
        x_, dt_, B_, C_, z_ = flat
        y, ends = ops.ssd_scan(
            *(x_, dt_, A, B_, C_),
            z=z_,
            initial_states=initial_states if each else packing.enter(initial_states),
            cu_seqlens=packing.cu_seqlens,
            **options,
        )
        y = packing.rows(y, x)
        final = packing.leave(ends, None if each else initial_states)
    out = (y,)
    out += (_cast(final, state_dtype),) if return_final_states else ()
    out += (_cast(ends, state_dtype),) if return_varlen_states else ()
    return out if len(out) > 1 else y


def _cast(state: Tensor, dtype: torch.dtype | None) -> Tensor:
    return state if dtype is None else state.to(dtype)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    max_sequences: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A Mamba-2 layer between its projections: split, convolution, scan, gated norm and, if given, projection.

    Args:
        zxbcdt: (b, l, 2 m + 2 h p + 2 g n + h): m channels of a SwiGLU branch [gate, value] (m may be 0), z, then
            x, B, C, dt. conv1d_weight: (h p + 2 g n, width). conv1d_bias: (h p + 2 g n).
        dt_bias, A: (h). D: (h) or (h,p); headdim (p) is needed unless D is (h,p).
        rmsnorm_weight: (h p), gated norm over h p / g channels; None: the gate is applied in the scan.
        outproj_weight: (d, m + h p). outproj_bias: (d).
        Others as in `mamba_chunk_scan_combined`; softplus is always applied to dt.

    Returns:
        y (b, l, m + h p), or (b,l,d) projected; then, if asked for, final states (b,h,p,n).

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device, by name; headdim or outproj_weight missing.
    """
    h = A.shape[0]
    p = D.shape[1] if D is not None and D.dim() == 2 else headdim
    if p is None:
        raise ValueError("headdim is needed unless D is (nheads, headdim)")
    if outproj_bias is not None and outproj_weight is None:
        raise ValueError("outproj_bias was given without outproj_weight")
    dim = h * p
    bc = conv1d_weight.shape[0] - dim  # B and C: 2 g n
    other = zxbcdt.shape[-1] - 2 * dim - bc - h
    if bc <= 0 or bc % (2 * ngroups) or other < 0 or other % 2:
        raise ValueError(
            f"zxbcdt has {zxbcdt.shape[-1]} channels and conv1d_weight {conv1d_weight.shape[0]}: not those of "
            f"{h} heads of {p} in {ngroups} groups"
        )
    side, z, xBC, dt = torch.split(zxbcdt, [other, dim, dim + bc, h], -1)
    packing = _packing(seq_idx, cu_seqlens, zxbcdt, max_sequences)
    rows = xBC if packing is None else packing.tokens(xBC)
    xBC = ops.causal_conv1d(
        *(rows, conv1d_weight, conv1d_bias),
        activation=activation,
        cu_seqlens=None if packing is None else packing.cu_seqlens,
    ).view(xBC.shape)
    x, B, C = torch.split(xBC, [dim, bc // 2, bc // 2], -1)
    z_heads = z.unflatten(-1, (h, p))
    y, final = mamba_chunk_scan_combined(
        *(x.unflatten(-1, (h, p)), dt, A),
        *(B.unflatten(-1, (ngroups, -1)), C.unflatten(-1, (ngroups, -1)), chunk_size, D),
        z=z_heads if rmsnorm_weight is None else None,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
        state_dtype=state_dtype,
        max_sequences=max_sequences,
    )
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = ops.gated_rms_norm(
            *(y, z, rmsnorm_weight),
            eps=rmsnorm_eps,
            group_size=dim // ngroups,
            norm_before_gate=norm_before_gate,
        )
    if other:
        gate, value = side.chunk(2, -1)
        y = torch.cat([F.silu(gate) * value, y], -1)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, final) if return_final_states else y


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    *,
    dt_limit: tuple[float, float] = _NO_LIMIT,
) -> Tensor:
    """One decode step of Mamba-2, `tigon.ssd_update`; the state is updated in place.

    The heads form, with what mamba_ssm calls tied arguments: one dt, A and dt_bias a head, expanded without a copy
    (stride 0) to the shapes below. Refused by name: the form without heads (Mamba-1), and untied arguments.

    Args:
        state: (slots,h,p,n), h, p, n contiguous. x, z: (b,h,p). B, C: (b,g,n). D: (h,p).
        dt: (b,h,p), A: (h,p,n), dt_bias: (h,p): stride 0 in p and n.
        state_batch_indices: (b) int, the slot of each row; negative: padding, zeros come out, nothing is touched.
        dt_limit: clamps dt after softplus, as the scan does; mamba_ssm's step has no such argument.

    Returns:
        y like x.

    Raises:
        NotImplementedError: Mamba-1's forms. ValueError, TypeError: what `tigon.ssd_update` raises.
    """
    if state.dim() != 4:
        raise NotImplementedError(
            f"selective_state_update: state has shape {tuple(state.shape)}; only the heads form "
            "(slots, nheads, headdim, dstate) of Mamba-2 is supported"
        )
    heads = (state.shape[1], *state.shape[2:])
    return ops.ssd_update(
        *(state, x, _tied("dt", dt, x.shape, 1), _tied("A", A, heads, 2), B, C),
        D=D,
        z=z,
        dt_bias=None if dt_bias is None else _tied("dt_bias", dt_bias, heads[:2], 1),
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        state_indices=state_batch_indices,
    )


def _tied(name: str, t: Tensor, shape: tuple[int, ...], dims: int) -> Tensor:
    """`t` without its last `dims` dimensions, along which it must be an expansion."""
    if tuple(t.shape) != tuple(shape):
        raise ValueError(
            f"selective_state_update: {name} has shape {tuple(t.shape)}, expected {tuple(shape)}"
        )
    if any(t.shape[-k] > 1 and t.stride(-k) for k in range(1, dims + 1)):
        raise NotImplementedError(
            f"selective_state_update: {name} is not tied: it must be one value a head, expanded without a copy "
            "(stride 0), as mamba_ssm's Mamba2.step passes it; Mamba-1's per-channel values are not supported"
        )
    return t[(..., *(0,) * dims)]


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    *,
    max_sequences: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution, `tigon.causal_conv1d`, channels before tokens.

    Args:
        x: (b,d,l); free of copies if channels are contiguous (channel-last), as in a transposed projection.
        weight: (d,width). bias: (d). activation: None, "silu" or "swish".
        seq_idx: (b,l) int32; may be combined with states, which belong to a row's first and last sequence.
        initial_states: (b,d,width-1). final_states_out: (b,d,width-1), written to.
        max_sequences: as in `mamba_chunk_scan_combined`.

    Returns:
        y (b,d,l), channel-last; then, if asked for, final states (b,d,width-1).

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device, by name.
    """
    rows = x.transpose(1, 2)
    packing = _packing(seq_idx, None, rows, max_sequences)
    y, final = ops.causal_conv1d(
        *(rows if packing is None else packing.tokens(rows), weight, bias),
        activation=activation,
        initial_state=initial_states if packing is None else packing.enter(initial_states),
        cu_seqlens=None if packing is None else packing.cu_seqlens,
        return_final_state=True,
    )
    if packing is not None:
        y, final = packing.rows(y, rows), packing.leave(final, initial_states)
    y = y.transpose(1, 2)
    if not return_final_states:
        return y
    return y, final if final_states_out is None else final_states_out.copy_(final)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Decode step of the convolution, `tigon.causal_conv1d_update`; conv_state is updated in place.

    Args:
        x: (b,d) or (b,d,m), 1 <= m <= 16. weight: (d,width). bias: (d). activation: None, "silu" or "swish".
        conv_state: (slots,d,W), W >= width-1, newest input last. mamba_ssm allocates it channel-last: such a window
            is copied and copied back.
        conv_state_indices: (b) int, the slot of each row; negative: padding.
        cache_seqlens: refused: circular windows are not supported.

    Returns:
        y like x.

    Raises:
        NotImplementedError: cache_seqlens. ValueError, TypeError: what `tigon.causal_conv1d_update` raises.
    """
    if cache_seqlens is not None:
        raise NotImplementedError(
            "causal_conv1d_update: cache_seqlens (a circular window) is not supported; keep the newest input last"
        )
    window = conv_state.contiguous()
    y = ops.causal_conv1d_update(
        x if x.dim() == 2 else x.transpose(1, 2),
        *(window, weight, bias),
        activation=activation,
        state_indices=conv_state_indices,
    )
    if window is not conv_state:
        conv_state.copy_(window)
    return y if x.dim() == 2 else y.transpose(1, 2)


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last `state_len` inputs of each packed sequence, zeros before its first.

    Args:
        x: (tokens,d). cu_seqlens: (s+1) bounds. state_len: columns, W of a decode window.

    Returns:
        states (s,d,state_len), newest last.
    """
    start, end = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    token = end - state_len + torch.arange(state_len, device=x.device)
    if not x.shape[0]:
        return x.new_zeros(token.shape[0], x.shape[1], state_len)
    rows = x[token.clamp(0, x.shape[0] - 1)]
    return torch.where((token >= start)[..., None], rows, 0.0).transpose(1, 2).contiguous()


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """RMSNorm with a gate: norm(x) silu(z) if norm_before_gate, else norm(x silu(z)); norm(x) = x r weight + bias.

    Args:
        x, z: (..., d) of one dtype. weight, bias: (d). group_size: channels normalized together; d if None.

    Returns:
        y like x.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device, by name.
    """
    options = {"eps": eps, "group_size": group_size}
    if z is not None:
        y = ops.gated_rms_norm(x, z, weight, norm_before_gate=norm_before_gate, **options)
    elif group_size in (None, x.shape[-1]):
        y = ops.rms_norm(x, weight, eps=eps)
    else:
        groups = x.unflatten(-1, (-1, group_size))
        y = ops.rms_norm(groups, torch.ones_like(weight[:group_size]), eps=eps).flatten(-2) * weight
        y = y.to(x.dtype)
    if bias is None:
        return y
    return (y + (bias * F.silu(z) if z is not None and norm_before_gate else bias)).to(x.dtype)


class RMSNorm(nn.Module):
    """The gated RMSNorm of mamba_ssm (`RMSNormGated`): `forward(x, z=None)`, parameter `weight` (hidden_size)."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """As `rmsnorm_fn`."""
        return rmsnorm_fn(
            *(x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate)
        )
