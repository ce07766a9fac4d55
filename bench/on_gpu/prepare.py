"""The stages build and warm: an environment, the extension for this GPU, every kernel compiled once."""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from stage import Failed, Stage, imports_tigon, interpreter, program, venv

INSTEAD = 25  # seconds kept of the stage's box for what is done where make env fails or is too slow
MODULES = ("setuptools", "pybind11", "cupy", "pytest", "xdist", "hypothesis", "numpy", "einops")
MODULES += ("transformers", "safetensors", "pytest_benchmark")


def build(stage: Stage) -> str:
    """An environment over the packages that are here; nothing but Tigon is installed into it."""
    code = f"import importlib.util as u; print(*(m for m in {MODULES} if not u.find_spec(m)))"
    missing = (stage.says(sys.executable, "-c", code) or "").split()
    missing += [
        tool for tool in ("make", "cmake", "nvcc", "c++", "compute-sanitizer") if not program(tool)
    ]
    stage.facts["missing"] = missing
    if stage.device == "cpu" and imports_tigon(stage, sys.executable):
        how = "already there"
    else:
        how = install(stage)
    python = interpreter(stage)
    doctor = stage.folder / "doctor.json"
    said = stage.says(python, "-m", "tigon", "doctor", "--json")
    if said is None:
        raise Failed("tigon doctor does not work")
    doctor.write_text(said)
    native = json.loads(said)["tigon"]
    made = native.get("build") or {}
    cuda = "reference on the CPU" if stage.device == "cpu" else way(stage, python)
    stage.facts |= {
        "how": how,
        "cuda_kernels": cuda,
        "archs": made.get("archs"),
        "why": made.get("why"),
    }
    stage.facts["build_seconds"] = made.get("seconds")
    seen = stage.says(python, "-c", "import torch; assert torch.cuda.is_available()")
    if stage.device == "cuda" and seen is None:
        raise Failed("torch does not see the GPU")
    if cuda == "none":
        raise Failed(f"no way to the CUDA kernels: {made.get('why')}, and no CuPy")
    lack = f"; missing: {', '.join(missing)}" if missing else ""
    return f"{how}; CUDA kernels: {cuda}{lack}"


def way(stage: Stage, python: Path) -> str:
    """How the CUDA ops run on this GPU."""
    code = "from tigon import native; print(type(native.load()).__name__)"
    names = {"Extension": "extension", "RunTimeCompiler": "CuPy"}
    return names.get((stage.says(python, "-c", code) or "").strip(), "none")


def install(stage: Stage) -> str:
    """By `make env`; where that fails, a link in an environment of its own, and CuPy for the CUDA ops."""
    env, folder = {}, venv(stage)
    if stage.device == "cuda":
        code = "import torch; print('%d%d' % torch.cuda.get_device_capability())"
        if said := stage.says(sys.executable, "-c", code):
            arch = said.split()[-1]
            env["TIGON_CUDA_ARCHS"] = arch + ("a" if int(arch) >= 90 else "")
    else:
        env["TIGON_BUILD"] = "none"
    make = ("make", "env", "ENV=present", f"PYTHON={sys.executable}", f"VENV={folder}")
    if program("make") and stage.call(*make, box=max(stage.left() - INSTEAD, 1), **env) == 0:
        return "make env"
    packages = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    if stage.call(sys.executable, "-m", "venv", "--without-pip", folder):
        raise Failed("no environment can be made: python -m venv does not work")
    [site] = folder.glob("lib/python*/site-packages")
    lines = "".join(f"import site; site.addsitedir({p!r})\n" for p in packages)
    (site / "present.pth").write_text(lines)
    link = site / "tigon"
    link.unlink(missing_ok=True)
    link.symlink_to(stage.root / "python")
    return "a link (make env failed or was too slow: see the log)"


def warm(stage: Stage) -> str:
    """Every op's kernels compiled once, by all cores."""
    file = stage.folder / "warm.json"
    file.unlink(missing_ok=True)
    budget = max(stage.left() - 8, 1)
    command = ["-m", "tigon.bench.warm", "--device", stage.device, "--budget", f"{budget:.0f}"]
    command += ["--jobs", stage.workers(16), "--json", file]
    command += ["--ops", *os.environ["OPS"].split()] if os.environ.get("OPS") else []
    # Before the benchmark, compilation of other packages' code is no waste of its time either.
    command += ["--peers"] if stage.device == "cuda" else []
    code = stage.call(interpreter(stage), *command)
    with suppress(OSError, ValueError):
        stage.facts |= json.loads(file.read_text())
    if code or "done" not in stage.facts:
        raise Failed(f"exit code {code}")
    failures, left = stage.facts["failures"], stage.facts["left"]
    note = f"{stage.facts['done']} workloads, {len(failures)} failed"
    return note + (f", {left} not run for want of time" if left else "")
