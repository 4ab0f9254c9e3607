# SPDX-License-Identifier: MIT OR Apache-2.0
"""The kernel's view of guest-physical memory: a window of its own address space, one byte per byte.

The whole window is reserved without access. Only a page that the hardware has validated (or that is shared on purpose)
is mapped, at its fixed place, from the memfd it lives in; so a stray access to any other address is a real fault, as
it is on the chip, and not a read of zeros. `PhysicalWindow` checks before it touches and raises; `address_of` is for
the test that shows the fault.

The C library is called through ctypes because Python's `mmap` cannot map at a fixed place. Nothing here is executable,
and nothing of it goes into a core dump.
"""

from __future__ import annotations

import ctypes
import enum
import mmap
import os
from collections.abc import Mapping
from typing import Final

from svsm.abi.errors import BackendError, ProtocolError
from svsm.abi.platform import PAGE_SIZE
from svsm.confine.libc import mapping_calls
from svsm.formats.record import Buffer

__all__ = ["MemoryKind", "PhysicalWindow"]

_NO_ACCESS: Final = 0
_FIXED: Final = 0x10
_NORESERVE: Final = 0x4000
_DONTDUMP: Final = 16
_FAILED: Final = ctypes.c_void_p(-1).value


class MemoryKind(enum.Enum):
    """The memfd that a mapped page is in."""

    PRIVATE = "private"
    VMPL2 = "vmpl2"
    SHARED = "shared"


class PhysicalWindow:
    """Mapped guest-physical memory.

    Args:
        descriptors: The memfds by `MemoryKind` value.
        size_bytes: Guest-physical addresses below this can be mapped.

    Raises:
        BackendError: ``platform-memory`` when the address space is not to be had.
    """

    def __init__(self, descriptors: Mapping[str, int], *, size_bytes: int) -> None:
        self._descriptors = {kind: descriptors[kind.value] for kind in MemoryKind}
        self._libc = mapping_calls()
        self._pages: dict[int, MemoryKind] = {}
        self.size_bytes = size_bytes
        base = self._libc.mmap(None, size_bytes, _NO_ACCESS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE, -1, 0)
        if base is None or base == _FAILED:
            raise _failed("reserve", 0)
        self._base: int = base

    def address_of(self, gpa: int) -> int:
        """Where byte `gpa` is, or would be, in this process."""
        return self._base + gpa

    def kind_of(self, gpa: int) -> MemoryKind | None:
        """Where the page of byte `gpa` is mapped from; None when it is not."""
        return self._pages.get(gpa // PAGE_SIZE)

    def kinds(self, gpa: int, length: int) -> dict[int, MemoryKind]:
        """Where each mapped page of a range is mapped from, by its address."""
        first, last = gpa // PAGE_SIZE, (gpa + length) // PAGE_SIZE
        return {page * PAGE_SIZE: self._pages[page] for page in range(first, last) if page in self._pages}

    def show(self, gpa: int, length: int, kind: MemoryKind) -> None:
        """Map whole pages, in place of whatever was mapped there.

        Raises:
            ProtocolError: ``platform-address``.
            BackendError: ``platform-memory``.
        """
        self._check_pages(gpa, length)
        address = self._base + gpa
        flags = mmap.MAP_SHARED | _FIXED
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        if self._libc.mmap(address, length, protection, flags, self._descriptors[kind], gpa) != address:
            raise _failed("map", gpa)
        self._libc.madvise(address, length, _DONTDUMP)
        pages = range(gpa // PAGE_SIZE, (gpa + length) // PAGE_SIZE)
        self._pages.update(dict.fromkeys(pages, kind))

    def hide(self, gpa: int, length: int) -> None:
        """Unmap whole pages; the addresses stay reserved.

        Raises:
            ProtocolError: ``platform-address``.
            BackendError: ``platform-memory``.
        """
        self._check_pages(gpa, length)
        address = self._base + gpa
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE | _FIXED
        if self._libc.mmap(address, length, _NO_ACCESS, flags, -1, 0) != address:
            raise _failed("unmap", gpa)
        for page in range(gpa // PAGE_SIZE, (gpa + length) // PAGE_SIZE):
            self._pages.pop(page, None)

    def read(self, gpa: int, length: int) -> bytes:
        """Bytes of mapped memory: one copy, so what is shared cannot change afterwards.

        Raises:
            ProtocolError: ``platform-not-validated``, ``platform-address``.
        """
        self._check_mapped(gpa, length)
        return ctypes.string_at(self._base + gpa, length)

    def write(self, gpa: int, data: Buffer) -> None:
        """Store bytes in mapped memory.

        Raises:
            ProtocolError: ``platform-not-validated``, ``platform-address``.
        """
        self._check_mapped(gpa, len(data))
        ctypes.memmove(self._base + gpa, bytes(data), len(data))

    def view(self, gpa: int, length: int) -> memoryview:
        """Mapped memory itself, writable: for what shares its pages with a device. The pages must stay mapped.

        Raises:
            ProtocolError: ``platform-not-validated``, ``platform-address``.
        """
        self._check_mapped(gpa, length)
        return memoryview((ctypes.c_ubyte * length).from_address(self._base + gpa)).cast("B")

    def close(self) -> None:
        """Unmap everything, the reservation too."""
        self._libc.munmap(self._base, self.size_bytes)
        self._pages.clear()

    def _check_mapped(self, gpa: int, length: int) -> None:
        if gpa < 0 or length < 0 or gpa + length > self.size_bytes:
            raise ProtocolError("no memory at this address", code="platform-address", gpa=gpa, length=length)
        for page in range(gpa // PAGE_SIZE, (gpa + length + PAGE_SIZE - 1) // PAGE_SIZE):
            if page not in self._pages:
                raise ProtocolError(
                    "the page is not validated", code="platform-not-validated", gpa=page * PAGE_SIZE, length=length
                )

    def _check_pages(self, gpa: int, length: int) -> None:
        misaligned = gpa % PAGE_SIZE or length % PAGE_SIZE
        if misaligned or gpa < 0 or length <= 0 or gpa + length > self.size_bytes:
            raise ProtocolError("not a range of pages that can be mapped", code="platform-address", gpa=gpa)


def _failed(what: str, gpa: int) -> BackendError:
    error = ctypes.get_errno()
    return BackendError(f"cannot {what} guest memory: {os.strerror(error)}", code="platform-memory", gpa=gpa, got=error)
