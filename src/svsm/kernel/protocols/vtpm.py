# SPDX-License-Identifier: MIT OR Apache-2.0
"""The vTPM protocol (2): the guest's TPM commands (AMD 58019 §8).

    0 QUERY   RCX out: bitmap of platform commands, RDX out: feature bits
    1 CMD     RCX: GPA of a buffer of 4096 bytes at any alignment; the response replaces the request in it

The framing is little-endian and not the TPM simulator's TCP framing: request u32 command, u8 locality, u32 size,
bytes; response u32 size, bytes. The TPM's own errors are ordinary responses with SUCCESS.

The TPM lives in another process: CMD hands the command over and answers the guest when the response comes. The
buffer's address is checked again then.

Two points differ from the reference implementation: a response too long for the buffer is INVALID_REQUEST (the
reference reports success and leaves the request in place for the guest to mistake for it), and no control command
exists, because a guest that could reset its own TPM could give itself fresh PCRs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from svsm.abi.errors import BackendError, SvsmError
from svsm.formats.record import U8, U32, Record, record
from svsm.kernel.protocols.guest_memory import GuestMemory
from svsm.kernel.protocols.table import Call, CallError, Reply, Result, Row, SvsmProtocol, result_of

__all__ = ["BUFFER_BYTES", "MAX_COMMAND_BYTES", "MAX_RESPONSE_BYTES", "SEND_COMMAND", "VTPM", "Tpm", "vtpm_protocol"]

VTPM: Final = 2
SEND_COMMAND: Final = 8
"""The one platform command, numbered as in the Microsoft simulator."""
BUFFER_BYTES: Final = 4096


@record(size=9, byte_order="little")
class _RequestHeader(Record):
    command: U32
    locality: U8
    size: U32


MAX_COMMAND_BYTES: Final = BUFFER_BYTES - _RequestHeader.SIZE
_COMMAND_BYTES: Final = 4
_SIZE_BYTES: Final = 4
MAX_RESPONSE_BYTES: Final = BUFFER_BYTES - _SIZE_BYTES


class Tpm(Protocol):
    """The guest's TPM, as this protocol needs it; it never blocks."""

    def powered_on(self) -> bool:
        """Whether commands are accepted at all. A TPM in failure mode is on: it answers TPM_RC_FAILURE itself."""

    def submit(self, command: bytes, done: Callable[[bytes | None], None]) -> None:
        """Execute one command (0 to 4087 bytes, locality 0).

        Args:
            command: As the guest wrote it; nothing in it has been checked.
            done: Called once, during `submit` or later, with the response, or None when there will be none.
        """


def vtpm_protocol(memory: GuestMemory, tpm: Tpm) -> SvsmProtocol:
    """The vTPM protocol's rows, for a guest with this TPM (a guest without one does not have the protocol)."""
    vtpm = _Vtpm(memory, tpm)
    return SvsmProtocol(number=VTPM, name="vtpm", calls={0: Row("QUERY", vtpm.query), 1: Row("CMD", vtpm.command)})


class _Vtpm:
    def __init__(self, memory: GuestMemory, tpm: Tpm) -> None:
        self._memory = memory
        self._tpm = tpm

    def query(self, _call: Call) -> Reply:
        """What CMD accepts."""
        return Reply(Result.SUCCESS, rcx=1 << SEND_COMMAND, rdx=0)

    def command(self, call: Call) -> None:
        """Start one command; the reply follows the TPM's response."""
        self._check_command_word(call.rcx)
        buffer = self._memory.read(call.rcx, BUFFER_BYTES)
        header = _RequestHeader.parse_at(buffer, 0)
        # The word was read twice, and another vCPU of the guest may have written in between.
        if header.command != SEND_COMMAND or header.locality != 0 or header.size > MAX_COMMAND_BYTES:
            raise CallError(Result.INVALID_PARAMETER, "bad vTPM request")
        if not self._tpm.powered_on():
            raise CallError(Result.INVALID_REQUEST, "the TPM is off")
        command = buffer[_RequestHeader.SIZE : _RequestHeader.SIZE + header.size]
        self._tpm.submit(command, lambda response: call.complete(self._answer(call.rcx, response)))

    def _check_command_word(self, gpa: int) -> None:
        try:
            word = self._memory.read(gpa, _COMMAND_BYTES) if gpa else b""
        except BackendError:
            raise
        except SvsmError:
            word = b""
        if int.from_bytes(word, "little") != SEND_COMMAND:
            raise CallError(Result.INVALID_PARAMETER, "not a vTPM request")

    def _answer(self, gpa: int, response: bytes | None) -> Reply:
        if response is None or len(response) > MAX_RESPONSE_BYTES:
            return Reply(Result.INVALID_REQUEST)
        try:
            self._memory.write(gpa, len(response).to_bytes(_SIZE_BYTES, "little") + response)
        except BackendError:
            raise
        except SvsmError as error:
            return Reply(result_of(error))
        return Reply(Result.SUCCESS)
