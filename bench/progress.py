"""A pytest plugin that writes one JSON line a test as it ends, so that a run that is cut off has left its results.

    pytest -p tigon.bench.progress --lines FILE [--passed FILE]

Lines: {"test", "outcome" (started, passed, failed, error, skipped, xfailed, xpassed), "seconds", "what"}, and
{"file", "what"} for a file that cannot be collected. --passed names tests, one a line, that are not run again.
"""

import json
import re
from pathlib import Path


def pytest_addoption(parser) -> None:
    parser.addoption("--lines", help="write a JSON line a test there")
    parser.addoption("--passed", help="a file of tests that are not run")


def pytest_configure(config) -> None:
    if config.getoption("lines") and not hasattr(
        config, "workerinput"
    ):  # one writer, not each worker
        config.pluginmanager.register(Lines(Path(config.getoption("lines"))))


def pytest_collection_modifyitems(config, items) -> None:
    if file := config.getoption("passed"):
        passed = set(Path(file).read_text().splitlines())
        out = [item for item in items if plain(item.nodeid) in passed]
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if plain(item.nodeid) not in passed]


def plain(name: str) -> str:
    """Without the group that xdist appends."""
    return re.sub(r"@[\w-]+$", "", name)


class Lines:
    def __init__(self, path: Path):
        self.file = path.open("a")

    def write(self, **line) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def pytest_runtest_logstart(self, nodeid, location) -> None:
        self.write(test=plain(nodeid), outcome="started")

    def pytest_runtest_logreport(self, report) -> None:
        outcome = report.outcome
        if report.when != "call" and outcome == "passed":
            return
        if report.when != "call" and outcome == "failed":
            outcome = "error"
        if hasattr(report, "wasxfail"):
            outcome = "xpassed" if outcome == "passed" else "xfailed"
        line = {"test": plain(report.nodeid), "outcome": outcome}
        line["seconds"] = round(report.duration, 3)
        if outcome != "passed":
            line["what"] = reason(report)
        self.write(**line)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.write(file=report.nodeid, what=reason(report))


def reason(report) -> str:
    """One line of why."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if isinstance(report.longrepr, tuple):  # a skip: (file, line, reason)
        text = report.longrepr[2]
    else:
        text = crash.message if crash else str(report.longrepr)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"E\s+\w", line)]
    return (errors[-1].removeprefix("E").strip() if errors else (lines or [""])[0])[:300]
