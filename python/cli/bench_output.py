"""What `tigon bench` prints about a case, and the files it writes."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from tigon.bench import records
from tigon.cli import table

FILES = {
    "json": "write the record, for tigon compare and the report",
    "csv": "write a row a result",
    "md": "write a table for a pull request",
    "plot": "write roofline, speed-ups and sweeps as .png, .svg or .pdf",
    "html": "write all of it as one page; measures smaller sizes too, unless --sweep none",
}
COLUMNS = (
    "who", "ms", "p20", "p80", "GB/s", "TFLOP/s", "roof", "time", "peak MB", "memory", "error", "flags",
)  # fmt: skip


def write(kind: str, record: Mapping, path: Path) -> None:
    if kind == "json":
        records.save(record, path)
    elif kind in ("csv", "md"):
        path.write_text({"csv": records.to_csv, "md": records.to_markdown}[kind](record))
    elif kind == "plot":
        from tigon.bench import plots

        plots.save(record, path)
    else:
        from tigon.bench import report

        report.write(record, path)


def check(kind: str, path: Path) -> None:
    """ValueError where `write` could not write."""
    if not path.parent.is_dir():
        raise ValueError(f"--{kind} {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"--{kind} {path} is a folder; name a file in it")
    if kind == "plot":
        from tigon.bench import plots

        plots.check(path)
        import_module("matplotlib")  # a page goes without, a plot does not


def heading(load, mode: str, preset: str | None = None) -> str:
    step = {"step": " (forward and backward)", "backward": " (gradients alone)"}.get(mode, "")
    dtype = str(load.dtype).removeprefix("torch.")
    words = (load.op, load.variant, preset, records.shape_text(load.sizes), dtype, mode)
    return " ".join(filter(None, words)) + step


def show(case, preset: str | None) -> None:
    """The gate's verdict and, where it is green, a row a candidate."""
    load, settings = case.workload, case.settings
    print(heading(load, settings.mode, preset))
    wrong = [row for row in case.gate if not row.ok]
    for row in wrong:
        again = "" if row.repeats else ", and another call gave other bits"
        print(f"  WRONG {row.name}: error {row.error:.2e}, limit {row.limit:.2e}{again}")
    if wrong:
        print()
        return
    where = "" if case.gate_sizes == load.sizes else f" at {records.shape_text(case.gate_sizes)}"
    against = "byte for byte" if load.exact else "against fp64"
    first = case.results[0].time
    caches = "cold" if settings.cold else "hot"
    print(
        f"  correct{where}: {len(case.gate)} tensors {against}; "
        f"median of {first.n} rounds by {first.method}, {caches} caches"
    )
    table.show(COLUMNS, [cells(case, result) for result in case.results])
    for name, reason in case.missing.items():
        print(f"  {name}: {reason}")
    print()


def cells(case, r) -> tuple[str, ...]:
    """One candidate; ratios are to Tigon."""
    own, t = case.results[0], r.time
    peak, ratio = ("-", "-") if r.peak is None else (f"{r.peak / 1e6:.1f}", "-")
    if r.peak is not None and own.peak:
        ratio = f"{r.peak / own.peak:.2f}x"
    return (
        r.name,
        f"{t.median * 1e3:.4g}",
        f"{t.p20 * 1e3:.4g}",
        f"{t.p80 * 1e3:.4g}",
        f"{case.work.bytes / t.median / 1e9:.4g}",
        f"{case.work.flops / t.median / 1e12:.3g}",
        "-" if r.share is None else f"{r.share:.1%}",
        f"{t.median / own.time.median:.2f}x",
        peak,
        ratio,
        f"{r.error:.1e}",
        "; ".join(r.flags),
    )
