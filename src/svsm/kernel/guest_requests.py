# SPDX-License-Identifier: MIT OR Apache-2.0
"""The kernel's end of the message channel to the AMD-SP: rules only, no memory and no host.

    IDLE ──request()──▶ SENT ──the host's answer──▶ IDLE (a report), SENT (send it again as told), or DEAD

A number is the IV of its message, so a message that may have been used must never be replaced by another one under the
same number. The host may answer "buffer too small" (the message is sent again as a plain request, which consumes the
number) and "busy" (sent once more); everything else that goes wrong, also an answer that never comes, ends the
channel for good: the key is wiped, and this VM gets no report any more (AMD 56421 §4.1.7; what Linux does too).
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Final

from svsm.abi.errors import BackendError, IntegrityError, ProtocolError, StateError, SvsmError
from svsm.crypto.guest_channel import MAX_SEQUENCE, open_message, seal_message
from svsm.formats.record import Buffer
from svsm.formats.snp.ghcb import VmmError, split_guest_request_result
from svsm.formats.snp.guest_message import (
    REPORT_RESPONSE_HEADER,
    KeySelection,
    MessageType,
    ReportRequest,
    ReportResponse,
    ResponseStatus,
)
from svsm.formats.snp.report import REPORT_BYTES

__all__ = ["Again", "GuestRequestChannel", "Received"]

_VMPCK: Final = 0
_KEY_BYTES: Final = 32
_MAX_BUSY: Final = 1


class Again(enum.Enum):
    """How to send the same message again."""

    PLAIN = "plain"
    """Without asking for certificates."""
    SAME = "same"


@dataclasses.dataclass(frozen=True, slots=True)
class Received:
    """The AMD-SP's answer."""

    report: bytes
    """1184 bytes."""


class GuestRequestChannel:
    """One VMPCK and its counter.

    Args:
        key: VMPCK0, 32 bytes; copied, and wiped when the channel dies.
    """

    def __init__(self, key: Buffer) -> None:
        self._key = bytearray(key)
        self._counter = 0
        self._message: bytes | None = None
        self._busy = 0
        self._plain = False
        self.dead = len(self._key) != _KEY_BYTES or not any(self._key)

    @property
    def idle(self) -> bool:
        """Whether no message is on its way."""
        return self._message is None

    def request(self, report_data: bytes) -> bytes:
        """Seal a request for a VMPL0 report, signed by the VCEK.

        Args:
            report_data: 64 bytes.

        Returns:
            The message page to put before the host, 4096 bytes.

        Raises:
            StateError: ``platform-channel-dead``, ``platform-channel-busy``, ``guest-message-sequence``.
            ProtocolError: ``platform-report-data``.
        """
        if self.dead:
            raise StateError("the channel to the AMD-SP is closed for good", code="platform-channel-dead")
        if self._message is not None:
            raise StateError("a report was asked for already", code="platform-channel-busy")
        if len(report_data) != 64:
            raise ProtocolError("report data has 64 bytes", code="platform-report-data", got=len(report_data))
        if self._counter > MAX_SEQUENCE - 2:
            self.wipe()
            raise StateError("guest message numbers are used up", code="guest-message-sequence")
        payload = ReportRequest(report_data, 0, KeySelection.VCEK, bytes(24)).pack()
        self._message = seal_message(
            bytes(self._key),
            message_type=MessageType.REPORT_REQUEST,
            sequence=self._counter + 1,
            payload=payload,
            vmpck_id=_VMPCK,
        )
        self._busy, self._plain = 0, False
        return self._message

    def answered(self, info_2: int, response: Buffer) -> Received | Again:
        """The host has answered.

        Args:
            info_2: SW_EXITINFO2.
            response: The response page, already copied out of shared memory.

        Returns:
            The report, or how to send the same message again.

        Raises:
            BackendError: ``platform-report-refused``: the host or the firmware refused; the channel is dead.
            IntegrityError: ``guest-message-tag`` or ``platform-report-answer``; the channel is dead.
            ProtocolError: ``platform-report-status``: an authentic refusal; the channel lives.
            StateError: ``platform-channel-busy`` when nothing was asked.
        """
        if self._message is None:
            raise StateError("no report was asked for", code="platform-channel-busy")
        firmware, vmm = split_guest_request_result(info_2)
        if not firmware and vmm == VmmError.INVALID_LENGTH and not self._plain:
            self._plain = True
            return Again.PLAIN
        if not firmware and vmm == VmmError.BUSY and self._busy < _MAX_BUSY:
            self._busy += 1
            return Again.PLAIN if self._plain else Again.SAME
        if firmware or vmm:
            self.wipe()
            raise BackendError(
                "the host did not get a report from the AMD-SP",
                code="platform-report-refused",
                firmware_status=firmware,
                vmm_status=vmm,
            )
        try:
            payload = self._open(response)
        except SvsmError:
            self.wipe()
            raise
        self._counter += 2
        self._message = None
        return _report_of(payload)

    def wipe(self) -> None:
        """Close the channel for good and forget the key."""
        self._key[:] = bytes(len(self._key))
        self._message = None
        self.dead = True

    def _open(self, response: Buffer) -> bytes:
        header, payload = open_message(bytes(self._key), response)
        expected = (MessageType.REPORT_RESPONSE, self._counter + 2, _VMPCK)
        if (header.message_type, header.sequence, header.vmpck_id) != expected:
            raise IntegrityError(
                "the AMD-SP's message is not the answer to this request",
                code="platform-report-answer",
                expected=self._counter + 2,
                got=header.sequence,
            )
        return payload


def _report_of(payload: bytes) -> Received:
    status = int.from_bytes(payload[:4], "little")
    if status != ResponseStatus.SUCCESS or len(payload) != ReportResponse.SIZE:
        raise ProtocolError("the AMD-SP refused the report", code="platform-report-status", got=status)
    response = ReportResponse.parse(payload)
    if response.report_size != REPORT_BYTES or any(response.reserved_08):
        raise ProtocolError("the AMD-SP's report response is malformed", code="platform-report-status", got=0)
    return Received(payload[REPORT_RESPONSE_HEADER:])
