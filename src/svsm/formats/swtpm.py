# SPDX-License-Identifier: MIT OR Apache-2.0
"""The swtpm-style front: its control messages, and the prefixes of its data channel.

*Control.* One message per write, not a byte stream: QEMU pads one-byte bodies to four, other clients do not, so what
is left over after a message is thrown away. A message is u32 command ‖ body, an answer u32 result ‖ body. All
big-endian. Learned from what QEMU 7.2, swtpm_ioctl 0.7.1 and tss2 3.2 send and expect.

*Data.* Raw TPM commands, or commands in the envelope of the TCG simulator (mssim): u32 8 ‖ u8 locality ‖ u32 size ‖
command, answered by u32 size ‖ response ‖ u32 0; u32 20 ends the session. The two are told apart by the first word:
a TPM command starts with a tag of 16 bits that is never zero.

*Platform* (mssim's second port): u32 signals, each answered by u32 0.

Deliberately refused: GET_STATEBLOB, SET_STATEBLOB and STORE_VOLATILE, which would hand a TPM's secrets to whoever
connects; LOCK_STORAGE and GET_INFO, which nobody here needs.
"""

from __future__ import annotations

import dataclasses
import enum

from svsm.formats.errors import ProtocolError
from svsm.formats.record import Buffer
from svsm.formats.tpm import MIN_COMMAND_BYTES

__all__ = [
    "CAPABILITIES",
    "MAX_CONTROL_BYTES",
    "MAX_HASH_BYTES",
    "RESULT_BAD_PARAMETER",
    "RESULT_FAIL",
    "RESULT_OK",
    "RESULT_UNKNOWN",
    "Control",
    "ControlMessage",
    "DataFrame",
    "DataReader",
    "PlatformSignal",
    "buffer_size_reply",
    "capability_reply",
    "established_reply",
    "result_reply",
]

MAX_HASH_BYTES = 4096
MAX_CONTROL_BYTES = 8 + MAX_HASH_BYTES
"""The longest control message: HASH_DATA."""

RESULT_OK = 0
RESULT_BAD_PARAMETER = 3
RESULT_FAIL = 9
RESULT_UNKNOWN = 10
"""TPM_BAD_ORDINAL, which swtpm uses for commands that it does not serve."""


class Control(enum.IntEnum):
    """Control commands."""

    GET_CAPABILITY = 1
    INIT = 2
    SHUTDOWN = 3
    GET_TPMESTABLISHED = 4
    SET_LOCALITY = 5
    HASH_START = 6
    HASH_DATA = 7
    HASH_END = 8
    CANCEL_TPM_CMD = 9
    STORE_VOLATILE = 10
    RESET_TPMESTABLISHED = 11
    GET_STATEBLOB = 12
    SET_STATEBLOB = 13
    STOP = 14
    GET_CONFIG = 15
    SET_DATAFD = 16
    SET_BUFFERSIZE = 17
    GET_INFO = 18
    LOCK_STORAGE = 19


_CAPABILITY_BITS = {
    Control.INIT: 0,
    Control.SHUTDOWN: 1,
    Control.GET_TPMESTABLISHED: 2,
    Control.SET_LOCALITY: 3,
    Control.HASH_START: 4,
    Control.CANCEL_TPM_CMD: 5,
    Control.RESET_TPMESTABLISHED: 7,
    Control.STOP: 10,
    Control.GET_CONFIG: 11,
    Control.SET_DATAFD: 12,
    Control.SET_BUFFERSIZE: 13,
}
_SEND_COMMAND_HEADER_BIT = 15

CAPABILITIES = sum(1 << bit for bit in _CAPABILITY_BITS.values()) | 1 << _SEND_COMMAND_HEADER_BIT
"""What GET_CAPABILITY says. Without the two STATEBLOB bits QEMU itself refuses to migrate the machine."""

_BODY_BYTES = {
    Control.INIT: 4,
    Control.SET_LOCALITY: 1,
    Control.RESET_TPMESTABLISHED: 1,
    Control.HASH_DATA: 4,
    Control.SET_BUFFERSIZE: 4,
}


@dataclasses.dataclass(frozen=True, slots=True)
class ControlMessage:
    """One control message."""

    command: Control
    number: int = 0
    """INIT: flags; SET_LOCALITY, RESET_TPMESTABLISHED: locality; SET_BUFFERSIZE: bytes wanted, 0 to ask."""
    data: bytes = b""
    """HASH_DATA: what to hash."""

    @classmethod
    def parse(cls, message: Buffer) -> ControlMessage:
        """Decode what one read returned; padding after the message is ignored.

        Raises:
            ProtocolError: ``swtpm-control-unknown`` for a command that does not exist, ``swtpm-control-short``.
        """
        if len(message) < 4:
            raise ProtocolError("a control message is too short", code="swtpm-control-short", got=len(message))
        number = int.from_bytes(message[:4], "big")
        try:
            command = Control(number)
        except ValueError:
            raise ProtocolError("no such control command", code="swtpm-control-unknown", got=number) from None
        width = _BODY_BYTES.get(command, 0)
        body = bytes(message[4 : 4 + width])
        if len(body) < width:
            raise ProtocolError("a control message is too short", code="swtpm-control-short", got=len(message))
        value = int.from_bytes(body, "big")
        if command is not Control.HASH_DATA:
            return cls(command, value)
        data = bytes(message[8 : 8 + value])
        if value > MAX_HASH_BYTES or len(data) < value:
            raise ProtocolError("HASH_DATA announces more than it has", code="swtpm-control-short", got=value)
        return cls(command, value, data)


def result_reply(result: int) -> bytes:
    """An answer without a body."""
    return result.to_bytes(4, "big")


def capability_reply() -> bytes:
    """Answer to GET_CAPABILITY: result, capabilities."""
    return result_reply(RESULT_OK) + CAPABILITIES.to_bytes(4, "big")


def established_reply(result: int, established: int) -> bytes:
    """Answer to GET_TPMESTABLISHED: result, flag, three bytes of padding."""
    return result_reply(result) + bytes((established & 1, 0, 0, 0))


def buffer_size_reply(result: int, size: int, minimum: int, maximum: int) -> bytes:
    """Answer to SET_BUFFERSIZE."""
    return b"".join(value.to_bytes(4, "big") for value in (result, size, minimum, maximum))


class PlatformSignal(enum.IntEnum):
    """Signals of the TCG simulator's platform port that are served."""

    POWER_ON = 1
    POWER_OFF = 2
    CANCEL_ON = 9
    CANCEL_OFF = 10
    NV_ON = 11
    NV_OFF = 12
    RESET = 17
    SESSION_END = 20
    STOP = 21


_SEND_COMMAND = 8
_SESSION_END = 20
_PREFIX_BYTES = 9


@dataclasses.dataclass(frozen=True, slots=True)
class DataFrame:
    """One TPM command from the data channel."""

    command: bytes
    locality: int | None
    """From the prefix; None for a raw command, which runs at the locality that the control channel set."""

    def wrap(self, response: bytes) -> bytes:
        """The response as this client wants it."""
        if self.locality is None:
            return response
        return len(response).to_bytes(4, "big") + response + bytes(4)


class DataReader:
    """Cuts the byte stream of a data client into commands; holds at most one command and one chunk."""

    def __init__(self, max_command_bytes: int = 4096) -> None:
        self._buffer = b""
        self._max_command_bytes = max_command_bytes
        self.ended = False
        """The client said that its session is over."""

    def feed(self, chunk: bytes) -> list[DataFrame]:
        """Add what arrived; returns the commands that it completes.

        Raises:
            ProtocolError: ``tpm-command-size``, ``swtpm-data``; the stream is lost then.
        """
        return self._cut(self._buffer + chunk)

    def is_command(self, chunk: bytes) -> bool:
        """Whether `chunk` is exactly one raw command, with nothing before it: then `feed` need not see it."""
        size = len(chunk)
        return (
            MIN_COMMAND_BYTES <= size <= self._max_command_bytes
            and not self._buffer
            and chunk[:2] != b"\0\0"
            and int.from_bytes(chunk[2:6], "big") == size
        )

    def _cut(self, buffer: bytes) -> list[DataFrame]:
        frames: list[DataFrame] = []
        offset = 0
        while not self.ended and (step := self._next(buffer, offset)) is not None:
            offset, frame = step
            if frame is not None:
                frames.append(frame)
        self._buffer = buffer[offset:]
        return frames

    def _next(self, buffer: bytes, offset: int) -> tuple[int, DataFrame | None] | None:
        """(offset after it, the frame) of the frame at `offset`, or None when it is not complete."""
        left = len(buffer) - offset
        if left < 4:
            return None
        if buffer[offset : offset + 2] != b"\0\0":
            if left < 6:
                return None
            size = int.from_bytes(buffer[offset + 2 : offset + 6], "big")
            if not MIN_COMMAND_BYTES <= size <= self._max_command_bytes:
                raise self._misfit(size)
            return (offset + size, DataFrame(buffer[offset : offset + size], None)) if left >= size else None
        word = int.from_bytes(buffer[offset : offset + 4], "big")
        if word == _SESSION_END:
            self.ended = True
            return offset + 4, None
        if word != _SEND_COMMAND:
            raise ProtocolError("neither a TPM command nor a prefix", code="swtpm-data", got=word)
        if left < _PREFIX_BYTES:
            return None
        size = int.from_bytes(buffer[offset + 5 : offset + 9], "big")
        if not MIN_COMMAND_BYTES <= size <= self._max_command_bytes:
            raise self._misfit(size)
        end = offset + _PREFIX_BYTES + size
        if left < _PREFIX_BYTES + size:
            return None
        return end, DataFrame(buffer[offset + _PREFIX_BYTES : end], buffer[offset + 4])

    @staticmethod
    def _misfit(size: int) -> ProtocolError:
        return ProtocolError("a TPM command has an impossible size", code="tpm-command-size", got=size)
