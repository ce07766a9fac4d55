"""No peer: the decode step of mamba_ssm's signature, which transformers and flashinfer share."""

from collections.abc import Callable, Mapping

import torch

from tigon.bench.peers.find import once


def spread(inputs: Mapping) -> tuple[torch.Tensor, ...]:
    """(A (h,p,n), D (h,p), dt_bias (h,p)) without a copy: strides of 0 tell kernels that they are a number a head."""
    h, p, n = inputs["state"].shape[1:]
    A = inputs["A"][:, None, None].expand(h, p, n)
    return A, *(inputs[name][:, None].expand(h, p) for name in ("D", "dt_bias"))


def by_token(update: Callable) -> Callable:
    """inputs -> (y, state): a call a token of `update(state, x, dt, A, B, C, D, dt_bias=…, dt_softplus=…)`."""
    parameters = once(spread)

    def call(inputs):
        state, x, B, C = (inputs[name] for name in ("state", "x", "B", "C"))
        A, D, bias = parameters(inputs)
        dt = inputs["dt"][..., None].expand(x.shape)
        options = {"dt_bias": bias, "dt_softplus": True}
        y = [
            update(state, x[:, j], dt[:, j], A, B[:, j], C[:, j], D, **options)
            for j in range(x.shape[1])
        ]
        return torch.stack(y, 1) if len(y) > 1 else y[0][:, None], state

    return call
