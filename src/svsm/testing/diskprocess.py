# SPDX-License-Identifier: MIT OR Apache-2.0
"""A disk in a process of its own, with a volatile write cache: what `RemoteDevice` talks to in tests.

The process keeps writes in memory until a flush brings them to its file. `kill` is the power cut: what was not
flushed is gone, or, with ``loss="tear"``, a random subset of its 128-byte pieces still reaches the file (`kill`
applies the subset afterwards, from a copy of the cache that the disk keeps in a second file).
It can be restarted on the same file as often as needed.

Run as a program: ``python -m svsm.testing.diskprocess FILE SOCKET [SPILL]`` listens on a Unix socket and serves one
connection after the other. SIGKILL is the power cut then; unflushed writes are dropped, unless `tear` brings
some of them from the spill file to the disk afterwards.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import sys
from pathlib import Path
from typing import Literal

from svsm.formats.errors import SvsmError
from svsm.storage.drivers.remote import (
    DISCARD,
    FLUSH,
    INFO,
    MAGIC,
    MAX_TRANSFER_BYTES,
    READ,
    STATUS_IO_ERROR,
    STATUS_OK,
    WRITE,
    ZERO,
    BlockMessage,
    RemoteDevice,
)

__all__ = ["CachedDisk", "DiskProcess", "main", "serve", "tear"]

_PIECE = 128
_SPILL_HEADER = 16
Loss = Literal["drop", "tear"]


class CachedDisk:
    """The file with its cache; the cache is also spilled to `spill` so that a power cut can be torn afterwards."""

    def __init__(self, path: Path, *, block_size_bytes: int, spill: Path | None) -> None:
        self._descriptor = os.open(path, os.O_RDWR)
        self.size_bytes = os.fstat(self._descriptor).st_size // block_size_bytes * block_size_bytes
        self.block_size_bytes = block_size_bytes
        self._cache: list[tuple[int, bytes]] = []
        self._spill = None if spill is None else os.open(spill, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)

    def read(self, offset: int, length: int) -> bytes:
        """What was written last, flushed or not."""
        data = bytearray(os.pread(self._descriptor, length, offset).ljust(length, b"\0"))
        for at, piece in self._cache:
            lo, hi = max(at, offset), min(at + len(piece), offset + length)
            if lo < hi:
                data[lo - offset : hi - offset] = piece[lo - at : hi - at]
        return bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        """Into the cache."""
        self._cache.append((offset, data))
        if self._spill is not None:
            os.write(self._spill, offset.to_bytes(8, "little") + len(data).to_bytes(8, "little") + data)

    def flush(self) -> None:
        """From the cache to the file."""
        for offset, data in self._cache:
            os.pwrite(self._descriptor, data, offset)
        self._cache.clear()
        if self._spill is not None:
            os.ftruncate(self._spill, 0)
            os.lseek(self._spill, 0, os.SEEK_SET)


def _exactly(connection: socket.socket, length: int) -> bytes | None:
    data = bytearray()
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            return None
        data += part
    return bytes(data)


def _handle(disk: CachedDisk, request: BlockMessage, data: bytes) -> tuple[int, int, int, bytes]:
    """(status, offset, length, data) of the reply."""
    inside = request.offset + request.length <= disk.size_bytes
    aligned = not (request.offset % disk.block_size_bytes or request.length % disk.block_size_bytes)
    if request.operation == INFO:
        return STATUS_OK, disk.block_size_bytes, disk.size_bytes, b""
    if not inside or not aligned:
        return STATUS_IO_ERROR, 0, 0, b""
    if request.operation == READ:
        return STATUS_OK, request.offset, request.length, disk.read(request.offset, request.length)
    if request.operation == WRITE:
        disk.write(request.offset, data)
    elif request.operation in (DISCARD, ZERO):
        disk.write(request.offset, bytes(request.length))
    elif request.operation == FLUSH:
        disk.flush()
    else:
        return STATUS_IO_ERROR, 0, 0, b""
    return STATUS_OK, request.offset, 0, b""


def serve(connection: socket.socket, disk: CachedDisk) -> None:
    """Answer requests until the other side closes or says something malformed."""
    while True:
        raw = _exactly(connection, BlockMessage.SIZE)
        if raw is None:
            return
        request = BlockMessage.parse(raw)
        if request.magic != MAGIC or request.length > max(MAX_TRANSFER_BYTES, disk.size_bytes):
            return
        data = _exactly(connection, request.length) if request.operation == WRITE else b""
        if data is None:
            return
        status, offset, length, answer = _handle(disk, request, data)
        reply = BlockMessage(MAGIC, request.operation, status, 0, request.sequence, offset, length)
        connection.sendall(reply.pack() + answer)


class DiskProcess:
    """A disk process on a file; `connect` gives the driver's end.

    Args:
        path: The file, of the disk's size.
        block_size_bytes: Granularity.
        spill: Where to keep a copy of the cache, so that `kill(loss="tear")` works.
    """

    def __init__(self, path: Path, *, block_size_bytes: int = 512, spill: Path | None = None) -> None:
        self._path = path
        self._block_size = block_size_bytes
        self._spill = spill
        self.pid = 0

    def connect(self) -> RemoteDevice:
        """Start the process and talk to it."""
        return RemoteDevice(self.socket())

    def socket(self) -> socket.socket:
        """Start the process; the connected socket to it."""
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                ours.close()
                serve(theirs, CachedDisk(self._path, block_size_bytes=self._block_size, spill=self._spill))
            os._exit(0)
        theirs.close()
        self.pid = pid
        return ours

    def kill(self, *, loss: Loss = "drop", seed: int = 0) -> None:
        """Cut the power: SIGKILL, and with ``tear`` a random subset of the cache still reaches the file."""
        if not self.pid:
            return
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.pid = 0
        if loss == "tear" and self._spill is not None:
            tear(self._path, self._spill, seed=seed)


def tear(path: Path, spill: Path, *, seed: int) -> None:
    """What a disk that was killed may still have written: a random subset of what its cache held.

    Args:
        path: The disk's file.
        spill: The copy of its cache.
        seed: Decides which 128-byte pieces.
    """
    rng = random.Random(seed)
    share = rng.random()
    spilled = spill.read_bytes()
    at = 0
    with path.open("r+b") as file:
        while at + _SPILL_HEADER <= len(spilled):
            offset = int.from_bytes(spilled[at : at + 8], "little")
            length = int.from_bytes(spilled[at + 8 : at + _SPILL_HEADER], "little")
            data = spilled[at + _SPILL_HEADER : at + _SPILL_HEADER + length]
            at += _SPILL_HEADER + length
            for piece in range(0, len(data), _PIECE):
                if rng.random() < share:
                    file.seek(offset + piece)
                    file.write(data[piece : piece + _PIECE])


def main(arguments: list[str]) -> int:
    """``FILE SOCKET [SPILL]``: serve the file on a Unix socket until killed."""
    if not 2 <= len(arguments) <= 3:
        print("usage: diskprocess FILE SOCKET [SPILL]", file=sys.stderr)
        return 2
    path, address = Path(arguments[0]), arguments[1]
    spill = Path(arguments[2]) if len(arguments) == 3 else None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(address)
        listener.listen(1)
        while True:
            connection, _ = listener.accept()
            # Each connection starts with an empty cache: what the last one did not flush is lost.
            with connection, contextlib.suppress(OSError, SvsmError):
                serve(connection, CachedDisk(path, block_size_bytes=512, spill=spill))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
