"""A run of `tigon bench` as schema 2 stores it, for the tests of its readers. No machine: every number is made up."""

import random

from tigon.bench.variants import variants
from tigon.bench.work import work
from tigon.registry import OPS

COPY, GEMM = 3.0e12, {"float32": 2.6e14, "bfloat16": 7.0e14, "float8_e4m3fn": 1.3e15}
SOME_PEERS = {
    "mamba2": ("mamba_ssm", "transformers"),
    "low precision": ("torchao", "modelopt"),
    "moe": ("transformers", "torch_grouped_mm"),
    "speculative decoding": ("flashinfer",),
    "token reduction": ("torch_eager",),
}
RED = ("scaled_mm", "w4a4")  # its gate is red
SUSPECT = "suspect: 112 % of the roof"
DIFFERS = "differs from the oracle"
LAUNCH_BOUND = "launch-bound: measure with --graph"
ABSENT = "flash_linear_attention"  # a peer that is never installed
ENV = {
    "date": "2026-12-01",
    "tigon": "0.1.0",
    "commit": "0123abc",
    "device": "Imaginary GPU 80GB",
    "arch": 90,
    "threads": 16,
    "os": {"name": "Debian GNU/Linux 12 (bookworm)", "kernel": "6.1.0", "machine": "x86_64"},
    "python": {"version": "3.12.3"},
    "packages": {
        "torch": "2.13.0+cu130",
        "triton": "3.7.1",
        "transformers": "5.23.0",
        "cupy": None,
    },
    "driver": {"version": "580.65.06", "cuda": "13.0", "gpus": [{"name": "Imaginary GPU 80GB"}]},
}


def timing(median: float, spread: float = 0.02) -> dict:
    low, high = median * (1 - spread), median * (1 + 2 * spread)
    return {"median": median, "p20": low, "p80": high, "n": 40, "method": "CUDA events"}


def result(name: str, median: float, roof: float, error=3e-3, flags=(), spread=0.02) -> dict:
    return {
        "name": name,
        "time": timing(median, spread),
        "peak": int(2e14 * median),
        "error": error,
        "share": roof / median,
        "flags": list(flags),
    }


def case(
    op: str, variant: str = "", mode="forward", shape=None, sweep=None, dtype="bfloat16", seed=0
) -> dict:
    """One entry of `cases`, with peers of the op's family that are slower by chance, at times faster."""
    luck = random.Random(f"{op}{variant}{mode}{shape}{seed}")
    shape = dict(OPS[op].sizes if shape is None else shape)
    counted = work(op, shape, 2, mode, variant or None)
    memory, compute = counted.bytes / COPY, counted.flops / GEMM[dtype]
    roof = max(memory, compute)
    red = (op, variant) == RED
    mine = (roof + 2e-6) / luck.uniform(0.55, 0.93)
    results = [result("tigon", mine, roof, spread=luck.uniform(0.005, 0.05))]
    for name in SOME_PEERS[OPS[op].family]:
        slower, spread = luck.uniform(0.8, 6.0), luck.uniform(0.01, 0.15)
        results.append(result(name, mine * slower, roof, spread=spread))
    row = {"name": "y", "error": 3e-3, "baseline": 3e-3, "limit": 1e-2, "repeats": True}
    wrong = dict(row, name="out", error=float("inf"), repeats=False)
    calm = {"sm_mhz": 1980, "memory_mhz": 2619, "power_w": 110.0, "throttle": []}
    hot = {"sm_mhz": 1755, "memory_mhz": 2619, "power_w": 698.0, "throttle": ["power cap"]}
    return {
        "case": {
            "op": op,
            "variant": variant,
            "mode": mode,
            "preset": "nemotron-3-super",
            "shape": shape,
            "dtype": dtype,
            "seed": 0,
            "cold": True,
            "graph": False,
            "backend": None,
            "sweep": sweep,
        },
        "work": {
            "bytes": counted.bytes,
            "flops": counted.flops,
            "roof_s": roof,
            "bound": "memory" if memory >= compute else "compute",
        },
        "check": {"ok": not red, "shape": shape, "rows": [row, wrong] if red else [row]},
        "results": [] if red else results,
        "missing": {ABSENT: "not installed"},
        "clocks": {"before": calm, "after": hot if compute > memory else calm},
    }


def swept(op: str, letter: str, values, **more) -> list[dict]:
    """The cases that a sweep adds: one a value of one size."""
    shapes = [dict(OPS[op].sizes, **{letter: value}) for value in values]
    return [case(op, shape=shape, sweep=letter, **more) for shape in shapes]


def sample_run() -> dict:
    """Every public op, two sweeps, a red gate, peers that are absent, fail or differ, a result too good to be true."""
    public = [name for name, op in OPS.items() if op.public]
    cases = [case(op, variants(op)[0]) for op in public]
    cases += [case("ssd_scan", mode="step"), case("ssd_update", "int8"), case(*RED)]
    cases += swept("ssd_scan", "l", (512, 1024, 2048, 4096))
    cases += [case("grouped_mm", mode="step")]
    cases += swept("grouped_mm", "rows", (512, 4096, 32768), mode="step")
    by_op = {item["case"]["op"]: item for item in cases[: len(public)]}
    by_op["rms_norm"]["results"][0] |= {"share": 1.12, "flags": [SUSPECT]}
    by_op["sample"]["results"][1] |= {"error": 0.31, "flags": [DIFFERS]}
    failed = "failed: RuntimeError: no kernel image is available for execution on the device"
    by_op["moe_experts"]["missing"]["torch_grouped_mm"] = failed
    del by_op["moe_experts"]["results"][2]
    by_op["tree_ancestors"]["results"][0] |= {"peak": None, "flags": [LAUNCH_BOUND]}
    by_op["verify_draft"]["results"][1]["error"] = None  # random by nature
    by_op["select_tokens"]["clocks"] = None
    return {
        "schema": 2,
        "command": "tigon bench all --preset nemotron-3-super --peers auto --json run.json",
        "env": ENV,
        "roof": {"device": ENV["device"], "source": "measured", "copy": COPY, "gemm": dict(GEMM)},
        "cases": cases,
    }
