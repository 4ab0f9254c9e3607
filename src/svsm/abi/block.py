# SPDX-License-Identifier: MIT OR Apache-2.0
"""BlockDevice: the hypervisor-neutral storage interface. Everything above it sees only this.

What is durable when (drivers must keep it, file systems may rely on it and on nothing more):

* `write` and `write_zeroes` returning means the device has taken the data: later reads through the same device see it.
  After a power cut, any subset of the 128-byte-aligned pieces of what was written since the last completed `flush` may
  have reached the medium, in any order, each piece either old or new. A piece smaller than 128 bytes is never torn
  inside.
* `flush` returning means every write, zeroing and discard that completed before `flush` was called survives any power
  cut. A device that cannot promise that fails its flushes.
* `write_zeroes` is a `write` of zeros, in everything but cost. The device may give the space back, and allocate it
  again with a later write, which may then fail for want of space.
* `discard` makes the contents of its ranges undefined until they are written again, and may be a no-op. Contents may
  even change between two reads.

One call takes any number of ranges, none included:

* All of them are checked before any is touched: a call that raises `StateError` has done nothing.
* A range of length 0 is checked like every other one and does nothing (a read gives b"").
* Ranges of a read, and of a `write_zeroes` or `discard`, may overlap. Where extents of one write overlap, each 128-byte
  piece holds the data of one of them; which, nobody promises. Extents of one call reach the medium in any order.
* The device keeps no hold of the caller's buffers, and what it returns is the caller's.

After an error from the device (`BackendError`):

* `write`, `write_zeroes`, `discard`: each piece of the call's ranges is old, new or, for a discard, undefined. Nothing
  else has changed.
* `flush`: nothing is promised about earlier writes, and repeating it does not mend that: callers treat it as final.
* Whether the device still works is the device's matter. One that does not raises ``block-io`` from every later call.

Capacity may change while a device is open: `size_bytes` is what was last heard. A driver may hear of it in any call,
and does in `poll`. Block size and writability never change; a device that changes its block size is dead.

After `close` every method but `close` raises ``block-closed``; the properties stay what they were. Closing makes
nothing durable.

Offsets and lengths are in bytes and multiples of `block_size_bytes`. A device is used by one thread at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from svsm.formats.record import Buffer

__all__ = ["BlockDevice", "Extent", "Range"]

Range = tuple[int, int]
"""(offset_bytes, length_bytes)."""

Extent = tuple[int, Buffer]
"""(offset_bytes, data); a memoryview is contiguous, and its items are single bytes."""


class BlockDevice(Protocol):
    """One disk. Every method may raise `BackendError` (``block-io``) or `StateError` (``block-range``,
    ``block-alignment``, ``block-read-only``, ``block-closed``); nothing else but `ProtocolError`
    (``block-protocol``) where a device on a socket breaks its protocol."""

    @property
    def size_bytes(self) -> int:
        """Capacity, as last heard. A multiple of `block_size_bytes`."""

    @property
    def block_size_bytes(self) -> int:
        """Granularity of offsets and lengths: a power of two, at least 128."""

    @property
    def read_only(self) -> bool:
        """Whether `write`, `write_zeroes` and `discard` are refused."""

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The contents of each range, in the order asked."""

    def write(self, extents: Sequence[Extent]) -> None:
        """Write all extents; no order among them is promised before the next `flush`."""

    def write_zeroes(self, ranges: Sequence[Range]) -> None:
        """Make the ranges read as zeros."""

    def flush(self) -> None:
        """Make everything written so far durable."""

    def discard(self, ranges: Sequence[Range]) -> None:
        """Give up the contents of the ranges."""

    def poll(self) -> bool:
        """Look for another capacity: a notice of the device, or its answer, as its kind has it.

        Returns:
            Whether the capacity differs from what it was when the device was opened or last polled.
        """

    def close(self) -> None:
        """Release the device (and its lock)."""
