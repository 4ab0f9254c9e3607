# SPDX-License-Identifier: MIT OR Apache-2.0
"""Disks that the operating system has: a descriptor, read and written at offsets.

The descriptor comes from outside (the host opens the disk and hands it over). `file` and `linux` add what regular
files and block special files have of their own: size, holes, zeroing, discarding. Behind an allow list of system calls
it needs pread, pwrite, fdatasync, flock, fstat, fcntl and close, and what those two name. The lock keeps a second
machine from using the same disk; it belongs to the open file and ends with its last descriptor.
"""

from __future__ import annotations

import abc
import fcntl
import os
from collections.abc import Sequence
from typing import Final, NoReturn

from svsm.abi.block import Extent, Range
from svsm.formats.errors import BackendError, StateError, SvsmError
from svsm.storage.drivers.checks import CheckedDevice, block_io_error

__all__ = ["DescriptorDevice", "system_error"]

_ZEROS: Final = bytes(1 << 16)


def system_error(operation: str, error: OSError) -> BackendError:
    """For a system call that failed."""
    return block_io_error(operation, error.strerror or "unknown")


class DescriptorDevice(CheckedDevice):
    """A `BlockDevice` on a descriptor, which it owns (it closes it even where this raises).

    Args:
        descriptor: Open for reading, and for writing unless `read_only`.
        block_size_bytes: Granularity.
        read_only: Refuse writes; takes a shared lock instead of an exclusive one.

    Raises:
        StateError: ``block-in-use`` where another open file holds the lock; ``block-size``.
        BackendError: ``block-io`` where the descriptor is not what this driver is for.
    """

    def __init__(self, descriptor: int, *, block_size_bytes: int, read_only: bool) -> None:
        self._descriptor = descriptor
        self._closed = False
        try:
            super().__init__(size_bytes=self._measure(), block_size_bytes=block_size_bytes, read_only=read_only)
            self._lock()
        except SvsmError:
            self.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, (fcntl.LOCK_SH if self._read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(
                "the disk is in use", code="block-in-use", hint="stop the other machine that uses it first"
            ) from None
        except OSError as error:
            raise system_error("lock", error) from error

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The contents of each range."""
        self._admit_reading(ranges)
        return [self._read(offset, length) for offset, length in ranges]

    def _read(self, offset: int, length: int) -> bytes:
        parts: list[bytes] = []
        while length > 0:
            try:
                part = self._pread(length, offset)
            except OSError as error:
                raise system_error("read", error) from error
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
        self._admit_writing(extents)
        for offset, data in extents:
            self._write("write", offset, memoryview(data).cast("B"))

    def _write(self, operation: str, offset: int, rest: memoryview) -> None:
        while len(rest):
            try:
                done = self._pwrite(rest, offset)
            except OSError as error:
                raise system_error(operation, error) from error
            if done <= 0:
                raise block_io_error(operation, "nothing was taken")
            offset += done
            rest = rest[done:]

    def _pread(self, length: int, offset: int) -> bytes:
        return os.pread(self._descriptor, length, offset)

    def _pwrite(self, data: memoryview, offset: int) -> int:
        return os.pwrite(self._descriptor, data, offset)

    def write_zeroes(self, ranges: Sequence[Range]) -> None:
        """As the system can do it for this kind of disk; written where it cannot."""
        self._admit_changing(ranges)
        for offset, length in ranges:
            if length and not self._zero(offset, length):
                self._write_zeros(offset, length)

    def _write_zeros(self, offset: int, length: int) -> None:
        for at in range(offset, offset + length, len(_ZEROS)):
            self._write("write zeroes", at, memoryview(_ZEROS)[: offset + length - at])

    @abc.abstractmethod
    def _zero(self, offset: int, length: int) -> bool:
        """Make a range zero; False where this kind of disk has no such call."""

    def flush(self) -> None:
        """fdatasync."""
        self._admit()
        if self._read_only:
            return
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise system_error("flush", error) from error

    def discard(self, ranges: Sequence[Range]) -> None:
        """Give the space back where the system can; nothing where it cannot."""
        self._admit_changing(ranges)
        for offset, length in ranges:
            if length:
                self._discard(offset, length)

    @abc.abstractmethod
    def _discard(self, offset: int, length: int) -> None:
        """Give a range up, where that can be."""

    def _wrong_kind(self, expected: str) -> NoReturn:
        raise BackendError(f"the disk is no {expected}", code="block-io", operation="open")

    def close(self) -> None:
        """Release lock and descriptor."""
        if not self._closed:
            self._closed = True
            os.close(self._descriptor)
