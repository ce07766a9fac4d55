"""The PEP 517 backend and the ``build_ext`` command of Tigon.

It is setuptools' backend with two additions: the tools that a native build needs are asked for
only when there will be one, and CUDA's compiler comes from wheels only when the system has none.

Environment: ``TIGON_BUILD`` = auto (build what this machine allows), require (fail if the extension
cannot be built) or none (pure Python); ``TIGON_CUDA_ARCHS`` = the architectures, separated by
semicolons; ``TIGON_BUILD_JOBS`` = compilers at a time.
"""

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that are not overridden below
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent.parent
ARCHS = "80;90a;100a;120a"
CUDA_WHEELS = [
    f"nvidia-{name}==13.0.*"
    for name in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")
]


def mode() -> str:
    """``TIGON_BUILD``, checked."""
    value = os.environ.get("TIGON_BUILD", "auto")
    if value not in ("auto", "require", "none"):
        raise SystemExit(f"TIGON_BUILD is {value!r}; allowed are auto, require and none")
    return value


def system_nvcc() -> str | None:
    """The machine's own nvcc; `tigon doctor` looks in the same places."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    names = (os.environ.get("CUDACXX"), f"{home}/bin/nvcc", "nvcc")
    return next(filter(None, (shutil.which(name) for name in names if name)), None)


def wheel_nvcc() -> str | None:
    """The nvcc of the ``nvidia-cuda-nvcc`` wheel, where the build environment holds one."""
    for folder in sys.path:
        found = sorted(Path(folder or ".").glob("nvidia/cu*/bin/nvcc"))
        if found:
            return str(found[-1])
    return None


def build_requirements() -> list[str]:
    """What a native build needs beyond setuptools; nvcc only where the system has none."""
    if mode() == "none":
        return []
    tools = ["cmake>=3.25", "ninja", "pybind11>=2.12"]
    linux = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
    return tools + (CUDA_WHEELS if linux and not system_nvcc() else [])


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + build_requirements()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + build_requirements()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    # setuptools reuses build/lib*, where a module deleted since would live on in the wheel.
    for stale in (ROOT / "build").glob("lib*"):
        shutil.rmtree(stale)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


class BuildNative(build_ext):
    """``build_ext`` by CMake; leaves ``_C`` and ``_build.json``, which ``tigon doctor`` reads."""

    def run(self):
        started = time.monotonic()
        record = {"mode": mode(), "archs": os.environ.get("TIGON_CUDA_ARCHS", ARCHS)}
        nvcc = system_nvcc() or wheel_nvcc()
        record["nvcc"] = system_nvcc() or (nvcc and "the nvidia-cuda-nvcc wheel")
        module, reason = None, self.missing(nvcc)
        if not reason:
            try:
                module = self.compile(nvcc, record["archs"])
                reason = None if module else f"{nvcc} does not work"
            except subprocess.CalledProcessError as error:
                reason = f"the build failed: {first_error(error.stdout)}"
        seconds = round(time.monotonic() - started, 1)
        record |= {"built": module is not None, "why": reason, "seconds": seconds}
        target = Path(self.get_ext_fullpath("tigon._C"))
        target.parent.mkdir(parents=True, exist_ok=True)
        if module:
            shutil.copy2(module, target)
        (target.parent / "_build.json").write_text(json.dumps(record, indent=1) + "\n")
        report(record)
        if not module and mode() == "require":
            raise SystemExit(f"TIGON_BUILD=require, but {reason}")

    def missing(self, nvcc: str | None) -> str | None:
        """Why there can be no extension here, or None."""
        if sys.platform != "linux":
            return f"the extension is built on Linux only, this is {sys.platform}"
        if not (ROOT / "CMakeLists.txt").is_file():
            return "CMakeLists.txt is not here"
        if not nvcc:
            return "no nvcc: install the CUDA toolkit, or build with pip's isolation"
        if not shutil.which("c++") and not shutil.which("g++") and not os.environ.get("CXX"):
            return "no C++ compiler: install g++"
        if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
            return "no Python.h: install Python's headers (Debian: python3-dev)"
        if not tool("cmake"):
            return "no cmake: pip install cmake"
        if importlib.util.find_spec("pybind11") is None:
            return "no pybind11: pip install pybind11"
        return None

    def compile(self, nvcc: str, archs: str) -> Path | None:
        """Configure, build, and return the module; None where CMake finds that nvcc does not work."""
        import pybind11

        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        out = build / "out"
        shutil.rmtree(out, ignore_errors=True)
        env = dict(os.environ, CUDACXX=nvcc)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": out,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TIGON_CUDA_ARCHS": archs,
        }
        ninja = tool("ninja")
        if ninja:
            options["CMAKE_MAKE_PROGRAM"] = ninja
        configure = [tool("cmake"), "--fresh", "-S", ROOT, "-B", build]
        configure += ["-G", "Ninja" if ninja else "Unix Makefiles"]
        run([*configure, *(f"-D{name}={value}" for name, value in options.items())], env)
        run([tool("cmake"), "--build", build, "--parallel", str(jobs())], env)
        return next(iter(out.glob("_C*")), None)


def tool(name: str) -> str | None:
    """A program of the build environment (its ``bin`` is first on PATH), or beside Python."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def jobs() -> int:
    """One per core, but no more than one per GB of memory that is free."""
    if "TIGON_BUILD_JOBS" in os.environ:
        return int(os.environ["TIGON_BUILD_JOBS"])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    return max(1, min(len(os.sched_getaffinity(0)), free))


def run(command: list, env: dict) -> None:
    """Run, keep what it said for the error message, and pass it on to ``pip -v``."""
    done = subprocess.run(
        [str(part) for part in command],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout, flush=True)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout)


def first_error(output: str) -> str:
    """The first line of a compiler's or CMake's output that names an error."""
    lines = [line.strip() for line in output.splitlines() if "error" in line.lower()]
    return (lines or output.splitlines()[-1:] or ["no output"])[0]


def report(record: dict) -> None:
    """Six lines on what was built; to the terminal too, because pip hides a build's output."""
    built = record["built"]
    ptx = " and PTX of compute_80"
    lines = [
        f"Tigon, TIGON_BUILD={record['mode']}:",
        "  Python and Triton kernels   included",
        f"  CUDA extension tigon._C     {'built' if built else 'not built'}",
        f"  architectures               {record['archs'] + ptx if built else 'none'}",
        f"  nvcc                        {record['nvcc'] or 'none found'}",
        f"  {'seconds' if built else 'why':<27} {record['seconds' if built else 'why']}",
    ]
    text = "\n".join(lines) + "\n"
    print(text, flush=True)
    with suppress(OSError, AttributeError), open("/dev/tty", "w") as terminal:
        # Only as the foreground job: a background job that writes to its terminal may be stopped.
        if not sys.stdout.isatty() and os.tcgetpgrp(terminal.fileno()) == os.getpgrp():
            terminal.write("\n" + text)
