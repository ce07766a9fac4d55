"""What `tigon.patch` did to a model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PatchReport:
    """counts: modules by kind ("Mamba2Mixer", ...). already: how many of them were in the wanted form before."""

    counts: dict[str, int]
    already: int = 0

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.counts.items()) or "nothing"
        return kinds + (f" ({self.already} of them already were)" if self.already else "")
