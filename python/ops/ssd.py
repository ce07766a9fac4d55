"""Mamba-2 state-space duality: `ssd_scan` over sequences and `ssd_update`, the decode step.

    dt'_t = clamp(softplus(dt_t + dt_bias), *dt_limit)          (softplus if dt_softplus; identity above 20)
    S_t   = exp(A dt'_t) S_{t-1} + dt'_t x_t B_t^T
    y_t   = (S_t C_t + D x_t) * silu(z_t)

Source: Dao and Gu 2024, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured
State Space Duality" (arXiv 2405.21060). Head i uses group i // (h / g).
"""

import torch
from torch import Tensor

from tigon.ops.checks import INDEX, Check, activation_dtypes, beside_dtypes, inner_is_strided
from tigon.ops.dispatch import call, inner, is_batch_invariant, run
from tigon.ops.library import differentiable, once_differentiable, register
from tigon.ops.replay import STATES, check_ancestors, check_rings, check_slots, unpack
from tigon.reference.state_format import is_scaled

MAX_DIM = 256  # of p and n: one program keeps a (p tile, n) state in registers
MAX_STEP = 16  # tokens a call of ssd_update

_SCAN_ARGUMENTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? initial_states, Tensor? cu_seqlens, Tensor? state_positions, "
    "bool dt_softplus, float dt_min, float dt_max, int chunk_size"
)


def _scan(x, *rest):
    return run("ssd_scan", x, x, *rest, batch_invariant=is_batch_invariant())


def _scan_fake(x, dt, A, B, C, D, z, dt_bias, initial, cu_seqlens, positions, *rest):
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (x.shape[2], x.shape[3], B.shape[3])
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    wanted = 0 if positions is None else positions.shape[0]
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty((sequences, *state), dtype=acc),
        x.new_empty((wanted, *state), dtype=acc),
    )


def _scan_backward(dy, dfinal, dstates, x, *rest):
    invariant = is_batch_invariant()
    grads = run("ssd_scan_backward", x, dy, dfinal, dstates, x, *rest, batch_invariant=invariant)
    return tuple(x.new_empty(0) if g is None else g for g in grads)


def _scan_backward_fake(dy, dfinal, dstates, x, dt, A, B, C, D, z, dt_bias, initial, *rest):
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial)
    return tuple(
        x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in inputs
    )


def _scan_setup(ctx, inputs, output):
    *tensors, ctx.dt_softplus, ctx.dt_min, ctx.dt_max, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _scan_autograd(ctx, dy, dfinal, dstates):
    x, *rest = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    grads = torch.ops.tigon.ssd_scan_backward(
        inner("dy", dy, 2),
        None if dfinal is None else dfinal.contiguous(),
        None if dstates is None else dstates.contiguous(),
        *(x, *rest),
        ctx.dt_softplus,
        ctx.dt_min,
        ctx.dt_max,
        ctx.chunk_size,
    )
    given = (x, *rest[:8])
    grads = [g if t is not None else None for g, t in zip(grads, given, strict=True)]
    return (*grads, None, None, None, None, None, None)


register(
    f"ssd_scan({_SCAN_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _scan,
    _scan_fake,
    autocast=("x", "B", "C", "z"),
)
register(
    f"ssd_scan_backward(Tensor dy, Tensor? dfinal, Tensor? dstates, {_SCAN_ARGUMENTS}) -> "
    f"({', '.join(['Tensor'] * 9)})",
    _scan_backward,
    _scan_backward_fake,
)
differentiable("ssd_scan", _scan_autograd, _scan_setup)
once_differentiable("ssd_scan_backward")


def _check_common(
    check, x, dt, A, B, C, D, z, dt_bias, dt_limit, rows: str, cast: bool
) -> tuple[float, float]:
    beside, activations = beside_dtypes(x, cast), activation_dtypes(x, cast)
    check.tensor("dt", dt, f"{rows} h", dtypes=beside)
    check.tensor("A", A, "h", dtypes=beside)
    check.tensor("B", B, f"{rows} g n", dtypes=activations)
    check.tensor("C", C, f"{rows} g n", dtypes=activations)
    check.one_of("D", D, "h", "h p", dtypes=beside, optional=True)
    check.tensor("z", z, f"{rows} h p", dtypes=activations, optional=True)
    check.tensor("dt_bias", dt_bias, "h", dtypes=beside, optional=True)
    check.divides("g", "h")
    check.size("p", MAX_DIM)
    check.size("n", MAX_DIM)
    low, high = (float(v) for v in dt_limit)
    check.require(
        0 <= low <= high, f"dt_limit must be (low, high) with 0 <= low <= high, got {dt_limit}"
    )
    return low, high


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int = 128,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_states: bool = False,
    state_positions: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Mamba-2 scan of whole sequences (formula at the top of the module), differentiable in every float input.

    Args:
        x: (b,l,h,p) fp32, bf16 or fp16 (fp64 on the reference); p at most 256.
        dt: (b,l,h) time steps, x's dtype or fp32, any strides.
        A: (h) decay rates, negative in a trained model, x's dtype or fp32.
        B, C: (b,l,g,n) in x's dtype; g divides h; n at most 256.
        chunk_size: accepted for compatibility; the result does not depend on it beyond rounding.
        D: (h) or (h,p) skip connection, x's dtype or fp32.
        z: (b,l,h,p) gate, in x's dtype.
        dt_bias: (h), added to dt before softplus.
        dt_softplus: apply softplus to dt + dt_bias.
        dt_limit: (low, high) to which the time step is clamped afterwards.
        initial_states: (b,h,p,n), any float dtype; with cu_seqlens (s,h,p,n), one for each sequence.
        cu_seqlens: (s+1) int32 or int64 bounds of s packed sequences; then b = 1. Empty sequences are fine.
        return_final_states: also return the state after each sequence's last token.
        state_positions: (i) int64, token counts in packed coordinates (b = 1); also return the states right
            after that many tokens: of the sequence that holds the token before the position; at 0 the first
            sequence's initial state.

    Returns:
        y like x (contiguous); then, if asked for, final states (b,h,p,n) or (s,h,p,n) in fp32, and states
        (i,h,p,n) in fp32. All three carry gradients.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range, by name.
    """
    check = Check("ssd_scan")
    check.tensor("x", x, "b l h p")
    low, high = _check_common(check, x, dt, A, B, C, D, z, dt_bias, dt_limit, "b l", cast=True)
    b, length = x.shape[:2]
    check.require(
        isinstance(chunk_size, int) and chunk_size > 0,
        f"chunk_size must be positive, got {chunk_size}",
    )
    packed = cu_seqlens is not None
    if packed:
        check.tensor("cu_seqlens", cu_seqlens, "s+1", dtypes=INDEX)
        check.require(
            cu_seqlens.shape[0] > 1, "cu_seqlens must hold at least 2 bounds (1 sequence)"
        )
        check.require(
            b == 1, f"x has b={b}; with cu_seqlens the sequences are packed and b must be 1"
        )
        check.cu_seqlens(cu_seqlens, length)
        check.sizes["s"], check.source["s"] = cu_seqlens.shape[0] - 1, "cu_seqlens"
    if state_positions is not None:
        check.tensor("state_positions", state_positions, "i", dtypes=INDEX)
        check.require(
            b == 1, f"x has b={b}; state_positions are in packed coordinates and need b = 1"
        )
        check.within("state_positions", state_positions, 0, length)
    check.tensor("initial_states", initial_states, f"{'s' if packed else 'b'} h p n", optional=True)
    x, B, C = inner("x", x, 2), inner("B", B, 2), inner("C", C, 2)
    z, D = inner("z", z, 2), None if D is None else inner("D", D, D.dim())
    args = (
        *(x, dt, inner("A", A, 1), B, C, D, z, inner("dt_bias", dt_bias, 1)),
        *(inner("initial_states", initial_states, 3), inner("cu_seqlens", cu_seqlens, 1)),
        *(inner("state_positions", state_positions, 1), bool(dt_softplus), low, high, chunk_size),
    )
    sizes = {
        "b": b,
        "l": length,
        "h": x.shape[2],
        "p": x.shape[3],
        "g": B.shape[2],
        "n": B.shape[3],
    }
    sizes |= {"s": check.sizes.get("s", b), "itemsize": x.element_size()}
    y, final, states = call("ssd_scan", x, args, sizes)
    out = (y,)
    out += (final,) if return_final_states else ()
    out += (states,) if state_positions is not None else ()
    return out if len(out) > 1 else y


def _update(state, x, *rest):
    return run("ssd_update", x, state, x, *rest)


def _update_fake(state, x, *rest):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


register(
    "ssd_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, Tensor? state_indices, Tensor? num_tokens, bool dt_softplus, float dt_min, float dt_max, "
    "Tensor(b!)? state_scale=None, Tensor? seeds=None, Tensor? positions=None, int layer=0) -> Tensor",
    _update,
    _update_fake,
)


def ssd_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    state_indices: Tensor | None = None,
    num_tokens: Tensor | None = None,
    state_scale: Tensor | None = None,
    rounding: str = "nearest",
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    layer: int = 0,
    replay: tuple | None = None,
    ancestors: Tensor | None = None,
) -> Tensor:
    """Decode: advance slot-indexed states by 1 to 16 tokens, in place (formula at the top of the module).

    Unlike mamba_ssm and transformers, dt_limit applies here as it does in the scan.

    With `replay` the new tokens go to rings and the state is rewritten only at absolute positions that are multiples
    of cursor.flush, so that rejected tokens are undone by not advancing over them (`replay_advance`). Outputs are
    those of the recurrence whose state is rounded at these positions, whatever was grouped or rejected before.

    Args:
        state: (slots,h,p,n) fp32, bf16, fp16, or int8 or float8_e4m3fn with state_scale; updated in place; slots may be
            strided, the rest contiguous.
        x: (b,h,p) for one token a row, or (b,m,h,p) with 1 <= m <= 16, or m <= flush <= 32 with replay.
        dt: (b,h) or (b,m,h). A: (h). B, C: (b,g,n) or (b,m,g,n). z: like x. D: (h) or (h,p). dt_bias: (h).
            Dtypes as in ssd_scan.
        state_indices: (b) int32 or int64, the slot of each row; negative: padding, zeros come out and nothing is
            touched. None: row i uses slot i. Two rows may not name one slot.
        num_tokens: (b) int32 or int64, tokens of the row that are real, 0 to m; the others give zeros. None: all.
        state_scale: (slots,h,p) fp32, updated in place: of each row of an 8-bit state; value = code * scale.
        rounding: of the state to its dtype, "nearest" (ties to even) or "stochastic": 16 random bits an element below
            the last place kept, a function of (seed, layer, absolute position of the write, element). fp32 is exact.
        seeds: (b) int64, the request's seed; for stochastic rounding.
        positions: (b) int32 or int64, absolute position of the first new token; for stochastic rounding without replay,
            where the position of the write is positions + num_tokens. With replay the cursor says it.
        layer: names the random bits of stochastic rounding; without effect on nearest.
        replay: (ReplayCache of the layer, ReplayCursor), see `tigon.ops.replay`.
        ancestors: (b,m) int32 with replay: the new tokens are a tree, bit j of ancestors[b,i] says that node j is i or
            an ancestor of i; parents come before children.

    Returns:
        y like x.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range, by name.
        RuntimeError: an argument requires a gradient; ssd_scan has gradients.
    """
    check = Check("ssd_update")
    if rounding not in ("nearest", "stochastic"):
        check.fail(f"rounding must be 'nearest' or 'stochastic', got {rounding!r}")
    check.one_of("x", x, "b h p", "b m h p")
    single = x.dim() == 3
    low, high = _check_common(
        check, x, dt, A, B, C, D, z, dt_bias, dt_limit, "b" if single else "b m", cast=False
    )
    check.tensor("state", state, "slots h p n", dtypes=STATES)
    check.no_gradient("ssd_scan", state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    slots, b = state.shape[0], x.shape[0]
    m = 1 if single else x.shape[1]
    if replay is None:
        check.require(
            1 <= m <= MAX_STEP,
            f"x has m={m} tokens a row, allowed: 1 to {MAX_STEP}; use ssd_scan for more",
        )
    else:
        cache, cursor = unpack(check, replay, m)
        check_rings(check, cache, cursor, x, m)
    check.tensor("state_indices", state_indices, "b", dtypes=INDEX, optional=True)
    check.tensor("num_tokens", num_tokens, "b", dtypes=INDEX, optional=True)
    check_slots(check, "state has", slots, b, state_indices)
    check.within("num_tokens", num_tokens, 0, m)
    if inner_is_strided(state):
        check.fail("state must be contiguous in (h, p, n): it is updated in place")
    _check_rounding(check, state, state_scale, rounding, seeds, positions, layer, replay)
    if ancestors is not None and replay is None:
        check.fail("ancestors say which tokens of a tree see which; they need replay")
    ancestors = check_ancestors(check, ancestors, single)
    if single:
        x, dt, B, C = x[:, None], dt[:, None], B[:, None], C[:, None]
        z = None if z is None else z[:, None]
    tokens = (inner("x", x, 2), dt, inner("A", A, 1), inner("B", B, 2), inner("C", C, 2))
    tokens += (
        None if D is None else inner("D", D, D.dim()),
        inner("z", z, 2),
        inner("dt_bias", dt_bias, 1),
        inner("state_indices", state_indices, 1),
        inner("num_tokens", num_tokens, 1),
    )
    steps = (bool(dt_softplus), low, high)
    seeds = inner("seeds", seeds, 1) if rounding == "stochastic" else None
    sizes = {"b": b, "m": m, "h": x.shape[2], "p": x.shape[3], "g": B.shape[2], "n": B.shape[3]}
    sizes |= {"itemsize": x.element_size(), "state_itemsize": state.element_size()}
    if replay is None:
        positions = None if seeds is None else inner("positions", positions, 1)
        args = (state, *tokens, *steps, state_scale, seeds, positions, layer)
        y = call("ssd_update", x, args, sizes)
    else:
        where = (state, state_scale, cache.x, cache.B, cache.dt, cursor.checkpoint, cursor.length)
        args = (*where, *tokens, ancestors, seeds, cursor.flush, layer, *steps)
        forms = {"flush": cursor.flush, "tree": ancestors is not None}
        y = call("ssd_replay", x, args, sizes | forms)
    return y[:, 0] if single else y


def _check_rounding(check, state, state_scale, rounding, seeds, positions, layer, replay) -> None:
    if is_scaled(state.dtype):
        check.tensor("state_scale", state_scale, "slots h p", dtypes=(torch.float32,))
        if inner_is_strided(state_scale):
            check.fail("state_scale must be contiguous in (h, p): it is updated in place")
    elif state_scale is not None:
        check.fail(f"state_scale belongs to int8 and float8_e4m3fn states, state is {state.dtype}")
    check.require(
        isinstance(layer, int) and 0 <= layer < 2**24,
        f"layer must be an int from 0 to {2**24 - 1}, got {layer}",
    )
    check.tensor("seeds", seeds, "b", dtypes=(torch.int64,), optional=True)
    if replay is not None and positions is not None:
        check.fail("positions follow from the cursor with replay; leave them out")
    check.tensor("positions", positions, "b", dtypes=INDEX, optional=True)
    if rounding == "stochastic":
        check.require(seeds is not None, "rounding='stochastic' needs seeds (b) int64")
        check.require(
            positions is not None or replay is not None,
            "rounding='stochastic' needs positions (b), of each row's first new token",
        )
