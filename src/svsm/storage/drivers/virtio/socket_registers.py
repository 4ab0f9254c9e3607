# SPDX-License-Identifier: MIT OR Apache-2.0
"""Registers behind a datagram socket: a device in another process.

Each access is a `RegisterMessage`; a READ waits for its answer, which must repeat its sequence number and offset,
and an INTERRUPT may come in between. The other side is the device: whatever else it sends, silence past the deadline,
a closed socket, all end the registers for good (``virtio-registers``). What it sends without being asked is bounded:
between two accesses at most `_MOST_UNASKED` messages are looked at.
"""

from __future__ import annotations

import socket
import time

from svsm.formats.errors import BackendError, FormatError, ProtocolError, SvsmError
from svsm.formats.virtio import RegisterMessage, RegisterOperation

__all__ = ["SocketRegisters"]

_MOST_UNASKED = 4096
_SEQUENCE_MASK = 0xFFFF_FFFF


class SocketRegisters:
    """`Registers` over a connected SOCK_SEQPACKET socket, which it owns.

    Args:
        connection: The socket; its timeout is this object's from now on.
        deadline_seconds: How long one register access may take.
    """

    def __init__(self, connection: socket.socket, *, deadline_seconds: float = 30.0) -> None:
        self._socket = connection
        self._deadline_seconds = deadline_seconds
        self._sequence = 0
        self._interrupted = False
        self._lost: SvsmError | None = None

    def _lose(self, reason: str) -> BackendError:
        lost = BackendError(f"the device's registers cannot be reached: {reason}", code="virtio-registers")
        self._lost = lost
        return lost

    def _send(self, message: RegisterMessage) -> None:
        if self._lost is not None:
            raise self._lost
        self._socket.settimeout(self._deadline_seconds)
        try:
            self._socket.send(message.pack(), socket.MSG_NOSIGNAL)
        except OSError as error:
            raise self._lose(str(error)) from error

    def _receive(self, seconds: float) -> RegisterMessage | None:
        """The next message; None when none comes in time."""
        if self._lost is not None:
            raise self._lost
        self._socket.settimeout(max(seconds, 0.0))
        try:
            raw = self._socket.recv(RegisterMessage.SIZE + 1)
        except (TimeoutError, BlockingIOError):
            return None
        except OSError as error:
            raise self._lose(str(error)) from error
        if not raw:
            raise self._lose("the device has hung up")
        try:
            message = RegisterMessage.parse(raw)
        except FormatError as error:
            self._lost = ProtocolError("a register message has another length", code="virtio-registers")
            raise self._lost from error
        if message.operation == RegisterOperation.INTERRUPT:
            self._interrupted = True
        elif message.operation != RegisterOperation.READ:
            self._lost = ProtocolError("this is no answer of a register", code="virtio-registers")
            raise self._lost
        return message

    def read32(self, offset: int) -> int:
        """Ask, and wait for this answer.

        Raises:
            BackendError: ``virtio-registers``: no answer, or nobody there.
            ProtocolError: ``virtio-registers``: another answer.
        """
        self._sequence = (self._sequence + 1) & _SEQUENCE_MASK
        self._send(RegisterMessage(RegisterOperation.READ, self._sequence, offset, 0))
        deadline = time.monotonic() + self._deadline_seconds
        for _ in range(_MOST_UNASKED):
            message = self._receive(deadline - time.monotonic())
            if message is None:
                raise self._lose("no answer in time")
            if message.operation == RegisterOperation.INTERRUPT:
                continue
            if message.sequence != self._sequence or message.offset != offset:
                self._lost = ProtocolError("a register answers another question", code="virtio-registers")
                raise self._lost
            return message.value
        raise self._lose("interrupts without end")

    def write32(self, offset: int, value: int) -> None:
        """Tell; there is no answer.

        Raises:
            BackendError: ``virtio-registers``.
        """
        self._send(RegisterMessage(RegisterOperation.WRITE, 0, offset, value))

    def wait_interrupt(self, seconds: float) -> bool:
        """An interrupt that has come already, or the next one.

        Raises:
            BackendError, ProtocolError: ``virtio-registers``.
        """
        if not self._interrupted:
            message = self._receive(seconds)
            if message is not None and message.operation != RegisterOperation.INTERRUPT:
                self._lost = ProtocolError("a register answers without a question", code="virtio-registers")
                raise self._lost
        interrupted, self._interrupted = self._interrupted, False
        return interrupted

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
