# SPDX-License-Identifier: MIT OR Apache-2.0
"""Channel over a connected stream socket that the host handed over, and frames on top of any channel.

Waiting is `poll` with the rest of the deadline; each call says itself that it does not block, because the host may keep
a copy of the descriptor and change its flags. So a host that takes or gives one byte at a time costs the kernel nothing
but the deadline.
"""

from __future__ import annotations

import select
import socket
import time

from svsm.abi.channel import Channel
from svsm.abi.errors import BackendError
from svsm.formats.frames import MAX_FRAME_BYTES, FrameDecoder, encode_frame
from svsm.formats.record import Buffer

__all__ = ["FramedChannel", "StreamChannel"]

_CHUNK_BYTES = 64 << 10
_DONTWAIT = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class StreamChannel:
    """A `Channel` over a connected stream socket, which it owns from now on."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection

    def send(self, data: Buffer, *, deadline: float) -> None:
        """Send all of `data`; see `Channel.send`."""
        rest = memoryview(data)
        while rest:
            self._wait(select.POLLOUT, deadline)
            try:
                rest = rest[self._socket.send(rest, _DONTWAIT) :]
            except (BlockingIOError, InterruptedError):
                continue
            except OSError as error:
                raise _closed(error) from None

    def receive(self, max_bytes: int, *, deadline: float) -> bytes:
        """Whatever is there, at most `max_bytes`; see `Channel.receive`."""
        while True:
            self._wait(select.POLLIN, deadline)
            try:
                return self._socket.recv(max_bytes, _DONTWAIT)
            except (BlockingIOError, InterruptedError):
                continue
            except OSError as error:
                raise _closed(error) from None

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _wait(self, event: int, deadline: float) -> None:
        poller = select.poll()
        try:
            poller.register(self._socket, event)
        except ValueError:
            raise BackendError("the channel was closed on this side", code="channel-closed") from None
        left = deadline - time.monotonic()
        if left <= 0 or not poller.poll(max(1, int(left * 1000))):
            raise BackendError(
                "nothing moved on the channel before the deadline",
                code="channel-timeout",
                hint="look whether the proxy runs and whether it reaches the broker",
            )


class FramedChannel:
    """Whole frames over a `Channel`.

    Args:
        channel: The byte stream.
        max_bytes: Cap on one body, both ways.
    """

    def __init__(self, channel: Channel, *, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._channel = channel
        self._max_bytes = max_bytes
        self._decoder = FrameDecoder(max_bytes=max_bytes)

    def send(self, body: Buffer, *, deadline: float) -> None:
        """Send one body.

        Raises:
            FormatError: ``frame-too-long``.
            BackendError: ``channel-closed`` or ``channel-timeout``.
        """
        self._channel.send(encode_frame(body, max_bytes=self._max_bytes), deadline=deadline)

    def receive(self, *, deadline: float) -> bytes:
        """The next body. Reads no byte beyond it, so nothing that a host sends ahead is held here.

        Raises:
            FormatError: ``frame-too-long`` or ``frame-truncated``.
            BackendError: ``channel-closed`` when the stream ended before a frame, or ``channel-timeout``.
        """
        while True:
            wanted = min(self._decoder.wanted_bytes, _CHUNK_BYTES)
            data = self._channel.receive(wanted, deadline=deadline)
            if not data:
                self._decoder.finish()
                raise BackendError(
                    "the proxy closed the serial line",
                    code="channel-closed",
                    hint="the proxy's log says why; a proxy that cannot reach the broker closes too",
                )
            bodies = self._decoder.feed(data)
            if bodies:
                return bodies[0]

    def fileno(self) -> int:
        """The channel's descriptor."""
        return self._channel.fileno()

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()


def _closed(error: OSError) -> BackendError:
    return BackendError("the channel broke", code="channel-closed", errno=error.errno)
