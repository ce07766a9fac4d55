"""What this machine has: a dict of facts, from the standard library alone and in milliseconds.

Nothing here imports torch, starts a CUDA context, or raises: a probe that breaks leaves
``{"error": …}`` in its place. ``tigon doctor`` prints the facts, benchmarks store them.
"""

import contextlib
import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "triton", "numpy", "transformers", "mamba-ssm", "flash-attn")


def facts() -> dict:
    """Every probe's answer, by name."""
    probes = {
        "os": os_facts,
        "python": python_facts,
        "packages": package_facts,
        "driver": driver_facts,
        "nvcc": nvcc_facts,
        "compiler": compiler_facts,
    }
    return {name: guarded(probe) for name, probe in probes.items()}


def guarded(probe, *args):
    """``probe(*args)``, or what went wrong: a doctor that crashes on a sick machine is no use."""
    try:
        return probe(*args)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def os_facts() -> dict:
    uname = os.uname() if hasattr(os, "uname") else platform.uname()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = {}
    with contextlib.suppress(OSError, AttributeError):  # AttributeError: Python 3.10 on old systems
        name = platform.freedesktop_os_release()
    libc = ""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
    return {
        "name": name.get("PRETTY_NAME", platform.system()),
        "kernel": uname.release,
        "machine": uname.machine,
        "libc": libc,
        "cores": cores,
    }


def python_facts() -> dict:
    version = ".".join(str(part) for part in sys.version_info[:3])
    return {"version": version, "executable": sys.executable}


def package_facts() -> dict:
    """Installed versions by name (None: not installed), read from metadata, nothing imported."""
    found = {name: package_version(name) for name in PACKAGES}
    found["cupy"] = next(
        filter(None, map(package_version, ("cupy-cuda13x", "cupy-cuda12x", "cupy"))), None
    )
    found["torch_cuda"] = torch_cuda()
    return found


def package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def torch_cuda() -> str | None:
    """The CUDA version torch was built for, None for a CPU build: read from torch/version.py."""
    with contextlib.suppress(OSError, metadata.PackageNotFoundError):
        source = Path(metadata.distribution("torch").locate_file("torch/version.py")).read_text()
        match = re.search(r"^cuda[^=]*=\s*['\"]([^'\"]+)", source, re.MULTILINE)
        return match and match[1]
    return None


def driver_facts() -> dict:
    """Driver version and GPUs through NVML, which (unlike CUDA itself) answers within milliseconds."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        version = Path("/proc/driver/nvidia/version")
        loaded = version.read_text().splitlines()[0] if version.is_file() else None
        return {"version": None, "loaded": loaded, "gpus": []}
    code = nvml.nvmlInit_v2()
    if code:
        return {"version": None, "gpus": [], "error": f"nvmlInit failed with code {code}"}
    try:
        text = ctypes.create_string_buffer(96)
        nvml.nvmlSystemGetDriverVersion(text, len(text))
        cuda, count = ctypes.c_int(), ctypes.c_uint()
        nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda))
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        return {
            "version": text.value.decode(),
            "cuda": f"{cuda.value // 1000}.{cuda.value % 1000 // 10}",
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "gpus": [gpu_facts(nvml, index) for index in range(count.value)],
        }
    finally:
        nvml.nvmlShutdown()


def gpu_facts(nvml, index: int) -> dict:
    device, name = ctypes.c_void_p(), ctypes.create_string_buffer(96)
    major, minor = ctypes.c_int(), ctypes.c_int()
    memory = (ctypes.c_ulonglong * 3)()  # total, free, used in bytes
    nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device))
    nvml.nvmlDeviceGetName(device, name, len(name))
    nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
    nvml.nvmlDeviceGetMemoryInfo(device, memory)
    return {
        "name": name.value.decode(),
        "arch": major.value * 10 + minor.value,
        "memory_gib": round(memory[0] / 2**30, 1),
    }


def nvcc_facts() -> dict | None:
    """The CUDA compiler that a build from source would use, None where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    names = (os.environ.get("CUDACXX"), f"{home}/bin/nvcc", "nvcc")
    path = next(filter(None, (shutil.which(name) for name in names if name)), None)
    return path and {"path": path, "version": said_version(path, r"release ([\d.]+)")}


def compiler_facts() -> dict:
    """The C compiler, and whether it finds Python.h: Triton builds a launcher for each kernel."""
    names = (os.environ.get("CC"), "gcc", "clang", "cc")
    path = next(filter(None, (shutil.which(name) for name in names if name)), None)
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    version = path and said_version(path, r"(\d+\.\d+[.\d]*)")
    return {"path": path, "version": version, "python_headers": headers}


def said_version(program: str, pattern: str) -> str | None:
    """What ``program --version`` says, within two seconds."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=2)
    match = re.search(pattern, said.stdout)
    return match and match[1]
