# SPDX-License-Identifier: MIT OR Apache-2.0
"""The syscall interface: what a user-mode service can ask of the kernel, as bytes.

A service has one stream socket to the kernel and nothing else. It sends *requests*, each with an id that it chose;
the kernel answers each once, in whatever order the work completes (a write waits for the volume's commit, a wait
for something to happen). A service sees the world only through *handles*, small integers that the kernel gave out:
files of the volume, a queue of events, a log, a connected client.

    frame    = u32 length of the whole frame, u32 id, u16 call or status, u8 descriptors, u8 reserved (0), body
    OPEN     name (UTF-8)                                → u32 handle
    CLOSE    u32 handle                                  → –
    READ     u32 handle, u64 offset, u32 length          → bytes (short at the end of the file)
    REPLACE  u32 count, count × {u32 handle, u32 length, bytes} → – (all files or none, durable when answered)
    WAIT     u32 handle                                  → one event (`Event`), with 1 descriptor for CONNECTION
    ANSWER   u32 handle, u32 command id, bytes           → – (the answer to a COMMAND event)
    WRITE    u32 handle, bytes                           → – (a log line, an announcement)

All integers are little-endian. Descriptors travel from kernel to service only, and only as connected client
sockets. Everything is bounded, and the bounds are checked before anything is allocated.

The kernel does not trust a service: a frame that breaks these rules raises `ProtocolError` or `FormatError` in the
kernel, which ends that service and nothing else. A service trusts the kernel, but checks all the same.

This module is sans-IO (`FrameReader`, `Request`, `Reply`, the body codecs); `svsm.services.syscalls` and
`svsm.kernel.processes` move the bytes.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence

from svsm.formats.cursor import Cursor
from svsm.formats.errors import FormatError, ProtocolError
from svsm.formats.record import U8, U16, U32, Buffer, Record, record

__all__ = [
    "MAX_COMMAND_BYTES",
    "MAX_FILES_PER_REPLACE",
    "MAX_FILE_BYTES",
    "MAX_FRAME_BYTES",
    "MAX_HANDLES",
    "MAX_NAME_BYTES",
    "MAX_PENDING",
    "MAX_WRITE_BYTES",
    "Call",
    "Endpoint",
    "Event",
    "EventKind",
    "FrameHeader",
    "FrameReader",
    "Reply",
    "Request",
    "Status",
    "Transport",
    "decode_answer",
    "decode_handle",
    "decode_open",
    "decode_read",
    "decode_replace",
    "decode_write",
    "encode_answer",
    "encode_handle",
    "encode_read",
    "encode_replace",
    "encode_write",
]

MAX_FILE_BYTES = 512 * 1024
"""The largest file a service may store; a TPM with full NV memory has 143 KiB."""
MAX_FILES_PER_REPLACE = 8
MAX_FRAME_BYTES = 1024 * 1024
MAX_NAME_BYTES = 64
MAX_WRITE_BYTES = 1024
MAX_COMMAND_BYTES = 4096
"""One TPM command or response (TPM2_PT_MAX_COMMAND_SIZE of libtpms)."""
MAX_PENDING = 16
"""Requests of one service that may be unanswered at a time."""
MAX_HANDLES = 64
"""Open handles of one service."""


class Call(enum.IntEnum):
    """What is asked."""

    OPEN = 1
    CLOSE = 2
    READ = 3
    REPLACE = 4
    WAIT = 5
    ANSWER = 6
    WRITE = 7


class Status(enum.IntEnum):
    """How it went."""

    OK = 0
    BAD_HANDLE = 1
    """No such handle, or the object behind it does not do that."""
    NOT_FOUND = 2
    """This process may not open an object of that name, or the file has no contents yet."""
    TOO_LARGE = 3
    FAILED = 4
    """The storage failed; whether the change happened is unknown."""
    BUSY = 5
    """The object serves another request of this kind already."""
    LIMIT = 6
    """Too many handles."""


class Endpoint(enum.IntEnum):
    """Which of the host's listening sockets a client connected to."""

    DATA = 1
    CONTROL = 2
    PLATFORM = 3
    """The platform port of the TCG simulator's protocol (mssim)."""


class Transport(enum.IntEnum):
    """How a client is connected."""

    UNIX = 1
    TCP = 2


class EventKind(enum.IntEnum):
    """What happened."""

    CONNECTION = 1
    COMMAND = 2
    STOP = 3
    """Finish in order: the kernel closes the socket soon."""


@record(size=12, byte_order="little")
class FrameHeader(Record):
    """Before every body."""

    length: U32  # bytes of the whole frame, header included
    id: U32
    code: U16  # Call in a request, Status in a reply
    descriptors: U8  # how many SCM_RIGHTS descriptors belong to this frame; 0 in requests, 0 or 1 in replies
    reserved_0b: U8  # must be zero


def _pack_frame(frame_id: int, code: int, descriptors: int, body: Buffer) -> bytes:
    length = FrameHeader.SIZE + len(body)
    if length > MAX_FRAME_BYTES:
        raise FormatError("a syscall frame is too large", code="syscall-frame-size", got=length)
    return FrameHeader(length, frame_id, code, descriptors, 0).pack() + bytes(body)


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """Service → kernel."""

    id: int
    call: Call
    body: bytes

    def pack(self) -> bytes:
        """The frame."""
        return _pack_frame(self.id, self.call, 0, self.body)

    @classmethod
    def parse(cls, header: FrameHeader, body: bytes) -> Request:
        """Make sense of one frame.

        Raises:
            ProtocolError: ``syscall-call`` for an unknown call, ``syscall-descriptors`` when it claims descriptors.
        """
        if header.descriptors:
            raise ProtocolError("a service cannot pass descriptors", code="syscall-descriptors")
        try:
            call = Call(header.code)
        except ValueError:
            raise ProtocolError("no such syscall", code="syscall-call", got=header.code) from None
        return cls(header.id, call, body)


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """Kernel → service."""

    id: int
    status: Status
    body: bytes = b""
    descriptors: int = 0

    def pack(self) -> bytes:
        """The frame."""
        return _pack_frame(self.id, self.status, self.descriptors, self.body)

    @classmethod
    def parse(cls, header: FrameHeader, body: bytes) -> Reply:
        """Make sense of one frame.

        Raises:
            ProtocolError: ``syscall-status``, ``syscall-descriptors``.
        """
        if header.descriptors > 1:
            raise ProtocolError("too many descriptors", code="syscall-descriptors", got=header.descriptors)
        try:
            status = Status(header.code)
        except ValueError:
            raise ProtocolError("no such syscall status", code="syscall-status", got=header.code) from None
        return cls(header.id, status, body, header.descriptors)


class FrameReader:
    """Cuts a byte stream into frames; never holds more than one frame and one chunk beyond it.

    Args:
        max_frame_bytes: Frames longer than this are refused before they are collected.
    """

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._buffer = bytearray()
        self._max_frame_bytes = max_frame_bytes

    def feed(self, chunk: Buffer) -> list[tuple[FrameHeader, bytes]]:
        """Add what arrived; returns the frames that it completes.

        Raises:
            ProtocolError: ``syscall-frame`` for a header that cannot be; the stream is lost then.
        """
        self._buffer += chunk
        frames = []
        while len(self._buffer) >= FrameHeader.SIZE:
            header = FrameHeader.parse(self._buffer[: FrameHeader.SIZE])
            if not FrameHeader.SIZE <= header.length <= self._max_frame_bytes or header.reserved_0b:
                raise ProtocolError("a syscall frame has an impossible header", code="syscall-frame", got=header.length)
            if len(self._buffer) < header.length:
                break
            frames.append((header, bytes(self._buffer[FrameHeader.SIZE : header.length])))
            del self._buffer[: header.length]
        return frames


def encode_handle(handle: int) -> bytes:
    """The body of CLOSE and WAIT, and of OPEN's reply."""
    return handle.to_bytes(4, "little")


def decode_handle(body: Buffer) -> int:
    """The inverse of `encode_handle`."""
    cursor = Cursor(body, what="a handle")
    handle = cursor.unsigned(4, "little")
    cursor.finish()
    return handle


def decode_open(body: Buffer) -> str:
    """The name in an OPEN.

    Raises:
        FormatError: ``syscall-name`` when it is empty, too long or not UTF-8.
    """
    try:
        name = bytes(body).decode("utf-8")
    except UnicodeDecodeError:
        name = ""
    if not name or len(body) > MAX_NAME_BYTES:
        raise FormatError("an object's name cannot be that", code="syscall-name", got=len(body))
    return name


def encode_read(handle: int, offset: int, length: int) -> bytes:
    """The body of READ."""
    return handle.to_bytes(4, "little") + offset.to_bytes(8, "little") + length.to_bytes(4, "little")


def decode_read(body: Buffer) -> tuple[int, int, int]:
    """(handle, offset_bytes, length_bytes) of a READ."""
    cursor = Cursor(body, what="a READ request")
    handle, offset, length = (cursor.unsigned(width, "little") for width in (4, 8, 4))
    cursor.finish()
    return handle, offset, length


def encode_replace(changes: Mapping[int, Buffer] | Sequence[tuple[int, Buffer]]) -> bytes:
    """The body of REPLACE: new contents by handle."""
    pairs = list(changes.items()) if isinstance(changes, Mapping) else list(changes)
    parts = [len(pairs).to_bytes(4, "little")]
    for handle, data in pairs:
        parts += [handle.to_bytes(4, "little"), len(data).to_bytes(4, "little"), bytes(data)]
    return b"".join(parts)


def decode_replace(body: Buffer) -> dict[int, bytes]:
    """New contents by handle of a REPLACE.

    Raises:
        FormatError: ``syscall-replace`` for no file, too many, or one handle twice.
    """
    cursor = Cursor(body, what="a REPLACE request")
    count = cursor.unsigned(4, "little")
    if not 1 <= count <= MAX_FILES_PER_REPLACE:
        raise FormatError("REPLACE names too few or too many files", code="syscall-replace", got=count)
    changes: dict[int, bytes] = {}
    for _ in range(count):
        handle = cursor.unsigned(4, "little")
        changes[handle] = cursor.take(cursor.unsigned(4, "little"))
    cursor.finish()
    if len(changes) != count:
        raise FormatError("REPLACE names a file twice", code="syscall-replace", got=count)
    return changes


def encode_answer(handle: int, command_id: int, response: Buffer) -> bytes:
    """The body of ANSWER."""
    return handle.to_bytes(4, "little") + command_id.to_bytes(4, "little") + bytes(response)


def decode_answer(body: Buffer) -> tuple[int, int, bytes]:
    """(handle, command id, response) of an ANSWER.

    Raises:
        FormatError: ``syscall-answer`` when the response is longer than a TPM response can be.
    """
    cursor = Cursor(body, what="an ANSWER request")
    handle, command_id = cursor.unsigned(4, "little"), cursor.unsigned(4, "little")
    if cursor.remaining > MAX_COMMAND_BYTES:
        raise FormatError("an answer is too long", code="syscall-answer", got=cursor.remaining)
    return handle, command_id, cursor.rest()


def encode_write(handle: int, data: Buffer) -> bytes:
    """The body of WRITE."""
    return handle.to_bytes(4, "little") + bytes(data)


def decode_write(body: Buffer) -> tuple[int, bytes]:
    """(handle, bytes) of a WRITE.

    Raises:
        FormatError: ``syscall-write`` when there is too much.
    """
    cursor = Cursor(body, what="a WRITE request")
    handle = cursor.unsigned(4, "little")
    if cursor.remaining > MAX_WRITE_BYTES:
        raise FormatError("too much to write", code="syscall-write", got=cursor.remaining)
    return handle, cursor.rest()


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """What WAIT returns. Which fields mean something depends on `kind`; the others are zero or empty.

    u8 kind; CONNECTION: u8 endpoint, u8 transport, u32 handle; COMMAND: u32 command id, u8 locality, bytes
    """

    kind: EventKind
    endpoint: Endpoint = Endpoint.DATA
    transport: Transport = Transport.UNIX
    handle: int = 0
    """Of a CONNECTION: stands for the client in the kernel's count, until closed."""
    command_id: int = 0
    locality: int = 0
    command: bytes = b""

    def pack(self) -> bytes:
        """The body of WAIT's reply."""
        if self.kind is EventKind.CONNECTION:
            return bytes((self.kind, self.endpoint, self.transport)) + self.handle.to_bytes(4, "little")
        if self.kind is EventKind.COMMAND:
            return bytes((self.kind,)) + self.command_id.to_bytes(4, "little") + bytes((self.locality,)) + self.command
        return bytes((self.kind,))

    @classmethod
    def parse(cls, body: Buffer) -> Event:
        """The inverse of `pack`.

        Raises:
            FormatError: ``syscall-event``, ``cursor-*``.
        """
        cursor = Cursor(body, what="an event")
        try:
            kind = EventKind(cursor.unsigned(1, "little"))
            if kind is EventKind.CONNECTION:
                endpoint, transport = Endpoint(cursor.unsigned(1, "little")), Transport(cursor.unsigned(1, "little"))
                event = cls(kind, endpoint=endpoint, transport=transport, handle=cursor.unsigned(4, "little"))
            elif kind is EventKind.COMMAND:
                command_id, locality = cursor.unsigned(4, "little"), cursor.unsigned(1, "little")
                event = cls(kind, command_id=command_id, locality=locality, command=cursor.rest())
            else:
                event = cls(kind)
        except ValueError:
            raise FormatError("no such event", code="syscall-event") from None
        cursor.finish()
        if len(event.command) > MAX_COMMAND_BYTES:
            raise FormatError("an event's command is too long", code="syscall-event", got=len(event.command))
        return event
