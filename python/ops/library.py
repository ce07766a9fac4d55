"""Registration of ops with torch.library: schema, implementation, fake, autocast, autograd."""

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("tigon", "DEF")


def register(
    schema: str, implementation: Callable, fake: Callable, autocast: tuple[str, ...] = ()
) -> None:
    """Define `tigon::<schema>`. autocast: the arguments that take the autocast dtype under torch.autocast.

    Within every op autocast is off, so that it does not lower the reference's own matrix products.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    arguments = getattr(torch.ops.tigon, name).default._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]
    if written:
        implementation = _telling_autograd(implementation, written)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tigon::{name}", fake, lib=LIBRARY)
    positions = [i for i, arg in enumerate(arguments) if arg.name in autocast]
    for device in ("cpu", "cuda"):
        LIBRARY.impl(name, _autocast(name, device, positions), f"Autocast{device.upper()}")


def _telling_autograd(implementation: Callable, written: list[int]) -> Callable:
    """A kernel writes where autograd does not look: count the write, so that a tensor kept for backward and overwritten
    since is refused there."""

    def mutating(*args):
        result = implementation(*args)
        for i in written:
            if i < len(args) and args[i] is not None and not args[i].is_inference():
                torch.autograd.graph.increment_version(args[i])
        return result

    return mutating


def _autocast(name: str, device: str, positions: list[int]) -> Callable:
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def kernel(*args):
        dtype = torch.get_autocast_dtype(device)
        args = list(args)
        for i in positions:
            t = args[i] if i < len(args) else None
            if t is not None and t.is_floating_point() and t.dtype not in (dtype, torch.float64):
                args[i] = t.to(dtype)
        with torch._C._ExcludeDispatchKeyGuard(key):
            return getattr(torch.ops.tigon, name)(*args)

    return kernel


def differentiable(name: str, backward: Callable, setup: Callable) -> None:
    """Give `tigon::<name>` its gradient."""
    torch.library.register_autograd(f"tigon::{name}", backward, setup_context=setup, lib=LIBRARY)


def once_differentiable(name: str) -> None:
    """A backward op has no gradient of its own: double backward raises and says so."""

    def refuse(ctx, *grads):
        raise RuntimeError(f"tigon::{name}: double backward is not supported")

    torch.library.register_autograd(
        f"tigon::{name}", refuse, setup_context=lambda ctx, inputs, output: None, lib=LIBRARY
    )
