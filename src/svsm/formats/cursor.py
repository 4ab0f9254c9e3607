# SPDX-License-Identifier: MIT OR Apache-2.0
"""A bounds-checked reader over bytes: how parsers take variable data apart.

No parser slices with arithmetic of its own; every length that the input chose is checked here, once, against what
is really there. A cursor only moves forward.
"""

from __future__ import annotations

from typing import TypeVar

from svsm.formats.errors import FormatError
from svsm.formats.record import Buffer, Record

__all__ = ["Cursor"]

_R = TypeVar("_R", bound=Record)


class Cursor:
    """Reads forward through `data`.

    Args:
        data: The bytes; they are not copied until taken.
        what: What the bytes are, for messages ("certificate table").
    """

    def __init__(self, data: Buffer, *, what: str) -> None:
        self._data = memoryview(data).cast("B")
        self._what = what
        self.offset = 0

    @property
    def remaining(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self.offset

    def take(self, length: int) -> bytes:
        """The next `length` bytes.

        Raises:
            FormatError: ``cursor-truncated`` when fewer remain or `length` is negative.
        """
        if length < 0 or length > self.remaining:
            raise FormatError(
                f"{self._what} is cut short",
                code="cursor-truncated",
                offset=self.offset,
                expected=length,
                got=self.remaining,
            )
        start = self.offset
        self.offset += length
        return bytes(self._data[start : self.offset])

    def unsigned(self, width_bytes: int, byte_order: str) -> int:
        """The next `width_bytes` bytes as an unsigned integer; `byte_order` is "little" or "big"."""
        return int.from_bytes(self.take(width_bytes), "big" if byte_order == "big" else "little")

    def record(self, kind: type[_R]) -> _R:
        """The next ``kind.SIZE`` bytes as a record."""
        return kind.parse(self.take(kind.SIZE))

    def rest(self) -> bytes:
        """Everything that remains."""
        return self.take(self.remaining)

    def finish(self) -> None:
        """Demand that nothing remains.

        Raises:
            FormatError: ``cursor-trailing`` otherwise.
        """
        if self.remaining:
            raise FormatError(
                f"{self._what} has trailing bytes", code="cursor-trailing", offset=self.offset, got=self.remaining
            )
