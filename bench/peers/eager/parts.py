"""The halves of a workload in plain torch: `take(inputs)` are the arguments of `compute`, prepared as far as a model
would have prepared them; `compute` is what runs, and what torch.compile compiles."""

from collections.abc import Callable, Mapping

Parts = tuple[Callable[[Mapping], tuple], Callable[..., tuple]]


def named(*names: str) -> Callable[[Mapping], tuple]:
    """inputs -> those of these names."""
    return lambda inputs: tuple(inputs[name] for name in names)
