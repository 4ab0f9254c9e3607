# SPDX-License-Identifier: MIT OR Apache-2.0
"""A volume in a file, worked on by us in this process or by the reference program: one process for each operation.

Both do the same things to files on the same file system, in turns, so that a machine with other work to do is in the
way of both. Each file has contents of random bytes; a write is of a new file, which goes away before the next one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from svsm.abi.block import Extent
from svsm.storage.cocoonfs import Volume
from svsm.storage.cocoonfs.layout import DEFAULT_LAYOUT, ImageLayout
from svsm.storage.drivers.file import FileDevice
from tests.bench.report import ROOT

__all__ = [
    "KEY",
    "MIB",
    "SALT",
    "CountingFile",
    "OurVolume",
    "Side",
    "TheirVolume",
    "best_of_turns",
    "reference_program",
]

KEY = bytes(range(32))
MIB = 1 << 20
SALT = b"\xdd\xee\xff"


class Side(Protocol):
    """One volume, and who works on it."""

    def mkfs(self) -> None:
        """Make it anew."""

    def write(self, inode: int, length: int) -> None:
        """Write a file of this length."""

    def remove(self, inode: int) -> None:
        """Remove a file."""

    def read(self, inode: int) -> None:
        """Read a file."""

    def list(self) -> None:
        """List the files."""


class CountingFile(FileDevice):
    """A file that counts the bytes which are written to it."""

    written = 0

    def write(self, extents: Sequence[Extent]) -> None:
        """Write, and count."""
        self.written += sum(len(data) for _, data in extents)
        super().write(extents)


def _contents(lengths: Sequence[int], folder: Path) -> dict[int, Path]:
    folder.mkdir(exist_ok=True)
    paths = {length: folder / f"contents-{length}" for length in lengths}
    for length, path in paths.items():
        if not path.exists():
            path.write_bytes(os.urandom(length))
    return paths


class OurVolume:
    """Opened once, like in the kernel."""

    def __init__(
        self, image: Path, size_bytes: int, lengths: Sequence[int], layout: ImageLayout = DEFAULT_LAYOUT
    ) -> None:
        self._image, self._size, self._layout = image, size_bytes, layout
        self._contents = {length: os.urandom(length) for length in lengths}
        self._volume: Volume | None = None
        self._device: CountingFile | None = None

    @property
    def written(self) -> int:
        """Bytes that were written since the volume was made."""
        return 0 if self._device is None else self._device.written

    @property
    def volume(self) -> Volume:
        """The open volume."""
        if self._volume is None:
            raise RuntimeError("there is no volume yet")
        return self._volume

    def mkfs(self) -> None:
        """Make it anew, and open it."""
        self.close()
        self._image.unlink(missing_ok=True)
        descriptor = os.open(self._image, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(descriptor, self._size)
        self._device = CountingFile(descriptor)
        self._volume = Volume.create(self._device, KEY, salt=SALT, layout=self._layout)
        self._device.written = 0

    def write(self, inode: int, length: int) -> None:
        """In a transaction of its own."""
        with self.volume.transaction() as transaction:
            transaction.write(inode, self._contents[length])

    def write_many(self, inodes: Sequence[int], length: int) -> None:
        """All in one transaction."""
        with self.volume.transaction() as transaction:
            for inode in inodes:
                transaction.write(inode, self._contents[length])

    def remove(self, inode: int) -> None:
        """In a transaction of its own."""
        with self.volume.transaction() as transaction:
            transaction.unlink(inode)

    def read(self, inode: int) -> None:
        """Into memory."""
        self.volume.read(inode)

    def list(self) -> None:
        """Into memory."""
        self.volume.list()

    def open_and_read(self, inode: int) -> None:
        """As a program does that wants nothing else."""
        volume = Volume.open(FileDevice(os.open(self._image, os.O_RDONLY), read_only=True), KEY, read_only=True)
        volume.read(inode)
        volume.close()

    def close(self) -> None:
        """Close it, so that others can open the file."""
        if self._volume is not None:
            self._volume.close()
            self._volume = None


def reference_program() -> Path | None:
    """The reference program, where it is installed."""
    local = ROOT / ".peers" / "bin" / "cocoonfs"
    found = str(local) if local.exists() else shutil.which("cocoonfs")
    return None if found is None else Path(found)


class TheirVolume:
    """A process for each operation, which opens the volume."""

    def __init__(self, program: Path, image: Path, size_bytes: int, lengths: Sequence[int]) -> None:
        self._program, self._image, self._size = program, image, size_bytes
        self._contents = _contents(lengths, image.parent)

    def _run(self, *words: object) -> None:
        command = [str(word) for word in (self._program, "-i", self._image, "-f", *words)]
        subprocess.run(command, check=True, capture_output=True)

    def start(self) -> None:
        """Nothing but its start."""
        subprocess.run([self._program, "--version"], check=True, capture_output=True)

    def mkfs(self) -> None:
        """Make it anew."""
        self._image.unlink(missing_ok=True)
        algorithms = ("-H", "sha2", "-C", "aes", "-t", "128")
        self._run("mkfs", "-K", KEY.hex(), "-I", SALT.hex(), *algorithms, "-s", f"{self._size // MIB}M")

    def write(self, inode: int, length: int) -> None:
        """From a file."""
        self._run("write-file", "-K", KEY.hex(), "-i", self._contents[length], inode)

    def remove(self, inode: int) -> None:
        """Remove a file."""
        self._run("remove-file", "-K", KEY.hex(), inode)

    def read(self, inode: int) -> None:
        """Into nothing."""
        self._run("read-file", "-K", KEY.hex(), "-o", "/dev/null", inode)

    def list(self) -> None:
        """Into a pipe."""
        self._run("list-files", "-K", KEY.hex())


def best_of_turns(
    runs: Mapping[str, Callable[[], object]], times: int, after: Mapping[str, Callable[[], object]] | None = None
) -> dict[str, float]:
    """The shortest time of each in milliseconds, taken in turns; `after` each turn but the last, not timed."""
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(times):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
            if after is not None and turn < times - 1:
                after[name]()
    return {name: seconds * 1000 for name, seconds in best.items()}
