"""Which backend a call takes, and why.

Kernels run on CUDA tensors, the reference elsewhere, unless TIGON_BACKEND or `with tigon.backend(...)` says
otherwise. `select` is the only place that decides; `explain` asks it without running anything.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tigon.registry import OPS

BACKENDS = ("auto", "reference", "kernel")
MIN_ARCH = 80

# Process-wide, not per thread: autograd runs backward in threads of its own.
_backend: str | None = None
_invariant: bool | None = None
_recording: list[str] | None = None


@dataclass(frozen=True)
class Choice:
    """backend: "reference", "triton" or "cuda". function: "module:name" of what runs."""

    op: str
    backend: str
    reason: str
    function: str


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the choice, the launch configs by kernel name, and the copies made on the way.

    tuned: by kernel, the row of a tuned launch table (file and row) that its config follows, if any.
    """

    op: str
    backend: str
    reason: str
    function: str
    arch: int | None
    launch: dict[str, Any] = field(default_factory=dict)
    copies: tuple[str, ...] = ()
    tuned: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend} ({self.function})", f"  because {self.reason}"]
        for name, config in self.launch.items():
            source = f", tuned by {self.tuned[name]}" if name in self.tuned else ""
            lines.append(f"  {name} on sm_{self.arch}: {config}{source}")
        lines += [f"  copies {copy}" for copy in self.copies]
        return "\n".join(lines)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Use "auto", "reference" or "kernel" within the block, in the whole process.

    "kernel" refuses what no kernel can run, in place of falling back; on CPU tensors it means Triton's interpreter or
    the host build of csrc.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"backend: {name!r} is not one of {', '.join(BACKENDS)}")
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


@contextlib.contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """Within the block, a row's result does not depend on what else is in the batch, bit for bit.

    TIGON_BATCH_INVARIANT=1 is the same for the whole process.
    """
    global _invariant
    before, _invariant = _invariant, enabled
    try:
        yield
    finally:
        _invariant = before


def is_batch_invariant() -> bool:
    """Whether batch-invariant mode is on."""
    return os.environ.get("TIGON_BATCH_INVARIANT") == "1" if _invariant is None else _invariant


def _wanted() -> tuple[str, str]:
    if _backend is not None:
        return _backend, f"tigon.backend({_backend!r})"
    name = os.environ.get("TIGON_BACKEND", "auto")
    if name not in BACKENDS:
        raise ValueError(f"TIGON_BACKEND={name!r} is not one of {', '.join(BACKENDS)}")
    return name, f"TIGON_BACKEND={name}" if name != "auto" else "the default"


def device_arch(device: torch.device) -> int:
    """Compute capability of a CUDA device as the key of the launch tables: 80, 90, 100 or 120."""
    return table_arch(*torch.cuda.get_device_capability(device))


def table_arch(major: int, minor: int = 0) -> int:
    """Launch tables are kept for 80, 90, 100 and 120; others take the nearest one below."""
    return max(
        (a for a in (80, 90, 100, 120) if a <= major * 10 + minor), default=major * 10 + minor
    )


def select(op: str, device: torch.device, dtype: torch.dtype, arch: int | None = None) -> Choice:
    """The backend for `op` on `device` with activations of `dtype`; raises where "kernel" was asked in vain.

    arch: pretend a GPU of this compute capability (for `explain` without one).
    """
    info = OPS[op]
    wanted, asked = _wanted()
    reference = Choice(op, "reference", "", info.reference)
    kernel = Choice(op, info.kind, "", info.kernel)

    def because(choice: Choice, reason: str) -> Choice:
        return Choice(choice.op, choice.backend, reason, choice.function)

    if wanted == "reference":
        return because(reference, f"{asked} asks for it")
    if dtype == torch.float64:
        if wanted == "kernel":
            raise TypeError(f"{op}: {asked}, but no kernel computes in float64; the reference does")
        return because(reference, "float64 is computed by the reference only")
    on_gpu = device.type == "cuda" or arch is not None
    if not on_gpu and wanted == "auto":
        return because(reference, f"the tensors are on {device.type}; kernels run on CUDA tensors")
    missing = _missing(info.kind, device, arch)
    if missing is None:
        where = f"sm_{arch}" if arch else device.type
        return because(kernel, f"{asked}, on {where}")
    if wanted == "kernel":
        raise RuntimeError(f"{op}: {asked}, but {missing}")
    return because(reference, missing)


def _missing(kind: str, device: torch.device, arch: int | None) -> str | None:
    """Why the kernel of this kind cannot run there, or None if it can."""
    if arch is None and device.type == "cpu":
        if kind == "cuda":
            from tigon import native

            return native.host_missing()
        if find_spec("triton") is None:
            return "Triton is not installed: pip install triton"
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before Triton is imported"
        return None
    if arch is None and device.type != "cuda":
        return f"the tensors are on {device.type}; kernels run on CUDA tensors"
    capability = arch or device_arch(device)
    if capability < MIN_ARCH:
        return f"this GPU is sm_{capability}; Tigon's kernels need sm_{MIN_ARCH} or later"
    if kind == "triton":
        return None if find_spec("triton") else "Triton is not installed: pip install triton"
    if arch is not None and not torch.cuda.is_available():
        return None  # what such a machine would do, with the extension built
    return _native_missing()


@cache
def _native_missing() -> str | None:
    from tigon import native

    usable, reason = native.available()
    return None if usable else reason


@cache
def _load(function: str) -> Callable:
    module, name = function.split(":")
    return getattr(import_module(module), name)


@cache
def _warn_once(op: str, reason: str) -> None:
    warnings.warn(
        f"tigon.{op} runs its PyTorch reference on a GPU, which is slow: {reason}. "
        "`tigon doctor` says what to install.",
        RuntimeWarning,
        stacklevel=5,
    )


def run(op: str, main: Tensor, *args: Any, **options: Any) -> Any:
    """Run `op` on the backend for `main`, with main's device current."""
    choice = select(op, main.device, main.dtype)
    function = _load(choice.function)
    if not main.is_cuda:
        return function(*args, **options)
    if choice.backend == "reference" and _wanted()[0] == "auto" and main.dtype != torch.float64:
        _warn_once(op, choice.reason)
    with torch.cuda.device(main.device):
        return function(*args, **options)


class _Stop(Exception):
    pass


def call(
    op: str, main: Tensor, args: tuple, sizes: dict[str, int], registered: str | None = None
) -> Any:
    """Call the registered op; while explaining, stop here. `sizes` are what launch tables are read by.

    registered: the name under which it is registered, where two public functions share one op.
    """
    if _recording is not None:
        raise _Stop(op, main, sizes)
    return getattr(torch.ops.tigon, registered or op)(*args)


def is_explaining() -> bool:
    """Whether `explain` asks: nothing is computed or drawn then."""
    return _recording is not None


def copied(name: str, t: Tensor, why: str) -> Tensor:
    """A contiguous copy of `t`; `explain` tells of it."""
    if _recording is not None:
        _recording.append(f"{name} {tuple(t.shape)}: {why}")
    return t.contiguous()


def inner(name: str, t: Tensor | None, dims: int) -> Tensor | None:
    """`t` with its last `dims` dimensions contiguous: itself where they are, else one copy."""
    if t is None:
        return None
    expected = 1
    for size, stride in zip(reversed(t.shape[-dims:]), reversed(t.stride()[-dims:]), strict=True):
        if size != 1 and stride != expected:
            return copied(name, t, f"its last {dims} dimension(s) are not contiguous")
        expected = expected * size
    return t


def explain(op: str, *args: Any, arch: int | None = None, **kwargs: Any) -> Explanation:
    """Say which backend and launch config `tigon.<op>(*args, **kwargs)` would take and why; runs nothing.

    arch: a compute capability (80, 90, 100, 120) to explain for, on a machine without such a GPU. Tensors on
    the meta device will do. Raises what the call itself would raise.
    """
    global _recording
    from tigon import ops

    if op not in OPS or not OPS[op].public:
        raise ValueError(
            f"explain: unknown op {op!r}; known: {', '.join(n for n in OPS if OPS[n].public)}"
        )
    before, _recording = _recording, []
    try:
        getattr(ops, op)(*args, **kwargs)
        raise AssertionError(f"{op} did not reach its launch")
    except _Stop as stop:
        form, main, sizes = stop.args  # of the op, where it has several
        copies = tuple(_recording)
    finally:
        _recording = before
    choice = select(form, main.device, main.dtype, arch)
    launch, tuned = {}, {}
    if choice.backend != "reference":
        if arch is None:  # on a CPU that of the interpreter's stand-in, as the launchers take it
            stand_in = _load("tigon.kernels.launch:target")
            arch = device_arch(main.device) if main.is_cuda else stand_in(main.device)[0]
        if OPS[form].kind == "cuda":
            launch = _load("tigon.native:plan")(form, table_arch(arch // 10), **sizes)
        else:
            sizes = sizes | {"batch_invariant": is_batch_invariant()}
            plan, sources = (_load(f"tigon.kernels.launch:{name}") for name in ("plan", "sources"))
            launch = plan(form, table_arch(arch // 10), **sizes)
            tuned = sources(form, table_arch(arch // 10), **sizes)
    return Explanation(
        op, choice.backend, choice.reason, choice.function, arch, launch, copies, tuned
    )
