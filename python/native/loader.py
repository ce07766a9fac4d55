"""The ways to the CUDA C++ kernels of csrc/, and a launch through the one that is there.

Three ways to the same text: the extension ``tigon._C``; CuPy, which compiles the one instance that a call
needs when it needs it; and, for tests on a machine without a GPU, a host build in which every CUDA thread is a
CPU thread. All three take a ``Launch`` (which instance, which grid: pure arithmetic, printable anywhere) and
the kernel's only argument, a struct, as bytes.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

MAX_BLOCKS = 2**31 - 1  # of a grid's x


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


def run(launch: Launch, device: torch.device, arguments: bytes) -> None:
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
            if launch.shared_bytes > kernel.max_dynamic_shared_size_bytes:
                kernel.max_dynamic_shared_size_bytes = launch.shared_bytes
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
    name = "tigon._C"
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
    here = Path(__file__).resolve().parents[1]
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
