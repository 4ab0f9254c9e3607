# SPDX-License-Identifier: MIT OR Apache-2.0
"""Files of a volume that is not there: what a service stores stays in memory, or fails on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from svsm.formats.errors import SvsmError

__all__ = ["MemoryFileStore"]


class MemoryFileStore:
    """A `FileStore` in memory, for tests and harnesses; `fail` makes every later replacement fail."""

    def __init__(self) -> None:
        self.files: dict[int, bytes] = {}
        self.replacements = 0
        self.fail: SvsmError | None = None

    def read(self, inode: int) -> bytes | None:
        """See `FileStore`."""
        return self.files.get(inode)

    def replace_many(self, changes: Mapping[int, bytes], done: Callable[[SvsmError | None], None]) -> None:
        """See `FileStore`."""
        if self.fail is None:
            self.files.update(changes)
            self.replacements += 1
        done(self.fail)
