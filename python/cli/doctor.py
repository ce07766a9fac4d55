"""``tigon doctor``: what works on this machine, what does not, and the fix.

Runs where torch is missing or broken: it needs the standard library only.
"""

import json
import os
import re
from pathlib import Path

import tigon
from tigon import cli
from tigon.cli import machine

MINIMUM = {"torch": (2, 6), "triton": (3, 6)}
OLDEST_ARCH = 80


def add_arguments(parser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--strict",
        action="store_true",
        help=f"exit with {cli.ENVIRONMENT} if there is a fix to make",
    )


def run(args) -> int:
    report = examine()
    print(json.dumps(report, indent=2) if args.json else render(report))
    return cli.ENVIRONMENT if args.strict and report["fixes"] else cli.OK


def examine() -> dict:
    """The whole report."""
    report = {"tigon": machine.guarded(tigon_facts), **machine.facts()}
    report["environment"] = {k: v for k, v in sorted(os.environ.items()) if k.startswith("TIGON_")}
    report["fixes"] = fixes = []
    kinds = ("triton", "cuda")
    reasons = {kind: machine.guarded(obstacle, kind, report, fixes) for kind in kinds}
    report["ops"] = machine.guarded(op_facts, report, reasons)
    return report


def tigon_facts() -> dict:
    """Version, place, and what the build recorded about the extension."""
    folder = Path(tigon.__file__).parent
    record = folder / "_build.json"
    return {
        "version": tigon.__version__,
        "path": str(folder),
        "native": machine.guarded(native_status),
        "build": machine.guarded(json.loads, record.read_text()) if record.is_file() else None,
    }


def native_status() -> dict:
    from tigon import native

    return native.status()


def op_facts(report: dict, reasons: dict) -> list[dict]:
    """For every op the backend that a call on this machine's best device takes, and why."""
    from tigon import registry

    forced = os.environ.get("TIGON_BACKEND", "auto")
    through = {
        "triton": f"Triton {report['packages'].get('triton')}",
        "cuda": "the extension tigon._C",
    }
    if (report["tigon"].get("native") or {}).get("backend") == "cupy":
        through["cuda"] = f"CuPy {report['packages'].get('cupy')}, which compiles at run time"
    rows = []
    for op in registry.PUBLIC.values():
        reason = reasons[op.kind]
        backend, why = ("reference", line(reason)) if reason else (op.kind, through[op.kind])
        if forced == "reference":
            backend, why = forced, "TIGON_BACKEND=reference"
        elif forced == "kernel" and reason:
            backend, why = "none", f"TIGON_BACKEND=kernel, but {why}"
        rows.append({"op": op.name, "kind": op.kind, "backend": backend, "why": why})
    return rows


def obstacle(kind: str, report: dict, fixes: list) -> str | None:
    """Why ops of ``kind`` cannot run their kernel here (None: they can), noting what can be mended."""
    packages, driver = report["packages"], report["driver"]
    for name, least in MINIMUM.items():
        if name == "triton" and kind != "triton":
            continue
        problem = too_old(name, packages.get(name), least)
        if problem:
            note(fixes, f"pip install '{name}>={'.'.join(map(str, least))}'", problem)
            return problem
    if not driver.get("gpus"):
        if driver.get("error") or driver.get("loaded"):
            problem = driver.get("error") or "the driver is loaded but its NVML library is missing"
            note(fixes, "reboot, or install the driver's user-space libraries again", problem)
            return problem
        return "no NVIDIA GPU"
    if not packages.get("torch_cuda"):
        note(fixes, "install torch's CUDA build", problem := "torch is a CPU build")
        return problem
    archs = [gpu["arch"] for gpu in driver["gpus"]]
    if max(archs) < OLDEST_ARCH:
        return f"the GPU is sm_{max(archs)}, kernels begin at sm_{OLDEST_ARCH}"
    return triton_obstacle(report, fixes) if kind == "triton" else cuda_obstacle(report, fixes)


def triton_obstacle(report: dict, fixes: list) -> str | None:
    compiler = report["compiler"]
    if not compiler.get("path"):
        note(fixes, "install gcc or clang", problem := "Triton needs a C compiler at run time")
    elif not compiler.get("python_headers"):
        fix = "install Python's headers (Debian: python3-dev)"
        note(fixes, fix, problem := "Triton needs Python.h at run time")
    else:
        return None
    return problem


def cuda_obstacle(report: dict, fixes: list) -> str | None:
    native = report["tigon"].get("native") or {}
    if native.get("backend"):
        return None
    cuda = report["packages"]["torch_cuda"].split(".")[0]
    problem = f"{native.get('why') or line(native)}, and CuPy is not installed"
    note(fixes, f"pip install 'tigon[cu{cuda}]', or reinstall Tigon where nvcc is", problem)
    return problem


def too_old(name: str, version: str | None, least: tuple) -> str | None:
    if not version:
        return f"{name} is not installed"
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    wanted = ".".join(map(str, least))
    return f"{name} {version} is older than {wanted}" if numbers < least else None


def note(fixes: list, fix: str, why: str) -> None:
    entry = {"fix": fix, "why": why}
    if entry not in fixes:
        fixes.append(entry)


def render(report: dict) -> str:
    """The report as text, about one screen."""
    lines = []
    for title, rows in sections(report).items():
        lines += [title, *(f"  {name:<21} {value}" for name, value in rows), ""]
    return "\n".join(lines).rstrip()


def sections(report: dict) -> dict[str, list[tuple[str, str]]]:
    """Title -> (label, value) rows."""
    own, packages, driver = report["tigon"], report["packages"], report["driver"]
    flavour = packages.get("torch_cuda")
    flavour = f" (built for CUDA {flavour})" if flavour else " (CPU build)"
    ops, fixes = report["ops"], report["fixes"]
    machine_rows = [(name, line(report[name])) for name in ("os", "python", "compiler", "nvcc")]
    driver_row = {name: driver.get(name) for name in ("version", "cuda", "loaded", "error")}
    gpus = [(f"gpu {index}", gpu_line(gpu)) for index, gpu in enumerate(driver.get("gpus", []))]
    out = {
        f"Tigon {own.get('version', '?')}": [
            ("path", own.get("path") or line(own)),
            ("CUDA extension", native_line(own.get("native") or {})),
            ("build", line(own.get("build"))),
        ],
        "Machine": [*machine_rows, ("driver", line(driver_row)), *gpus],
        "Packages": [
            (name, f"{version or 'not installed'}{flavour if name == 'torch' and version else ''}")
            for name, version in packages.items()
            if name != "torch_cuda"
        ],
        "Environment": list(report["environment"].items()),
        "Ops": [(op["op"], f"{op['backend']:<10} {op['why']}") for op in ops]
        if isinstance(ops, list)
        else [("unknown", line(ops))],
        "To fix": [
            (f"{index}. {fix['why']}", f"\n     {fix['fix']}") for index, fix in enumerate(fixes, 1)
        ],
    }
    return {title: rows for title, rows in out.items() if rows}


def line(value) -> str:
    """A probe's answer on one line; a failed probe shows its error."""
    if isinstance(value, dict):
        bare = ("name", "version", "path", "executable", "libc", "machine", "why")
        parts = ((name, line(part)) for name, part in value.items() if part)
        value = ", ".join(part if name in bare else f"{name} {part}" for name, part in parts)
    elif isinstance(value, (list, tuple)):
        value = ";".join(map(str, value))
    return str(value) if value else "none"


def native_line(native: dict) -> str:
    if not native.get("extension"):
        return line(native.get("why") or native)
    return line({name: native.get(name) for name in ("archs", "nvcc", "cxx", "kernels")})


def gpu_line(gpu: dict) -> str:
    return (
        f"{gpu['name']}, sm_{gpu['arch']}, {gpu['memory_gib']} GiB" if "name" in gpu else line(gpu)
    )
