"""Runs a launch of python/native/ in a program built with sanitizers, as if it were the host library."""

import ctypes
import os
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


class SanitizerError(AssertionError):
    """The program ended with a report; its text."""


class Sanitized:
    """A loader for ``native.use_host_library`` that knows the tensors of the one call it serves.

    tensors: all that the kernel may reach, by their whole storages. A pointer into none of them is the output
    that the launcher allocated, of `output_bytes`. pointers: how many pointers the arguments begin with.
    """

    def __init__(
        self, program: Path, tensors: list[Tensor], output_bytes: int, pointers: int, folder: Path
    ):
        self.program, self.pointers, self.folder = program, pointers, folder
        self.output_bytes = output_bytes
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.buffers = list(storages.items())

    def launch(self, launch: Launch, device: int, stream: int, arguments: bytes) -> None:
        links = []
        for index, address in enumerate(struct.unpack_from(f"{self.pointers}P", arguments)):
            if address:
                links.append((index * POINTER, *self.locate(address)))
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
