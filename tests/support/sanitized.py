"""Runs a launch of python/native/ in a program built with sanitizers, as if it were the host library."""

import ctypes
import os
import re
import struct
import subprocess
from pathlib import Path

from torch import Tensor

from tigon.native import Launch

POINTER = struct.calcsize("P")
OPTIONS = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def pointer_places(packed: struct.Struct) -> list[int]:
    """Offsets of the pointers, Q, in a packed format."""
    codes = re.sub(r"(\d+)(\w)", lambda m: m[2] * int(m[1]), packed.format.lstrip("="))
    return [struct.calcsize(f"={codes[:i]}") for i, code in enumerate(codes) if code == "Q"]


class SanitizerError(AssertionError):
    """The program ended with a report; its text."""


class Sanitized:
    """A loader for ``native.use_host_library`` that knows the tensors of the one call it serves.

    tensors: all that the kernel may reach, by their whole storages; more may come with `know`. A pointer into none
    of them is the output that the launcher allocated, of `output_bytes`. pointers: how many pointers the arguments
    begin with, or their places (a launcher of several kernels: by the size of their arguments, or by kernel).
    """

    def __init__(
        self,
        program: Path,
        tensors: list[Tensor],
        output_bytes: int,
        pointers: int | dict[int | str, list[int]],
        folder: Path,
    ):
        self.program, self.pointers, self.folder = program, pointers, folder
        self.output_bytes = output_bytes
        self.buffers: list[tuple[int, int]] = []
        self.know(*tensors)

    def know(self, *tensors: Tensor) -> None:
        storages = (t.untyped_storage() for t in tensors)
        found = ((storage.data_ptr(), storage.nbytes()) for storage in storages)
        self.buffers = list(dict.fromkeys([*self.buffers, *found]))

    def places(self, kernel: str, arguments: bytes) -> list[int]:
        """Where pointers lie in the arguments."""
        if isinstance(self.pointers, dict):
            name = kernel.split("<")[0].removeprefix("tigon::")
            return self.pointers[name if name in self.pointers else len(arguments)]
        return [index * POINTER for index in range(self.pointers)]

    def launch(self, launch: Launch, device: int, stream: int, arguments: bytes) -> None:
        links = []
        for place in self.places(launch.kernel, arguments):
            (address,) = struct.unpack_from("P", arguments, place)
            if address:
                links.append((place, *self.locate(address)))
        case, result = self.folder / "case", self.folder / "result"
        case.write_bytes(self.encode(launch, arguments, links))
        done = subprocess.run(
            [str(self.program), str(case), str(result)],
            capture_output=True,
            text=True,
            env=os.environ | OPTIONS,
        )
        if done.returncode or done.stderr:
            raise SanitizerError(f"exit {done.returncode}\n{done.stderr[-6000:]}")
        content = result.read_bytes()
        for address, size in self.buffers:
            ctypes.memmove(address, content[:size], size)
            content = content[size:]

    def locate(self, address: int) -> tuple[int, int]:
        """Buffer and offset of an address."""
        for index, (start, size) in enumerate(self.buffers):
            if start <= address < start + size:
                return index, address - start
        self.buffers.append((address, self.output_bytes))
        return len(self.buffers) - 1, 0

    def encode(self, launch: Launch, arguments: bytes, links: list[tuple[int, int, int]]) -> bytes:
        """The case file of tests/csrc/sanitize.cpp."""

        def sized(content: bytes) -> bytes:
            return struct.pack("q", len(content)) + content

        numbers = struct.pack("4q", *launch.grid, launch.block, launch.shared_bytes)
        parts = [sized(launch.kernel.encode()), numbers, sized(arguments)]
        parts.append(struct.pack("q", len(self.buffers)))
        parts += [sized(ctypes.string_at(address, size)) for address, size in self.buffers]
        parts.append(struct.pack("q", len(links)))
        parts += [struct.pack("3q", *link) for link in links]
        return b"".join(parts)
