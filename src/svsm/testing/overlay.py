# SPDX-License-Identifier: MIT OR Apache-2.0
"""A writable view of a device that must not change: writes stay in memory.

What was written is kept by block; the memory it takes is what was written.
"""

from __future__ import annotations

from collections.abc import Sequence

from svsm.abi.block import BlockDevice, Extent, Range
from svsm.storage.drivers.checks import CheckedDevice

__all__ = ["OverlayDevice"]


class OverlayDevice(CheckedDevice):
    """A `BlockDevice` over another one, which is only read. Writes are taken, and kept in memory."""

    def __init__(self, below: BlockDevice) -> None:
        super().__init__(size_bytes=below.size_bytes, block_size_bytes=below.block_size_bytes, read_only=False)
        self._below = below
        self._written: dict[int, bytes] = {}
        self._zeros = bytes(below.block_size_bytes)

    def _measure(self) -> int:
        self._below.poll()
        return self._below.size_bytes

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The contents of each range, with what was written here."""
        self._admit_reading(ranges)
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
        self._admit_writing(extents)
        block = self.block_size_bytes
        for offset, data in extents:
            for at in range(0, len(data), block):
                self._written[offset + at] = bytes(memoryview(data)[at : at + block])

    def write_zeroes(self, ranges: Sequence[Range]) -> None:
        """Keep in memory that the ranges are zero; all zeroed blocks share one block of zeros."""
        self._admit_changing(ranges)
        for offset, length in ranges:
            for at in range(offset, offset + length, self.block_size_bytes):
                self._written[at] = self._zeros

    def flush(self) -> None:
        """Nothing to do."""
        self._admit()

    def discard(self, ranges: Sequence[Range]) -> None:
        """Nothing to do: contents become undefined, and what they were is one possibility."""
        self._admit_changing(ranges)

    def close(self) -> None:
        """Close the device below."""
        self._closed = True
        self._below.close()
