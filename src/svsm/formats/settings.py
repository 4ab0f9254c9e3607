# SPDX-License-Identifier: MIT OR Apache-2.0
"""The owner's settings page: one measured page that says whom this image obeys.

It is the last measured page before the VMSA, so that everything before it (the payload digest) is the same for
every owner. Layout: a 32-byte header, the broker's public key, zeros up to 4096 bytes. Strict: another version,
another length, or a non-zero byte where none belongs refuses the image, because a setting that is not understood
must not be skipped.

The key is kept as bytes here; `svsm.crypto.token` demands that it is a P-384 key when it is used.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

from svsm.formats.cursor import Cursor
from svsm.formats.errors import FormatError
from svsm.formats.record import U16, U32, Buffer, Bytes, Record, record

__all__ = ["SETTINGS_BYTES", "SETTINGS_VERSION", "Settings", "SettingsHeader"]

SETTINGS_BYTES = 4096
SETTINGS_VERSION = 1
_MAGIC = b"SVSMOWNR"
_MAX_KEY_BYTES = 512


@record(size=32, byte_order="little")
class SettingsHeader(Record):
    """First 32 bytes of the page."""

    magic: Annotated[bytes, Bytes(8)]
    """"SVSMOWNR"."""
    version: U32
    length_bytes: U32
    """Used part of the page, this header included."""
    broker_key_bytes: U16
    """Length of the SubjectPublicKeyInfo that follows."""
    reserved_12: Annotated[bytes, Bytes(14)]
    """Zero, else refused."""


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What the owner decided before the launch."""

    broker_public_key: bytes
    """SubjectPublicKeyInfo (DER) of the P-384 key that signs the broker's tokens."""

    def pack(self) -> bytes:
        """The page, 4096 bytes.

        Raises:
            FormatError: ``settings-key`` when the key is empty or longer than 512 bytes.
        """
        if not 0 < len(self.broker_public_key) <= _MAX_KEY_BYTES:
            raise FormatError(
                "the broker's key does not fit the settings page",
                code="settings-key",
                expected=_MAX_KEY_BYTES,
                got=len(self.broker_public_key),
            )
        header = SettingsHeader(
            magic=_MAGIC,
            version=SETTINGS_VERSION,
            length_bytes=SettingsHeader.SIZE + len(self.broker_public_key),
            broker_key_bytes=len(self.broker_public_key),
            reserved_12=bytes(14),
        )
        return (header.pack() + self.broker_public_key).ljust(SETTINGS_BYTES, b"\0")

    @classmethod
    def parse(cls, page: Buffer) -> Settings:
        """Read the page.

        Raises:
            FormatError: ``settings-format``, ``settings-version`` or ``settings-key``.
        """
        if len(page) != SETTINGS_BYTES:
            raise FormatError("the settings page has the wrong length", code="settings-format", got=len(page))
        cursor = Cursor(page, what="settings page")
        header = cursor.record(SettingsHeader)
        if header.magic != _MAGIC:
            raise FormatError("the settings page has another magic", code="settings-format", got=header.magic)
        if header.version != SETTINGS_VERSION:
            raise FormatError(
                "the settings page has another version",
                code="settings-version",
                expected=SETTINGS_VERSION,
                got=header.version,
            )
        if not 0 < header.broker_key_bytes <= _MAX_KEY_BYTES:
            raise FormatError("the settings page holds no broker key", code="settings-key", got=header.broker_key_bytes)
        key = cursor.take(header.broker_key_bytes)
        used = SettingsHeader.SIZE + header.broker_key_bytes
        if header.length_bytes != used or any(header.reserved_12) or any(cursor.rest()):
            raise FormatError("the settings page holds something that is not understood", code="settings-format")
        return cls(broker_public_key=key)
