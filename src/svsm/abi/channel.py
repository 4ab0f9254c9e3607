# SPDX-License-Identifier: MIT OR Apache-2.0
"""Channel: the byte stream to the proxy, given by the untrusted host (a socket, a 16550, vsock).

A channel carries bytes and nothing else: no framing, no authenticity, no bound on delays but the deadline that each
call takes. Whatever arrives is hostile input.
"""

from __future__ import annotations

from typing import Protocol

from svsm.formats.record import Buffer

__all__ = ["Channel"]


class Channel(Protocol):
    """A bidirectional byte stream."""

    def send(self, data: Buffer, *, deadline: float) -> None:
        """Send all of `data` before `deadline` (`time.monotonic` seconds).

        Raises:
            BackendError: ``channel-closed`` or ``channel-timeout``.
        """

    def receive(self, max_bytes: int, *, deadline: float) -> bytes:
        """At least one and at most `max_bytes` bytes; b"" when the peer closed its side.

        Raises:
            BackendError: ``channel-timeout`` when nothing came before `deadline`.
        """

    def fileno(self) -> int:
        """A descriptor that polls readable when `receive` would return at once."""

    def close(self) -> None:
        """End the channel."""
