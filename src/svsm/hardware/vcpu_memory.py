# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the guest sees of its memory: ranges of two memfds, mapped into this process and into the emulator.

The chip decides (RMP) and says by MAP and UNMAP what is visible; the *table* here repeats that. A range of the table
that is mapped, in the process and in the emulator, is *active*. What is not visible is never active, so that a bug
in the emulator cannot reach it by accident. (The process still holds the memfds: a hijacked one could map them again.
What must never be reached from here, private memory, is a memfd that it does not have.)

Normally everything visible is active. But each change of the emulator's mappings costs it time quadratic in their
number (4 ms at 1,000), a guest can cut its memory into as many ranges as it has pages, and the chip waits for each
ACK. So at most `MAX_ACTIVE` ranges are made active in advance, the rest when the guest touches them; `settle` starts
anew from the largest ones when there are too many. Only the guest's own time depends on how it has cut its memory.

Invariants: the table is sorted and disjoint, and neighbours of the same kind are one range; every active range lies
inside one range of the table and has its permissions. The C library's mmap is called through ctypes because
Python's `mmap` object cannot be given to the emulator without pinning it.
"""

from __future__ import annotations

import bisect
import ctypes
import dataclasses
import mmap
import os
import struct
from typing import Final, Protocol

from svsm.confine.libc import mapping_calls
from svsm.formats.errors import BackendError
from svsm.formats.snp.vcpu_messages import Access, Memory

__all__ = ["MAX_ACTIVE", "GuestMemory", "MemoryEngine"]

MAX_ACTIVE: Final = 128
"""Active ranges up to which one is made active before it is touched."""

_LEVEL_SHIFTS: Final = (39, 30, 21, 12)
_TABLE_MASK: Final = 0x000F_FFFF_FFFF_F000
_INDEX_MASK: Final = 0x1FF
_ENTRY_BYTES: Final = 8
_ENTRY_PRESENT: Final = 1
_ENTRY_ACCESSED: Final = 1 << 5
_ENTRY_LARGE: Final = 1 << 7
_IDENTITY_GPA: Final = (1 << 36) - 8192
"""The emulated CPU addresses 36 bits; what is mapped from here on does not reach it. A guest that maps this address
can read the constant tables there, nothing else."""
_IDENTITY_BYTES: Final = 8192
_READ, _WRITE, _EXECUTE = 1, 2, 4
"""The emulator's permission bits (UC_PROT_*)."""


class MemoryEngine(Protocol):
    """The part of `unicorn.Uc` that this module drives."""

    def mem_map_ptr(self, address: int, size: int, perms: int, ptr: int) -> None:
        """Make `size` bytes of this process at `ptr` the guest's memory at `address`."""

    def mem_unmap(self, address: int, size: int) -> None:
        """Take it away again."""

    def reg_read(self, reg_id: int) -> int:
        """A register."""

    def reg_write(self, reg_id: int, value: int) -> None:
        """Store a register."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Range:
    start: int
    end: int
    memory: Memory
    perms: int

    def continues(self, other: _Range) -> bool:
        return self.end == other.start and (self.memory, self.perms) == (other.memory, other.perms)


class GuestMemory:
    """The memory of one vCPU process.

    Args:
        engine: The emulator.
        descriptors: The memfd of each memory; offset = GPA.
        cr3: The emulator's number of that register.
    """

    def __init__(self, engine: MemoryEngine, descriptors: dict[Memory, int], *, cr3: int) -> None:
        self._engine = engine
        self._descriptors = descriptors
        self._libc = mapping_calls()
        self._cr3 = cr3
        self._identity = self._make_identity()
        engine.mem_map_ptr(_IDENTITY_GPA, _IDENTITY_BYTES, _READ, self._identity)
        self._table: list[_Range] = []
        self._active: dict[int, tuple[int, int]] = {}
        """Start → (end, address in this process)."""

    def map(self, gpa: int, length: int, memory: Memory, access: Access) -> None:
        """Make a range visible with `access`, in place of whatever was there.

        Raises:
            BackendError: ``vcpu-map`` when the operating system refuses.
        """
        self.unmap(gpa, length)
        perms = _perms(memory, access)
        length = min(length, _IDENTITY_GPA - gpa)
        if not perms or length <= 0:
            return
        made = _Range(gpa, gpa + length, memory, perms)
        index = bisect.bisect_left(self._table, gpa, key=_start)
        if index < len(self._table) and made.continues(self._table[index]):
            made = dataclasses.replace(made, end=self._table.pop(index).end)
        if index > 0 and self._table[index - 1].continues(made):
            index -= 1
            made = dataclasses.replace(made, start=self._table.pop(index).start)
        self._table.insert(index, made)
        if len(self._active) < MAX_ACTIVE:
            self._activate(gpa, gpa + length, made)

    def unmap(self, gpa: int, length: int) -> None:
        """Make a range invisible; parts that were not visible are no error.

        Raises:
            BackendError: ``vcpu-map`` when the operating system refuses.
        """
        end = gpa + length
        cut: list[tuple[int, int]] = []
        hit = [start for start, (stop, _) in self._active.items() if start < end and gpa < stop]
        for start in hit:
            cut += [(start, gpa), (end, self._active[start][0])]
        self._deactivate(hit)
        first = max(0, bisect.bisect_right(self._table, gpa, key=_start) - 1)
        last = bisect.bisect_left(self._table, end, key=_start)
        kept: list[_Range] = []
        for item in self._table[first:last]:
            if item.start < gpa:
                kept.append(dataclasses.replace(item, end=min(item.end, gpa)))
            if item.end > end:
                kept.append(dataclasses.replace(item, start=max(item.start, end)))
        self._table[first:last] = kept
        for start, stop in cut:
            rest = self._at(start) if start < stop else None
            if rest is not None:
                self._activate(start, stop, rest)

    def touch(self, gpa: int) -> bool:
        """The guest touches what is not active: make it active if it is visible.

        As much of the range around `gpa` as is not active already. May be called while the emulator runs: it only
        adds, so that no code that is being executed goes away.

        Returns:
            False when the guest may not see that address: a fault.
        Raises:
            BackendError: ``vcpu-map``.
        """
        item = self._at(gpa)
        if item is None:
            return False
        start, end = item.start, item.end
        for low, (high, _) in self._active.items():
            if low <= gpa < high:
                return False  # active, and still a fault: not for lack of a mapping
            if high <= gpa:
                start = max(start, high)
            else:
                end = min(end, low)
        self._activate(start, end, item)
        return True

    def walk(self, cr3: int, address: int) -> tuple[bool, int | None]:
        """Make the page tables active that translate a virtual address (the emulator's own walk is silent about them).

        Args:
            cr3: The guest's; four levels.
            address: Virtual.

        Returns:
            Whether something is active now that was not; and the GPA of a table entry that the guest may not see.
        Raises:
            BackendError: ``vcpu-map``.
        """
        table = cr3 & _TABLE_MASK
        added = False
        for shift in _LEVEL_SHIFTS:
            gpa = table + (address >> shift & _INDEX_MASK) * _ENTRY_BYTES
            item = self._at(gpa)
            if item is None or not item.perms & _READ:
                return added, gpa
            added = self.touch(gpa) or added
            entry = int.from_bytes(os.pread(self._descriptors[item.memory], _ENTRY_BYTES, gpa), "little")
            if not entry & _ENTRY_PRESENT or entry & _ENTRY_LARGE:
                break
            table = entry & _TABLE_MASK
        return added, None

    def settle(self) -> None:
        """Before the guest is entered: start anew with the largest ranges when too many are active."""
        if len(self._active) < MAX_ACTIVE:
            return
        self.close()
        self._activate_largest()

    def move(self, engine: MemoryEngine) -> None:
        """Go on with another emulator, in which nothing is mapped yet.

        Raises:
            BackendError: ``vcpu-map``.
        """
        self.close()
        self._engine = engine
        engine.mem_map_ptr(_IDENTITY_GPA, _IDENTITY_BYTES, _READ, self._identity)
        self._activate_largest()

    def close(self) -> None:
        """Nothing is active any more."""
        self._deactivate(list(self._active))

    def _at(self, gpa: int) -> _Range | None:
        index = bisect.bisect_right(self._table, gpa, key=_start) - 1
        return self._table[index] if index >= 0 and gpa < self._table[index].end else None

    def _activate_largest(self) -> None:
        for item in sorted(self._table, key=lambda item: item.start - item.end)[: MAX_ACTIVE // 2]:
            self._activate(item.start, item.end, item)

    def _activate(self, start: int, end: int, item: _Range) -> None:
        protection = mmap.PROT_READ | mmap.PROT_WRITE if item.perms & _WRITE else mmap.PROT_READ
        host = self._libc.mmap(None, end - start, protection, mmap.MAP_SHARED, self._descriptors[item.memory], start)
        if host is None or host == ctypes.c_void_p(-1).value:
            raise _failed("mmap", start)
        self._engine.mem_map_ptr(start, end - start, item.perms, host)
        self._active[start] = (end, host)

    def _deactivate(self, starts: list[int]) -> None:
        """Take ranges out of emulator and process.

        The emulator drops its translations of an unmapped range by *virtual* address, through the guest's tables.
        Where those do not map it, that is a page fault inside the emulator: nobody sees it, but the third one
        makes it lose the guest's next exception. So it gets tables that map everything for the while.
        """
        if not starts:
            return
        saved = self._engine.reg_read(self._cr3)
        self._engine.reg_write(self._cr3, _IDENTITY_GPA)
        for start in starts:
            end, host = self._active.pop(start)
            self._engine.mem_unmap(start, end - start)
            if self._libc.munmap(host, end - start):
                raise _failed("munmap", start)
        self._engine.reg_write(self._cr3, saved)

    def _make_identity(self) -> int:
        """Page tables for `_deactivate`: every address maps to itself modulo 512 GiB. Two pages, kept for good."""
        anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        host = self._libc.mmap(None, _IDENTITY_BYTES, mmap.PROT_READ | mmap.PROT_WRITE, anonymous, -1, 0)
        if host is None or host == ctypes.c_void_p(-1).value:
            raise _failed("mmap", _IDENTITY_GPA)
        top = [_IDENTITY_GPA + _IDENTITY_BYTES // 2 | _ENTRY_PRESENT | _ENTRY_ACCESSED] * 512
        pages = [index << 30 | _ENTRY_LARGE | _ENTRY_PRESENT | _ENTRY_ACCESSED for index in range(512)]
        tables = struct.pack("<1024Q", *top, *pages)
        ctypes.memmove(host, tables, len(tables))
        return int(host)


def _start(item: _Range) -> int:
    return item.start


def _perms(memory: Memory, access: Access) -> int:
    """The emulator's permissions for RMP permissions; shared pages are data to a confidential guest."""
    perms = (_READ if access & Access.READ else 0) | (_WRITE if access & Access.WRITE else 0)
    executable = access & (Access.EXECUTE_USER | Access.EXECUTE_SUPERVISOR)
    return perms | (_EXECUTE if executable and memory is Memory.VMPL2 else 0)


def _failed(call: str, gpa: int) -> BackendError:
    error = ctypes.get_errno()
    return BackendError(f"{call} of guest memory failed: {os.strerror(error)}", code="vcpu-map", got=error, gpa=gpa)
