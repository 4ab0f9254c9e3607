# SPDX-License-Identifier: MIT OR Apache-2.0
"""What every driver checks before it touches its device: that it is open, bounds, alignment, writability. Nothing is
done by halves because one range of several was wrong. `CheckedDevice` is the part of a driver that does it."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence

from svsm.abi.block import Extent, Range
from svsm.formats.errors import BackendError, StateError

__all__ = [
    "CheckedDevice",
    "block_io_error",
    "check_block_size",
    "check_extents",
    "check_ranges",
    "closed_error",
    "read_only_error",
    "uniform_extents",
    "uniform_ranges",
]

_SMALLEST_BLOCK = 128
_LARGEST_BLOCK = 1 << 20


def check_block_size(block_size_bytes: int) -> None:
    """Demand a power of two from 128 bytes to 1 MiB.

    Raises:
        StateError: ``block-size``.
    """
    if not _SMALLEST_BLOCK <= block_size_bytes <= _LARGEST_BLOCK or block_size_bytes & (block_size_bytes - 1):
        raise StateError("this block size is not supported", code="block-size", got=block_size_bytes)


def check_ranges(ranges: Iterable[Range], *, size_bytes: int, block_size_bytes: int) -> None:
    """Demand that all ranges are aligned and inside the device.

    Args:
        ranges: Of a call.
        size_bytes: Of the device.
        block_size_bytes: A power of two.

    Raises:
        StateError: ``block-alignment``, ``block-range``.
    """
    mask = block_size_bytes - 1
    for offset, length in ranges:  # for calls with a thousand ranges: as few steps as will do
        if (bits := offset | length) & mask or bits < 0 or offset + length > size_bytes:
            raise _range_error(offset, length, size_bytes, block_size_bytes)


def check_extents(extents: Iterable[Extent], *, size_bytes: int, block_size_bytes: int) -> None:
    """Demand the same of a write.

    Raises:
        StateError: ``block-alignment``, ``block-range``.
    """
    mask = block_size_bytes - 1
    for offset, data in extents:
        length = len(data)
        if (offset | length) & mask or offset < 0 or offset + length > size_bytes:
            raise _range_error(offset, length, size_bytes, block_size_bytes)


def uniform_ranges(ranges: Sequence[Range], *, size_bytes: int, block_size_bytes: int) -> int:
    """The one length of all ranges, where they have one and `check_ranges` has nothing to say; 0 where not.

    A call with a thousand ranges usually looks like this, and a device waits while it is checked.
    """
    length = ranges[0][1] if ranges else 0
    mask, last = block_size_bytes - 1, size_bytes - length
    if length <= 0 or length & mask:
        return 0
    for offset, own in ranges:
        if own != length or offset & mask or not 0 <= offset <= last:
            return 0
    return length


def uniform_extents(extents: Sequence[Extent], *, size_bytes: int, block_size_bytes: int) -> int:
    """The same for a write."""
    length = len(extents[0][1]) if extents else 0
    mask, last = block_size_bytes - 1, size_bytes - length
    if length <= 0 or length & mask:
        return 0
    for offset, data in extents:
        if len(data) != length or offset & mask or not 0 <= offset <= last:
            return 0
    return length


def _range_error(offset: int, length: int, size_bytes: int, block_size_bytes: int) -> StateError:
    if (offset | length) % block_size_bytes:
        return StateError(
            "a range is not a multiple of the block size",
            code="block-alignment",
            offset=offset,
            length=length,
            expected=block_size_bytes,
        )
    return StateError("a range is beyond the device", code="block-range", offset=offset, length=length, got=size_bytes)


def read_only_error() -> StateError:
    """For writes to a device that was opened for reading."""
    return StateError("the device is read-only", code="block-read-only")


def closed_error() -> StateError:
    """For calls after `close`."""
    return StateError("the device is closed", code="block-closed")


def block_io_error(what: str, reason: str) -> BackendError:
    """For an operation that the device failed."""
    return BackendError(f"the device failed to {what}: {reason}", code="block-io", operation=what)


class CheckedDevice(abc.ABC):
    """What drivers have in common: what they say about their device, and what they refuse.

    Args:
        size_bytes: Capacity; what is not a whole block is cut off.
        block_size_bytes: Granularity.
        read_only: Refuse writes.

    Raises:
        StateError: ``block-size``.

    Attributes:
        resizes: How many times the capacity has changed.
    """

    def __init__(self, *, size_bytes: int, block_size_bytes: int, read_only: bool) -> None:
        check_block_size(block_size_bytes)
        self._block_size = block_size_bytes
        self._size = self.resizes = 0
        self._resized(size_bytes)
        self._polled_size, self.resizes = self._size, 0
        self._read_only = read_only
        self._closed = False

    @property
    def size_bytes(self) -> int:
        """Capacity, as last heard."""
        return self._size

    @property
    def block_size_bytes(self) -> int:
        """Granularity."""
        return self._block_size

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return self._read_only

    def _admit(self) -> None:
        if self._closed:
            raise closed_error()

    def _admit_reading(self, ranges: Sequence[Range]) -> None:
        if self._closed:
            raise closed_error()
        check_ranges(ranges, size_bytes=self._size, block_size_bytes=self._block_size)

    def _admit_changing(self, ranges: Sequence[Range]) -> None:
        self._admit_reading(ranges)
        self._demand_writable()

    def _demand_writable(self) -> None:
        if self._read_only:
            raise read_only_error()

    def _admit_writing(self, extents: Sequence[Extent]) -> None:
        if self._closed:
            raise closed_error()
        check_extents(extents, size_bytes=self._size, block_size_bytes=self._block_size)
        self._demand_writable()

    def poll(self) -> bool:
        """Ask for the capacity; whether it differs from what it was at the start or at the last `poll`."""
        self._admit()
        self._resized(self._measure())
        changed, self._polled_size = self._size != self._polled_size, self._size
        return changed

    def _resized(self, size_bytes: int) -> None:
        """Take a capacity over; what is not a whole block is cut off."""
        size = size_bytes // self._block_size * self._block_size
        if size != self._size:
            self._size = size
            self.resizes += 1

    @abc.abstractmethod
    def _measure(self) -> int:
        """The capacity in bytes, asked for now."""
