# SPDX-License-Identifier: MIT OR Apache-2.0
"""A disk that is a regular file or a block special file, given as a descriptor.

The descriptor comes from outside (the host opens the disk and hands it over); this code opens nothing and uses only
pread, pwrite, fdatasync, fstat/lseek, flock and close, so it works behind an allow list of system calls. The lock
keeps a second machine from using the same disk; it belongs to the open file and ends with its last descriptor.

The size is read once. A host that shrinks the file later makes reads end early, which is an I/O error here.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Sequence

from svsm.abi.block import Extent, Range
from svsm.formats.errors import BackendError, StateError, SvsmError
from svsm.storage.drivers.checks import (
    block_io_error,
    check_block_size,
    check_ranges,
    closed_error,
    read_only_error,
)

__all__ = ["FileDevice"]

DEFAULT_BLOCK_SIZE_BYTES = 512


class FileDevice:
    """A `BlockDevice` on a descriptor, which it owns (it closes it even where this raises).

    Args:
        descriptor: Open for reading, and for writing unless `read_only`.
        block_size_bytes: Granularity: what the medium writes without tearing a smaller piece.
        read_only: Refuse writes; takes a shared lock instead of an exclusive one.

    Raises:
        StateError: ``block-in-use`` where another open file holds the lock; ``block-size``.
        BackendError: ``block-io`` where the descriptor is neither a file nor a block device.
    """

    def __init__(
        self, descriptor: int, *, block_size_bytes: int = DEFAULT_BLOCK_SIZE_BYTES, read_only: bool = False
    ) -> None:
        self._descriptor = descriptor
        self._block_size = block_size_bytes
        self._read_only = read_only
        try:
            check_block_size(block_size_bytes)
            self._size = self._measure() // block_size_bytes * block_size_bytes
            self._lock()
        except SvsmError:
            self.close()
            raise

    def _measure(self) -> int:
        try:
            mode = os.fstat(self._descriptor).st_mode
            if stat.S_ISREG(mode):
                return os.fstat(self._descriptor).st_size
            if stat.S_ISBLK(mode):
                return os.lseek(self._descriptor, 0, os.SEEK_END)
        except OSError as error:
            raise block_io_error("tell its size", error.strerror or "unknown") from error
        raise BackendError("the disk is neither a file nor a block device", code="block-io", operation="open")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, (fcntl.LOCK_SH if self._read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(
                "the disk is in use", code="block-in-use", hint="stop the other machine that uses it first"
            ) from None
        except OSError as error:
            raise block_io_error("lock", error.strerror or "unknown") from error

    @property
    def size_bytes(self) -> int:
        """Capacity."""
        return self._size

    @property
    def block_size_bytes(self) -> int:
        """Granularity."""
        return self._block_size

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return self._read_only

    def _check(self, ranges: Sequence[Range], *, writing: bool) -> None:
        if self._descriptor < 0:
            raise closed_error()
        check_ranges(ranges, size_bytes=self._size, block_size_bytes=self._block_size)
        if writing and self._read_only:
            raise read_only_error()

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The contents of each range."""
        self._check(ranges, writing=False)
        return [self._read(offset, length) for offset, length in ranges]

    def _read(self, offset: int, length: int) -> bytes:
        parts: list[bytes] = []
        while length > 0:
            try:
                part = os.pread(self._descriptor, length, offset)
            except OSError as error:
                raise block_io_error("read", error.strerror or "unknown") from error
            if not part:
                raise block_io_error("read", "the disk became shorter")
            if len(part) == length and not parts:
                return part
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return b"".join(parts)

    def write(self, extents: Sequence[Extent]) -> None:
        """Write all extents."""
        self._check([(offset, len(data)) for offset, data in extents], writing=True)
        for offset, data in extents:
            rest = memoryview(data).cast("B")
            while len(rest):
                try:
                    done = os.pwrite(self._descriptor, rest, offset)
                except OSError as error:
                    raise block_io_error("write", error.strerror or "unknown") from error
                if done <= 0:
                    raise block_io_error("write", "nothing was taken")
                offset += done
                rest = rest[done:]

    def flush(self) -> None:
        """fdatasync."""
        self._check([], writing=False)
        if self._read_only:
            return
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise block_io_error("flush", error.strerror or "unknown") from error

    def discard(self, ranges: Sequence[Range]) -> None:
        """Nothing: the file keeps its blocks (hole punching is not on the kernel's list of system calls)."""
        self._check(ranges, writing=True)

    def close(self) -> None:
        """Release lock and descriptor."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
