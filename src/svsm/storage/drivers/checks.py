# SPDX-License-Identifier: MIT OR Apache-2.0
"""What every driver checks before it touches its device: bounds, alignment, writability. Nothing is done by halves
because one range of several was wrong."""

from __future__ import annotations

from collections.abc import Iterable

from svsm.abi.block import Range
from svsm.formats.errors import BackendError, StateError

__all__ = ["block_io_error", "check_block_size", "check_ranges", "closed_error", "read_only_error"]

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

    Raises:
        StateError: ``block-alignment``, ``block-range``.
    """
    for offset, length in ranges:
        if offset % block_size_bytes or length % block_size_bytes:
            raise StateError(
                "a range is not a multiple of the block size",
                code="block-alignment",
                offset=offset,
                length=length,
                expected=block_size_bytes,
            )
        if offset < 0 or length < 0 or offset + length > size_bytes:
            raise StateError(
                "a range is beyond the device", code="block-range", offset=offset, length=length, got=size_bytes
            )


def read_only_error() -> StateError:
    """For writes to a device that was opened for reading."""
    return StateError("the device is read-only", code="block-read-only")


def closed_error() -> StateError:
    """For calls after `close`."""
    return StateError("the device is closed", code="block-closed")


def block_io_error(what: str, reason: str) -> BackendError:
    """For an operation that the device failed."""
    return BackendError(f"the device failed to {what}: {reason}", code="block-io", operation=what)
