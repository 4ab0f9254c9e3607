# SPDX-License-Identifier: MIT OR Apache-2.0
"""Guest messages: what a guest and the AMD-SP say to each other past the host (AMD 56860 §8.26, table 99).

One message is one shared page: a header of 0x60 bytes, of which the last 48 are authenticated, then the encrypted
payload. The layout is here; `svsm.crypto.guest_channel` seals and opens.

A report request and its response are the payloads that svsm uses. Reserved bytes of everything must be zero: the
AMD-SP refuses a request otherwise, and the kernel refuses a response.
"""

from __future__ import annotations

import enum
from typing import Annotated, Final

from svsm.formats.errors import FormatError
from svsm.formats.record import U8, U16, U32, U64, Buffer, Bytes, Record, record

__all__ = [
    "AAD_OFFSET",
    "ALGORITHM_AES_256_GCM",
    "HEADER_SIZE",
    "MAX_PAYLOAD",
    "MESSAGE_SIZE",
    "REPORT_RESPONSE_HEADER",
    "KeySelection",
    "MessageHeader",
    "MessageType",
    "ReportRequest",
    "ReportResponse",
    "ResponseStatus",
    "message_header",
    "parse_message",
]

MESSAGE_SIZE: Final = 4096
HEADER_SIZE: Final = 0x60
MAX_PAYLOAD: Final = MESSAGE_SIZE - HEADER_SIZE
AAD_OFFSET: Final = 0x30
"""The header from here to its end is additional authenticated data."""
ALGORITHM_AES_256_GCM: Final = 1
_HEADER_VERSION: Final = 1
_MESSAGE_VERSION: Final = 1


class MessageType(enum.IntEnum):
    """Each request's number; its response's is one more."""

    CPUID_REQUEST = 1
    KEY_REQUEST = 3
    REPORT_REQUEST = 5
    REPORT_RESPONSE = 6
    EXPORT_REQUEST = 7
    IMPORT_REQUEST = 9
    ABSORB_REQUEST = 11
    VMRK_REQUEST = 13
    ABSORB_NOMA_REQUEST = 15
    TSC_INFO_REQUEST = 17


class KeySelection(enum.IntEnum):
    """REPORT_REQ flags bits 1:0."""

    VLEK_ELSE_VCEK = 0
    VCEK = 1
    VLEK = 2


class ResponseStatus(enum.IntEnum):
    """First word of a REPORT_RSP."""

    SUCCESS = 0
    INVALID_PARAMETER = 0x16
    INVALID_KEY_SELECTION = 0x27


@record(size=HEADER_SIZE, byte_order="little")
class MessageHeader(Record):
    """The header of one message."""

    tag: Annotated[bytes, Bytes(16)]
    reserved_10: Annotated[bytes, Bytes(16)]
    """Room for longer tags; zero."""
    sequence: U64
    reserved_28: Annotated[bytes, Bytes(8)]
    algorithm: U8
    header_version: U8
    header_size: U16
    message_type: U8
    message_version: U8
    payload_size: U16
    reserved_38: U32
    vmpck_id: U8
    reserved_3d: Annotated[bytes, Bytes(35)]

    @property
    def aad(self) -> bytes:
        """The 48 authenticated bytes."""
        return self.pack()[AAD_OFFSET:]


@record(size=0x60, byte_order="little")
class ReportRequest(Record):
    """Payload of MSG_REPORT_REQ (table 22)."""

    report_data: Annotated[bytes, Bytes(64)]
    vmpl: U32
    flags: U32
    """Bits 1:0: `KeySelection`."""
    reserved_48: Annotated[bytes, Bytes(24)]


@record(size=0x20 + 0x4A0, byte_order="little")
class ReportResponse(Record):
    """Payload of MSG_REPORT_RSP (table 25) with a report."""

    status: U32
    report_size: U32
    reserved_08: Annotated[bytes, Bytes(24)]
    report: Annotated[bytes, Bytes(0x4A0)]


REPORT_RESPONSE_HEADER: Final = 0x20
"""Bytes of a response before the report."""


def message_header(*, message_type: int, sequence: int, payload_size: int, vmpck_id: int) -> MessageHeader:
    """The header of a message that isn't sealed yet: everything but the tag.

    Raises:
        FormatError: ``guest-message-size`` when the payload does not fit a page.
    """
    if not 0 < payload_size <= MAX_PAYLOAD:
        raise FormatError("a guest message's payload must fit its page", code="guest-message-size", got=payload_size)
    return MessageHeader(
        bytes(16), bytes(16), sequence, bytes(8), ALGORITHM_AES_256_GCM, _HEADER_VERSION, HEADER_SIZE, message_type,
        _MESSAGE_VERSION, payload_size, 0, vmpck_id, bytes(35),
    )  # fmt: skip


def parse_message(page: Buffer) -> tuple[MessageHeader, bytes]:
    """Take a message page apart.

    Returns:
        The header and the encrypted payload (without the tag).

    Raises:
        FormatError: ``guest-message-header`` (``field`` names the member), ``guest-message-size``.
    """
    if len(page) != MESSAGE_SIZE:
        raise FormatError("a guest message is one page", code="guest-message-size", got=len(page))
    header = MessageHeader.parse(bytes(page[:HEADER_SIZE]))
    expected = {
        "algorithm": ALGORITHM_AES_256_GCM,
        "header_version": _HEADER_VERSION,
        "header_size": HEADER_SIZE,
        "message_version": _MESSAGE_VERSION,
        "reserved_38": 0,
        "reserved_10": bytes(16),
        "reserved_28": bytes(8),
        "reserved_3d": bytes(35),
    }
    for field, value in expected.items():
        if getattr(header, field) != value:
            raise FormatError("a guest message's header is wrong", code="guest-message-header", field=field)
    if header.vmpck_id > 3:
        raise FormatError("there is no such VMPCK", code="guest-message-header", field="vmpck_id")
    if not 0 < header.payload_size <= MAX_PAYLOAD:
        raise FormatError(
            "a guest message's payload must fit its page", code="guest-message-size", got=header.payload_size
        )
    return header, bytes(page[HEADER_SIZE : HEADER_SIZE + header.payload_size])
