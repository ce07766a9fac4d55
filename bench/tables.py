"""Tables of README.md and the docs, made from data and never typed: `python -m tigon.bench.tables [--check]`.

A page marks a block by two lines, and what lies between them is rewritten:

    <!-- generated: support -->             every public op, by python/registry.py
    <!-- generated: gpu-results [NAME…] --> bench/results/<GPU>/NAME.json, all files without a name
    <!-- generated: cpu-results NAME… -->   bench/results/cpu/NAME.json, in that order
    <!-- generated: nvfp4-training -->      bench/results/cpu/nvfp4_training.json
    <!-- end -->

--check writes nothing and fails where a page is not what the data say. Works in a checkout only.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tigon.bench import records
from tigon.registry import PUBLIC, Op

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "python -m tigon.bench.tables"
BLOCK = re.compile(r"(<!-- generated: (.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
NOT_MEASURED = "Not measured yet.\n"
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float8_e4m3fn": "FP8"}
KERNELS = {"triton": "Triton", "cuda": "CUDA C++"}


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def short(dtype: str) -> str:
    return SHORT.get(dtype, dtype)


def support(root: Path, names: Sequence[str] = ()) -> str:
    """One row an op; neighbours that differ in nothing but the name share one."""
    grouped: dict[tuple[str, ...], list[str]] = {}
    for op in PUBLIC.values():
        grouped.setdefault(support_row(op), []).append(f"`{op.name}`")
    columns = (
        "op", "kernel", "dtypes", "GPUs", "passes", "`torch.compile`", "CUDA graph", "batch-invariant",
        "packed, ragged",
    )  # fmt: skip
    return table(columns, [(", ".join(ops), *row) for row, ops in grouped.items()])


def support_row(op: Op) -> tuple[str, ...]:
    words = "|".join(("cu_seqlens", *PUBLIC))
    return (
        KERNELS[op.kind],
        "; ".join(filter(None, (" ".join(map(short, op.dtypes)), op.takes))),
        f"sm_{', '.join(map(str, op.archs))}",
        "forward, backward" if op.backward else "forward",
        "yes" if op.compiles else "-",
        "yes" if op.captures else "-",
        op.invariant or "-",
        re.sub(rf"\b({words})\b", r"`\1`", op.ragged) or "-",
    )


def speed(own: float, other: float) -> str:
    """How Tigon's time compares with another's."""
    return compared(other / own, "faster", "slower")


def memory(own: float | None, other: float | None) -> str:
    return compared(other / own, "less", "more") if own and other else "-"


def compared(ratio: float, above: str, below: str) -> str:
    text = f"{max(ratio, 1 / ratio):.3g}"
    return "the same" if text == "1" else f"{text}x {above if ratio > 1 else below}"


def peers(found: Mapping) -> list[dict]:
    """Results of others: not of the same op in another mode."""
    return [r for r in found["results"] if not r["name"].startswith("tigon")]


def flagged(text: str, result: Mapping) -> str:
    return f"{text} ({'; '.join(result['flags'])})" if result["flags"] else text


def case_text(case: Mapping) -> str:
    """Op, variant, mode, where it was asked for, shape and dtype."""
    mode = {"step": "forward and backward"}.get(case["mode"], case["mode"])
    said = (case.get("variant"), mode, case.get("preset"))
    flags = [word for word in ("cold", "graph") if case.get(word)]
    shape = records.shape_text(case["shape"])
    return " ".join(filter(None, (f"`{case['op']}`", *said, shape, short(case["dtype"]), *flags)))


def gpu_results(root: Path, names: Sequence[str] = ()) -> str:
    """A table for each GPU and file; sweeps, which are for plots, are left out."""
    parts = []
    for folder in sorted((root / "bench/results").iterdir()):
        for path in sorted(folder.glob("*.json")) if folder.name != "cpu" else ():
            if names and path.stem not in names:
                continue
            try:
                run = records.load(path)
            except ValueError:  # a summary, not a record
                continue
            parts.append(gpu_part(run, path.relative_to(root)))
    return "\n".join(parts) or NOT_MEASURED


def gpu_part(run: Mapping, path: Path) -> str:
    rows = []
    for found in run["cases"]:
        if found["case"].get("sweep"):
            continue
        if not found["results"]:
            rows.append((case_text(found["case"]), "wrong, so not timed", "-", "-"))
            continue
        own = found["results"][0]
        seconds = own["time"]["median"]
        share = "-" if own["share"] is None else f"{100 * own['share']:.3g} %"
        beside = (
            flagged(f"{speed(seconds, peer['time']['median'])} than {peer['name']}", peer)
            for peer in peers(found)
        )
        time = flagged(f"{seconds * 1e3:.4g} ms", own)
        rows.append((case_text(found["case"]), time, share, "; ".join(beside) or "-"))
    lines = [
        records.machine_line(run["env"]),
        records.roof_line(run["roof"]) if run["roof"] else "",
    ]
    lines += [f"`{run['command']}` (`{path}`)"]
    body = table(("call", "time", "of the roof", "beside"), rows)
    return body + "\n" + "\n".join(f"{line}.  " for line in filter(None, lines)) + "\n"


def cpu_results(root: Path, names: Sequence[str]) -> str:
    """Ratios within one run: the absolute times belong to a small machine."""
    rows, envs = [], []
    for name in names:
        path = root / f"bench/results/cpu/{name}.json"
        found = json.loads(path.read_text())
        if isinstance(found, dict) and "cases" not in found:
            reader = token_reduction_rows if "schedule" in found else patch_rows
            rows += reader(found)
            envs.append(found["env"])
            continue
        run = records.load(path)
        # Schema 1 holds an environment a case.
        parts = found if isinstance(found, list) else [run] * len(run["cases"])
        for part, case in zip(parts, run["cases"]):
            rows += case_rows(case, part["env"])
            envs.append(part["env"])
    packages = [(p, v) for env in envs for p, v in env["packages"].items()]
    beside = {"torch", "transformers", *(row[2] for row in rows)}
    named = {p: p.removeprefix("nvidia-").replace("-", "_") for p, _ in packages}
    used = sorted({f"{p} {v}" for p, v in packages if v and named[p] in beside})
    dates = sorted({env["date"] for env in envs})
    commits = sorted({env["commit"] for env in envs})
    cores = sorted({env["os"]["cores"] for env in envs})
    files = f"`bench/results/cpu/`: {', '.join(f'`{name}.json`' for name in names)}"
    return (
        table(("call", "threads", "beside", "time", "peak memory"), rows)
        + f"\nA machine of {'/'.join(map(str, cores))} cores, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, "
        + f"{', '.join(used)}; tigon at {', '.join(commits)}. Commands and times are in {files}.\n"
    )


def case_rows(found: Mapping, env: Mapping) -> Iterator[tuple[str, ...]]:
    """One row a peer."""
    own = found["results"][0]
    threads = str(env["threads"])
    if own["time"]["method"] == "cpu clock":
        threads += ", CPU time"
    for peer in peers(found):
        faster = speed(own["time"]["median"], peer["time"]["median"])
        if peer["time"]["median"] > records.SUSPECT * own["time"]["median"]:
            faster += f" (suspect: over {records.SUSPECT:g}x)"
        less = memory(own["peak"], peer["peak"])
        yield case_text(found["case"]), threads, peer["name"], flagged(faster, peer), less


def patch_rows(found: Mapping) -> Iterator[tuple[str, ...]]:
    """bench/patch_nemotron_h.py: a model before and after `tigon.patch`, and the part that is dense GEMMs."""
    for phase, measured in found["results"].items():
        tokens = f" of {found['options']['tokens']} tokens" if phase == "prefill" else ""
        bound = f"its dense GEMMs alone bound this at {1 / measured['dense_unpatched']:.3g}x"
        ratio = compared(measured["ratio"], "faster", "slower")
        text = f"`tigon.patch` on a NemotronH, {phase}{tokens} fp32; {bound}"
        yield text, str(found["env"]["threads"]), "unpatched", ratio, "-"


def token_reduction_rows(found: Mapping) -> Iterator[tuple[str, ...]]:
    """bench/token_reduction.py: prefill with tokens dropped, and of all."""
    got, kind = found["results"], found["schedule"]["kind"]
    kept = f"an average of {got['average']:.2g}, {got['final']:.1g} at the end"
    text = f"token reduction `{kind}` to {kept}; prefill, {len(found['pattern'])} layers, fp32"
    ratio = compared(got["ratio"], "faster", "slower")
    yield text, str(found["threads"]), "unreduced", ratio, "-"


def nvfp4_training(root: Path, names: Sequence[str] = ()) -> str:
    """examples/nvfp4_training.py: held-out bits per byte by seed, with the recipe and without."""
    found = json.loads((root / "bench/results/cpu/nvfp4_training.json").read_text())
    rows = [
        (str(r["seed"]), f"{r['fp32']:.4f}", f"{r['nvfp4']:.4f}", f"{100 * r['difference']:+.2f} %")
        for r in found["rows"]
    ]
    body = table(("seed", "fp32", "NVFP4 recipe", "difference"), rows)
    mean = f"Mean: {100 * found['mean']:+.2f} %"
    steps = f"{found['options']['steps']} steps, {found['options']['bytes']:,} held-out bytes"
    return f"{body}\n{mean}; {steps}; {records.machine_line(found['env'])}.\n"


BLOCKS = {
    "support": support,
    "gpu-results": gpu_results,
    "cpu-results": cpu_results,
    "nvfp4-training": nvfp4_training,
}


def rewritten(page: str, root: Path) -> str:
    """The page with its blocks made anew. ValueError for a block that nobody makes."""

    def make(match: re.Match) -> str:
        name, *rest = match[2].split()
        if name not in BLOCKS:
            raise ValueError(f"no block is called {name!r}; there are {', '.join(BLOCKS)}")
        return f"{match[1]}{BLOCKS[name](root, rest)}{match[4]}"

    return BLOCK.sub(make, page)


def pages(root: Path) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a page is stale"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    args = parser.parse_args(argv)
    if not (args.root / "README.md").is_file():
        print(f"{args.root} is not a checkout of Tigon: it has no README.md")
        return 4
    stale = []
    for page in pages(args.root):
        text = page.read_text()
        new = rewritten(text, args.root)
        if new == text:
            continue
        stale.append(page)
        if not args.check:
            page.write_text(new)
            print(f"rewrote {page.relative_to(args.root)}")
    if args.check and stale:
        names = ", ".join(str(page.relative_to(args.root)) for page in stale)
        print(f"stale: {names}. Run: {COMMAND}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
