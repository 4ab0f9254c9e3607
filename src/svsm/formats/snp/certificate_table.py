# SPDX-License-Identifier: MIT OR Apache-2.0
"""The certificate table that a host attaches to a report (AMD 56421 rev 1.55 §4.1.8.1).

Entries of 24 bytes {GUID, offset, length}, ended by an entry of zeros; offsets count from the table's start. GUIDs are
written in text order. The host makes the table and can put anything there, so everything is bounded before it is used:
size, number of entries, ranges, overlaps, duplicates. What a certificate says is for the verifier; a GUID is only the
host's claim about it.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator, Mapping
from typing import Annotated, Final

from svsm.formats.cursor import Cursor
from svsm.formats.errors import FormatError
from svsm.formats.record import U32, Buffer, Bytes, Record, record

__all__ = ["ARK", "ASK", "CRL", "MAX_ENTRIES", "MAX_TABLE_BYTES", "VCEK", "VLEK", "pack_table", "parse_table"]

VCEK: Final = uuid.UUID("63da758d-e664-4564-adc5-f4b93be8accd")
VLEK: Final = uuid.UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1")
ASK: Final = uuid.UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782")
"""The intermediate; an ASVK beside a VLEK."""
ARK: Final = uuid.UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae")
CRL: Final = uuid.UUID("92f81bc3-5811-4d3d-97ff-d19f88dc67ea")

MAX_TABLE_BYTES: Final = 64 * 1024
MAX_ENTRIES: Final = 16


@record(size=24, byte_order="little")
class _Entry(Record):
    guid: Annotated[bytes, Bytes(16)]
    offset: U32
    """From the table's start, in bytes."""
    length: U32


_END: Final = _Entry(guid=bytes(16), offset=0, length=0)


def parse_table(data: Buffer) -> dict[uuid.UUID, bytes]:
    """Take a certificate table apart.

    Args:
        data: The table, with whatever padding follows it. Empty means that the host gave none.

    Returns:
        The data of each entry by its GUID, in the table's order; unknown GUIDs are kept.

    Raises:
        FormatError: ``certificate-table-size``, ``certificate-table-terminator``, ``certificate-table-entries``,
            ``certificate-table-range``, ``certificate-table-overlap`` or ``certificate-table-duplicate``.
    """
    if len(data) > MAX_TABLE_BYTES:
        raise FormatError(
            "the certificate table is too large", code="certificate-table-size", expected=MAX_TABLE_BYTES, got=len(data)
        )
    if not data:
        return {}
    entries = list(_entries(data))
    header_bytes = (len(entries) + 1) * _Entry.SIZE
    found: dict[uuid.UUID, bytes] = {}
    for entry in entries:
        if entry.length == 0 or entry.offset < header_bytes or entry.offset + entry.length > len(data):
            raise FormatError(
                "a certificate lies outside the table",
                code="certificate-table-range",
                offset=entry.offset,
                got=entry.length,
            )
        guid = uuid.UUID(bytes=entry.guid)
        if guid in found:
            raise FormatError(
                "the certificate table has two of a kind", code="certificate-table-duplicate", guid=str(guid)
            )
        found[guid] = bytes(memoryview(data)[entry.offset : entry.offset + entry.length])
    ordered = sorted(entries, key=lambda entry: entry.offset)
    for before, after in itertools.pairwise(ordered):
        if before.offset + before.length > after.offset:
            raise FormatError("two certificates overlap", code="certificate-table-overlap", offset=after.offset)
    return found


def _entries(data: Buffer) -> Iterator[_Entry]:
    cursor = Cursor(data, what="certificate table")
    for _ in range(MAX_ENTRIES + 1):
        if cursor.remaining < _Entry.SIZE:
            raise FormatError(
                "the certificate table does not end", code="certificate-table-terminator", offset=cursor.offset
            )
        entry = cursor.record(_Entry)
        if entry == _END:
            return
        yield entry
    raise FormatError(
        "the certificate table has too many entries", code="certificate-table-entries", expected=MAX_ENTRIES
    )


def pack_table(certificates: Mapping[uuid.UUID, bytes]) -> bytes:
    """Build a certificate table.

    Args:
        certificates: The data by GUID, in the order in which to write it. Empty gives an empty table.

    Raises:
        FormatError: ``certificate-table-entries``, ``certificate-table-range`` (empty data) or
            ``certificate-table-size``.
    """
    if len(certificates) > MAX_ENTRIES:
        raise FormatError(
            "the certificate table has too many entries", code="certificate-table-entries", expected=MAX_ENTRIES
        )
    offset = (len(certificates) + 1) * _Entry.SIZE
    header, body = b"", b""
    for guid, data in certificates.items():
        if not data:
            raise FormatError("a certificate is empty", code="certificate-table-range", guid=str(guid))
        header += _Entry(guid=guid.bytes, offset=offset + len(body), length=len(data)).pack()
        body += data
    table = header + _END.pack() + body
    if len(table) > MAX_TABLE_BYTES:
        raise FormatError(
            "the certificate table is too large",
            code="certificate-table-size",
            expected=MAX_TABLE_BYTES,
            got=len(table),
        )
    return table
