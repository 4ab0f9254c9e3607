# SPDX-License-Identifier: MIT OR Apache-2.0
"""Sealing and opening of guest messages: AES-256-GCM under a VMPCK (AMD 56860 §8.26).

Both ends number messages with one counter: a request has the number after the last one seen, its response the number
after that. The number is the IV, so a number must never be used for two different messages: a request that has to
be sent again is sent again *as it is*, and whoever meets a failure it can't explain throws the key away.
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from svsm.formats.errors import IntegrityError, StateError
from svsm.formats.record import Buffer
from svsm.formats.snp.guest_message import MESSAGE_SIZE, MessageHeader, message_header, parse_message

__all__ = ["MAX_SEQUENCE", "open_message", "seal_message"]

MAX_SEQUENCE: Final = (1 << 64) - 1
_TAG_BYTES: Final = 16


def _iv(sequence: int) -> bytes:
    return sequence.to_bytes(8, "little") + bytes(4)


def seal_message(key: bytes, *, message_type: int, sequence: int, payload: Buffer, vmpck_id: int) -> bytes:
    """Encrypt one message.

    Args:
        key: The VMPCK, 32 bytes.
        sequence: This message's number, 1 to 2^64-1, never used before under this key.

    Returns:
        The message page, 4096 bytes.

    Raises:
        StateError: ``guest-message-sequence`` when the numbers are used up.
        FormatError: ``guest-message-size``.
    """
    if not 0 < sequence <= MAX_SEQUENCE:
        raise StateError("guest message numbers are used up", code="guest-message-sequence")
    header = message_header(message_type=message_type, sequence=sequence, payload_size=len(payload), vmpck_id=vmpck_id)
    sealed = AESGCM(key).encrypt(_iv(sequence), bytes(payload), header.aad)
    header = header.replace(tag=sealed[-_TAG_BYTES:])
    return (header.pack() + sealed[:-_TAG_BYTES]).ljust(MESSAGE_SIZE, b"\0")


def open_message(key: bytes, page: Buffer) -> tuple[MessageHeader, bytes]:
    """Authenticate and decrypt one message page. Type, number and key id are the caller's to check.

    Raises:
        FormatError: ``guest-message-header``, ``guest-message-size``.
        IntegrityError: ``guest-message-tag`` when it was not sealed with this key, or was changed.
    """
    header, ciphertext = parse_message(page)
    try:
        payload = AESGCM(key).decrypt(_iv(header.sequence), ciphertext + header.tag, header.aad)
    except InvalidTag:
        raise IntegrityError("a guest message is not authentic", code="guest-message-tag") from None
    return header, payload
