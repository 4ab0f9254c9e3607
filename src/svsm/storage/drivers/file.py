# SPDX-License-Identifier: MIT OR Apache-2.0
"""A disk that is a regular file.

`write_zeroes` asks the file system for zeroed space (fallocate with ZERO_RANGE: it stays allocated, so that later
writes do not fail for want of space), else for a hole, else writes zeros. `discard` punches holes, where there are
holes. A host that shrinks the file makes reads end early, which is an I/O error here, until `poll` has seen it.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from collections.abc import Callable
from typing import Final

from svsm.storage.drivers.descriptor import DescriptorDevice, system_error

__all__ = ["FileDevice"]

DEFAULT_BLOCK_SIZE_BYTES: Final = 512
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16
_CANNOT: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class FileDevice(DescriptorDevice):
    """A `BlockDevice` on a regular file's descriptor: see `DescriptorDevice`.

    Args:
        descriptor: Open for reading, and for writing unless `read_only`; owned.
        block_size_bytes: Granularity: what the medium writes without tearing a smaller piece.
        read_only: Refuse writes; takes a shared lock instead of an exclusive one.
    """

    def __init__(
        self, descriptor: int, *, block_size_bytes: int = DEFAULT_BLOCK_SIZE_BYTES, read_only: bool = False
    ) -> None:
        self._modes = [_ZERO_RANGE | _KEEP_SIZE, _PUNCH_HOLE | _KEEP_SIZE]
        super().__init__(descriptor, block_size_bytes=block_size_bytes, read_only=read_only)

    def _measure(self) -> int:
        try:
            found = os.fstat(self._descriptor)
        except OSError as error:
            raise system_error("tell its size", error) from error
        if not stat.S_ISREG(found.st_mode):
            self._wrong_kind("regular file")
        return found.st_size

    def _zero(self, offset: int, length: int) -> bool:
        while self._modes:
            if self._allocate("write zeroes", self._modes[0], offset, length):
                return True
            del self._modes[0]  # this file system has no such thing, and won't get it
        return False

    def _discard(self, offset: int, length: int) -> None:
        self._allocate("discard", _PUNCH_HOLE | _KEEP_SIZE, offset, length)

    def _allocate(self, operation: str, mode: int, offset: int, length: int) -> bool:
        """fallocate(2); False where the file system does not know the mode."""
        failed = _fallocate()(self._descriptor, mode, offset, length)
        if not failed:
            return True
        if failed in _CANNOT:
            return False
        raise system_error(operation, OSError(failed, os.strerror(failed)))


@functools.cache
def _fallocate() -> Callable[[int, int, int, int], int]:
    """libc's, which says 0 or errno: the standard library has only the one without a mode."""
    import ctypes  # costs a command that only looks a tenth of its time

    call = ctypes.CDLL(None, use_errno=True).fallocate
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return lambda *where: ctypes.get_errno() if call(*where) else 0
