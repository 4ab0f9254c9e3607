# SPDX-License-Identifier: MIT OR Apache-2.0
"""Guest-physical memory: three memfds by owner, the offset in each being the guest-physical address.

Whoever may not see a page does not hold the memfd that it lives in: that is how the simulated machine encrypts memory.
The files are sparse over the whole 48-bit address space and sealed against shrinking and growing, so no holder can
truncate one under another's mapping (the other would die by SIGBUS). They can hold pages anywhere; the RMP's
regions bound what the machine itself ever puts there.

A move takes the contents (or zeroes), and punches a hole where the page was: nothing of it is left behind, neither
for the next owner of that place nor for whoever still maps it. What the host writes into *its* memfd at the address of
a page that lives elsewhere is seen by nobody but the host, and is punched when the page comes back.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Mapping
from typing import Final

from svsm.formats.errors import BackendError
from svsm.formats.record import Buffer
from svsm.hardware.rmp import Change, Home

__all__ = ["ADDRESS_SPACE", "PhysicalMemory"]

ADDRESS_SPACE: Final = 1 << 48
_PUNCH: Final = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_MFD_NOEXEC_SEAL: Final = 0x8
_COPY: Final = 1 << 20


class PhysicalMemory:
    """The three memories of one VM.

    Args:
        descriptors: Existing memfds by home, or None to create them.
    """

    def __init__(self, descriptors: Mapping[Home, int] | None = None) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        self.descriptors: dict[Home, int] = dict(descriptors) if descriptors else {}
        for home in Home:
            if home not in self.descriptors:
                self.descriptors[home] = _create(f"svsm-{home.value}")

    def read(self, home: Home, gpa: int, length: int) -> bytes:
        """Bytes of one memory, holes as zeros."""
        data = os.pread(self.descriptors[home], length, gpa)
        if len(data) != length:
            raise BackendError("guest memory ended early", code="machine-memory", got=gpa)
        return data

    def write(self, home: Home, gpa: int, data: Buffer) -> None:
        """Store bytes in one memory."""
        try:
            written = os.pwrite(self.descriptors[home], data, gpa)
        except OSError as error:
            raise BackendError(f"guest memory: {error.strerror}", code="machine-memory", got=gpa) from None
        if written != len(data):
            raise BackendError("guest memory took only a part", code="machine-memory", got=gpa)

    def carry_out(self, change: Change) -> None:
        """Do to the memories what a change of the RMP means: move or zero the contents, punch the old place."""
        old, new = change.before.home, change.after.home
        if old is new:
            if change.zero:
                self.punch(new, change.gpa, change.length)
            return
        self.punch(new, change.gpa, change.length)
        if not change.zero:
            self._copy(old, new, change.gpa, change.length)
        self.punch(old, change.gpa, change.length)

    def punch(self, home: Home, gpa: int, length: int) -> None:
        """Give the pages of a range back to the system: it reads as zeros, through every mapping."""
        if self._libc.fallocate(self.descriptors[home], _PUNCH, gpa, length):
            raise BackendError(
                f"cannot clear guest memory: {os.strerror(ctypes.get_errno())}", code="machine-memory", got=gpa
            )

    def populated(self, home: Home, gpa: int, length: int) -> bool:
        """Whether any page of the range has memory behind it in this memfd."""
        try:
            return os.lseek(self.descriptors[home], gpa, os.SEEK_DATA) < gpa + length
        except OSError:
            return False

    def close(self) -> None:
        """Close the descriptors."""
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors.clear()

    def _copy(self, old: Home, new: Home, gpa: int, length: int) -> None:
        position = gpa
        end = gpa + length
        while position < end and self.populated(old, position, end - position):
            size = min(_COPY, end - position)
            self.write(new, position, self.read(old, position, size))
            position += size


def _create(name: str) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        try:
            descriptor = os.memfd_create(name, flags | _MFD_NOEXEC_SEAL)
        except OSError:  # before Linux 6.3
            descriptor = os.memfd_create(name, flags)
        os.ftruncate(descriptor, ADDRESS_SPACE)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError as error:
        raise BackendError(f"cannot create guest memory: {error.strerror}", code="machine-memory") from None
    return descriptor
