# SPDX-License-Identifier: MIT OR Apache-2.0
"""A vhost-user disk with a volatile write cache: power loss below a virtio driver.

The cache is `svsm.testing.diskprocess.CachedDisk`, with its rules for what a cut loses; here it is behind the virtio
disk model of `svsm.host.devices` and the messages of `svsm.testing.vhost_user_backend`, so that what comes out of a
cut went through a driver, its rings and its flushes.

Run as a program: ``python -m svsm.testing.vhost_user_disk FILE SOCKET SPILL`` listens on a Unix socket and serves one
connection after the other, each with an empty cache. SIGKILL is the power cut.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from svsm.host.devices.virtio_blk import BlkBackend, BlkOptions
from svsm.testing.diskprocess import CachedDisk
from svsm.testing.vhost_user_backend import Backend

__all__ = ["CachedBlk", "main", "serve_connection"]


class CachedBlk(BlkBackend):
    """A virtio disk in front of a cache.

    Args:
        descriptor: The file, for its capacity; stays the caller's.
        cache: On the same file.
    """

    def __init__(self, descriptor: int, cache: CachedDisk) -> None:
        super().__init__(descriptor, BlkOptions())
        self._cache = cache

    def load(self, offset: int, length: int) -> bytes:
        """From the cache, where it has it."""
        return self._cache.read(offset, length)

    def store(self, offset: int, data: bytes) -> None:
        """Into the cache."""
        self._cache.write(offset, data)

    def sync(self) -> None:
        """From the cache to the file."""
        self._cache.flush()


def serve_connection(connection: socket.socket, path: Path, cache: CachedDisk) -> None:
    """Serve one front-end until it leaves, or until the cache raises EOFError: a cut, after which nothing is answered.

    Args:
        connection: To the front-end; owned from now on.
        path: The disk's file.
        cache: On it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        backend = Backend(CachedBlk(descriptor, cache))
        backend.serve(connection).join()
        backend.join()
    finally:
        os.close(descriptor)


def main(arguments: list[str]) -> int:
    """``FILE SOCKET SPILL``: serve the file on a Unix socket until killed."""
    if len(arguments) != 3:
        print("usage: vhost_user_disk FILE SOCKET SPILL", file=sys.stderr)
        return 2
    path, address, spill = Path(arguments[0]), arguments[1], Path(arguments[2])
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(address)
        listener.listen(1)
        while True:
            connection, _ = listener.accept()
            serve_connection(connection, path, CachedDisk(path, block_size_bytes=512, spill=spill))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
