"""Argument checks: shapes, dtypes and devices by name, before anything is launched.

    check = Check("ssd_scan")
    check.tensor("x", x, "b l h p", dtypes=FLOATS)
    check.tensor("B", B, "b l g n", dtypes=(x.dtype,))

Each symbol is bound by the first tensor that shows it. Values inside tensors are looked at only where that
is free: on CPU tensors, or anywhere with TIGON_CHECK=1; with TIGON_CHECK=0 nowhere.
"""

import os
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CASTABLE = FLOATS[:3]  # what autocast casts; it leaves fp64 alone
INDEX = (torch.int32, torch.int64)


def names(dtypes: Iterable[torch.dtype]) -> str:
    """Dtypes as users write them: "float32, bfloat16"."""
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def activation_dtypes(main: Tensor, cast: bool = True) -> tuple[torch.dtype, ...]:
    """Activations share a dtype; under autocast any that it casts will do.

    cast: whether autocast casts for this op; it does not for the decode ops.
    """
    return CASTABLE if cast and _autocast(main) else (main.dtype,)


def beside_dtypes(main: Tensor, cast: bool = True) -> tuple[torch.dtype, ...]:
    """What dt, A, D, biases and weights may have beside activations of main's dtype: that one or fp32."""
    if cast and _autocast(main):
        return CASTABLE
    return tuple(dict.fromkeys((main.dtype, torch.float32)))


def _autocast(main: Tensor) -> bool:
    if not isinstance(main, Tensor) or main.dtype not in CASTABLE:
        return False
    kind = main.device.type
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def inner_is_strided(state: Tensor) -> bool:
    """Whether a state's dimensions after the first are not contiguous."""
    if not state.numel():
        return False
    expected = 1
    for size, stride in zip(reversed(state.shape[1:]), reversed(state.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return True
        expected = expected * size
    return False


class Check:
    """Checks of one call; remembers the sizes of the symbols that it has seen."""

    def __init__(self, op: str):
        self.op = op
        self.sizes: dict[str, int] = {}
        self.source: dict[str, str] = {}
        self.device: torch.device | None = None
        self.main = ""

    def fail(self, message: str, error: type[Exception] = ValueError) -> None:
        raise error(f"{self.op}: {message}")

    def require(self, holds: bool, message: str) -> None:
        if not holds:
            self.fail(message)

    def tensor(
        self,
        name: str,
        value: Tensor | None,
        dims: str,
        *,
        dtypes: tuple[torch.dtype, ...] = FLOATS,
        optional: bool = False,
    ) -> None:
        """`value` is a tensor of shape `dims` (symbols or numbers), of one of `dtypes`, on the main device."""
        if value is None and optional:
            return
        if not isinstance(value, Tensor):
            self.fail(f"{name} must be a Tensor, got {type(value).__name__}", TypeError)
        if value.dtype not in dtypes:
            self.fail(
                f"{name} has dtype {names([value.dtype])}, allowed: {names(dtypes)}", TypeError
            )
        if self.device is None:
            self.device, self.main = value.device, name
        elif value.device != self.device:
            self.fail(f"{name} is on {value.device}, but {self.main} is on {self.device}")
        symbols = dims.split()
        matches = value.dim() == len(symbols)
        for symbol, size in zip(symbols, value.shape, strict=False):
            if matches and symbol not in self.sizes and not symbol.isdigit():
                self.sizes[symbol], self.source[symbol] = size, name
            matches = matches and size == self._size(symbol)
        if not matches:
            known = [
                f"{s}={self.sizes[s]} (from {self.source[s]})"
                for s in dict.fromkeys(symbols)
                if s in self.sizes and self.source[s] != name
            ]
            where = f" with {', '.join(known)}" if known else ""
            expected = f"({', '.join(symbols)})"
            self.fail(f"{name} has shape {tuple(value.shape)}, expected {expected}{where}")

    def _size(self, symbol: str) -> int:
        return int(symbol) if symbol.isdigit() else self.sizes[symbol]

    def one_of(self, name: str, value: Tensor | None, *choices: str, **kw) -> None:
        """`value` has one of several shapes, told apart by their number of dimensions."""
        if value is not None and isinstance(value, Tensor):
            for dims in choices:
                if value.dim() == len(dims.split()):
                    return self.tensor(name, value, dims, **kw)
            allowed = " or ".join(f"({', '.join(c.split())})" for c in choices)
            self.fail(f"{name} has shape {tuple(value.shape)}, expected {allowed}")
        self.tensor(name, value, choices[0], **kw)

    def divides(self, small: str, large: str) -> None:
        a, b = self.sizes[small], self.sizes[large]
        self.require(a > 0 and b % a == 0, f"{small}={a} must divide {large}={b}")

    def size(self, symbol: str, limit: int) -> None:
        """A symbol's size lies in [1, limit]."""
        size = self.sizes[symbol]
        self.require(1 <= size <= limit, f"{symbol}={size} is not supported, 1 to {limit} are")

    def cu_seqlens(self, value: Tensor | None, total: int) -> None:
        """cu_seqlens starts at 0, never falls and ends at `total` (looked at where that is free)."""
        if value is None or not readable(value):
            return
        bounds = value.tolist()
        rises = all(a <= b for a, b in pairwise(bounds))
        if bounds[0] != 0 or bounds[-1] != total or not rises:
            self.fail(
                f"cu_seqlens must start at 0, never fall and end at l={total}, got {_short(bounds)}"
            )

    def within(self, name: str, value: Tensor | None, low: int, high: int) -> None:
        """Every element of `value` lies in [low, high] (looked at where that is free)."""
        if value is None or not value.numel() or not readable(value):
            return
        least, most = value.min().item(), value.max().item()
        if least < low or most > high:
            self.fail(f"{name} must lie in [{low}, {high}], got values from {least} to {most}")

    def no_gradient(self, use: str, **tensors: Tensor | None) -> None:
        """An in-place decode op has no gradient: refuse inputs that want one."""
        if torch.is_grad_enabled():
            for name, t in tensors.items():
                if t is not None and t.requires_grad:
                    self.fail(
                        f"{name} requires a gradient and this op has none: call it under torch.no_grad(), or use {use}",
                        RuntimeError,
                    )

    def not_yet(self, **arguments) -> None:
        """Arguments that the interface has and this version lacks: refused by name, never dropped."""
        for name, value in arguments.items():
            if value is not None:
                self.fail(
                    f"{name} is not supported in this version, leave it out", NotImplementedError
                )

    def distinct(self, name: str, value: Tensor | None) -> None:
        """Non-negative elements of `value` occur once: two rows may not write one slot."""
        if value is None or not readable(value):
            return
        live = [i for i in value.tolist() if i >= 0]
        if len(set(live)) != len(live):
            self.fail(f"{name} names a slot twice: {_short(live)}")


def readable(t: Tensor) -> bool:
    """Whether looking at the values of `t` is allowed and waits for nothing."""
    mode = os.environ.get("TIGON_CHECK", "")
    if mode == "0" or torch.compiler.is_compiling() or type(t) is not Tensor or t.is_meta:
        return False
    return t.device.type == "cpu" or mode == "1"


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, …]"
