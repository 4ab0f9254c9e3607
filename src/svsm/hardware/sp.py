# SPDX-License-Identifier: MIT OR Apache-2.0
"""The AMD-SP's answer to guest messages (AMD 56860 §8.26 SNP_GUEST_REQUEST, §7 guest messages).

Pure: a request page in, a response page or a firmware status out. The rules that matter:

* Each VMPCK has its own counter. A request must carry the counter's value plus one; the response carries one more and
  the counter moves to it. A request that fails moves nothing, so it can be repeated as it is.
* A message that is not authentic is BAD_MEASUREMENT, a wrong number or header INVALID_PARAM, an exhausted counter
  AEAD_OFLOW: statuses that the host sees. What is wrong *inside* an authentic message is said inside the response.
* Whoever holds VMPCKn may ask for reports of VMPL n to 3 and of no other: that is what a level's key is worth.

Message types that this firmware does not have (derived keys, migration, TSC) are refused by status.
"""

from __future__ import annotations

from typing import Final

from svsm.crypto.guest_channel import MAX_SEQUENCE, open_message, seal_message
from svsm.formats.errors import FormatError, IntegrityError
from svsm.formats.snp.firmware_status import FirmwareStatus
from svsm.formats.snp.guest_message import (
    REPORT_RESPONSE_HEADER,
    KeySelection,
    MessageType,
    ReportRequest,
    ReportResponse,
    ResponseStatus,
    parse_message,
)
from svsm.formats.snp.report import REPORT_BYTES, Report
from svsm.hardware.chip import Chip
from svsm.hardware.launch import GuestContext, refused

__all__ = ["SecureProcessor", "make_report"]

_VMPL_MAX: Final = 3


class SecureProcessor:
    """The message channel between one running guest and its chip.

    Args:
        chip: The processor.
        context: The guest.
    """

    def __init__(self, chip: Chip, context: GuestContext) -> None:
        self._chip = chip
        self._context = context
        self._counters = [0, 0, 0, 0]

    def guest_request(self, page: bytes) -> bytes:
        """One guest message.

        Args:
            page: The request, 4096 bytes, as the host relayed it.

        Returns:
            The response page, 4096 bytes.

        Raises:
            ProtocolError: ``psp-refused``; the counters have not moved then.
        """
        try:
            header, _ = parse_message(page)
        except FormatError as error:
            raise refused(FirmwareStatus.INVALID_PARAM, error.message) from None
        counter = self._counters[header.vmpck_id]
        if counter > MAX_SEQUENCE - 2:
            raise refused(FirmwareStatus.AEAD_OFLOW, "the message counter is exhausted")
        if header.sequence != counter + 1:
            raise refused(FirmwareStatus.INVALID_PARAM, "the message has not the number that is due")
        key = self._context.vmpcks[header.vmpck_id]
        try:
            header, payload = open_message(key, page)
        except IntegrityError as error:
            raise refused(FirmwareStatus.BAD_MEASUREMENT, error.message) from None
        if header.message_type != MessageType.REPORT_REQUEST:
            raise refused(FirmwareStatus.INVALID_PARAM, "the firmware does not have this message type")
        answer = self._report(payload, header.vmpck_id)
        self._counters[header.vmpck_id] = counter + 2
        return seal_message(
            key,
            message_type=MessageType.REPORT_RESPONSE,
            sequence=counter + 2,
            payload=answer,
            vmpck_id=header.vmpck_id,
        )

    def _report(self, payload: bytes, vmpck_id: int) -> bytes:
        if len(payload) != ReportRequest.SIZE:
            return _failure(ResponseStatus.INVALID_PARAMETER)
        request = ReportRequest.parse(payload)
        selection = request.flags & 3
        if request.flags & ~3 or any(request.reserved_48) or selection == 3:
            return _failure(ResponseStatus.INVALID_PARAMETER)
        if not vmpck_id <= request.vmpl <= _VMPL_MAX:
            return _failure(ResponseStatus.INVALID_PARAMETER)
        if selection == KeySelection.VLEK:
            return _failure(ResponseStatus.INVALID_KEY_SELECTION)
        report = make_report(self._chip, self._context, report_data=request.report_data, vmpl=request.vmpl)
        return ReportResponse(ResponseStatus.SUCCESS, REPORT_BYTES, bytes(24), report.pack()).pack()


def make_report(chip: Chip, context: GuestContext, *, report_data: bytes, vmpl: int) -> Report:
    """A signed report about `context` (AMD 56860 table 23).

    Args:
        report_data: 64 bytes of the guest's choice.
        vmpl: The level that it states.
    """
    tcb, firmware = chip.tcb.pack(chip.line), chip.firmware
    report = Report.blank(chip.report_version).replace(
        guest_svn=context.guest_svn,
        policy=context.policy,
        family_id=context.family_id,
        image_id=context.image_id,
        vmpl=vmpl,
        current_tcb=tcb,
        platform_info=chip.platform_info,
        key_info=int(context.author_key_enabled),
        report_data=report_data,
        measurement=context.measurement,
        host_data=context.host_data,
        id_key_digest=context.id_key_digest,
        author_key_digest=context.author_key_digest,
        report_id=context.report_id,
        reported_tcb=tcb,
        cpuid_family=chip.family,
        cpuid_model=chip.model,
        cpuid_stepping=chip.stepping,
        chip_id=chip.chip_id,
        committed_tcb=tcb,
        current_build=firmware.build,
        current_minor=firmware.minor,
        current_major=firmware.major,
        committed_build=firmware.build,
        committed_minor=firmware.minor,
        committed_major=firmware.major,
        launch_tcb=tcb,
    )
    if report.has_mitigation_vectors:
        report = report.replace(launch_mit_vector=chip.mitigations, current_mit_vector=chip.mitigations)
    return chip.sign(report)


def _failure(status: ResponseStatus) -> bytes:
    return int(status).to_bytes(4, "little") + bytes(REPORT_RESPONSE_HEADER - 4)
