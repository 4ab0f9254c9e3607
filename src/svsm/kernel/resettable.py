# SPDX-License-Identifier: MIT OR Apache-2.0
"""A disk that asks for a reset, and gets it where nothing can be lost by it.

Theory. A virtio device that has failed says so (DEVICE_NEEDS_RESET), an NVMe controller too (CSTS.CFS). The driver is
dead then, and would stay so. Here it is reset and the call is made again. That is honest because of the driver's own
rule: if anything had been written since the last good flush, or was being written, the next flush fails, since nobody
knows whether it outlived the reset; a commit ends with a flush, so it fails as a whole. A read just takes longer, and
a commit begins with one. A reset gives the host no power that it did not have: it may answer every read with old
contents anyway, and the file system above authenticates what it reads.

Only what asks for a reset gets one. A device that breaks the protocol, that says nothing until the deadline, or whose
registers are gone stays dead: waiting again for it would cost everybody else the same time again. And only a few times
in a kernel's life, so that a device which fails for ever does not keep the kernel busy for ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeVar

from svsm.abi.block import BlockDevice, Extent, Range
from svsm.abi.errors import BackendError, SvsmError

__all__ = ["MAX_RESETS", "ResettableDisk", "ResettableDriver"]

MAX_RESETS: Final = 8
_ASKS_FOR_IT: Final = frozenset({"virtio-needs-reset", "nvme-failed"})

_T = TypeVar("_T")


class ResettableDriver(BlockDevice, Protocol):
    """A driver that knows why its device is dead, and can start again."""

    fault: SvsmError | None

    def reconnect(self) -> None:
        """Reset the device and start again."""


class ResettableDisk:
    """A `BlockDevice` over a driver, which it owns.

    Args:
        driver: The driver.
        on_reset: Told the code of the fault after which the disk was reset.
        limit: A context in which a reset ends in time.
    """

    def __init__(
        self,
        driver: ResettableDriver,
        *,
        on_reset: Callable[[str], None],
        limit: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._driver = driver
        self._on_reset = on_reset
        self._limit = limit
        self._left = MAX_RESETS

    @property
    def driver(self) -> ResettableDriver:
        """The driver."""
        return self._driver

    @property
    def size_bytes(self) -> int:
        """See `BlockDevice`."""
        return self._driver.size_bytes

    @property
    def block_size_bytes(self) -> int:
        """See `BlockDevice`."""
        return self._driver.block_size_bytes

    @property
    def read_only(self) -> bool:
        """See `BlockDevice`."""
        return self._driver.read_only

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """See `BlockDevice`."""
        return self._call(lambda: self._driver.read(ranges))

    def write(self, extents: Sequence[Extent]) -> None:
        """See `BlockDevice`."""
        self._call(lambda: self._driver.write(extents))

    def write_zeroes(self, ranges: Sequence[Range]) -> None:
        """See `BlockDevice`."""
        self._call(lambda: self._driver.write_zeroes(ranges))

    def flush(self) -> None:
        """See `BlockDevice`. Fails after a reset that came between a write and this."""
        self._call(self._driver.flush)

    def discard(self, ranges: Sequence[Range]) -> None:
        """See `BlockDevice`."""
        self._call(lambda: self._driver.discard(ranges))

    def poll(self) -> bool:
        """See `BlockDevice`."""
        return self._call(self._driver.poll)

    def close(self) -> None:
        """See `BlockDevice`."""
        self._driver.close()

    def _call(self, operation: Callable[[], _T]) -> _T:
        try:
            return operation()
        except BackendError:
            if not self._reset():
                raise
        return operation()

    def _reset(self) -> bool:
        """Whether the disk may be used again, and is the disk that it was."""
        fault = self._driver.fault
        if fault is None or fault.code not in _ASKS_FOR_IT or not self._left:
            return False
        self._left -= 1
        before = (self._driver.block_size_bytes, self._driver.read_only)
        try:
            with self._limit():
                self._driver.reconnect()
        except SvsmError:
            return False
        if (self._driver.block_size_bytes, self._driver.read_only) != before:
            return False
        self._on_reset(fault.code)
        return True
