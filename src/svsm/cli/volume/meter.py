# SPDX-License-Identifier: MIT OR Apache-2.0
"""Progress of long work: one line on a terminal's stderr that is written over, and nothing in a pipe.

Nothing is shown in the first half second, so short work stays silent everywhere.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TextIO

from svsm.abi.block import BlockDevice, Extent, Range

__all__ = ["Meter", "Watched", "meter"]

_PATIENCE_S, _INTERVAL_S = 0.5, 0.1
_BAR = 24


class Meter:
    """Takes what `storage.cocoonfs.check.Progress` is told.

    Args:
        out: A terminal, or None for silence.
    """

    def __init__(self, out: TextIO | None) -> None:
        self._out = out
        self._next = time.monotonic() + _PATIENCE_S
        self._shown = 0

    def __call__(self, stage: str, done: int, whole: int) -> None:
        """Show how far a stage is."""
        now = time.monotonic()
        if self._out is None or now < self._next:
            return
        self._next = now + _INTERVAL_S
        filled = _BAR * done // max(whole, 1)
        line = f"{stage:<12} [{'#' * filled}{'.' * (_BAR - filled)}] {100 * done // max(whole, 1):3} %"
        self._out.write("\r" + line.ljust(self._shown))
        self._out.flush()
        self._shown = len(line)

    def end(self) -> None:
        """Take the line away."""
        if self._out is not None and self._shown:
            self._out.write("\r" + " " * self._shown + "\r")
            self._out.flush()
            self._shown = 0


@contextlib.contextmanager
def meter() -> Iterator[Meter]:
    """A meter on stderr, which is silent where that is no terminal."""
    shown = Meter(sys.stderr if sys.stderr is not None and sys.stderr.isatty() else None)
    try:
        yield shown
    finally:
        shown.end()


class Watched:
    """A `BlockDevice` that tells a meter how much was written to another one: making a volume writes all of it once.

    Args:
        device: The other one.
        progress: Is told.
    """

    def __init__(self, device: BlockDevice, progress: Meter) -> None:
        self._device, self._progress, self._written = device, progress, 0

    @property
    def size_bytes(self) -> int:
        """As the other one's."""
        return self._device.size_bytes

    @property
    def block_size_bytes(self) -> int:
        """As the other one's."""
        return self._device.block_size_bytes

    @property
    def read_only(self) -> bool:
        """As the other one's."""
        return self._device.read_only

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """As the other one does."""
        return self._device.read(ranges)

    def write(self, extents: Sequence[Extent]) -> None:
        """As the other one does, and counted."""
        self._device.write(extents)
        self._written += sum(len(data) for _, data in extents)
        self._progress("writing", min(self._written, self.size_bytes), self.size_bytes)

    def write_zeroes(self, ranges: Sequence[Range]) -> None:
        """As the other one does."""
        self._device.write_zeroes(ranges)

    def flush(self) -> None:
        """As the other one does."""
        self._device.flush()

    def discard(self, ranges: Sequence[Range]) -> None:
        """As the other one does."""
        self._device.discard(ranges)

    def poll(self) -> bool:
        """As the other one does."""
        return self._device.poll()

    def close(self) -> None:
        """As the other one does."""
        self._device.close()
