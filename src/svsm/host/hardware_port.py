# SPDX-License-Identifier: MIT OR Apache-2.0
"""The host's end of its channel to the hardware: one command, one answer; notices are kept for who wants them."""

from __future__ import annotations

import collections
import contextlib
import os
import socket
from typing import Final

from svsm.formats.errors import BackendError, ProtocolError
from svsm.formats.snp.firmware_status import FirmwareStatus
from svsm.formats.snp.hardware_messages import ANSWER, MAX_MESSAGE, HostCommand, Message

__all__ = ["HardwarePort"]

_NOTICES: Final = frozenset({HostCommand.VMEXIT, HostCommand.ENDED})


class HardwarePort:
    """Commands to the machine.

    Args:
        sock: SOCK_SEQPACKET, blocking; the port owns it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._identifier = 0
        self._notices: collections.deque[Message] = collections.deque()
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MAX_MESSAGE)

    def fileno(self) -> int:
        """Readable when a notice has arrived; look at `take_notice` first."""
        return self._sock.fileno()

    def ask(self, kind: HostCommand, *arguments: int, payload: bytes = b"") -> Message:
        """One command; its answer with whatever status.

        Raises:
            BackendError: ``host-hardware`` when the hardware is gone.
        """
        self._identifier += 1
        message = Message(kind, arguments, payload, self._identifier)
        try:
            self._sock.sendall(message.pack())
        except OSError as error:
            self._read_last_words()
            raise _gone(str(error.strerror)) from None
        while True:
            answer = self._receive()
            if answer.kind == kind | ANSWER and answer.identifier == self._identifier:
                return answer
            self._keep(answer)
            if answer.kind == HostCommand.ENDED:
                raise _gone(answer.payload.decode(errors="replace"))

    def command(self, kind: HostCommand, *arguments: int, payload: bytes = b"") -> Message:
        """One command that must succeed.

        Raises:
            ProtocolError: ``host-psp-refused`` with the firmware's ``status``.
            BackendError: ``host-hardware``.
        """
        answer = self.ask(kind, *arguments, payload=payload)
        if answer.status:
            known = answer.status in FirmwareStatus.__members__.values()
            raise ProtocolError(
                f"the hardware refused {kind.name}: {answer.payload.decode(errors='replace')}",
                code="host-psp-refused",
                status=answer.status,
                name=FirmwareStatus(answer.status).name if known else "",
            )
        return answer

    def stop(self) -> None:
        """Ask the hardware to end the VM; ENDED follows as a notice."""
        with contextlib.suppress(OSError):
            self._sock.sendall(Message(HostCommand.STOP).pack())

    def take_notice(self) -> Message | None:
        """The oldest notice that was read meanwhile."""
        return self._notices.popleft() if self._notices else None

    def read_notice(self) -> None:
        """Read one that has arrived."""
        self._keep(self._receive())

    def close(self) -> None:
        """Hang up; the VM ends."""
        self._sock.close()

    def _keep(self, message: Message) -> None:
        if message.kind not in _NOTICES:
            raise BackendError("the hardware said something unexpected", code="host-hardware", got=message.kind)
        self._notices.append(message)

    def _read_last_words(self) -> None:
        """Keep the notices that arrived before the hardware went."""
        with contextlib.suppress(BackendError):
            while True:
                answer = self._receive()
                if answer.kind in _NOTICES:
                    self._keep(answer)

    def _receive(self) -> Message:
        try:
            data, descriptors = self._packet()
        except OSError as error:
            raise _gone(str(error.strerror)) from None
        for descriptor in descriptors:
            os.close(descriptor)
        if not data:
            raise _gone("it hung up")
        return Message.parse(data)

    def _packet(self) -> tuple[bytes, list[int]]:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._sock, MAX_MESSAGE + 1, 1)
        except ConnectionResetError:
            # It left a command unread. Linux says so once, before what it had sent: the next read gives that.
            data, descriptors, _, _ = socket.recv_fds(self._sock, MAX_MESSAGE + 1, 1)
        return data, descriptors


def _gone(why: str) -> BackendError:
    return BackendError(f"the hardware is gone: {why}", code="host-hardware")
