"""What a Mamba layer remembers between calls, by slot, and how tokens of a call are undone.

    MambaCache       states after the last token; a call advances them for good
    SnapshotCache    a call leaves the pool alone and keeps the state after each of its tokens, by slot: m states more
                     a slot; `keep` copies the one that is wanted
    ReplayMambaCache a call leaves the state alone and keeps its inputs in a ring (tigon.ops.replay): a state is
                     rewritten once in `flush` tokens, and a token is undone by not moving the cursor

All three answer `step` (a few tokens a row, by the decode ops), `read` and `write` (any number, by the scan).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tigon.modules.state import Lengths, read_slots, write_slots
from tigon.ops import ssd_update
from tigon.ops.replay import ReplayCache as Ring
from tigon.ops.replay import (
    ReplayCursor,
    replay_commit,
    replay_state,
    replay_store_window,
    replay_window,
)
from tigon.ops.ssd import MAX_STEP
from tigon.reference.state_format import decode_state, encode_state, is_scaled, raw

Convolve = Callable[..., Tensor]  # CausalConv1d: (x, conv_state=…, state_indices=…, …) -> y
Split = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # (b,l,conv_dim) -> x, B, C


def _read(state: Tensor | None, slots: Tensor | None, rows: int) -> Tensor | None:
    """`read_slots`, of any dtype, or of None."""
    return None if state is None else read_slots(raw(state), slots, rows).view(state.dtype)


def _write(state: Tensor | None, new: Tensor | None, slots: Tensor | None) -> None:
    if state is not None:
        write_slots(raw(state), raw(new), slots)


@dataclass
class MambaCache:
    """conv (slots,conv_dim,d_conv-1): the last inputs of the convolution, newest last. ssm (slots,h,p,n); scale
    (slots,h,p) fp32 where it is 8 bits wide. lengths: read where states are rounded at random; advanced by the caller.
    seeds (slots) int64: of the requests, for random rounding."""

    conv: Tensor
    ssm: Tensor
    scale: Tensor | None = None
    seeds: Tensor | None = None
    lengths: Lengths | None = field(default=None, repr=False)
    rounding: str = "nearest"
    layer: int = 0

    most_tokens = MAX_STEP  # of a row in one call of `step`
    _per_slot = ("conv", "ssm", "scale")

    def tensors(self) -> tuple[Tensor, ...]:
        """What belongs to slots and to this layer alone; FP8 as bytes."""
        found = (getattr(self, name) for name in self._per_slot)
        return tuple(raw(t) for t in found if t is not None)

    def selected(self, slots: Tensor, **shared) -> "MambaCache":
        """A copy of some slots; shared: lengths, seeds and the like of the copy."""
        own = {name: _read(getattr(self, name), slots, slots.shape[0]) for name in self._per_slot}
        return replace(self, **own, **shared)

    def _random(self, slots: Tensor | None, rows: int) -> dict:
        if self.rounding == "nearest":
            return {}
        return {
            "rounding": self.rounding,
            "seeds": read_slots(self.seeds, slots, rows),
            "positions": read_slots(self.lengths.tensor, slots, rows),
            "layer": self.layer,
        }

    def step(
        self, convolve: Convolve, split: Split, xBC, dt, arguments, slots, num_tokens, ancestors
    ) -> Tensor:
        """y (b,m,h,p) of m new tokens a row. arguments: of ssd_update, A to dt_limit."""
        if ancestors is not None:
            raise ValueError("Mamba2: trees of tokens need a cache with rollback='replay'")
        where = {"state_indices": slots, "num_tokens": num_tokens}
        x, B, C = split(convolve(xBC, conv_state=self.conv, **where))
        random = self._random(slots, x.shape[0])
        return ssd_update(
            self.ssm, x, dt, B=B, C=C, state_scale=self.scale, **random, **arguments, **where
        )

    def read(self, slots: Tensor | None, rows: int, A: Tensor) -> tuple[Tensor, Tensor]:
        """(conv, ssm) of each row, to continue from by the scan."""
        acc = torch.promote_types(self.conv.dtype, torch.float32)
        held = _read(self.ssm, slots, rows), _read(self.scale, slots, rows)
        return read_slots(self.conv, slots, rows), decode_state(*held, acc)

    def write(self, slots: Tensor | None, conv: Tensor, ssm: Tensor, added: Tensor) -> None:
        """Leave the scan's states. added (rows): the tokens that they have seen since `read`."""
        write_slots(self.conv, conv, slots)
        self._write_state(slots, ssm, added)

    def _write_state(self, slots, ssm: Tensor, added: Tensor) -> None:
        random = self._random(slots, ssm.shape[0])
        if random:
            del random["rounding"]
            random["positions"] = random["positions"] + added
        state, scale = encode_state(ssm.detach(), self.ssm.dtype, **random)
        _write(self.ssm, state, slots)
        _write(self.scale, scale, slots)


@dataclass
class SnapshotCache(MambaCache):
    """after_ssm (slots,m,h,p,n), after_scale (slots,m,h,p): what the state was after each token of the last call.
    inputs (slots,conv_dim,d_conv-1+m): the convolution's window then, and those tokens behind it."""

    after_ssm: Tensor | None = None
    after_scale: Tensor | None = None
    inputs: Tensor | None = None

    _per_slot = ("conv", "ssm", "scale", "after_ssm", "after_scale", "inputs")

    @property
    def most_tokens(self) -> int:
        return self.after_ssm.shape[1]

    def step(
        self, convolve: Convolve, split: Split, xBC, dt, arguments, slots, num_tokens, ancestors
    ) -> Tensor:
        if ancestors is not None:
            raise ValueError("Mamba2: trees of tokens need a cache with rollback='replay'")
        rows, m = xBC.shape[:2]
        conv = read_slots(self.conv, slots, rows).clone()
        seen = torch.cat([conv, xBC.transpose(1, 2).to(conv.dtype)], 2)
        unused = self.inputs.shape[2] - seen.shape[2]
        write_slots(self.inputs, torch.nn.functional.pad(seen, (0, unused)), slots)
        x, B, C = split(convolve(xBC, conv_state=conv, num_tokens=num_tokens))
        random = self._random(slots, rows)
        state = _read(self.ssm, slots, rows).clone()
        scale = None if self.scale is None else _read(self.scale, slots, rows).clone()
        after, scales, y = [], [], []
        z = arguments.get("z")
        for t in range(m):
            now = arguments if z is None else arguments | {"z": z[:, t : t + 1]}
            real = None if num_tokens is None else (num_tokens - t).clamp(0, 1)
            one = slice(t, t + 1)
            feed = (x[:, one], dt[:, one])
            y.append(
                ssd_update(
                    state, *feed, B=B[:, one], C=C[:, one], num_tokens=real, state_scale=scale,
                    **random, **now,
                )
            )  # fmt: skip
            if random:
                random["positions"] = random["positions"] + 1
            after.append(raw(state).clone())
            scales += [] if scale is None else [scale.clone()]
        for pool, states in ((self.after_ssm, after), (self.after_scale, scales)):
            if states:
                states = torch.stack(states + states[-1:] * (self.most_tokens - m), 1)
                write_slots(raw(pool), states, slots)
        return torch.cat(y, 1)

    def keep(self, slots: Tensor | None, num_new: Tensor) -> None:
        """Make the state after num_new (b) tokens of the last call the state; 0 leaves it as it was."""
        rows = num_new.shape[0]
        some = num_new > 0
        if slots is None:
            slots = torch.arange(rows, device=num_new.device)
        chosen = torch.where(some, slots, -1)
        last = (num_new - 1).clamp(min=0).to(torch.int64)
        place = slots.clamp(min=0)
        for pool, after in ((self.ssm, self.after_ssm), (self.scale, self.after_scale)):
            if pool is not None:
                write_slots(raw(pool), raw(after)[place, last], chosen)
        width = self.conv.shape[2]
        column = num_new.clamp(min=0)[:, None] + torch.arange(width, device=num_new.device)
        seen = self.inputs[place]
        index = column[:, None].expand(-1, seen.shape[1], -1)
        write_slots(self.conv, seen.gather(2, index), chosen)


@dataclass
class ReplayMambaCache(MambaCache):
    """ssm: the states after the cursor's checkpoints. ring: the inputs since then; `conv` is its window, by position.
    tokens: of a row in one call, at most. width: of the convolution."""

    ring: Ring | None = None
    cursor: ReplayCursor | None = field(default=None, repr=False)
    tokens: int = 1
    width: int = 4
    _per_slot = ("ssm", "scale")

    @property
    def most_tokens(self) -> int:
        return self.tokens

    def tensors(self) -> tuple[Tensor, ...]:
        return (*super().tensors(), *self.ring.tensors())

    def selected(self, slots: Tensor, **shared) -> "ReplayMambaCache":
        ring = Ring(*(t[slots] for t in self.ring.tensors()))
        return super().selected(slots, ring=ring, conv=ring.conv, **shared)

    @property
    def _replay(self) -> tuple[Ring, ReplayCursor]:
        return self.ring, self.cursor

    def step(
        self, convolve: Convolve, split: Split, xBC, dt, arguments, slots, num_tokens, ancestors
    ) -> Tensor:
        where = {"state_indices": slots, "num_tokens": num_tokens, "ancestors": ancestors}
        where["replay"] = self._replay
        x, B, C = split(convolve(xBC, conv_state=self.ring.conv, **where))
        random = self._random(slots, x.shape[0])
        random.pop("positions", None)  # the cursor knows
        return ssd_update(
            self.ssm, x, dt, B=B, C=C, state_scale=self.scale, **random, **arguments, **where
        )

    def read(self, slots: Tensor | None, rows: int, A: Tensor) -> tuple[Tensor, Tensor]:
        if slots is None:
            slots = torch.arange(rows, device=self.ssm.device)
        random = self._random(slots, rows)
        random.pop("positions", None)
        ssm = replay_state(self.ssm, *self._replay, slots, A, self.scale, **random)
        return replay_window(*self._replay, slots, self.width), ssm

    def write(self, slots: Tensor | None, conv: Tensor, ssm: Tensor, added: Tensor) -> None:
        rows = conv.shape[0]
        if slots is None:
            slots = torch.arange(rows, device=self.ssm.device)
        lengths = read_slots(self.lengths.tensor, slots, rows) + added
        replay_store_window(self.ring, lengths, slots, conv.detach())
        self._write_state(slots, ssm, added)

    def keep_path(self, slots: Tensor | None, path: Tensor, num_new: Tensor) -> None:
        """Move the accepted nodes of a tree together in the ring."""
        replay_commit(*self._replay, slots, path, num_new)


def allocate(
    slots: int,
    sizes: tuple[int, int, int, int],
    channels: int,
    width: int,
    *,
    dtype: torch.dtype,
    ssm_dtype: torch.dtype,
    device: torch.device | str,
    layer: int = 0,
    rounding: str = "nearest",
    seeds: Tensor | None = None,
    lengths: Lengths | None = None,
    rollback: str | None = None,
    tokens: int = 1,
    cursor: ReplayCursor | None = None,
) -> MambaCache:
    """Zeroed states of one layer: sizes (h,p,g,n), `channels` of the convolution. See `Mamba2.allocate_cache`."""
    if rollback not in (None, "replay", "snapshot"):
        raise ValueError(f"rollback must be 'replay', 'snapshot' or None, got {rollback!r}")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding must be 'nearest' or 'stochastic', got {rounding!r}")
    if rollback == "replay" and cursor is None:
        raise ValueError("rollback='replay' needs a cursor (ReplayCursor.allocate)")
    h, p, g, n = sizes

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(slots, *shape, dtype=dtype, device=device)

    if lengths is None:
        lengths = Lengths(zeros(dtype=torch.int64), 2**62)
    shared = {
        "ssm": zeros(h, p, n, dtype=ssm_dtype),
        "scale": zeros(h, p, dtype=torch.float32) if is_scaled(ssm_dtype) else None,
        "seeds": zeros(dtype=torch.int64) if seeds is None else seeds,
        "lengths": lengths,
        "rounding": rounding,
        "layer": layer,
    }
    if rollback == "replay":
        ring = Ring.allocate(
            slots,
            tokens=tokens,
            flush=cursor.flush,
            heads=h,
            head_dim=p,
            groups=g,
            state_dim=n,
            channels=channels,
            width=width,
            dtype=dtype,
            device=device,
        )
        return ReplayMambaCache(
            ring.conv, **shared, ring=ring, cursor=cursor, tokens=tokens, width=width
        )
    conv = zeros(channels, width - 1, dtype=dtype)
    if rollback is None:
        return MambaCache(conv, **shared)
    return SnapshotCache(
        conv,
        **shared,
        after_ssm=zeros(tokens, h, p, n, dtype=ssm_dtype),
        after_scale=zeros(tokens, h, p, dtype=torch.float32) if is_scaled(ssm_dtype) else None,
        inputs=zeros(channels, width - 1 + tokens, dtype=dtype),
    )
