"""Is a result right? Every output and gradient against the fp64 reference.

By the numerics contract the relative RMS error may be twice that of an honest baseline plus one rounding of the
output. The baseline is the reference in the same dtype; for the scan it also rounds where a kernel feeds tensor cores.
Where the bytes are pinned (quantizers) no byte may differ from the reference's, and no integer (choices of experts).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import tigon
from tigon.bench.workloads import Workload

# Relative RMS error that no result may pass, even where the reference is both the result and the baseline.
CAP = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
Run = Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Row:
    """One output or gradient. error and baseline are errors as `difference` counts them; repeats: same bits again."""

    name: str
    error: float
    baseline: float
    limit: float
    repeats: bool = True

    @property
    def ok(self) -> bool:
        return self.error <= self.limit and self.repeats


def _rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def relative_rms(got: Tensor, oracle: Tensor) -> float:
    """RMS of the difference over RMS of the oracle (absolute where that is zero); infinite if not finite."""
    error = _rms(got.double() - oracle.double()) / (_rms(oracle) or 1.0)
    return error if error == error else float("inf")


def difference(got: Tensor, right: Tensor) -> float:
    """Relative RMS error of numbers; of integers and codes, which are bytes, the share that differs."""
    if not got.is_floating_point():
        return (got != right).double().mean().item() if got.numel() else 0.0
    if got.element_size() > 1:
        return relative_rms(got, right)
    other = got.view(torch.uint8) != right.view(torch.uint8)
    return other.double().mean().item() if got.numel() else 0.0


def results(
    work: Workload, backward: bool, run: Run | None = None, grads: tuple[Tensor, ...] | None = None
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """(outputs and, with `backward`, gradients by name; the output gradients used, drawn if None)."""
    leaves = {k: t.detach().clone() for k, t in work.inputs.items()}
    backward = backward and work.differentiable
    if backward:
        for t in leaves.values():
            t.requires_grad_(t.is_floating_point())
    with torch.set_grad_enabled(backward):
        out = (run or work.run)(leaves)
    found = {name: t.detach() for name, t in zip(work.outputs, out)}
    if not backward:
        return found, ()
    if grads is None:
        generator = torch.Generator(out[0].device).manual_seed(1)
        grads = tuple(torch.randn(t.shape, device=t.device, generator=generator) for t in out)
    grads = tuple(g.to(t.dtype) for g, t in zip(grads, out))
    wanted = {k: t for k, t in leaves.items() if t.requires_grad}
    slopes = torch.autograd.grad(
        [t for t in out if t.requires_grad],
        list(wanted.values()),
        [g for g, t in zip(grads, out) if t.requires_grad],
    )
    return found | {f"d{k}": g for k, g in zip(wanted, slopes)}, grads


def oracle(work: Workload, backward: bool) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """(results in fp64 or of the work's own oracle, output gradients, which are exact in the work's dtype)."""
    if work.oracle is not None:
        return dict(zip(work.outputs, work.oracle(work))), ()
    with tigon.backend("reference"):
        _, grads = results(work, backward)
        wide = tuple(g.double() for g in grads)
        return results(work.widened(), backward, grads=wide)[0], grads


def baseline(work: Workload, backward: bool, grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The reference's results in the work's dtype."""
    if work.op == "ssd_scan" and work.dtype != torch.float32:
        return _rounded_scan(work, backward, grads)
    with tigon.backend("reference"):
        return results(work, backward, grads=grads)[0]


def _rounded_scan(work: Workload, backward: bool, grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """ssd_scan by the reference that rounds its operands."""
    from tigon.reference.ssd import CHUNK, ssd_backward, ssd_forward

    order = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
    given = [work.inputs.get(name) for name in order]
    rest = (None, None, work.options.get("dt_softplus", False), 0.0, float("inf"), CHUNK)
    found = dict(zip(work.outputs, ssd_forward(*given, *rest, round_operands=True)))
    if backward:
        slopes = ssd_backward(grads[0], grads[1], None, *given, *rest, round_operands=True)
        found |= {f"d{k}": g for k, g in zip(order, slopes) if k in work.inputs}
    return found


Truth = tuple[dict[str, Tensor], tuple[Tensor, ...], dict[str, Tensor]]


def truth(work: Workload, backward: bool = True) -> Truth:
    """(what is right, the output gradients, the baseline): what `verify` compares with, whatever the launch config."""
    exact, grads = oracle(work, backward)
    return exact, grads, exact if work.exact else baseline(work, backward, grads)


def verify(
    work: Workload, backward: bool = True, repeat: bool = True, known: Truth | None = None
) -> list[Row]:
    """The selected backend's results, one row an output or gradient. known: `truth` of this work, if it is at hand."""
    exact, grads, base = known or truth(work, backward)
    got, _ = results(work, backward, grads=grads or None)
    again = results(work, backward, grads=grads or None)[0] if repeat else got
    rows = []
    for name, right in exact.items():
        honest, limit = difference(base[name], right), 0.0
        if not work.exact and right.is_floating_point():
            limit = min(2 * honest + torch.finfo(got[name].dtype).eps, work.cap or CAP[work.dtype])
        rows.append(
            Row(
                name,
                difference(got[name], right),
                honest,
                limit,
                torch.equal(got[name], again[name]),
            )
        )
    return rows
