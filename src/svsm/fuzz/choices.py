# SPDX-License-Identifier: MIT OR Apache-2.0
"""Bytes as decisions: how a structured target is driven by an engine that knows only byte strings.

A structured target reads its input from front to back, a few bytes per decision: which operation next, with which
numbers, on which message. The end of the input reads as zeros, so that every byte string is a valid program and a
prefix of a program does the same as its beginning. `edited` damages a message that our own code made, which reaches
far deeper than bytes that an engine would have to invent, and keeps a reproducer valid when keys are drawn anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

__all__ = ["Choices"]

_T = TypeVar("_T")

_MAX_EDITS = 8
_INTERESTING = (
    0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x1_0000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF,
    1 << 32, (1 << 32) + 1, (1 << 48) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 8, (1 << 64) - 1,
)  # fmt: skip


class Choices:
    """Reads decisions from `data`."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def more(self) -> bool:
        """Whether there are bytes left; a loop over operations ends here."""
        return self._at < len(self._data)

    def raw(self, length: int) -> bytes:
        """The next bytes, fewer at the end."""
        taken = self._data[self._at : self._at + length]
        self._at += length
        return taken

    def rest(self) -> bytes:
        """Everything that is left."""
        return self.raw(max(0, len(self._data) - self._at))

    def unsigned(self, width_bytes: int) -> int:
        """A little-endian number; zeros beyond the end."""
        return int.from_bytes(self.raw(width_bytes), "little")

    def below(self, limit: int) -> int:
        """A number from 0 to `limit` - 1, from one byte where that is enough, else from four."""
        return self.unsigned(1 if limit <= 256 else 4) % max(1, limit)

    def flag(self) -> bool:
        """Yes or no."""
        return bool(self.unsigned(1) & 1)

    def pick(self, options: Sequence[_T]) -> _T:
        """One of them."""
        return options[self.below(len(options))]

    def number(self) -> int:
        """A 64-bit number: small, of those that break things, or any."""
        kind = self.unsigned(1)
        if kind < 0x60:
            return kind
        if kind < 0xC0:
            return _INTERESTING[kind % len(_INTERESTING)]
        return self.unsigned(8)

    def blob(self, limit: int) -> bytes:
        """Bytes of a drawn length up to `limit`."""
        return self.raw(self.below(limit + 1))

    def edited(self, message: bytes) -> bytes:
        """`message` with up to eight edits: overwritten, flipped, cut, lengthened, repeated."""
        changed = bytearray(message)
        for _ in range(self.below(_MAX_EDITS + 1)):
            kind = self.below(6)
            at = self.unsigned(2 if len(changed) <= 0x1_0000 else 4) % (len(changed) + 1)
            if kind == 0:
                piece = self.blob(16)
                changed[at : at + len(piece)] = piece
            elif kind == 1 and at < len(changed):
                changed[at] ^= 1 << self.below(8)
            elif kind == 2:
                del changed[at : at + self.unsigned(1)]
            elif kind == 3:
                changed[at:at] = self.blob(64)
            elif kind == 4:
                del changed[at:]
            elif kind == 5:
                value = self.number() & 0xFFFF_FFFF_FFFF_FFFF
                width = (1, 2, 4, 8)[self.below(4)]
                changed[at : at + width] = value.to_bytes(8, "little")[:width]
        return bytes(changed)
