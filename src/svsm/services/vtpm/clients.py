# SPDX-License-Identifier: MIT OR Apache-2.0
"""The connected clients of the socket front: one object each, driven by the server's event loop.

The other end of every socket here is hostile, and so is the host, which may keep a copy of the very descriptor and
change its flags at any time. So no socket is trusted to be non-blocking: each call says MSG_DONTWAIT itself. A
client that does not read its answers is not read from either; what is kept per client is one command, one chunk and
one answer. Descriptors that arrive where none belongs are closed at once.
"""

from __future__ import annotations

import array
import os
import select
import socket
import struct
import time
from typing import Protocol

from svsm.formats.errors import ProtocolError
from svsm.formats.swtpm import MAX_CONTROL_BYTES, DataReader

__all__ = ["Client", "ControlClient", "DataClient", "Front", "PlatformClient"]

_CHUNK_BYTES = 4096
_MAX_UNSENT_BYTES = 65536
_DONTWAIT = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_HOT_ROUNDS = 32
_HOT_SECONDS = 0.02
_HOT_WAIT_US = 2000


class Front(Protocol):
    """What a client needs of the server."""

    def execute(self, command: bytes, locality: int | None) -> bytes:
        """Run a TPM command; locality None is the one that the control channel set."""

    def control(self, message: bytes, descriptor: int | None, *, unix: bool) -> bytes:
        """Answer a control message; owns `descriptor`."""

    def platform(self, signal: int) -> bytes:
        """Answer a signal of the platform port; b"" ends the session."""

    def quiet(self) -> bool:
        """Whether no other data client is connected and the kernel has nothing to say."""


class Client:
    """One connection.

    Args:
        connection: Owned.
        handle: Of the kernel, which counts clients by it; 0 for one that came with SET_DATAFD.
    """

    def __init__(self, connection: socket.socket, handle: int, front: Front) -> None:
        self.connection = connection
        self.handle = handle
        self.front = front
        self._unsent = b""

    def fileno(self) -> int:
        """The descriptor to poll."""
        return self.connection.fileno()

    @property
    def interest(self) -> int:
        """What to poll for."""
        return select.EPOLLOUT if self._unsent else select.EPOLLIN

    def ready(self, mask: int) -> bool:
        """Something happened; returns False when the client is finished with."""
        if self._unsent:
            return self._send(b"") if mask & select.EPOLLOUT else not mask & (select.EPOLLHUP | select.EPOLLERR)
        return self._readable()

    def _readable(self) -> bool:
        raise NotImplementedError

    def _send(self, data: bytes) -> bool:
        data = self._unsent + data if self._unsent else data
        try:
            sent = self.connection.send(data, _DONTWAIT)
        except BlockingIOError:
            sent = 0
        except OSError:
            return False
        self._unsent = data[sent:] if sent < len(data) else b""
        return len(self._unsent) <= _MAX_UNSENT_BYTES

    def close(self) -> None:
        """Drop the connection."""
        self.connection.close()


class DataClient(Client):
    """Sends TPM commands, raw or prefixed."""

    def __init__(self, connection: socket.socket, handle: int, front: Front) -> None:
        super().__init__(connection, handle, front)
        self._frames = DataReader()
        # Lets the receive in `_hot` give up by itself; harmless where the host undoes it (only its own TPM waits).
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, _HOT_WAIT_US))

    def _readable(self) -> bool:
        receive, execute, send = self.connection.recv, self.front.execute, self.connection.send
        flags = int(socket.MSG_DONTWAIT)
        until = time.monotonic() + _HOT_SECONDS
        for _ in range(_HOT_ROUNDS):
            try:
                chunk = receive(_CHUNK_BYTES, flags)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if self._frames.is_command(chunk):
                # The usual case, kept short: one raw command, whole, and a client that takes the answer.
                response = execute(chunk, None)
                try:
                    sent = send(response, _DONTWAIT)
                except BlockingIOError:
                    sent = 0
                except OSError:
                    return False
                self._unsent = response[sent:]
            elif not chunk or not self._serve(chunk):
                return False
            # A client that just got its answer usually sends the next command at once: wait for it here, briefly,
            # instead of paying for another round of the event loop.
            if self._unsent or not self.front.quiet() or time.monotonic() > until:
                return True
            flags = 0
        return True

    def _serve(self, chunk: bytes) -> bool:
        try:
            frames = self._frames.feed(chunk)
        except ProtocolError:
            return False
        answers = [frame.wrap(self.front.execute(frame.command, frame.locality)) for frame in frames]
        if answers and not self._send(b"".join(answers)):
            return False
        return not self._frames.ended


class ControlClient(Client):
    """Sends control messages, one per read; see `svsm.formats.swtpm`."""

    def __init__(self, connection: socket.socket, handle: int, front: Front) -> None:
        super().__init__(connection, handle, front)
        self._unix = connection.family == socket.AF_UNIX

    def _readable(self) -> bool:
        try:
            message, ancillary, flags, _ = self.connection.recvmsg(
                MAX_CONTROL_BYTES, socket.CMSG_LEN(4), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return True
        except OSError:
            return False
        descriptors = _received(ancillary)
        if len(descriptors) != 1 or flags & socket.MSG_CTRUNC or not message:
            for descriptor in descriptors:
                os.close(descriptor)
            descriptors = []
        if not message:
            return False
        answer = self.front.control(message, descriptors[0] if descriptors else None, unix=self._unix)
        return self._send(answer)


class PlatformClient(Client):
    """Sends the simulator's platform signals, u32 each."""

    def __init__(self, connection: socket.socket, handle: int, front: Front) -> None:
        super().__init__(connection, handle, front)
        self._partial = b""

    def _readable(self) -> bool:
        try:
            chunk = self.connection.recv(64, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        data = self._partial + chunk
        whole = len(data) - len(data) % 4
        self._partial = data[whole:]
        for (signal,) in struct.iter_unpack(">I", data[:whole]):
            answer = self.front.platform(signal)
            if not answer or not self._send(answer):
                return False
        return bool(chunk)


def _received(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)
