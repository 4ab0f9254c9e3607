# SPDX-License-Identifier: MIT OR Apache-2.0
"""A disk in memory: the plainest `BlockDevice`, for tests and for images that never touch a disk.

Everything is durable at once. Disks that lose power live in `svsm.testing.powercut`.
"""

from __future__ import annotations

from collections.abc import Sequence

from svsm.abi.block import Extent, Range
from svsm.formats.record import Buffer
from svsm.storage.drivers.checks import CheckedDevice, check_ranges

__all__ = ["MemoryDevice"]


class MemoryDevice(CheckedDevice):
    """A device over a bytearray.

    Args:
        content: Initial contents (copied), or a size in bytes for a zeroed device.
        block_size_bytes: Granularity.
        read_only: Refuse writes.

    Raises:
        StateError: ``block-size``, ``block-alignment``.

    Attributes:
        data: The contents. Its owner may make it longer or shorter: `poll` sees that.
    """

    def __init__(self, content: Buffer | int, *, block_size_bytes: int = 512, read_only: bool = False) -> None:
        self.data = bytearray(content)
        super().__init__(size_bytes=len(self.data), block_size_bytes=block_size_bytes, read_only=read_only)
        check_ranges([(0, len(self.data))], size_bytes=len(self.data), block_size_bytes=block_size_bytes)

    def _measure(self) -> int:
        return len(self.data)

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The contents of each range."""
        self._admit_reading(ranges)
        view = memoryview(self.data)
        return [bytes(view[offset : offset + length]) for offset, length in ranges]

    def write(self, extents: Sequence[Extent]) -> None:
        """Write all extents."""
        self._admit_writing(extents)
        for offset, data in extents:
            self.data[offset : offset + len(data)] = data

    def write_zeroes(self, ranges: Sequence[Range]) -> None:
        """Zero the ranges."""
        self._admit_changing(ranges)
        for offset, length in ranges:
            self.data[offset : offset + length] = bytes(length)

    def flush(self) -> None:
        """Nothing to do."""
        self._admit()

    def discard(self, ranges: Sequence[Range]) -> None:
        """Zero the ranges."""
        self.write_zeroes(ranges)

    def close(self) -> None:
        """Refuse further calls; `data` stays for the owner."""
        self._closed = True
