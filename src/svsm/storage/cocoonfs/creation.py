# SPDX-License-Identifier: MIT OR Apache-2.0
"""The creation-info header: what stands on a disk that shall become a volume, written by somebody without the key.

    header at offset 0 | auxiliary blob ...                       ... auxiliary blob | backup header | ...

The backup's place follows from the size of the disk alone, so it is found when the first copy was torn while a
static header replaced it. The auxiliary blob (a checksum, the encoded records, zeros) lies behind the first copy and
in front of the backup, and is durable before the header that announces it.

Nothing here is authenticated: whoever has the disk chooses configuration, size, salt and auxiliary metadata. A caller
who formats on its word compares it with what it expects (`provisioning.Expected`).
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

from svsm.formats.cursor import Cursor
from svsm.formats.errors import FormatError
from svsm.formats.record import U8, U64, Bytes, Record, record
from svsm.storage.cocoonfs import integrity
from svsm.storage.cocoonfs.aux import MAX_AUX_BYTES
from svsm.storage.cocoonfs.layout import CREATION_MAGIC, FORMAT_VERSION, ImageLayout, align_up
from svsm.storage.cocoonfs.primitives import checksum

__all__ = ["CreationHeader", "backup_offset", "pack_blob", "parse_blob"]

_SECTION, _SKIP = 47, 8
_CHECKSUM_BYTES = 8
_UNIT = 128
_PARTS_LOG2 = 4
_LEAST_UNITS = 4 << _PARTS_LOG2


def backup_offset(device_bytes: int) -> int | None:
    """Where the backup copy begins on a disk of this size, in bytes; None on a disk too small for one (8 KiB)."""
    units = device_bytes // _UNIT
    if units < _LEAST_UNITS:
        return None
    shift = units.bit_length() - 1 - _PARTS_LOG2
    return (((units >> shift) - 1) << shift) * _UNIT


def _damaged(field: str) -> FormatError:
    return FormatError("the creation-info header is damaged", code="cocoonfs-creation-damaged", field=field)


@record(size=47, byte_order="little")
class _Prefix(Record):
    magic: Annotated[bytes, Bytes(8)]
    version: U8
    layout: Annotated[bytes, Bytes(21)]
    aux_bytes: U64
    image_ab: U64
    salt_length: U8


class CreationHeader(NamedTuple):
    """A creation-info header (CocoonFS §Filesystem creation info header).

    Attributes:
        layout: The configuration.
        salt: At most 255 bytes.
        image_ab: Size of the volume in allocation blocks.
        aux_bytes: Length of the encoded auxiliary metadata beside it; 0 for none.
    """

    layout: ImageLayout
    salt: bytes
    image_ab: int
    aux_bytes: int

    @property
    def size_bytes(self) -> int:
        """Length on the disk: whole IO blocks."""
        io_bytes = self.layout.io_bytes
        return align_up(_Prefix.SIZE + integrity.section_bytes(io_bytes) + len(self.salt), io_bytes)

    @property
    def blob_bytes(self) -> int:
        """Length of the auxiliary blob on the disk: whole IO blocks, or none."""
        return align_up(_CHECKSUM_BYTES + self.aux_bytes, self.layout.io_bytes) if self.aux_bytes else 0

    def pack(self) -> bytes:
        """The header with its integrity protection, padded to whole IO blocks."""
        io_bytes = self.layout.io_bytes
        prefix = _Prefix(
            CREATION_MAGIC, FORMAT_VERSION, self.layout.pack(), self.aux_bytes, self.image_ab, len(self.salt)
        ).pack()
        plain = prefix + bytes(integrity.section_bytes(io_bytes)) + self.salt
        return integrity.protect(
            plain.ljust(self.size_bytes, b"\0"), section=_SECTION, head_skip=_SKIP, io_block_bytes=io_bytes
        )

    @staticmethod
    def measure(head: bytes) -> CreationHeader:
        """A header with everything but the salt's contents, from the first 128 bytes.

        Raises:
            FormatError: ``cocoonfs-no-magic``, ``cocoonfs-creation-damaged``, ``cocoonfs-layout``,
                ``cocoonfs-unsupported-…``.
        """
        if head[: len(CREATION_MAGIC)] != CREATION_MAGIC:
            raise FormatError("there is no creation-info header here", code="cocoonfs-no-magic", got=head[:8])
        plain = integrity.tier0(head, section=_SECTION, head_skip=_SKIP)
        if plain is None:
            raise _damaged("integrity")
        prefix = _Prefix.parse_at(plain, 0)
        if prefix.version != FORMAT_VERSION:
            raise FormatError(
                "this version of the format is not supported", code="cocoonfs-unsupported-version", got=prefix.version
            )
        layout = ImageLayout.parse(prefix.layout)
        layout.validate()
        if prefix.aux_bytes > MAX_AUX_BYTES:
            raise _damaged("auxiliary metadata")
        return CreationHeader(layout, bytes(prefix.salt_length), prefix.image_ab, prefix.aux_bytes)

    def parse_contents(self, data: bytes) -> CreationHeader:
        """The complete header from its `size_bytes` bytes; `self` is what `measure` gave.

        Raises:
            FormatError: ``cocoonfs-creation-damaged``.
        """
        io_bytes = self.layout.io_bytes
        plain = integrity.unprotect(data, section=_SECTION, head_skip=_SKIP, io_block_bytes=io_bytes)
        if plain is None:
            raise _damaged("integrity")
        cursor = Cursor(plain, what="the creation-info header")
        cursor.take(_Prefix.SIZE + integrity.section_bytes(io_bytes))
        salt = cursor.take(len(self.salt))
        if any(cursor.rest()):
            raise _damaged("padding")
        return CreationHeader(self.layout, salt, self.image_ab, self.aux_bytes)


def pack_blob(header: CreationHeader, encoded: bytes) -> bytes:
    """The auxiliary blob as it goes to the disk; empty where there is none."""
    if not header.aux_bytes:
        return b""
    padded = encoded.ljust(header.blob_bytes - _CHECKSUM_BYTES, b"\0")
    return checksum(padded) + padded


def parse_blob(header: CreationHeader, data: bytes) -> bytes:
    """The encoded auxiliary metadata from its blob.

    Raises:
        FormatError: ``cocoonfs-creation-damaged``.
    """
    if not header.aux_bytes:
        return b""
    padded = data[_CHECKSUM_BYTES:]
    if checksum(padded) != data[:_CHECKSUM_BYTES] or any(padded[header.aux_bytes :]):
        raise _damaged("auxiliary metadata")
    return padded[: header.aux_bytes]
