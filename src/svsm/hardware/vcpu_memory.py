# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the guest sees of its memory: ranges of two memfds, mapped into this process and into the emulator.

The chip decides (RMP) and says by MAP and UNMAP what is visible; this module keeps the process's own address space
equal to that: a range that is not visible to the guest is not mapped in the process either, so that a bug in the
emulator cannot reach it by accident. (The process still holds the memfds: a hijacked one could map them again.
What must never be reached from here, private memory, is a memfd that it does not have.)

Invariant: `_ranges` are sorted, disjoint, page-aligned, and exactly what the emulator has mapped.
The C library's mmap is called through ctypes because Python's `mmap` cannot give a part of a mapping back.
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
from typing import Final, Protocol

from svsm.formats.errors import BackendError, ProtocolError
from svsm.formats.snp.vcpu_messages import Access, Memory

__all__ = ["MAX_RANGES", "GuestMemory", "MemoryEngine"]

MAX_RANGES: Final = 16384
"""Disjoint ranges at one time; each is a mapping of the process, of which Linux allows 65530."""

_READ, _WRITE, _EXECUTE = 1, 2, 4
"""The emulator's permission bits (UC_PROT_*); they happen to be those of mmap(2) too."""


class MemoryEngine(Protocol):
    """The part of `unicorn.Uc` that this module drives."""

    def mem_map_ptr(self, address: int, size: int, perms: int, ptr: int) -> None:
        """Make `size` bytes of this process at `ptr` the guest's memory at `address`."""

    def mem_unmap(self, address: int, size: int) -> None:
        """Take it away again."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Range:
    start: int
    end: int
    host: int
    perms: int


class GuestMemory:
    """The mapped ranges of one vCPU process.

    Args:
        engine: The emulator.
        descriptors: The memfd of each memory; offset = GPA.
    """

    def __init__(self, engine: MemoryEngine, descriptors: dict[Memory, int]) -> None:
        self._engine = engine
        self._descriptors = descriptors
        self._libc = _libc()
        self._ranges: list[_Range] = []

    def map(self, gpa: int, length: int, memory: Memory, access: Access) -> None:
        """Make a range visible with `access`, in place of whatever was there.

        Raises:
            ProtocolError: ``vcpu-ranges`` when there would be too many ranges.
            BackendError: ``vcpu-map`` when the operating system refuses.
        """
        self.unmap(gpa, length)
        perms = _perms(memory, access)
        if not perms:
            return
        if len(self._ranges) >= MAX_RANGES:
            raise ProtocolError("too many ranges of guest pages", code="vcpu-ranges", expected=MAX_RANGES)
        protection = mmap.PROT_READ | mmap.PROT_WRITE if perms & _WRITE else mmap.PROT_READ
        host = self._libc.mmap(None, length, protection, mmap.MAP_SHARED, self._descriptors[memory], gpa)
        if host is None or host == ctypes.c_void_p(-1).value:
            raise _failed("mmap", gpa)
        self._engine.mem_map_ptr(gpa, length, perms, host)
        self._ranges.append(_Range(gpa, gpa + length, host, perms))
        self._ranges.sort(key=lambda item: item.start)

    def unmap(self, gpa: int, length: int) -> None:
        """Make a range invisible; parts that were not visible are no error.

        Raises:
            BackendError: ``vcpu-map`` when the operating system refuses.
        """
        end = gpa + length
        kept: list[_Range] = []
        for item in self._ranges:
            low, high = max(item.start, gpa), min(item.end, end)
            if low >= high:
                kept.append(item)
                continue
            self._engine.mem_unmap(low, high - low)
            if self._libc.munmap(item.host + low - item.start, high - low):
                raise _failed("munmap", low)
            if item.start < low:
                kept.append(dataclasses.replace(item, end=low))
            if high < item.end:
                kept.append(dataclasses.replace(item, start=high, host=item.host + high - item.start))
        self._ranges = kept

    def close(self) -> None:
        """Unmap everything."""
        for item in list(self._ranges):
            self.unmap(item.start, item.end - item.start)


def _perms(memory: Memory, access: Access) -> int:
    """The emulator's permissions for RMP permissions; shared pages are data to a confidential guest."""
    perms = (_READ if access & Access.READ else 0) | (_WRITE if access & Access.WRITE else 0)
    executable = access & (Access.EXECUTE_USER | Access.EXECUTE_SUPERVISOR)
    return perms | (_EXECUTE if executable and memory is Memory.VMPL2 else 0)


def _failed(call: str, gpa: int) -> BackendError:
    error = ctypes.get_errno()
    return BackendError(f"{call} of guest memory failed: {os.strerror(error)}", code="vcpu-map", got=error, gpa=gpa)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    ]
    libc.munmap.restype = ctypes.c_int
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc
