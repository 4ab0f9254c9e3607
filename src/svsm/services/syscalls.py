# SPDX-License-Identifier: MIT OR Apache-2.0
"""The service's side of the syscall socket: send a request, wait for its answer, keep what comes in between.

One thread. `call` blocks until *its* answer is there, which is what a TPM's NV store needs; answers to other
requests (an outstanding WAIT) that arrive meanwhile are kept for `completed`. At most `MAX_PENDING` requests are
outstanding, so what is kept is bounded too.

The end of the socket means that the kernel is gone or done with this service: `KernelGone`, a `BackendError`.
"""

from __future__ import annotations

import array
import os
import socket

from svsm.abi.syscall import (
    MAX_FRAME_BYTES,
    MAX_PENDING,
    Call,
    FrameReader,
    Reply,
    Request,
    Status,
    decode_handle,
    encode_handle,
    encode_read,
    encode_replace,
    encode_write,
)
from svsm.formats.errors import BackendError, ProtocolError, StateError
from svsm.formats.record import Buffer

__all__ = ["Kernel", "KernelGone"]

_CHUNK_BYTES = 65536
_MAX_DESCRIPTORS = 8


class KernelGone(BackendError):
    """The kernel closed the syscall socket."""


class Kernel:
    """The kernel, as a service sees it.

    Args:
        descriptor: The service's end of the syscall socket; owned from now on.
    """

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._socket.settimeout(None)
        self._reader = FrameReader(MAX_FRAME_BYTES)
        self._next_id = 1
        self._pending: set[int] = set()
        self._done: dict[int, Reply] = {}
        self._descriptors: list[int] = []

    def fileno(self) -> int:
        """Readable when `poll` may complete something."""
        return self._socket.fileno()

    def submit(self, call: Call, body: Buffer = b"") -> int:
        """Send a request without waiting; returns its id.

        Raises:
            StateError: ``syscall-pending`` when too many are outstanding.
            KernelGone: ``syscall-closed``.
        """
        if len(self._pending) >= MAX_PENDING:
            raise StateError("too many syscalls are outstanding", code="syscall-pending")
        request_id = self._next_id
        self._next_id = self._next_id % 0xFFFFFFFF + 1
        frame = Request(request_id, call, bytes(body)).pack()
        try:
            self._socket.sendall(frame, socket.MSG_NOSIGNAL)
        except OSError as error:
            raise KernelGone("the kernel is gone", code="syscall-closed", errno=error.errno) from None
        self._pending.add(request_id)
        return request_id

    @property
    def has_completed(self) -> bool:
        """Whether an answer waits to be taken with `completed`."""
        return bool(self._done)

    def completed(self, request_id: int) -> Reply | None:
        """The answer to a request, once, or None when it has not come yet."""
        return self._done.pop(request_id, None)

    def poll(self, *, block: bool) -> None:
        """Take in what the kernel sent: once, waiting for it or not.

        Raises:
            KernelGone: ``syscall-closed``.
            ProtocolError: ``syscall-*`` when it makes no sense.
        """
        flags = socket.MSG_CMSG_CLOEXEC | (0 if block else socket.MSG_DONTWAIT)
        try:
            chunk, ancillary, message_flags, _ = self._socket.recvmsg(
                _CHUNK_BYTES, socket.CMSG_LEN(4 * _MAX_DESCRIPTORS), flags
            )
        except BlockingIOError:
            return
        except OSError as error:
            raise KernelGone("the kernel is gone", code="syscall-closed", errno=error.errno) from None
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i", data[: len(data) - len(data) % 4])
                self._descriptors += received
        if message_flags & socket.MSG_CTRUNC:
            raise ProtocolError("descriptors were lost", code="syscall-descriptors")
        if not chunk:
            raise KernelGone("the kernel closed the syscall socket", code="syscall-closed")
        for header, body in self._reader.feed(chunk):
            reply = Reply.parse(header, body)
            if reply.id not in self._pending:
                raise ProtocolError("an answer to nothing", code="syscall-id", got=reply.id)
            self._pending.remove(reply.id)
            self._done[reply.id] = reply

    def take_descriptor(self) -> int:
        """The descriptor that belongs to the reply just completed; the caller owns it.

        Replies are completed in the order they came, and only WAIT carries descriptors, one WAIT at a time.

        Raises:
            ProtocolError: ``syscall-descriptors`` when none came.
        """
        if not self._descriptors:
            raise ProtocolError("a descriptor is missing", code="syscall-descriptors")
        return self._descriptors.pop(0)

    def call(self, call: Call, body: Buffer = b"") -> Reply:
        """Send a request and wait for its answer."""
        request_id = self.submit(call, body)
        while (reply := self.completed(request_id)) is None:
            self.poll(block=True)
        return reply

    def open(self, name: str) -> int:
        """The handle of a named object.

        Raises:
            BackendError: ``syscall-failed`` when this process may not have it.
        """
        return decode_handle(self._demand(Call.OPEN, name.encode(), name).body)

    def read(self, handle: int, *, max_bytes: int) -> bytes:
        """The contents of a file, b"" when it has none yet.

        Raises:
            BackendError: ``syscall-failed``.
        """
        reply = self.call(Call.READ, encode_read(handle, 0, max_bytes))
        if reply.status is Status.NOT_FOUND:
            return b""
        if reply.status is not Status.OK:
            raise BackendError("the kernel could not read", code="syscall-failed", status=reply.status.name)
        return reply.body

    def replace(self, changes: dict[int, bytes]) -> None:
        """Replace whole files, all or none; returns when they are durable.

        Raises:
            BackendError: ``syscall-failed``: whether it happened is unknown.
        """
        self._demand(Call.REPLACE, encode_replace(changes), "replace")

    def write(self, handle: int, data: bytes) -> None:
        """Write a line to a log, or an announcement."""
        self._demand(Call.WRITE, encode_write(handle, data), "write")

    def close_handle(self, handle: int) -> None:
        """Give a handle back."""
        self._demand(Call.CLOSE, encode_handle(handle), "close")

    def _demand(self, call: Call, body: bytes, what: str) -> Reply:
        reply = self.call(call, body)
        if reply.status is not Status.OK:
            raise BackendError("the kernel refused", code="syscall-failed", status=reply.status.name, what=what)
        return reply

    def close(self) -> None:
        """End the connection; the kernel takes that for the end of this service."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        self._socket.close()
