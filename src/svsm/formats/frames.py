# SPDX-License-Identifier: MIT OR Apache-2.0
"""Frames of the serial line between kernel and proxy: an 8-byte little-endian length, then that many bytes of JSON.

COCONUT's wire (svsm `kernel/src/attest.rs`, `tools/aproxy`), which has no limit on the length. Here both sides have
one: a longer announcement is refused from its eight bytes alone, before anything is waited for or allocated. The
decoder is sans-IO: feed it whatever arrived, take out the complete frames.
"""

from __future__ import annotations

from svsm.formats.errors import FormatError
from svsm.formats.record import U64, Buffer, Record, record

__all__ = ["MAX_FRAME_BYTES", "FrameDecoder", "FrameHeader", "encode_frame"]

MAX_FRAME_BYTES = 1 << 20
"""Default cap on the body: the largest honest message is a report with a certificate table, under 100 KiB."""


@record(size=8, byte_order="little")
class FrameHeader(Record):
    """What precedes every body."""

    body_bytes: U64


def encode_frame(body: Buffer, *, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """Put `body` into a frame.

    Raises:
        FormatError: ``frame-too-long``.
    """
    if len(body) > max_bytes:
        raise FormatError("a frame is longer than its limit", code="frame-too-long", expected=max_bytes, got=len(body))
    return FrameHeader(body_bytes=len(body)).pack() + bytes(body)


class FrameDecoder:
    """Cuts a byte stream into frame bodies.

    Args:
        max_bytes: Cap on one body; buffered bytes never exceed one `feed` plus this.
    """

    def __init__(self, *, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._broken = False

    @property
    def pending_bytes(self) -> int:
        """Bytes of a frame that is not complete; 0 means that the stream may end here."""
        return len(self._buffer)

    @property
    def wanted_bytes(self) -> int:
        """How many more bytes complete the current header or frame; at least 1."""
        if len(self._buffer) < FrameHeader.SIZE:
            return FrameHeader.SIZE - len(self._buffer)
        return FrameHeader.SIZE + self._announced() - len(self._buffer)

    def feed(self, data: Buffer) -> list[bytes]:
        """Take bytes, return the bodies that they complete, in order.

        Raises:
            FormatError: ``frame-too-long`` when a header announces more than the cap. There is no way to find the
                next frame after that: every further call raises the same.
        """
        self._buffer += data
        bodies: list[bytes] = []
        while len(self._buffer) >= FrameHeader.SIZE:
            length = self._announced()
            end = FrameHeader.SIZE + length
            if len(self._buffer) < end:
                break
            bodies.append(bytes(self._buffer[FrameHeader.SIZE : end]))
            del self._buffer[:end]
        return bodies

    def finish(self) -> None:
        """The stream ended.

        Raises:
            FormatError: ``frame-truncated`` inside a frame.
        """
        if self._buffer:
            raise FormatError("the stream ended inside a frame", code="frame-truncated", got=len(self._buffer))

    def _announced(self) -> int:
        if self._broken:
            raise self._too_long(self._max_bytes + 1)
        length = FrameHeader.parse_at(self._buffer, 0).body_bytes
        if length > self._max_bytes:
            self._broken = True
            del self._buffer[FrameHeader.SIZE :]
            raise self._too_long(length)
        return length

    def _too_long(self, got: int) -> FormatError:
        return FormatError(
            "a frame announces more than its limit", code="frame-too-long", expected=self._max_bytes, got=got
        )
