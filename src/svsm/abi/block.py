# SPDX-License-Identifier: MIT OR Apache-2.0
"""BlockDevice: the hypervisor-neutral storage interface. Everything above it sees only this.

What is durable when (drivers must keep it, file systems may rely on it and on nothing more):

* `write` returning means the device has taken the data: later reads through the same device see it. After a power
  cut, any subset of the 128-byte-aligned pieces of writes since the last completed `flush` may have reached the
  medium, in any order, each piece either old or new. A piece smaller than 128 bytes is never torn inside.
* `flush` returning means every write and discard that completed before `flush` was called survives any power cut.
* `discard` makes the contents of its ranges undefined until written again; it may be a no-op.
* An error from `write` or `flush` leaves the ranges concerned undefined; a failed `flush` promises nothing about
  earlier writes, and repeating it does not mend that: callers treat it as final.

Offsets and lengths are in bytes and multiples of `block_size_bytes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from svsm.formats.record import Buffer

__all__ = ["BlockDevice", "Extent", "Range"]

Range = tuple[int, int]
"""(offset_bytes, length_bytes)."""

Extent = tuple[int, Buffer]
"""(offset_bytes, data)."""


class BlockDevice(Protocol):
    """One disk. Every method may raise `BackendError` (``block-io``) or `StateError` (``block-range``,
    ``block-alignment``, ``block-read-only``, ``block-closed``); nothing else."""

    @property
    def size_bytes(self) -> int:
        """Capacity. A multiple of `block_size_bytes`."""

    @property
    def block_size_bytes(self) -> int:
        """Granularity of offsets and lengths: a power of two, at least 128."""

    @property
    def read_only(self) -> bool:
        """Whether `write`, `discard` and `resize` are refused."""

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The contents of each range, in the order asked."""

    def write(self, extents: Sequence[Extent]) -> None:
        """Write all extents; no order among them is promised before the next `flush`."""

    def flush(self) -> None:
        """Make everything written so far durable."""

    def discard(self, ranges: Sequence[Range]) -> None:
        """Give up the contents of the ranges."""

    def close(self) -> None:
        """Release the device (and its lock). Further calls raise ``block-closed``."""
