"""Builds csrc/ for the CPU: the same .cu files, by g++, against tests/csrc/host_cuda.h.

Kinds: "fibers" (a shared library for value tests, every CUDA thread a fiber), "asan" and "tsan" (programs that
run one launch from a file under AddressSanitizer + UBSan or ThreadSanitizer, every CUDA thread a std::thread).
Results are kept in build/csrc-host by the hash of all that goes in.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tigon import native

ROOT = Path(__file__).resolve().parents[2]
SHIM = ROOT / "tests" / "csrc"
BUILDS = ROOT / "build" / "csrc-host"
KERNELS = sorted((ROOT / "csrc").glob("*.cu"))
FLAGS = {
    "fibers": ["-O2", "-fPIC", "-DHOST_FIBERS"],
    "asan": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-O1", "-g1", "-fsanitize=thread"],
}


def missing() -> str | None:
    """Why there can be no host build here, and how to get what is missing; None if there can be one."""
    if not shutil.which("g++"):
        return "no g++ (Debian: apt install g++)"
    if native.cuda_headers() is None:
        return (
            "no CUDA headers: pip install nvidia-cuda-runtime==13.0.* nvidia-cuda-crt==13.0.* "
            "nvidia-cuda-cccl==13.0.*, or set CUDA_HOME"
        )
    return None


def build(kind: str, kernels: list[Path] = KERNELS, defines: tuple[str, ...] = ()) -> Path:
    """The library or program of this kind from these kernel sources, built if it is not there yet."""
    runtime = [SHIM / "host_launch.cpp", *([] if kind == "fibers" else [SHIM / "sanitize.cpp"])]
    flags = ["-std=c++20", *FLAGS[kind], "-DTIGON_HOST_BUILD", *defines]
    parts = [*kernels, *runtime, *SHIM.glob("*.h"), *(ROOT / "csrc" / "common").glob("*")]
    text = b"\0".join([str(flags).encode(), *(path.read_bytes() for path in sorted(parts))])
    name = f"{kind}-{hashlib.sha256(text).hexdigest()[:16]}"
    result = BUILDS / (name + (".so" if kind == "fibers" else ""))
    BUILDS.mkdir(parents=True, exist_ok=True)
    with (BUILDS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of several pytest processes builds, the others wait
        if not result.exists():
            compile_all([*kernels, *runtime], flags, result, shared=kind == "fibers")
    return result


def compile_all(sources: list[Path], flags: list[str], result: Path, shared: bool) -> None:
    """Compile each source, one per core at a time, and link them into `result`."""
    scratch = result.with_name(result.name + ".parts")
    scratch.mkdir(exist_ok=True)
    include = [f"-I{ROOT / 'csrc'}", f"-I{SHIM}", "-isystem", str(native.cuda_headers())]
    objects = [scratch / f"{source.name}.o" for source in sources]
    commands = [
        ["g++", *flags, *include, "-x", "c++", "-c", str(source), "-o", str(target)]
        for source, target in zip(sources, objects)
    ]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(run, commands))
    linked = scratch / "linked"
    run(["g++", *flags, *(["-shared"] if shared else []), *map(str, objects), "-o", str(linked)])
    linked.replace(result)
    shutil.rmtree(scratch)


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
