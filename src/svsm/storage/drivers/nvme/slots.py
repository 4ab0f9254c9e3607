# SPDX-License-Identifier: MIT OR Apache-2.0
"""Bounce buffers of an NVMe queue: one for each command that can be in flight, at addresses that never change.

A few are large. Each is whole pages and page-aligned, so a transfer's PRP entries are known before: the first page,
and, for more than two pages, a list of the others that is written once and never read by the driver. Nothing private
enters shared memory but the data of a write, which overwrites all that its command exposes; of a page that a command
exposes beyond its length nothing is lent, because the length is in the command.

NVMe does not say how much of a read was written. So what a read exposes is zeroed before, every time: a controller that
reports success and did nothing gives zeros, never the contents of an earlier request.
"""

from __future__ import annotations

from svsm.formats.nvme import PAGE_BYTES
from svsm.storage.drivers.dma import DmaMemory

__all__ = ["MOST_BUFFER_BYTES", "Slots", "slots_bytes"]

_LIST_ENTRIES = PAGE_BYTES // 8
MOST_BUFFER_BYTES = _LIST_ENTRIES * PAGE_BYTES
"""With one page of PRP list (which has room for one page more than this needs)."""


def slots_bytes(slots: int, *, small_bytes: int, large_bytes: int, large_slots: int) -> int:
    """Shared memory that the buffers take at most."""
    large = min(large_slots, slots)
    sizes = ((slots - large, small_bytes), (large, large_bytes))
    return sum(count * (size + (PAGE_BYTES if size > 2 * PAGE_BYTES else 0)) for count, size in sizes) + PAGE_BYTES


class Slots:
    """The buffers, and which of them are free.

    Args:
        memory: Where they go.
        count: How many; at least 1.
        small_bytes, large_bytes: Whole pages, at most `MOST_BUFFER_BYTES`.
        large_slots: How many are large, at least 1; the first ones.

    Raises:
        StateError: ``dma-memory``.

    Attributes:
        offsets: Of each buffer in `memory`.
        zeros: As long as the largest buffer.
    """

    def __init__(self, memory: DmaMemory, count: int, *, small_bytes: int, large_bytes: int, large_slots: int) -> None:
        large = min(large_slots, count)
        self.small_bytes = small_bytes
        self.zeros = memoryview(bytes(max(small_bytes, large_bytes)))
        self._boundary = large
        self._large = list(range(large))
        self._small = list(range(count - 1, large - 1, -1))
        self.offsets: list[int] = []
        self._prp1: list[int] = []
        self._lists: list[int] = []
        for slot in range(count):
            size = large_bytes if slot < large else small_bytes
            offset = memory.allocate(size, align=PAGE_BYTES)
            self.offsets.append(offset)
            self._prp1.append(memory.device_address(offset))
            self._lists.append(self._store_list(memory, offset, size // PAGE_BYTES))

    @staticmethod
    def _store_list(memory: DmaMemory, buffer: int, pages: int) -> int:
        """The device address of a list of all pages but the first; 0 where no transfer needs one."""
        if pages <= 2:
            return 0
        offset = memory.allocate(PAGE_BYTES, align=PAGE_BYTES)
        for entry in range(pages - 1):
            memory.u64[(offset >> 3) + entry] = memory.device_address(buffer + (entry + 1) * PAGE_BYTES)
        return memory.device_address(offset)

    def take(self, length: int) -> int:
        """A free slot whose buffer holds `length` bytes, or -1."""
        free = self._small if length <= self.small_bytes and self._boundary < len(self.offsets) else self._large
        return free.pop() if free else -1

    def give_back(self, slot: int) -> None:
        """The driver has it again."""
        (self._large if slot < self._boundary else self._small).append(slot)

    def prps(self, slot: int, length: int) -> tuple[int, int]:
        """PRP 1 and PRP 2 of a transfer (§4.3)."""
        first = self._prp1[slot]
        if length <= PAGE_BYTES:
            return first, 0
        if length <= 2 * PAGE_BYTES:
            return first, first + PAGE_BYTES
        return first, self._lists[slot]
