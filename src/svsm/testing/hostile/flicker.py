# SPDX-License-Identifier: MIT OR Apache-2.0
"""Shared memory that changes as soon as it has been read: a driver that reads a value twice gets two values.

It stands for a device on another processor with perfect timing. What the driver only polls (whether there is news)
stays; what it takes (a used element, a packed descriptor that is used, a status byte) turns to garbage behind it.
"""

from __future__ import annotations

import sys
from typing import Any, Final

from svsm.formats.virtio import DescriptorFlag
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.virtio.packed import PackedQueue

__all__ = ["FlickerMemory"]

_GARBAGE_ELEMENT: Final = 0xFFFF_FFFF_0000_0007
_USED: Final = int(DescriptorFlag.AVAIL | DescriptorFlag.USED) << 48
_TAKERS: Final = ("collect", "drain", "finish_control")


class _Flicker:
    """A view whose single items turn to garbage after a function that takes them has read one."""

    def __init__(self, view: memoryview, garbage: int) -> None:
        self._view = view
        self._garbage = garbage
        self.nbytes = view.nbytes

    def __getitem__(self, key: Any) -> Any:
        value = self._view[key]
        caller = sys._getframe(1)
        if isinstance(key, int) and caller.f_code.co_name in _TAKERS:
            reader = caller.f_locals.get("self")
            if not isinstance(reader, PackedQueue):
                self._view[key] = self._garbage
            elif value & _USED == reader._seen_mark:
                # Its marks stay: they are what the driver waits for in the next round.
                self._view[key] = self._garbage & ~_USED | value & _USED
        return value

    def __setitem__(self, key: Any, value: Any) -> None:
        self._view[key] = value


class FlickerMemory(DmaMemory):
    """`DmaMemory` of that kind."""

    def __init__(self, memory: memoryview, *, address: int) -> None:
        super().__init__(memory, address=address)
        self._whole = self.bytes
        self.u64: Any = _Flicker(self.u64, _GARBAGE_ELEMENT)
        self.bytes: Any = _Flicker(self.bytes, 0xFF)

    def part(self, offset: int, length: int) -> DmaMemory:
        """As the base's, over the plain bytes."""
        return type(self)(self._whole[offset : offset + length], address=self.address + offset)
