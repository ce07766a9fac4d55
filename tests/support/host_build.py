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
    # A fortified longjmp refuses to change stacks, which is how fibers take turns.
    "fibers": ["-O2", "-fPIC", "-DHOST_FIBERS", "-U_FORTIFY_SOURCE"],
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


def build(kind: str, kernels: list[Path] = KERNELS) -> Path:
    """The library or program of this kind from these kernel sources, built if it is not there yet."""
    runtime = [SHIM / "host_launch.cpp", *([] if kind == "fibers" else [SHIM / "sanitize.cpp"])]
    BUILDS.mkdir(parents=True, exist_ok=True)
    with (BUILDS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of several pytest processes builds, the others wait
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(lambda source: compiled(kind, source), [*kernels, *runtime]))
        result = BUILDS / f"{kind}-{digest(*map(str.encode, map(str, objects)))}"
        shared = ["-shared"] if kind == "fibers" else []
        return made(result, ["g++", *FLAGS[kind], *shared, *map(str, objects)])


def compiled(kind: str, source: Path) -> Path:
    """The object file of one source."""
    include = [f"-I{ROOT / 'csrc'}", f"-I{SHIM}", "-isystem", str(native.cuda_headers())]
    command = ["g++", "-std=c++20", *FLAGS[kind], "-DTIGON_HOST_BUILD", *include, "-x", "c++", "-c"]
    headers = [*SHIM.glob("*.h"), *(ROOT / "csrc" / "common").glob("*")]
    content = (path.read_bytes() for path in (source, *sorted(headers)))
    name = f"{source.stem}-{kind}-{digest(str(command).encode(), *content)}.o"
    return made(BUILDS / name, [*command, str(source)])


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def made(result: Path, command: list[str]) -> Path:
    """`result`, by the command unless it is there; whole or not at all."""
    if not result.exists():
        scratch = result.with_name(f"{result.name}.new")
        done = subprocess.run([*command, "-o", str(scratch)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        scratch.replace(result)
    return result
