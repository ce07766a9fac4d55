"""The safetensors files of a checkpoint folder, their headers and index compared, without reading a tensor.

    files = read_files(folder)        files.tensors: name -> Stored, files.findings: what is wrong

Files in formats that would have to be unpickled are named and never opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tigon.integrations.safetensors_header import Stored, read_header

INDEX = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
WRITE_AGAIN = "write or download the file again"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: `severity` error (results would be wrong, or it cannot be loaded), warning or note."""

    severity: str
    tensor: str  # its name on disk, a module's, or "" where a file is meant
    fault: str
    fix: str = ""
    file: str = ""


@dataclass
class Files:
    tensors: dict[str, Stored] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def error(self, tensor: str, fault: str, fix: str, file: Path | str = "") -> None:
        self.findings.append(Finding("error", tensor, fault, fix, Path(file).name if file else ""))

    def warning(self, tensor: str, fault: str, fix: str, file: Path | str = "") -> None:
        name = Path(file).name if file else ""
        self.findings.append(Finding("warning", tensor, fault, fix, name))


def read_files(folder: Path) -> Files:
    """Headers of all the shards that the index names, or of all safetensors files where there is none."""
    files = Files()
    weight_map = _index(folder, files)
    present = sorted(p for p in folder.glob("*.safetensors") if p.is_file())
    if weight_map is None:
        shards = present
        if len(present) > 1:
            files.warning("", f"{len(present)} shards without an index", f"add {INDEX}")
    else:
        shards = _shards(folder, set(weight_map.values()), files)
        for extra in sorted(set(present) - set(shards)):
            files.warning("", "is not in the index and would not be read", "remove it", extra)
    pickled = sorted(p.name for pattern in PICKLED for p in folder.glob(pattern))
    if not shards and weight_map is None:
        held = f"only pickled weights, which are never opened: {', '.join(pickled)}"
        fault = held if pickled else "no safetensors file"
        files.error("", fault, "convert the weights to safetensors", folder)
    for shard in shards:
        _read(shard, files)
    if weight_map is not None:
        _compare_index(weight_map, files, {p.name for p in shards})
    return files


def load_json(path: Path, files: Files) -> Any:
    """A JSON object, or None and a finding."""
    try:
        values = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        files.error("", f"is not JSON: {error}", WRITE_AGAIN, path)
        return None
    if not isinstance(values, dict):
        files.error("", f"holds {type(values).__name__}, expected an object", WRITE_AGAIN, path)
        return None
    return values


def _index(folder: Path, files: Files) -> dict[str, str] | None:
    """Tensor -> file; None without an index."""
    path = folder / INDEX
    if not path.is_file():
        return None
    values = load_json(path, files)
    if values is None:
        return None
    weight_map = values.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        files.error("", "weight_map does not map tensors to files", "build the index again", path)
        return None
    return weight_map


def _shards(folder: Path, names: Iterable[str], files: Files) -> list[Path]:
    found = []
    for name in sorted(names):
        if Path(name).name != name or name == ".." or "\0" in name or len(name) > 255:
            fault = f"names a file outside the folder: {name!r}"
            files.error("", fault, "build the index again", INDEX)
        elif not name.endswith(".safetensors"):
            fault = f"names {name!r}, which is not a safetensors file and is never opened"
            files.error("", fault, "convert the weights to safetensors", INDEX)
        elif not (folder / name).is_file():
            fault = f"names {name}, which is not there"
            files.error("", fault, "download the missing shard", INDEX)
        else:
            found.append(folder / name)
    return found


def _read(shard: Path, files: Files) -> None:
    try:
        tensors, faults = read_header(shard)
    except OSError as error:
        files.error("", f"cannot be read: {error.strerror}", WRITE_AGAIN, shard)
        return
    for name, fault in faults:
        files.error(name, fault, WRITE_AGAIN, shard)
    for name, stored in tensors.items():
        if name in files.tensors:
            other = files.tensors[name].file.name
            files.error(name, f"is in {other} too", "keep one of the two", shard)
        files.tensors.setdefault(name, stored)


def _compare_index(weight_map: dict[str, str], files: Files, read: set[str]) -> None:
    broken = {f.tensor for f in files.findings}
    for name, file in weight_map.items():
        stored = files.tensors.get(name)
        if stored is None and file in read and name not in broken:
            files.error(
                name, f"is not in {file}, where the index has it", "build the index again", INDEX
            )
        elif stored is not None and stored.file.name != file:
            fault = f"is in {stored.file.name}, the index has it in {file}"
            files.error(name, fault, "build the index again", INDEX)
    for name in files.tensors.keys() - weight_map.keys():
        stored = files.tensors[name]
        files.warning(name, "is not in the index", "build the index again", stored.file)
