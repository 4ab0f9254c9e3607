# SPDX-License-Identifier: MIT OR Apache-2.0
"""A disk in memory: the plainest `BlockDevice`, for tests and for images that never touch a disk.

Everything is durable at once. Disks that lose power live in `svsm.testing.powercut`.
"""

from __future__ import annotations

from collections.abc import Sequence

from svsm.abi.block import Extent, Range
from svsm.formats.record import Buffer
from svsm.storage.drivers.checks import check_block_size, check_ranges, closed_error, read_only_error

__all__ = ["MemoryDevice"]


class MemoryDevice:
    """A device over a bytearray.

    Args:
        content: Initial contents (copied), or a size in bytes for a zeroed device.
        block_size_bytes: Granularity.
        read_only: Refuse writes.

    Raises:
        StateError: ``block-size``, ``block-alignment``.
    """

    def __init__(self, content: Buffer | int, *, block_size_bytes: int = 512, read_only: bool = False) -> None:
        check_block_size(block_size_bytes)
        self.data = bytearray(content)
        check_ranges([(0, len(self.data))], size_bytes=len(self.data), block_size_bytes=block_size_bytes)
        self._block_size = block_size_bytes
        self._read_only = read_only
        self._closed = False

    @property
    def size_bytes(self) -> int:
        """Capacity."""
        return len(self.data)

    @property
    def block_size_bytes(self) -> int:
        """Granularity."""
        return self._block_size

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return self._read_only

    def _check(self, ranges: Sequence[Range]) -> None:
        if self._closed:
            raise closed_error()
        check_ranges(ranges, size_bytes=len(self.data), block_size_bytes=self._block_size)

    def _check_writable(self, ranges: Sequence[Range]) -> None:
        self._check(ranges)
        if self._read_only:
            raise read_only_error()

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The contents of each range."""
        self._check(ranges)
        view = memoryview(self.data)
        return [bytes(view[offset : offset + length]) for offset, length in ranges]

    def write(self, extents: Sequence[Extent]) -> None:
        """Write all extents."""
        self._check_writable([(offset, len(data)) for offset, data in extents])
        for offset, data in extents:
            self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        """Nothing to do."""
        self._check([])

    def discard(self, ranges: Sequence[Range]) -> None:
        """Zero the ranges."""
        self._check_writable(ranges)
        for offset, length in ranges:
            self.data[offset : offset + length] = bytes(length)

    def close(self) -> None:
        """Refuse further calls; `data` stays for the owner."""
        self._closed = True
