"""Plain torch for the Mamba-2 layer."""

import torch
import torch.nn.functional as F

from tigon.bench.peers.eager.parts import Parts, named
from tigon.bench.peers.find import once
from tigon.bench.workloads import Workload

CHUNK = 128
EPS = 1e-5


def _chunks(t: torch.Tensor) -> torch.Tensor:
    """(b,l,…) -> (b,c,q,…)."""
    if pad := -t.shape[1] % CHUNK:
        t = F.pad(t, [0, 0] * (t.dim() - 2) + [0, pad])
    return t.unflatten(1, (-1, CHUNK))


def _segment_sums(a: torch.Tensor) -> torch.Tensor:
    """(…,q) -> (…,q,q): the sum of a over s+1 to t at [t,s], -inf above the diagonal."""
    total = a.cumsum(-1)
    seen = torch.ones(a.shape[-1], a.shape[-1], dtype=torch.bool, device=a.device).tril()
    return (total[..., :, None] - total[..., None, :]).masked_fill(~seen, -torch.inf)


def ssd_scan(work: Workload) -> Parts:
    """By chunks, as in listing 1 of "Transformers are SSMs" (arXiv 2405.21060); products in the inputs' dtype."""

    def compute(x, dt, A, B, C, D, dt_bias):
        length, h, g = x.shape[1], x.shape[2], B.shape[2]
        low, skip = x.dtype, x * D[:, None].to(x.dtype)
        dt = F.softplus(dt.float() + dt_bias)
        u = (x * dt[..., None]).to(low)
        u, a, B, C = (_chunks(t) for t in (u, dt * A, B, C))
        u = u.unflatten(3, (g, h // g))  # (b,c,q,g,e,p), e heads of a group
        a = a.permute(0, 3, 1, 2).unflatten(1, (g, h // g))  # (b,g,e,c,q)
        total = a.cumsum(-1)
        products = torch.einsum("bcqgn,bcsgn->bgcqs", C, B)
        mixing = (products[:, :, None] * _segment_sums(a).exp()).to(low)
        y = torch.einsum("bgecqs,bcsgep->bcqgep", mixing, u)
        to_end = (total[..., -1:] - total).exp().permute(0, 3, 4, 1, 2)[..., None]
        ends = torch.einsum("bcqgn,bcqgep->bgecpn", B, (u * to_end).to(low)).float()
        ends = F.pad(ends, (0, 0, 0, 0, 1, 0))
        passed = _segment_sums(F.pad(total[..., -1], (1, 0))).exp()
        states = torch.einsum("bgezc,bgecpn->bgezpn", passed, ends)
        before = torch.einsum("bcqgn,bgecpn->bcqgep", C, states[:, :, :, :-1].to(low))
        y = y + before * total.exp().permute(0, 3, 4, 1, 2)[..., None]
        y = y.flatten(1, 2)[:, :length].flatten(2, 3).to(low)
        return y + skip, states[:, :, :, -1].flatten(1, 2)

    return named("x", "dt", "A", "B", "C", "D", "dt_bias"), compute


def ssd_update(work: Workload) -> Parts:
    """A token at a time; the state stays in place."""
    if work.variant != "plain":
        raise NotImplementedError(f"models in plain torch have no {work.variant} states")

    def compute(state, x, dt, A, B, C, D, dt_bias):
        groups = (B.shape[2], -1)
        dt = F.softplus(dt.float() + dt_bias)
        decay, u = (dt * A).exp()[..., None, None], (x * dt[..., None])[..., None]
        B, C, S = B.float(), C.float(), state.unflatten(1, groups)
        out = []
        for j in range(x.shape[1]):
            S.mul_(decay[:, j].unflatten(1, groups))
            S.addcmul_(u[:, j].unflatten(1, groups), B[:, j, :, None, None])
            out.append(torch.einsum("bgepn,bgn->bgep", S, C[:, j]).flatten(1, 2))
        y = torch.stack(out, 1) + x * D[:, None]
        return y.to(x.dtype), state

    return named("state", "x", "dt", "A", "B", "C", "D", "dt_bias"), compute


def causal_conv1d(work: Workload) -> Parts:
    def compute(x, weight, bias):
        x = x.transpose(1, 2)
        (d, width), length = weight.shape, x.shape[2]
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        y = F.conv1d(x, weight[:, None], bias, padding=width - 1, groups=d)
        return F.silu(y[..., :length]).transpose(1, 2), F.pad(x, (width - 1 - length, 0))

    return named("x", "weight", "bias"), compute


def causal_conv1d_update(work: Workload) -> Parts:
    if work.variant != "plain":
        raise NotImplementedError("models in plain torch have no rollback by replay")
    low = once(lambda inputs: tuple(inputs[name].to(work.dtype) for name in ("weight", "bias")))

    def compute(x, state, weight, bias):
        window = torch.cat([state, x.transpose(1, 2)], -1)
        state.copy_(window[..., x.shape[1] :])
        y = F.conv1d(window, weight[:, None], bias, groups=weight.shape[0])
        return F.silu(y).transpose(1, 2), state

    return lambda inputs: (inputs["x"], inputs["conv_state"], *low(inputs)), compute


def gated_rms_norm(work: Workload) -> Parts:
    group = work.options["group_size"]

    def compute(x, z, weight):
        u = x.float() * F.silu(z.float())
        u = F.rms_norm(u.unflatten(-1, (-1, group)), (group,), eps=EPS).flatten(-2)
        return ((u * weight).to(x.dtype),)

    return named("x", "z", "weight"), compute


def rms_norm(work: Workload) -> Parts:
    def compute(x, weight):
        return (F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), EPS),)

    return named("x", "weight"), compute


PARTS = {
    part.__name__: part
    for part in (
        ssd_scan,
        ssd_update,
        causal_conv1d,
        causal_conv1d_update,
        gated_rms_norm,
        rms_norm,
    )
}
