# SPDX-License-Identifier: MIT OR Apache-2.0
"""What an OVMF firmware file says about its own launch: the GUIDed table at its end and the SEV metadata.

The table ends 32 bytes before the end of the file and is read backwards: each entry is data, a 16-bit size of the
whole entry, and a GUID; the last one is the footer, whose size is that of the table. Entries that matter:

* the SEV-ES reset block: EIP at which application processors start,
* the SEV metadata: offset, from the end of the file, of a list of memory sections to launch.

A firmware without SEV metadata cannot start as an SNP guest. Its digest can be computed, and some tools do; no
guest will ever have it, so here it is refused (``ovmf-no-sev-metadata``).
"""

from __future__ import annotations

import dataclasses
import enum
import uuid
from collections.abc import Iterator
from typing import Annotated, Final, Self

from svsm.formats.errors import FormatError
from svsm.formats.record import U16, U32, Buffer, Bytes, Record, record

__all__ = ["FOUR_GIB", "Ovmf", "Section", "SectionType"]

FOUR_GIB: Final = 1 << 32
"""Where the firmware ends in guest memory."""

_PAGE: Final = 4096
_MAX_FIRMWARE_BYTES: Final = 64 << 20
_MAX_SECTIONS: Final = 256
_TABLE_END: Final = 32

_FOOTER: Final = uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
_RESET_BLOCK: Final = uuid.UUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e").bytes_le
_METADATA: Final = uuid.UUID("dc886566-984a-4798-a75e-5585a7bf67cc").bytes_le
_METADATA_MAGIC: Final = b"ASEV"


class SectionType(enum.IntEnum):
    """Kinds of memory that the metadata asks for."""

    SNP_SEC_MEM = 1
    SNP_SECRETS = 2
    CPUID = 3
    SVSM_CAA = 4
    SNP_KERNEL_HASHES = 0x10


@record(size=18, byte_order="little")
class _Entry(Record):
    size: U16  # bytes, with this trailer
    guid: Annotated[bytes, Bytes(16)]


@record(size=16, byte_order="little")
class _MetadataHeader(Record):
    magic: Annotated[bytes, Bytes(4)]
    size: U32  # bytes, with this header
    version: U32  # 1
    count: U32


@record(size=12, byte_order="little")
class _SectionRecord(Record):
    gpa: U32
    size_bytes: U32
    section_type: U32


@dataclasses.dataclass(frozen=True, slots=True)
class Section:
    """Guest memory below the firmware that has to be launched."""

    gpa: int
    size_bytes: int
    section_type: SectionType


@dataclasses.dataclass(frozen=True, slots=True)
class Ovmf:
    """A firmware file that can be launched as an SNP guest."""

    image: bytes = dataclasses.field(repr=False)
    reset_eip: int | None
    """Where application processors start; None when the firmware does not say."""
    sections: tuple[Section, ...]
    """In launch order."""

    @property
    def gpa(self) -> int:
        """Guest physical address of the first byte."""
        return FOUR_GIB - len(self.image)

    @classmethod
    def parse(cls, image: Buffer) -> Self:
        """Read a firmware file.

        Raises:
            FormatError: ``ovmf-no-sev-metadata``, or another ``ovmf-*`` code for a damaged file.
        """
        data = bytes(image)
        if not data or len(data) % _PAGE or len(data) > _MAX_FIRMWARE_BYTES:
            raise FormatError("a firmware file is whole pages up to 64 MiB", code="ovmf-size", got=len(data))
        table = dict(_table(data))
        where = table.get(_METADATA)
        if where is None:
            raise FormatError(
                "the firmware has no SEV metadata and cannot start an SNP guest",
                code="ovmf-no-sev-metadata",
                hint="use a build with SEV-SNP support, such as OVMF.fd of Debian's package ovmf",
            )
        sections = tuple(_sections(data, _word(where)))
        reset = table.get(_RESET_BLOCK)
        return cls(data, None if reset is None else _word(reset), sections)


def _word(entry: bytes) -> int:
    if len(entry) < 4:
        raise FormatError("a table entry is too short", code="ovmf-table", expected=4, got=len(entry))
    return int.from_bytes(entry[:4], "little")


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """GUID (as stored) and data of each entry, last first; nothing when the file has no table."""
    end = len(data) - _TABLE_END - _Entry.SIZE
    footer = _Entry.parse_at(data, end)
    if footer.guid != _FOOTER:
        return
    start = end - (footer.size - _Entry.SIZE)
    if footer.size < _Entry.SIZE or start < 0:
        raise FormatError("the table has an impossible size", code="ovmf-table", got=footer.size)
    seen: set[bytes] = set()
    while end > start:
        if end - start < _Entry.SIZE:
            raise FormatError("the table has a partial entry", code="ovmf-table", offset=end)
        entry = _Entry.parse_at(data, end - _Entry.SIZE)
        if not _Entry.SIZE <= entry.size <= end - start or entry.guid in seen:
            raise FormatError("a table entry is damaged or twice there", code="ovmf-table", offset=end, got=entry.size)
        seen.add(entry.guid)
        yield entry.guid, data[end - entry.size : end - _Entry.SIZE]
        end -= entry.size


def _sections(data: bytes, from_end: int) -> Iterator[Section]:
    if from_end > len(data):
        raise FormatError("the SEV metadata is outside the file", code="ovmf-metadata", got=from_end)
    start = len(data) - from_end
    header = _MetadataHeader.parse_at(data, start)
    if header.magic != _METADATA_MAGIC or header.version != 1:
        raise FormatError("the SEV metadata is unknown", code="ovmf-metadata", got=header.version)
    if header.count > _MAX_SECTIONS or header.size < _MetadataHeader.SIZE + header.count * _SectionRecord.SIZE:
        raise FormatError("the SEV metadata has an impossible size", code="ovmf-metadata", got=header.count)
    if not header.count:
        raise FormatError("the SEV metadata is empty", code="ovmf-no-sev-metadata")
    for index in range(header.count):
        entry = _SectionRecord.parse_at(data, start + _MetadataHeader.SIZE + index * _SectionRecord.SIZE)
        yield _section(entry, len(data))


def _section(entry: _SectionRecord, firmware_bytes: int) -> Section:
    if entry.section_type not in SectionType.__members__.values():
        raise FormatError("an SEV section has an unknown kind", code="ovmf-metadata", got=entry.section_type)
    kind = SectionType(entry.section_type)
    if entry.gpa % _PAGE or entry.size_bytes % _PAGE or entry.gpa + entry.size_bytes > FOUR_GIB - firmware_bytes:
        raise FormatError("an SEV section has no page address", code="ovmf-metadata", gpa=entry.gpa)
    if kind in (SectionType.SNP_SECRETS, SectionType.CPUID) and entry.size_bytes != _PAGE:
        raise FormatError("a secrets or CPUID section is one page", code="ovmf-metadata", got=entry.size_bytes)
    return Section(entry.gpa, entry.size_bytes, kind)
