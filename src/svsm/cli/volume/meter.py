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
        self._stage, self._moved, self._whole = "", 0, 0

    def __call__(self, stage: str, done: int, whole: int) -> None:
        """Show how far a stage is; where `whole` is 0, because nobody knows it, how much is done."""
        now = time.monotonic()
        if self._out is None or now < self._next:
            return
        self._next = now + _INTERVAL_S
        line = f"{stage:<12} {done:,}"
        if whole:
            filled = _BAR * done // whole
            line = f"{stage:<12} [{'#' * filled}{'.' * (_BAR - filled)}] {100 * done // whole:3} %"
        self._out.write("\r" + line.ljust(self._shown))
        self._out.flush()
        self._shown = len(line)

    def moving(self, stage: str, whole_bytes: int) -> None:
        """From here on, what a `Watched` device reads and writes is for this stage."""
        self._stage, self._moved, self._whole = stage, 0, whole_bytes

    def moved(self, length: int) -> None:
        """A `Watched` device has read or written so many bytes. What comes beyond the whole is bookkeeping."""
        if self._whole:
            self._moved = min(self._moved + length, self._whole)
            self(self._stage, self._moved, self._whole)

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
    """A `BlockDevice` that tells a meter how much another one reads and writes.

    Args:
        device: The other one.
        progress: Is told, and knows of what it is a part; see `Meter.moving`.
    """

    def __init__(self, device: BlockDevice, progress: Meter) -> None:
        self._device, self._progress = device, progress

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
        """As the other one does, and counted."""
        contents = self._device.read(ranges)
        self._progress.moved(sum(map(len, contents)))
        return contents

    def write(self, extents: Sequence[Extent]) -> None:
        """As the other one does, and counted."""
        self._device.write(extents)
        self._progress.moved(sum(len(data) for _, data in extents))

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
