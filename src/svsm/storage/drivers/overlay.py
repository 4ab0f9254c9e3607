# SPDX-License-Identifier: MIT OR Apache-2.0
"""A writable view of a device that must not change: writes stay in memory.

Offline tools use it to look at a volume with a pending commit as it will be, and leave the disk as it is. What was
written is kept by block; the memory it takes is what was written.
"""

from __future__ import annotations

from collections.abc import Sequence

from svsm.abi.block import BlockDevice, Extent, Range
from svsm.storage.drivers.checks import check_ranges

__all__ = ["OverlayDevice"]


class OverlayDevice:
    """A `BlockDevice` over another one, which is only read."""

    def __init__(self, below: BlockDevice) -> None:
        self._below = below
        self._written: dict[int, bytes] = {}

    @property
    def size_bytes(self) -> int:
        """Capacity of the device below."""
        return self._below.size_bytes

    @property
    def block_size_bytes(self) -> int:
        """Granularity of the device below."""
        return self._below.block_size_bytes

    @property
    def read_only(self) -> bool:
        """Writes are taken (and kept in memory)."""
        return False

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The contents of each range, with what was written here."""
        contents = self._below.read(ranges)
        block = self.block_size_bytes
        for index, (offset, length) in enumerate(ranges):
            found = [at for at in range(offset, offset + length, block) if at in self._written]
            if found:
                mixed = bytearray(contents[index])
                for at in found:
                    mixed[at - offset : at - offset + block] = self._written[at]
                contents[index] = bytes(mixed)
        return contents

    def write(self, extents: Sequence[Extent]) -> None:
        """Keep all extents in memory."""
        block = self.block_size_bytes
        ranges = [(offset, len(data)) for offset, data in extents]
        check_ranges(ranges, size_bytes=self.size_bytes, block_size_bytes=block)
        for offset, data in extents:
            for at in range(0, len(data), block):
                self._written[offset + at] = bytes(memoryview(data)[at : at + block])

    def flush(self) -> None:
        """Nothing to do."""

    def discard(self, ranges: Sequence[Range]) -> None:
        """Nothing to do: contents become undefined, and what they were is one possibility."""
        check_ranges(ranges, size_bytes=self.size_bytes, block_size_bytes=self.block_size_bytes)

    def close(self) -> None:
        """Close the device below."""
        self._below.close()
