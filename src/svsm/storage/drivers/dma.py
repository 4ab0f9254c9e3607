# SPDX-License-Identifier: MIT OR Apache-2.0
"""Memory that a driver shares with a device which is not trusted.

Theory. Every byte here can change at any moment, by the other side's hand. So a driver (1) reads a value once, into
a private variable, and judges the copy; (2) never reads back what it wrote; (3) puts nothing here that the device
must not see; (4) zeroes what a device is going to fill, so that a length that lies shows zeros.

Publishing. A field that the device polls is stored whole: `u16`, `u32` and `u64` are typed views of the memory, and
an item assignment through them is one aligned machine store. `struct.pack_into` is not: it clears the destination
first, and a polling device sees the zero. On x86-64 stores become visible in order, and a load only passes older
stores; where a load must not (publish, then look whether the device wants a kick), `fence` is between them.

`DmaMemory` hands out regions from the front and takes them back all at once; a queue's life is its device's life.
Virtio and NVMe drivers both build on it.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Final

from svsm.formats.errors import StateError

__all__ = ["HAS_FENCE", "PAGE_BYTES", "DmaMemory", "fence"]

PAGE_BYTES: Final = 4096
_WORD: Final = 8
_ADDRESS_LIMIT: Final = 1 << 52

HAS_FENCE: Final = os.uname().machine in ("x86_64", "i686")
"""Whether `fence` orders a store before a later load. Where not, a driver always kicks and never sleeps unpolled."""

_FENCE_LOCK = threading.Lock()


def fence() -> None:
    """A full barrier: an uncontended lock is one locked compare-and-exchange on x86."""
    with _FENCE_LOCK:
        pass


class DmaMemory:
    """A window of shared memory, and where the device sees it.

    Args:
        memory: Writable, a whole number of pages; stays exported for as long as this lives.
        address: What the device calls its first byte; page-aligned. Guest-physical, or an IOVA.

    Raises:
        StateError: ``dma-memory`` for memory or addresses that cannot be used.

    Attributes:
        bytes, u16, u32, u64: Views of the same memory, indexed in items.
    """

    def __init__(self, memory: memoryview, *, address: int) -> None:
        if sys.byteorder != "little":
            raise StateError("the drivers' rings need a little-endian machine", code="dma-memory")
        size = memory.nbytes
        if memory.readonly or not size or size % PAGE_BYTES or address % PAGE_BYTES:
            raise StateError("shared memory is writable and consists of whole pages", code="dma-memory", got=size)
        if address < 0 or address + size > _ADDRESS_LIMIT:
            raise StateError("shared memory lies beyond what can be addressed", code="dma-memory", got=address)
        self.bytes = memory.cast("B")
        self.u16 = self.bytes.cast("H")
        self.u32 = self.bytes.cast("I")
        self.u64 = self.bytes.cast("Q")
        self.address = address
        self._next = 0

    @property
    def size_bytes(self) -> int:
        """Of the whole window."""
        return self.bytes.nbytes

    @property
    def free_bytes(self) -> int:
        """Not handed out yet."""
        return self.size_bytes - self._next

    def allocate(self, length: int, *, align: int = 64) -> int:
        """The offset of `length` zeroed bytes; `align` is a power of two.

        Raises:
            StateError: ``dma-memory`` when they are not there.
        """
        offset = (self._next + align - 1) & ~(align - 1)
        if length < 0 or align < _WORD or align & (align - 1) or offset + length > self.size_bytes:
            raise StateError(
                "the shared memory is too small for this driver",
                code="dma-memory",
                expected=offset + length,
                got=self.size_bytes,
            )
        self._next = offset + length
        self.zero(offset, length)
        return offset

    def zero(self, offset: int, length: int) -> None:
        """Clear bytes."""
        self.bytes[offset : offset + length] = bytes(length)

    def device_address(self, offset: int) -> int:
        """What the device calls the byte at `offset`."""
        return self.address + offset

    def release_all(self) -> None:
        """Take every region back; for a device that has confirmed its reset."""
        self._next = 0

    def part(self, offset: int, length: int) -> DmaMemory:
        """A window of its own over some of this one's pages; both see the same bytes."""
        return type(self)(self.bytes[offset : offset + length], address=self.address + offset)
