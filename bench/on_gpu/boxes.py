"""Commands with a time box, of which nothing is left on the machine when the box is over."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

GRACE = 3.0  # seconds between the request to end and the end
PR_SET_CHILD_SUBREAPER = 36
_stopped = False


def adopt_orphans() -> None:
    """From now on a process below this one that loses its parent becomes a child of this one (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(of: int) -> list[int]:
    """The living processes below `of`, read from /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                children.setdefault(int(parent), []).append(int(entry.parent.name))
    found, new = [], [of]
    while new:
        new = [pid for parent in new for pid in children.get(parent, ())]
        found += new
    return found


def run(
    command: Sequence[str],
    log: BinaryIO,
    box: float,
    env: Mapping[str, str],
    cwd: Path,
    watch: Path | None = None,
    limit: float = float("inf"),
) -> int | None:
    """The exit code, or None if the box was over; output goes to `log`.

    watch: a file. Each time that it changes the box begins anew, until `limit` seconds are over.
    """
    if _stopped:
        return None
    process = subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        env=env,
        start_new_session=True,
    )
    begin, seen = time.monotonic(), _stamp(watch)
    deadline = begin + min(box, limit)
    try:
        while True:
            left = max(deadline - time.monotonic(), 0.1)
            with suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=min(left, 0.5) if watch else left)
            if (now := _stamp(watch)) != seen:
                seen, deadline = now, min(begin + limit, time.monotonic() + box)
            if time.monotonic() >= deadline:
                return None
    finally:
        own = [process.pid] if process.poll() is None else []
        end([*own, *descendants(process.pid)], group=process.pid)
        process.wait()


def _stamp(file: Path | None) -> int | None:
    """When the file changed last; None while there is none."""
    with suppress(OSError):
        return file.stat().st_mtime_ns if file else None
    return None


def interrupt(number: int, frame: object) -> None:
    """A signal handler: end all that runs, start nothing more, raise KeyboardInterrupt."""
    global _stopped
    _stopped = True
    sweep()
    raise KeyboardInterrupt


def sweep() -> None:
    """End everything below this process: also what hid in a session of its own and lost its parent."""
    for _ in range(3):
        if left := descendants(os.getpid()):
            end(left)
    with suppress(ChildProcessError):  # no process of ours is left
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def end(pids: Iterable[int], group: int | None = None) -> None:
    """Ask to end, wait a little, then kill. `group`: their process group, where they have one."""
    pids = list(pids)
    _signal(pids, group, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline and any(map(_alive, pids)):
        time.sleep(0.05)
    _signal(pids, group, signal.SIGKILL)
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline and any(map(_alive, pids)):
        time.sleep(0.02)


def _signal(pids: list[int], group: int | None, number: int) -> None:
    if group is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _alive(pid: int) -> bool:
    """A zombie has ended: its parent has not asked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
