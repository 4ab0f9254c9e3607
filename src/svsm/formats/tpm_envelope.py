# SPDX-License-Identifier: MIT OR Apache-2.0
"""The envelope in which a TPM's permanent state lies in the volume: one file per TPM.

    header (64 bytes) ‖ permanent state as the TPM library gave it

The library's own format has no checksum: a flipped bit loads silently. CocoonFS is what authenticates the file;
the CRC here finds what goes wrong between the two (a truncated call, a file of another kind, a bug). The version is
checked before anything else is believed. `sequence` counts the stores of this TPM, for people who compare images.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Annotated

from svsm.formats.errors import FormatError, IntegrityError
from svsm.formats.record import U16, U32, U64, Buffer, Bytes, Record, record
from svsm.formats.tpm import EK_NAME_BYTES

__all__ = ["MAX_STATE_BYTES", "TpmEnvelope"]

MAX_STATE_BYTES = 500 * 1024
"""More than a TPM with full NV memory needs (143 KiB)."""

_MAGIC = b"SVSM-TPM"
_VERSION = 1
_NO_NAME = bytes(EK_NAME_BYTES)


@record(size=64, byte_order="little")
class _Header(Record):
    magic: Annotated[bytes, Bytes(8)]  # "SVSM-TPM"
    version: U16  # 1
    reserved_0a: U16  # must be zero
    state_length: U32  # bytes after the header
    sequence: U64  # stores of this TPM so far
    ek_name: Annotated[bytes, Bytes(EK_NAME_BYTES)]  # all zero: not known
    reserved_3a: U16  # must be zero
    checksum: U32  # CRC-32 of header (this field zero) and state


@dataclasses.dataclass(frozen=True, slots=True)
class TpmEnvelope:
    """A TPM's permanent state and what is known about it."""

    state: bytes = dataclasses.field(repr=False)
    """As libtpms stores it ("permall"). Holds the seeds: secret."""
    sequence: int
    ek_name: bytes | None
    """TPM name of the RSA-2048 EK, 34 bytes; None when it must be computed anew (after TPM2_ChangeEPS)."""

    def pack(self) -> bytes:
        """The file's contents.

        Raises:
            FormatError: ``tpm-envelope-size``.
        """
        if not 0 < len(self.state) <= MAX_STATE_BYTES:
            raise FormatError("a TPM state has an impossible size", code="tpm-envelope-size", got=len(self.state))
        header = _Header(
            _MAGIC, _VERSION, 0, len(self.state), self.sequence, self.ek_name or _NO_NAME, 0, 0
        )  # fmt: skip
        checksum = zlib.crc32(self.state, zlib.crc32(header.pack()))
        return header.replace(checksum=checksum).pack() + self.state

    @classmethod
    def parse(cls, data: Buffer) -> TpmEnvelope:
        """Open an envelope.

        Raises:
            FormatError: ``tpm-envelope-magic``, ``tpm-envelope-version``, ``tpm-envelope-size``, ``record-truncated``.
            IntegrityError: ``tpm-envelope-checksum``.
        """
        header = _Header.parse_at(data, 0)
        if header.magic != _MAGIC:
            raise FormatError("this is not a TPM state file", code="tpm-envelope-magic")
        if header.version != _VERSION or header.reserved_0a or header.reserved_3a:
            raise FormatError(
                "the TPM state file has a version that this program does not know",
                code="tpm-envelope-version",
                expected=_VERSION,
                got=header.version,
            )
        if not 0 < header.state_length <= MAX_STATE_BYTES or len(data) != _Header.SIZE + header.state_length:
            raise FormatError("a TPM state file has the wrong length", code="tpm-envelope-size", got=len(data))
        state = bytes(data[_Header.SIZE :])
        if zlib.crc32(state, zlib.crc32(header.replace(checksum=0).pack())) != header.checksum:
            raise IntegrityError("the checksum of a TPM state file does not match", code="tpm-envelope-checksum")
        return cls(state, header.sequence, None if header.ek_name == _NO_NAME else header.ek_name)
