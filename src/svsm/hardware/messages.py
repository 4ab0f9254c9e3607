# SPDX-License-Identifier: MIT OR Apache-2.0
"""One end of a machine channel as the chip holds it: whole packets, counted descriptors, no surprises.

A peer that sends anything but a message, or descriptors that the kind does not have, loses the channel: every
descriptor that came is closed first.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence

from svsm.formats.errors import BackendError, ProtocolError
from svsm.formats.snp.hardware_messages import MAX_MESSAGE, Message

__all__ = ["Port"]

_SOCKET_BUFFER = 4 * MAX_MESSAGE


class Port:
    """A SOCK_SEQPACKET socket that carries `Message` packets.

    Args:
        sock: One end; the port owns it.
        name: Of the peer, for messages.
    """

    def __init__(self, sock: socket.socket, *, name: str) -> None:
        self._sock = sock
        self.name = name
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._sock.fileno()

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send one packet.

        Raises:
            BackendError: ``machine-channel`` when the peer is gone or does not read.
        """
        try:
            socket.send_fds(self._sock, [message.pack()], list(descriptors))
        except OSError as error:
            raise BackendError(
                f"the channel to {self.name} failed: {error.strerror}", code="machine-channel", got=error.errno
            ) from None

    def receive(self) -> tuple[Message, list[int]] | None:
        """The next packet and its descriptors (at most one), None when the peer has hung up.

        Raises:
            FormatError: ``machine-message``.
            ProtocolError: ``machine-descriptors``.
            BackendError: ``machine-channel``.
        """
        try:
            data, descriptors, flags, _ = socket.recv_fds(self._sock, MAX_MESSAGE + 1, 4)
        except ConnectionResetError:
            return None
        except OSError as error:
            raise BackendError(
                f"the channel to {self.name} failed: {error.strerror}", code="machine-channel", got=error.errno
            ) from None
        try:
            if len(descriptors) > 1 or flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
                raise ProtocolError(
                    f"{self.name} sent too much at once", code="machine-descriptors", got=len(descriptors)
                )
            if not data:
                _close(descriptors)
                return None
            return Message.parse(data), descriptors
        except BaseException:
            _close(descriptors)
            raise

    def close(self) -> None:
        """Hang up."""
        self._sock.close()


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
