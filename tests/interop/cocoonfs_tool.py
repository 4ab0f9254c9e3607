# SPDX-License-Identifier: MIT OR Apache-2.0
"""The reference program for CocoonFS, run on one image file."""

from __future__ import annotations

import os
import signal
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from svsm.storage.drivers.memory import MemoryDevice
from tests.support import peer

__all__ = ["Tool"]


class Tool:
    """The program and the image that it works on.

    Args:
        folder: Where image and contents of files go.
        key: Of the volume.
        program: Another build of the program than the installed one.
    """

    def __init__(self, folder: Path, key: bytes, program: Path | None = None) -> None:
        self._program = program or peer("cocoonfs")
        self._strace: list[str] = []
        self._was_cut = False
        self._key = key
        self._image, self._in, self._out = folder / "image", folder / "in", folder / "out"

    def run(self, *arguments: str, refused: bool = False) -> str:
        """Run it with small device blocks; it must do so, or refuse."""
        command = [str(self._program), "-i", str(self._image), "-f", *arguments]
        done = subprocess.run([*self._strace, *command], capture_output=True, text=True, timeout=120, check=False)
        self._was_cut = bool(self._strace) and done.returncode == -signal.SIGKILL
        if not self._was_cut:
            if self._strace and "ptrace" in done.stderr.lower():
                pytest.skip("this machine does not let strace trace")
            assert (done.returncode != 0) == refused, done.stderr + done.stdout
        return done.stdout

    def _traced(self, change: Callable[[Tool], None], output: str, *more: str) -> None:
        """Make a change of one command under strace, which looks at writes to the image."""
        only = ["-P", str(self._image.resolve()), "-e", "trace=write", *more]
        self._strace = [str(peer("strace")), "-f", "-qq", "-o", output, *only]
        try:
            change(self)
        finally:
            self._strace = []

    def writes(self, change: Callable[[Tool], None]) -> list[str]:
        """Make a change of one command: its writes to the image, as strace shows their first bytes."""
        trace = self._out.with_name("trace")
        self._traced(change, str(trace))
        return [line.split(", ", 1)[1] for line in trace.read_text().splitlines() if " write(" in line]

    def cut(self, at: int, change: Callable[[Tool], None]) -> bool:
        """Make a change of one command, killed as it enters its write number `at`, from 1; False where it has fewer.

        strace ends the same way as what it ran.
        """
        self._traced(change, os.devnull, "-e", f"inject=write:signal=KILL:when={at}")
        return self._was_cut

    def give(self, device: MemoryDevice) -> None:
        """Let it work on a copy of this disk."""
        self._image.write_bytes(device.data)

    def take(self) -> MemoryDevice:
        """A copy of its image."""
        return MemoryDevice(self._image.read_bytes(), block_size_bytes=128)

    def files(self) -> dict[int, int]:
        """Flags by inode."""
        listed = self.run("list-files", "-K", self._key.hex())
        return {int(line.split()[0]): int(line.split()[1], 16) for line in listed.splitlines()}

    def read(self, inode: int) -> bytes:
        """A file's contents."""
        self._out.unlink(missing_ok=True)
        self.run("read-file", "-K", self._key.hex(), "-o", str(self._out), str(inode))
        return self._out.read_bytes()

    def write(self, inode: int, data: bytes, flags: int = 0) -> None:
        """Create or replace a file."""
        self._in.write_bytes(data)
        self.run("write-file", "-K", self._key.hex(), "-i", str(self._in), str(inode), str(flags))

    def remove(self, inode: int) -> None:
        """Remove a file."""
        self.run("remove-file", "-K", self._key.hex(), str(inode))

    def aux(self) -> list[tuple[uuid.UUID, bytes]]:
        """The auxiliary metadata."""
        found: list[tuple[uuid.UUID, bytes]] = []
        for line in self.run("aux-fs-metadata", "list-entries").splitlines():
            kind = uuid.UUID(line.split()[0])
            index = sum(1 for known, _ in found if known == kind)
            self._out.unlink(missing_ok=True)
            self.run("aux-fs-metadata", "read-entry", "-o", str(self._out), str(kind), str(index))
            found.append((kind, self._out.read_bytes()))
        return found

    def edit_aux(self, *what: str, data: bytes = b"", key: bool = False) -> None:
        """Change the auxiliary metadata, with the key or without."""
        self._in.write_bytes(data)
        source = ["-i", str(self._in)] if what[0] == "add-entry" else []
        keyed = ["-K", self._key.hex()] if key else []
        self.run("aux-fs-metadata", "edit", *keyed, what[0], *source, *what[1:])
