"""Decoding with replay, step by step through the public ops, and what must come out: histories of drafts and
acceptance.

A history is a list of steps (m, accepted): m tokens a call, of which the first `accepted` (one number, or one a row)
are the sequence's own and stay; the others are other tokens, drafts that are rejected.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import tigon
from tigon.ops import ReplayCache, ReplayCursor, replay_advance
from tigon.reference.conv1d import conv1d_forward
from tigon.reference.ssd import process_dt
from tigon.reference.ssd_replay import replay_recurrence
from tigon.reference.state_format import decode_state, encode_state

OPTIONS = {"dt_softplus": True, "dt_limit": (0.001, 2.0)}
STEP = ("x", "dt", "B", "C", "z", "u")  # what a token brings


@dataclass
class Sequences:
    """b token sequences of one layer and its parameters: x, z (b,l,h,p), dt (b,l,h), B, C (b,l,g,n), u (b,l,d), the
    convolution's inputs."""

    tokens: dict[str, Tensor]
    A: Tensor
    D: Tensor
    dt_bias: Tensor
    weight: Tensor
    bias: Tensor
    state: Tensor  # (b,h,p,n), fp32 or fp64: before token 0

    @property
    def length(self) -> int:
        return self.tokens["x"].shape[1]

    def rows(self, rows: list[int]) -> "Sequences":
        """Some of the sequences."""
        given = vars(self) | {"state": self.state[rows]}
        given["tokens"] = {k: t[rows] for k, t in self.tokens.items()}
        return Sequences(**given)

    def on(self, device) -> "Sequences":
        given = {k: v.to(device) for k, v in vars(self).items() if k != "tokens"}
        return Sequences({k: t.to(device) for k, t in self.tokens.items()}, **given)

    def to(self, dtype: torch.dtype) -> "Sequences":
        def cast(t):
            return t.to(dtype)

        given = {k: v for k, v in vars(self).items() if k != "tokens"}
        return Sequences(
            {k: cast(t) for k, t in self.tokens.items()}, **{k: cast(t) for k, t in given.items()}
        )


def sequences(
    b=2, l=40, h=4, p=3, g=2, n=8, d=6, width=4, dtype=torch.float64, seed=0
) -> Sequences:
    generator = torch.Generator().manual_seed(seed)
    beside = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tokens = {
        "x": draw(b, l, h, p),
        "dt": draw(b, l, h),
        "B": draw(b, l, g, n),
        "C": draw(b, l, g, n),
    }
    tokens |= {"z": draw(b, l, h, p), "u": draw(b, l, d)}
    A = -torch.rand(h, generator=generator, dtype=torch.float64).to(beside) * 0.5
    return Sequences(
        *(tokens, A, draw(h, dtype=beside), draw(h, dtype=beside)),
        *(draw(d, width, dtype=beside), draw(d, dtype=beside), draw(b, h, p, n, dtype=beside)),
    )


class Decoder:
    """A layer's states and rings in a pool, and one row of `seqs` a slot."""

    def __init__(
        self,
        seqs: Sequences,
        slots: list[int],
        *,
        flush=4,
        m=4,
        state=None,
        start=0,
        pool=None,
        stochastic=False,
        seeds=None,
        layer=3,
        device="cpu",
    ):
        seqs = seqs.on(device)
        self.seqs, self.flush, self.device = seqs, flush, device
        x, B = seqs.tokens["x"], seqs.tokens["B"]
        b, _, h, p = x.shape
        self.indices = torch.tensor(slots, device=device)
        count = pool or max(slots) + 1
        self.cache = ReplayCache.allocate(
            count,
            tokens=m,
            flush=flush,
            heads=h,
            head_dim=p,
            groups=B.shape[2],
            state_dim=B.shape[3],
            channels=seqs.weight.shape[0],
            width=seqs.weight.shape[1],
            dtype=x.dtype,
            device=device,
        )
        for ring in self.cache.tensors():
            ring.fill_(float("nan"))  # whatever was there before
        self.cursor = ReplayCursor.allocate(count, flush, device)
        self.dtype = state or seqs.state.dtype
        self.seeds = (torch.arange(77, 77 + b) if seeds is None else seeds).to(device)
        self.round = (
            {"rounding": "stochastic", "seeds": self.seeds, "layer": layer} if stochastic else {}
        )
        self.layer = layer
        self.state = torch.zeros(count, h, p, B.shape[3], dtype=self.dtype, device=device)
        self.scale = None
        # The state of the prompt is stored as it would be at position `start`.
        at = (
            {
                "seeds": self.seeds,
                "positions": torch.full((b,), start, device=device),
                "layer": layer,
            }
            if stochastic
            else {}
        )
        codes, scale = encode_state(seqs.state, self.dtype, **at)
        if scale is not None:
            self.scale = torch.zeros(count, h, p, device=device)
            self.scale[self.indices] = scale
        for i, slot in enumerate(slots):
            self.state[slot] = codes[i]
        self.start = start
        self.cursor.start(self.indices, torch.full((b,), start, device=device))
        self.done = [0] * b  # tokens of the sequences that are committed

    def step(
        self, m: int, accepted, num_tokens=None, ancestors=None, order=None
    ) -> tuple[Tensor, Tensor]:
        """One call of both ops: (y (b,m,h,p), v (b,m,d)); drafts past `accepted` are other tokens."""
        b = len(self.done)
        accepted = [accepted] * b if isinstance(accepted, int) else accepted
        given = {}
        for name, t in self.seqs.tokens.items():
            given[name] = torch.randn(b, m, *t.shape[2:], dtype=torch.float64).to(t)
            for row, (done, count) in enumerate(zip(self.done, accepted)):
                given[name][row, :count] = t[row, done : done + count]
        return self.call(given, accepted, num_tokens, order, ancestors)

    def call(self, given, accepted, num_tokens=None, order=None, ancestors=None):
        b = len(self.done)
        order = list(range(b)) if order is None else order
        index = self.indices[order]
        seqs = self.seqs
        where = {
            "state_indices": index,
            "replay": (self.cache, self.cursor),
            "ancestors": ancestors,
        }
        if num_tokens is not None:
            where["num_tokens"] = torch.tensor(num_tokens, device=self.device)[order]
        given = {k: t[order] for k, t in given.items()}
        round = dict(self.round)
        if "seeds" in round:
            round["seeds"] = round["seeds"][order]
        v = tigon.causal_conv1d_update(given["u"], None, seqs.weight, seqs.bias, **where)
        y = tigon.ssd_update(
            *(self.state, given["x"], given["dt"], seqs.A, given["B"], given["C"]),
            D=seqs.D,
            z=given["z"],
            dt_bias=seqs.dt_bias,
            state_scale=self.scale,
            **OPTIONS,
            **where,
            **round,
        )
        if accepted is not None:
            self.advance(accepted)
        back = torch.empty(b, dtype=torch.int64)
        back[order] = torch.arange(b)
        return y[back], v[back]

    def advance(self, accepted):
        count = torch.tensor(accepted, dtype=torch.int32, device=self.device)
        replay_advance(self.cursor, self.indices, count)
        self.done = [a + n for a, n in zip(self.done, accepted)]

    def run(self, history) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs of the committed tokens, one tensor a row."""
        rows, convs = [[] for _ in self.done], [[] for _ in self.done]
        for m, accepted in history:
            accepted = [accepted] * len(self.done) if isinstance(accepted, int) else accepted
            y, v = self.step(m, accepted)
            for r, count in enumerate(accepted):
                rows[r].append(y[r, :count])
                convs[r].append(v[r, :count])
        empty = [self.seqs.tokens[name][0, :0] for name in ("x", "u")]
        return [torch.cat([empty[0], *r]) for r in rows], [torch.cat([empty[1], *r]) for r in convs]

    def current(self) -> Tensor:
        """The states after all committed tokens."""
        return tigon.ops.replay_state(
            *(self.state, self.cache, self.cursor, self.indices, self.seqs.A, self.scale),
            **self.round,
        )

    def window(self) -> Tensor:
        return tigon.ops.replay_window(
            self.cache, self.cursor, self.indices, self.seqs.weight.shape[1]
        )


def oracle(decoder: Decoder, row: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(y (count,h,p), state, stored state) of a row after `count` tokens by the law, in fp64 with real rounding."""
    s = decoder.seqs.on("cpu").to(torch.float64)
    t = {k: v[row, :count] for k, v in s.tokens.items()}
    dt = process_dt(t["dt"], s.dt_bias, OPTIONS["dt_softplus"], *OPTIONS["dt_limit"])
    stochastic = bool(decoder.round)

    def rounded(S, position):
        at = {}
        if stochastic:
            at = {
                "seeds": decoder.seeds[row : row + 1].cpu(),
                "positions": torch.tensor([position]),
                "layer": decoder.layer,
            }
        return decode_state(*encode_state(S[None], decoder.dtype, **at), torch.float64)[0]

    S = rounded(s.state[row], decoder.start)
    return replay_recurrence(
        *(t["x"], dt, s.A, t["B"], t["C"], s.D, t["z"], S, decoder.start, decoder.flush, rounded)
    )


def conv_oracle(seqs: Sequences, row: int, count: int) -> Tensor:
    seqs = seqs.on("cpu")
    u = seqs.tokens["u"][row : row + 1, :count].double()
    return conv1d_forward(u, seqs.weight.double(), seqs.bias.double(), None, None, True)[0][0]


def tree(parents: list[int], node: int = -1) -> list[int]:
    """The nodes on the path to `node`, the root first."""
    node, path = node % len(parents), []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def tree_bits(parents: list[int], b: int) -> Tensor:
    """`ancestors` (b,m) of b equal trees."""
    bits = [sum(1 << a for a in tree(parents, node)) for node in range(len(parents))]
    return torch.tensor(bits).to(torch.int32).repeat(b, 1)
