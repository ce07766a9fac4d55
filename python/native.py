"""The CUDA C++ kernels of csrc/: found, planned, packed and launched.

Three ways to the same text: the extension ``tigon._C``; CuPy, which compiles the one instance that a call
needs when it needs it; and, for tests on a machine without a GPU, a host build in which every CUDA thread is a
CPU thread. All three take a ``Launch`` (which instance, which grid: pure arithmetic, printable anywhere) and
the kernel's only argument, a struct, as bytes.

Importing this module needs the standard library only, so that ``tigon doctor`` works without torch.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORMATS = ("f32", "bf16", "f16")  # by the codes of csrc/common/types.cuh
MAX_BLOCKS = 2**31 - 1  # of a grid's x

# struct SsdUpdate in csrc/ssd_update.cu: 12 pointers, 15 sizes and strides, 13 ints, 2 floats, padding.
SSD_UPDATE = struct.Struct("=12Q15q13i2fi")
# struct Conv1dUpdate in csrc/conv1d_update.cu: 7 pointers, 6 sizes and strides, 7 ints, padding.
CONV1D_UPDATE = struct.Struct("=7Q6q8i")


@dataclass(frozen=True)
class Launch:
    """What is launched: an instance of a kernel in csrc/<source>, its grid (x, y), threads a block, bytes."""

    source: str
    kernel: str
    grid: tuple[int, int]
    block: int
    shared_bytes: int


class Loader(Protocol):
    """One way to reach the kernels."""

    def launch(self, launch: Launch, device: int, stream: int, arguments: bytes) -> None: ...


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _lanes(n: int) -> int:
    """Lanes that share a row of the state: 16 elements each, a power of two."""
    return 1 << (_ceil(n, 16) - 1).bit_length()


@functools.lru_cache(maxsize=1024)
def plan_ssd_update(
    b: int, m: int, h: int, p: int, n: int, io: str, state: str, vectors: bool
) -> Launch:
    """The launch of ``ssd_update``: 16 elements of n a lane, two rows of p a lane, at most 128 threads.

    Lanes depend on n alone and rows on p and n, so that a row's bits depend on neither batch nor m.
    vectors: the state is read and written in 16-byte accesses.
    """
    lanes = _lanes(n)
    block = min(128, _ceil(_ceil(p, 2) * lanes, 32) * 32)
    rows = block // lanes * 2
    blocks = b * h
    if blocks > MAX_BLOCKS:
        raise ValueError(f"ssd_update: b*h = {blocks} is over {MAX_BLOCKS}")
    instance = f"tigon::ssd_update<tigon::{io}, tigon::{state}, {'true' if vectors else 'false'}>"
    # struct Staged: B, C, x, gate, dt, decay of m tokens; D.
    floats = m * (2 * _ceil(n, 8) * 8 + 2 * rows + 2) + rows
    return Launch("ssd_update.cu", instance, (blocks, _ceil(p, rows)), block, 4 * floats)


@functools.lru_cache(maxsize=1024)
def plan_conv1d_update(b: int, d: int, io: str, state: str) -> Launch:
    """The launch of ``conv1d_update``: one thread a row and channel."""
    block = min(128, _ceil(d, 32) * 32)
    if b > MAX_BLOCKS or _ceil(d, block) > 65535:
        raise ValueError(f"conv1d_update: {b} rows of {d} channels are over the size of a grid")
    instance = f"tigon::conv1d_update<tigon::{io}, tigon::{state}>"
    return Launch("conv1d_update.cu", instance, (b, _ceil(d, block)), block, 0)


def plan(op: str, arch: int, **sizes: int) -> dict[str, Launch]:
    """What `op` launches for these sizes, as kernels/launch.py says it for Triton's kernels; for `explain`.

    The launches are the same for every arch. Two bytes an element are shown as bf16, whose launch fp16 shares.
    """
    io = "f32" if sizes["itemsize"] == 4 else "bf16"
    held = "f32" if sizes.get("state_itemsize", sizes["itemsize"]) == 4 else "bf16"
    if op == "causal_conv1d_update":
        return {"conv1d_update": plan_conv1d_update(sizes["b"], sizes["d"], io, held)}
    b, m, h, p, n = (sizes[name] for name in "bmhpn")
    vectors = n % (4 if held == "f32" else 8) == 0
    return {"ssd_update": plan_ssd_update(b, m, h, p, n, io, held, vectors)}


def ssd_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_indices: Tensor | None,
    num_tokens: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> Tensor:
    """m steps of the recurrence on slot-indexed states, in place: the launcher of csrc/ssd_update.cu.

    state (slots,h,p,n), its slots strided at will; x, z (b,m,h,p), B, C (b,m,g,n): batch and tokens strided at
    will; dt (b,m,h) and D (h)|(h,p): any strides; A, dt_bias (h); state_indices, num_tokens (b). Returns y
    (b,m,h,p), zeros for padding. Activations and state are fp32, bf16 or fp16, each of dt, A, D, dt_bias any
    of them. Two rows must not share a slot. Raises RuntimeError where no kernel can be reached or launched.
    """
    import torch

    b, m, h, p = x.shape
    slots, _, _, n = state.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not y.numel():
        return y
    codes = _codes()
    io, held = codes[x.dtype], codes[state.dtype]
    size = state.element_size()
    vectors = not (state.data_ptr() | state.stride(0) * size | n * size) & 15
    launch = plan_ssd_update(b, m, h, p, n, FORMATS[io], FORMATS[held], vectors)
    lanes = _lanes(n)

    xs, zs, Bs, Cs = x.stride(), z.stride() if z is not None else (0, 0), B.stride(), C.stride()
    Ds = (0, 0) if D is None else (*D.stride(), 0)[:2]
    A, dt_bias = _packed(A), _packed(dt_bias)
    state_indices, num_tokens = _indices(state_indices), _indices(num_tokens)
    offsets = (Bs[0] | Bs[1] | Cs[0] | Cs[1] | n) * x.element_size()
    arguments = SSD_UPDATE.pack(
        state.data_ptr(),
        x.data_ptr(),
        dt.data_ptr(),
        A.data_ptr(),
        B.data_ptr(),
        C.data_ptr(),
        _pointer(D),
        _pointer(z),
        _pointer(dt_bias),
        _pointer(state_indices),
        _pointer(num_tokens),
        y.data_ptr(),
        slots,
        state.stride(0),
        *xs[:2],
        *zs[:2],
        *Bs[:2],
        *Cs[:2],
        *dt.stride(),
        *Ds,
        m,
        h,
        B.shape[2],
        p,
        n,
        lanes,
        launch.block // lanes * 2,
        codes[dt.dtype],
        codes[A.dtype],
        0 if D is None else codes[D.dtype],
        0 if dt_bias is None else codes[dt_bias.dtype],
        dt_softplus,
        not (B.data_ptr() | C.data_ptr() | offsets) & 15,
        dt_min,
        dt_max,
        0,
    )
    _launch(launch, x.device, arguments)
    return y


def conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state_indices: Tensor | None,
    num_tokens: Tensor | None,
    silu: bool,
) -> Tensor:
    """m steps of the causal convolution on slot-indexed windows, in place: csrc/conv1d_update.cu.

    x (b,m,d), batch and tokens strided at will; conv_state (slots,d,W >= width-1), any strides; weight
    (d,width), width 2 to 8; bias (d); state_indices, num_tokens (b). Returns y (b,m,d), zeros for padding.
    x and conv_state are fp32, bf16 or fp16, each of weight and bias any of them. Raises as ssd_update does.
    """
    import torch

    b, m, d = x.shape
    slots, _, window = conv_state.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not y.numel():
        return y
    codes = _codes()
    launch = plan_conv1d_update(b, d, FORMATS[codes[x.dtype]], FORMATS[codes[conv_state.dtype]])
    weight, bias = weight.contiguous(), _packed(bias)
    state_indices, num_tokens = _indices(state_indices), _indices(num_tokens)
    arguments = CONV1D_UPDATE.pack(
        conv_state.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        _pointer(bias),
        _pointer(state_indices),
        _pointer(num_tokens),
        y.data_ptr(),
        slots,
        *conv_state.stride(),
        *x.stride()[:2],
        m,
        d,
        weight.shape[1],
        window,
        codes[weight.dtype],
        0 if bias is None else codes[bias.dtype],
        silu,
        0,
    )
    _launch(launch, x.device, arguments)
    return y


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _packed(t: Tensor | None) -> Tensor | None:
    """A vector with stride 1."""
    return t if t is None or t.stride(0) == 1 else t.contiguous()


def _indices(t: Tensor | None) -> Tensor | None:
    """int32 with stride 1; the caller keeps the copy alive until the launch is on its stream."""
    if t is None or (t.element_size() == 4 and t.stride(0) == 1):
        return t
    import torch

    # Beyond int32 means padding: it must not wrap into a slot.
    return t.clamp(-1, 2**31 - 1).to(torch.int32).contiguous()


@functools.cache
def _codes() -> dict[torch.dtype, int]:
    import torch

    return {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _launch(launch: Launch, device: torch.device, arguments: bytes) -> None:
    """On the current stream of `device`; CPU tensors go to the host build."""
    if device.type == "cpu":
        if _host is None:
            raise RuntimeError(f"{launch.source}: {host_missing()}")
        return _host.launch(launch, 0, 0, arguments)
    import torch

    stream = torch._C._cuda_getCurrentRawStream(device.index)  # current_stream() costs 10x as much
    return load().launch(launch, device.index, stream, arguments)


class Extension:
    """The kernels of ``tigon._C``."""

    def __init__(self, module):
        self.module = module
        self.handles: dict[str, int] = {}

    def launch(self, launch: Launch, device: int, stream: int, arguments: bytes) -> None:
        handle = self.handles.get(launch.kernel)
        if handle is None:
            handle = self.handles[launch.kernel] = self.module.find(launch.kernel)
        x, y = launch.grid
        self.module.launch(
            handle, x, y, launch.block, launch.shared_bytes, device, stream, arguments
        )


class RunTimeCompiler:
    """The kernels, each compiled by CuPy (NVRTC) at its first launch; CuPy keeps them on disk."""

    def __init__(self):
        self.cupy = importlib.import_module("cupy")
        self.functions: dict[tuple[str, int], object] = {}

    def launch(self, launch: Launch, device: int, stream: int, arguments: bytes) -> None:
        with self.cupy.cuda.Device(device):
            kernel = self.functions.get((launch.kernel, device))
            if kernel is None:
                kernel = self.functions[launch.kernel, device] = self.compile(launch)
            data = ctypes.create_string_buffer(arguments, len(arguments))
            pointers = (ctypes.c_void_p * 1)(ctypes.addressof(data))
            self.cupy.cuda.driver.launchKernel(
                kernel.kernel.ptr,
                *(*launch.grid, 1),
                *(launch.block, 1, 1),
                launch.shared_bytes,
                stream,
                ctypes.addressof(pointers),
                0,
            )

    def compile(self, launch: Launch):
        headers = cuda_headers()
        if headers is None:
            raise RuntimeError(
                "CuPy is here but CUDA's headers (cuda_bf16.h) are not: pip install 'cupy-cuda13x[ctk]'"
            )
        module = self.cupy.RawModule(
            code=(sources() / launch.source).read_text(),
            options=("-std=c++17", f"-I{sources()}", f"-I{headers}"),
            name_expressions=(launch.kernel,),
        )
        return module.get_function(launch.kernel)


class HostLibrary:
    """The kernels compiled for the CPU by tests/csrc, on CPU tensors."""

    def __init__(self, path: str | os.PathLike):
        self.function = ctypes.CDLL(os.fspath(path)).tigon_host_launch
        self.function.argtypes = [ctypes.c_char_p] + [ctypes.c_int64] * 4 + [ctypes.c_char_p]
        self.function.argtypes += [ctypes.c_size_t]
        self.function.restype = ctypes.c_int

    def launch(self, launch: Launch, device: int, stream: int, arguments: bytes) -> None:
        sizes = (*launch.grid, launch.block, launch.shared_bytes)
        if self.function(launch.kernel.encode(), *sizes, arguments, len(arguments)):
            raise RuntimeError(
                f"the host build has no {launch.kernel} with {len(arguments)} bytes of arguments"
            )


_host: Loader | None = None


def use_host_library(library: str | os.PathLike | Loader | None) -> None:
    """Run the kernels on CPU tensors through a host build (tests): its path, a loader, or None to unplug it."""
    global _host
    plain = isinstance(library, str | os.PathLike)
    _host = HostLibrary(library) if plain else library


def host_missing() -> str | None:
    """Why CPU tensors cannot take the kernels, or None if a host build is plugged in."""
    if _host is not None:
        return None
    return "CUDA kernels run on CPU tensors only through the host build of tests/csrc"


@functools.cache
def load() -> Loader:
    """The extension, else CuPy, else RuntimeError with the reason and the fix."""
    module, why = _extension()
    if module is not None:
        return Extension(module)
    if importlib.util.find_spec("cupy") is None:
        raise RuntimeError(f"{why}, and CuPy is not installed: {_fix()}")
    try:
        return RunTimeCompiler()
    except Exception as error:  # a broken CuPy raises whatever its libraries raise
        raise RuntimeError(f"{why}, and CuPy cannot be imported: {error}") from error


def available() -> tuple[bool, str]:
    """Whether kernels can be launched on CUDA tensors, and how or why not. Imports no CuPy."""
    module, why = _extension()
    if module is not None:
        return True, f"the extension tigon._C, built for {module.built_archs}"
    if importlib.util.find_spec("cupy") is not None:
        return True, f"CuPy compiles csrc/ at run time, for {why}"
    return False, f"{why}, and CuPy is not installed: {_fix()}"


def status() -> dict:
    """What is built and what is not, for ``tigon doctor``: names and values, without torch or CuPy."""
    module, why = _extension()
    usable, _ = available()
    cupy = importlib.util.find_spec("cupy") is not None
    report = {
        "backend": "extension" if module else "cupy" if cupy else None,
        "extension": getattr(module, "__file__", None),
        "cupy": cupy,
    }
    if module:
        report |= {
            "archs": f"{module.built_archs}, PTX of compute_80",
            "nvcc": module.nvcc_version,
            "cxx": module.cxx_compiler,
            "kernels": len(module.kernels()),
        }
    else:
        report["why"] = why
    if not usable:
        report["fix"] = _fix()
    return report


@functools.cache
def _extension() -> tuple[object | None, str]:
    """tigon._C, or None and why."""
    name = f"{__package__}._C"
    if importlib.util.find_spec(name) is None:
        return None, "the extension tigon._C was not built"
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        return None, f"the extension tigon._C cannot be loaded ({error})"


def _fix() -> str:
    return "install Tigon where nvcc is, or pip install 'tigon[cu13]' (cu12 for a CUDA 12 driver)"


def sources() -> Path:
    """csrc/: beside python/ in a checkout, inside the package in a wheel."""
    here = Path(__file__).resolve().parent
    return here / "csrc" if (here / "csrc").is_dir() else here.parent / "csrc"


@functools.cache
def cuda_headers() -> Path | None:
    """The folder of CUDA's headers: CUDA_HOME, the nvidia-* wheels, then /usr/local/cuda."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    wheels = [
        home for folder in sys.path for home in sorted(Path(folder).glob("nvidia/c*"), reverse=True)
    ]
    for home in (*homes, *wheels, Path("/usr/local/cuda")):
        if (home / "include" / "cuda_bf16.h").is_file():
            return home / "include"
    return None
