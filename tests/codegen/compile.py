"""Compile kernel launches for architectures that are not there, and say what came out.

    python tests/codegen/compile.py [--all] [--only TEXT] [--arch 90] [--json]

Every case of tests/support/codegen_cases.py calls a launcher with tensors on the meta device while Triton's launch is
replaced by a note of what it was asked for. So what is compiled is what the launcher launches: its tables, its
specializations. Each distinct (kernel, arguments, config, architecture) is compiled once, on all cores, and kept in
build/triton by the hash of its source. Needs no GPU, and a process in which TRITON_INTERPRET is not set.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import codegen_cases as cases  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from tigon.kernels import launch  # noqa: E402

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}
MMA = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma\b",
    "mma": r"\bmma\.sync",
    "e4m3": r"mma\S*\.e4m3\.e4m3",  # operands as they are, of wgmma and mma.sync
    "f8f6f4": r"mma\S*\.kind::f8f6f4",
    "mxf8f6f4": r"mma\S*\.kind::mxf8f6f4",
    "mxf4nvf4": r"mma\S*\.kind::mxf4nvf4",
}


@dataclass(frozen=True)
class Launch:
    """One kernel as one launch would specialize it; a hashable key for what must be compiled."""

    kernel: str  # module:name
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, object], ...]
    arch: int


@dataclass
class Report:
    """What ptxas and the compiler made of a launch: registers a thread, bytes, instruction counts."""

    kernel: str
    arch: int
    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]
    half_dots: int
    wide_loads: int
    wide_stores: int
    narrow_addresses: list[str]
    tile: str


def record(call, arch: int) -> list[Launch]:
    """The launches of `call()`, none of which happens."""
    launches = []

    def note(kernel, *args, grid, warmup, **kwargs):
        launches.append(_launch(kernel, args, kwargs, arch))

    original, JITFunction.run = JITFunction.run, note
    try:
        with launch.assume(arch):
            call()
    finally:
        JITFunction.run = original
    return launches


def _launch(kernel, args, kwargs, arch) -> Launch:
    values = dict(zip(kernel.arg_names, args))
    options = {k: v for k, v in kwargs.items() if k not in kernel.arg_names}
    values |= {k: v for k, v in kwargs.items() if k in kernel.arg_names}
    types, constants, divisible = [], [], []
    for i, param in enumerate(kernel.params):
        value = values.get(param.name, param.default)
        kind = "constexpr" if param.is_constexpr else _type(value)
        types.append((param.name, kind))
        if kind == "constexpr":
            constants.append((param.name, value))
        elif kind.startswith("*") or (kind[0] == "i" and value % 16 == 0):
            divisible.append(i)
    name = f"{kernel.fn.__module__}:{kernel.fn.__name__}"
    return Launch(name, *map(tuple, (types, constants, divisible, sorted(options.items()))), arch)


def _type(value) -> str:
    """Triton's type of a runtime argument; None and 1 are compiled in."""
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_launch(item: Launch) -> Report:
    module, name = item.kernel.split(":")
    source = ASTSource(
        getattr(import_module(module), name),
        dict(item.types),
        dict(item.constants),
        {(i,): [["tt.divisibility", 16]] for i in item.divisible},
    )
    built = triton.compile(
        source, target=GPUTarget("cuda", item.arch, 32), options=dict(item.options)
    )
    registers, stack = resource_usage(built.asm["cubin"])
    ptx, ttir = built.asm["ptx"], built.asm["ttir"]
    constants = {k: v for k, v in (*item.constants, *item.options) if v is not None}
    return Report(
        kernel=name,
        arch=item.arch,
        registers=registers,
        stack=stack,
        shared=built.metadata.shared,
        instructions={name: len(re.findall(pattern, ptx)) for name, pattern in MMA.items()},
        wide_loads=len(re.findall(r"ld\.global\S*\.(?:v4\.b32|v2\.b64)", ptx)),
        wide_stores=len(re.findall(r"st\.global\S*\.(?:v4\.b32|v2\.b64)", ptx)),
        half_dots=len(re.findall(r"tt\.dot .*(?:bf16|f16|f8\w+)>", ttir)),
        narrow_addresses=re.findall(r"tt\.addptr .*: !tt\.ptr<\w+>, i32.*", ttir),
        tile=" ".join(f"{k}={v}" for k, v in constants.items()),
    )


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack and local memory): spills go to the stack."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def run(everything: bool, only: str = "", archs=(80, 90, 100, 120)) -> dict[str, list[dict]]:
    """Reports by "case/arch"."""
    wanted = {}
    for case in cases.CASES:
        for arch in archs:
            if only in case.name:
                dtypes = case.all_dtypes if everything else case.dtypes
                found = [item for dtype in dtypes for item in record(case.call(dtype), arch)]
                wanted[f"{case.name}/{arch}"] = list(dict.fromkeys(found))
    distinct = list(dict.fromkeys(item for items in wanted.values() for item in items))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        reports = dict(zip(distinct, pool.map(compile_launch, distinct)))
    return {name: [asdict(reports[item]) for item in items] for name, items in wanted.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every dtype, not one of each size")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--arch", type=int, action="append", choices=[80, 90, 100, 120])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        reports = run(args.all, args.only, args.arch or (80, 90, 100, 120))
    if args.json:
        print(json.dumps(reports))
        return
    for name, found in reports.items():
        for r in found:
            mma = " ".join(f"{k} {v}" for k, v in r["instructions"].items() if v)
            print(
                f"{name:34} {r['kernel']:16} {r['registers']:3} registers {r['stack']:4} B stack "
                f"{r['shared'] / 1024:6.1f} KB shared  {mma or '-'}  {r['tile']}"
            )


if __name__ == "__main__":
    main()
