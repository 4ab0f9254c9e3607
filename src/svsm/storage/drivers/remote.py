# SPDX-License-Identifier: MIT OR Apache-2.0
"""A disk behind a connected stream socket: the block protocol and the driver that trusts nothing it hears.

Every message is a 32-byte header (little-endian) and, for a write request or a read reply, data:

    magic u32 "SVBD" | operation u8 | status u8 | reserved u16 | sequence u64 | offset u64 | length u64

A reply repeats operation and sequence. INFO answers with offset = block size, length = capacity; it may be asked again.
READ, WRITE, DISCARD and ZERO (make zero) name a range of at most 1 MiB. Requests are answered in order. The other side
may be hostile: a reply with another sequence number, operation, length or an unknown status, and a peer that stays
silent past the deadline or closes, all end the device for good: after a lost reply nobody knows what is on the disk.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence

from svsm.abi.block import Extent, Range
from svsm.formats.errors import ProtocolError, SvsmError
from svsm.formats.record import U8, U16, U32, U64, Buffer, Record, record
from svsm.storage.drivers.checks import CheckedDevice, block_io_error, check_block_size

__all__ = [
    "DISCARD",
    "FLUSH",
    "INFO",
    "MAGIC",
    "MAX_TRANSFER_BYTES",
    "READ",
    "STATUS_IO_ERROR",
    "STATUS_OK",
    "WRITE",
    "ZERO",
    "BlockMessage",
    "RemoteDevice",
]

MAGIC = int.from_bytes(b"SVBD", "little")
INFO, READ, WRITE, FLUSH, DISCARD, ZERO = range(1, 7)
_NAMES = {READ: "read", WRITE: "write", FLUSH: "flush", DISCARD: "discard", ZERO: "write zeroes"}
STATUS_OK, STATUS_IO_ERROR = 0, 1
MAX_TRANSFER_BYTES = 1 << 20
_MAX_CAPACITY = 1 << 56
_OUTSTANDING = 64
_DEADLINE_SECONDS = 30.0
_DONTWAIT = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
"""With each call: the other side may keep a copy of the descriptor and change its flags."""

_Request = tuple[int, int, int, Buffer]
"""(operation, offset, length, data)."""


@record(size=32, byte_order="little")
class BlockMessage(Record):
    """The header of every request and reply."""

    magic: U32
    operation: U8
    status: U8
    reserved_6: U16
    sequence: U64
    offset: U64
    length: U64


class RemoteDevice(CheckedDevice):
    """A `BlockDevice` over a connected stream socket, which it owns (it closes it even where this raises).

    Args:
        connection: The socket; its timeout is this driver's from now on.
        read_only: Refuse writes.
        deadline_seconds: How long one operation may take.

    Raises:
        ProtocolError: ``block-protocol`` where the other side does not describe itself sensibly.
        BackendError: ``block-io`` where it closes or stays silent.
    """

    def __init__(
        self, connection: socket.socket, *, read_only: bool = False, deadline_seconds: float = _DEADLINE_SECONDS
    ) -> None:
        self._socket = connection
        self._deadline_seconds = deadline_seconds
        self._sequence = 0
        self._dead: str | None = None
        try:
            size, block = self._describe()
        except SvsmError:
            connection.close()
            raise
        super().__init__(size_bytes=size, block_size_bytes=block, read_only=read_only)

    def _describe(self) -> tuple[int, int]:
        deadline = self._deadline()
        sequence = self._send(INFO, 0, 0, b"", deadline)
        reply = self._header(INFO, sequence, deadline)
        try:
            check_block_size(reply.offset)
        except SvsmError:
            raise self._protocol("block size", reply.offset) from None
        if reply.length > _MAX_CAPACITY or reply.length % reply.offset:
            raise self._protocol("capacity", reply.length)
        return reply.length, reply.offset

    # -- the wire ----------------------------------------------------------------------------------------------

    def _deadline(self) -> float:
        return time.monotonic() + self._deadline_seconds

    def _lost(self, operation: str, reason: str) -> SvsmError:
        self._dead = self._dead or reason
        return block_io_error(operation, reason)

    def _protocol(self, field: str, got: int) -> SvsmError:
        self._dead = f"it answered with a wrong {field}"
        return ProtocolError("the disk's answer makes no sense", code="block-protocol", field=field, got=got)

    def _wait(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise self._lost("answer", "no answer in time")
        self._socket.settimeout(left)

    def _send(self, operation: int, offset: int, length: int, data: Buffer, deadline: float) -> int:
        self._sequence += 1
        header = BlockMessage(MAGIC, operation, STATUS_OK, 0, self._sequence, offset, length)
        rest = memoryview(header.pack() + bytes(data))
        while len(rest):
            self._wait(deadline)
            try:
                done = self._socket.send(rest, _DONTWAIT)
            except (BlockingIOError, InterruptedError):
                continue
            except OSError as error:
                raise self._lost("take a request", str(error)) from error
            rest = rest[done:]
        return self._sequence

    def _receive(self, length: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < length:
            self._wait(deadline)
            try:
                part = self._socket.recv(min(length - len(data), MAX_TRANSFER_BYTES), _DONTWAIT)
            except (BlockingIOError, InterruptedError):
                continue
            except OSError as error:
                raise self._lost("answer", str(error)) from error
            if not part:
                raise self._lost("answer", "the connection was closed")
            data += part
        return bytes(data)

    def _header(self, operation: int, sequence: int, deadline: float) -> BlockMessage:
        reply = BlockMessage.parse(self._receive(BlockMessage.SIZE, deadline))
        for field, got, expected in (
            ("magic", reply.magic, MAGIC),
            ("operation", reply.operation, operation),
            ("sequence", reply.sequence, sequence),
            ("reserved", reply.reserved_6, 0),
        ):
            if got != expected:
                raise self._protocol(field, got)
        if reply.status == STATUS_IO_ERROR and reply.length == 0:
            raise block_io_error(_NAMES.get(operation, "answer"), "I/O error")
        if reply.status != STATUS_OK:
            raise self._protocol("status", reply.status)
        return reply

    def _answer(self, operation: int, sequence: int, length: int, deadline: float) -> bytes:
        reply = self._header(operation, sequence, deadline)
        expected = length if operation == READ else 0
        if reply.length != expected:
            raise self._protocol("length", reply.length)
        return self._receive(expected, deadline)

    def _run(self, requests: Iterator[_Request]) -> list[bytes]:
        """Send requests, some of them ahead of the answers; the answers come back in order."""
        if self._dead is not None:
            raise block_io_error("answer", self._dead)
        deadline = self._deadline()
        answers: list[bytes] = []
        waiting: list[tuple[int, int, int]] = []
        failure: SvsmError | None = None

        def settle(keep: int) -> None:
            nonlocal failure
            while len(waiting) > keep:
                operation, sequence, length = waiting.pop(0)
                try:
                    answers.append(self._answer(operation, sequence, length, deadline))
                except SvsmError as error:
                    if self._dead is not None:
                        raise
                    failure = failure or error

        for operation, offset, length, data in requests:
            # A reader of answers must never wait for a writer of answers: reads are taken one by one.
            settle(0 if operation == READ else _OUTSTANDING - 1)
            waiting.append((operation, self._send(operation, offset, length, data, deadline), length))
        settle(0)
        if failure is not None:
            raise failure
        return answers

    # -- BlockDevice -------------------------------------------------------------------------------------------

    def _measure(self) -> int:
        if self._dead is not None:
            raise block_io_error("answer", self._dead)
        size, block = self._describe()
        if block != self._block_size:
            raise self._protocol("block size", block)
        return size

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The contents of each range."""
        self._admit_reading(ranges)
        contents = []
        for offset, length in ranges:
            pieces = self._run(_pieces(READ, [(offset, length)]))
            contents.append(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        return contents

    def write(self, extents: Sequence[Extent]) -> None:
        """Write all extents."""
        self._admit_writing(extents)
        self._run(
            (WRITE, offset + at, len(chunk), chunk)
            for offset, data in extents
            for at in range(0, len(data), MAX_TRANSFER_BYTES)
            for chunk in (memoryview(data)[at : at + MAX_TRANSFER_BYTES],)
        )

    def write_zeroes(self, ranges: Sequence[Range]) -> None:
        """Zeros at the other side: nothing but the range crosses the wire."""
        self._admit_changing(ranges)
        self._run(_pieces(ZERO, ranges))

    def flush(self) -> None:
        """A flush at the other side."""
        self._admit()
        self._run(iter([(FLUSH, 0, 0, b"")]))

    def discard(self, ranges: Sequence[Range]) -> None:
        """Give up the ranges."""
        self._admit_changing(ranges)
        self._run(_pieces(DISCARD, ranges))

    def close(self) -> None:
        """Close the connection."""
        if not self._closed:
            self._closed = True
            self._socket.close()


def _pieces(operation: int, ranges: Sequence[Range]) -> Iterator[_Request]:
    """Requests for whole ranges, none larger than the protocol's limit."""
    for offset, length in ranges:
        for at in range(offset, offset + length, MAX_TRANSFER_BYTES):
            yield operation, at, min(MAX_TRANSFER_BYTES, offset + length - at), b""
