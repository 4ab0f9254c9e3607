# SPDX-License-Identifier: MIT OR Apache-2.0
"""Progress of long work: one line on a terminal's stderr that is written over, and nothing in a pipe.

Nothing is shown in the first half second, so short work stays silent everywhere.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TextIO

__all__ = ["Meter", "meter"]

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
