# SPDX-License-Identifier: MIT OR Apache-2.0
"""A disk that is a block special file of Linux: a real machine's disk, or a real confidential VM's.

The system's own driver is underneath, so a hostile device behind it is that driver's matter; what this one sees of it
is contents and errors. Size, sector sizes and writability are asked for with ioctls (linux/fs.h); zeroing is
BLKZEROOUT, which the system does by writing where the device cannot, discarding is BLKDISCARD.

`block_size_bytes` is the *logical* sector, the least that can be written. `physical_block_bytes` is what the medium
writes at once: a smaller write makes it rewrite the neighbours too, so a volume on such a disk should have IO blocks
of that size.

With O_DIRECT, data passes through one buffer of whole pages, because the device takes no other; without, through the
page cache, and `flush` brings it out.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
from typing import Final

from svsm.formats.errors import BackendError, StateError
from svsm.storage.drivers.checks import block_io_error
from svsm.storage.drivers.descriptor import DescriptorDevice, system_error

__all__ = ["LinuxDevice", "open_linux"]

_BLKROGET, _BLKSSZGET, _BLKPBSZGET, _BLKGETSIZE64 = 0x125E, 0x1268, 0x127B, 0x80081272
_BLKDISCARD, _BLKZEROOUT = 0x1277, 0x127F
_DIRECT_BYTES: Final = 1 << 20
_LARGEST: Final = (1 << 63) - 1


class LinuxDevice(DescriptorDevice):
    """A `BlockDevice` on a block special file's descriptor: see `DescriptorDevice`.

    Args:
        descriptor: Open for reading, and for writing unless `read_only`; owned.
        read_only: Refuse writes; a device that the system holds for read-only is so without being told.

    Attributes:
        physical_block_bytes: What the medium writes at once.
        direct: Whether the descriptor is open with O_DIRECT.
    """

    def __init__(self, descriptor: int, *, read_only: bool = False) -> None:
        self._descriptor = descriptor
        try:
            self._demand_block_device()
            logical = self._ask(_BLKSSZGET, "i")
            self.physical_block_bytes = max(logical, self._ask(_BLKPBSZGET, "I"))
            read_only = read_only or self._ask(_BLKROGET, "i") != 0
            self.direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
        except (BackendError, OSError) as error:
            os.close(descriptor)
            if isinstance(error, OSError):
                raise system_error("tell its sectors", error) from error
            raise
        if self.direct:
            self._buffer = mmap.mmap(-1, _DIRECT_BYTES)
        super().__init__(descriptor, block_size_bytes=logical, read_only=read_only)

    def _demand_block_device(self) -> None:
        if not stat.S_ISBLK(os.fstat(self._descriptor).st_mode):
            self._wrong_kind("block device")

    def _ask(self, request: int, form: str) -> int:
        answer = fcntl.ioctl(self._descriptor, request, bytes(struct.calcsize(form)))
        value: int = struct.unpack(form, answer)[0]
        return value

    def _measure(self) -> int:
        try:
            size = self._ask(_BLKGETSIZE64, "Q")
        except OSError as error:
            raise system_error("tell its size", error) from error
        if size > _LARGEST:
            raise block_io_error("tell its size", "it is larger than disks can be")
        return size

    def _pread(self, length: int, offset: int) -> bytes:
        if not self.direct:
            return super()._pread(length, offset)
        length = min(length, _DIRECT_BYTES)
        done = os.preadv(self._descriptor, [memoryview(self._buffer)[:length]], offset)
        # A device whose end is not where it was may stop within a block; the rest of that is asked for from its start.
        return self._buffer[: done // self.block_size_bytes * self.block_size_bytes]

    def _pwrite(self, data: memoryview, offset: int) -> int:
        if not self.direct:
            return super()._pwrite(data, offset)
        length = min(len(data), _DIRECT_BYTES)
        self._buffer[:length] = data[:length]
        done = os.pwrite(self._descriptor, memoryview(self._buffer)[:length], offset)
        return done // self.block_size_bytes * self.block_size_bytes

    def _zero(self, offset: int, length: int) -> bool:
        return self._range_ioctl("write zeroes", _BLKZEROOUT, offset, length)

    def _discard(self, offset: int, length: int) -> None:
        self._range_ioctl("discard", _BLKDISCARD, offset, length)

    def _range_ioctl(self, operation: str, request: int, offset: int, length: int) -> bool:
        """An ioctl on a range; False where the device does not know it."""
        try:
            fcntl.ioctl(self._descriptor, request, struct.pack("QQ", offset, length))
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY):
                return False
            raise system_error(operation, error) from error
        return True

    def close(self) -> None:
        """Release lock, claim and descriptor."""
        if self.direct and not self._closed:
            self._buffer.close()
        super().close()


def open_linux(path: str, *, read_only: bool = False, direct: bool = False) -> LinuxDevice:
    """A block special file, claimed for this process alone: not while it is mounted, or part of something else.

    Args:
        path: Of the special file.
        read_only: Only read; several may at once.
        direct: Past the page cache (O_DIRECT).

    Raises:
        StateError: ``block-in-use``.
        BackendError: ``block-io`` where it cannot be opened, or is no block device.
    """
    flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR | os.O_EXCL) | (os.O_DIRECT if direct else 0)
    try:
        # O_EXCL without O_CREAT is defined for block special files only.
        if not stat.S_ISBLK(os.stat(path).st_mode):
            raise BackendError("the disk is no block device", code="block-io", operation="open")
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise StateError(
                "the disk is in use", code="block-in-use", hint="unmount it, or stop what else has it open"
            ) from None
        raise system_error("open", error) from error
    return LinuxDevice(descriptor, read_only=read_only)
