# SPDX-License-Identifier: MIT OR Apache-2.0
"""The certificate table: written and read back, and every way in which a host may build one badly."""

from __future__ import annotations

import struct
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.formats.errors import FormatError
from svsm.formats.snp.certificate_table import (
    ARK,
    ASK,
    MAX_ENTRIES,
    MAX_TABLE_BYTES,
    VCEK,
    VLEK,
    pack_table,
    parse_table,
)


def _table(entries: list[tuple[bytes, int, int]], body: bytes = b"", *, terminated: bool = True) -> bytes:
    header = b"".join(guid + struct.pack("<II", offset, length) for guid, offset, length in entries)
    return header + (bytes(24) if terminated else b"") + body


def _code(data: bytes) -> str:
    with pytest.raises(FormatError) as refused:
        parse_table(data)
    return refused.value.code


def test_a_table_reads_back() -> None:
    content = {VCEK: b"vcek", ASK: b"a" * 1000, ARK: b"r"}
    packed = pack_table(content)
    assert parse_table(packed) == content
    assert parse_table(packed.ljust(4096, b"\0")) == content
    assert parse_table(b"") == parse_table(bytes(24)) == parse_table(pack_table({})) == {}


def test_guids_are_in_text_order() -> None:
    packed = pack_table({VCEK: b"x"})
    assert packed[:16].hex() == "63da758de6644564adc5f4b93be8accd"
    assert packed[16:24] == struct.pack("<II", 48, 1)


def test_unknown_guids_are_kept() -> None:
    stranger = uuid.UUID(int=1)
    assert parse_table(pack_table({stranger: b"data"})) == {stranger: b"data"}


def test_every_bad_table_is_refused_for_its_own_reason() -> None:
    one = VCEK.bytes
    assert _code(bytes(MAX_TABLE_BYTES + 1)) == "certificate-table-size"
    assert _code(_table([(one, 48, 4)], terminated=False)) == "certificate-table-terminator"
    assert _code(bytes(23)) == "certificate-table-terminator"
    assert _code(_table([(one, 47, 1)], b"abcd")) == "certificate-table-range"
    assert _code(_table([(one, 0, 24)], b"abcd")) == "certificate-table-range"
    assert _code(_table([(one, 48, 5)], b"abcd")) == "certificate-table-range"
    assert _code(_table([(one, 48, 0)], b"abcd")) == "certificate-table-range"
    assert _code(_table([(one, 0xFFFF_FFFF, 0xFFFF_FFFF)], b"abcd")) == "certificate-table-range"
    assert _code(_table([(bytes(16), 48, 4)], terminated=False)) == "certificate-table-terminator"
    assert _code(_table([(one, 72, 2), (one, 74, 2)], b"abcd")) == "certificate-table-duplicate"
    assert _code(_table([(one, 72, 3), (VLEK.bytes, 74, 2)], b"abcd")) == "certificate-table-overlap"
    assert _code(_table([(VLEK.bytes, 74, 2), (one, 72, 3)], b"abcd")) == "certificate-table-overlap"
    many = [(uuid.UUID(int=i + 1).bytes, 24 * (MAX_ENTRIES + 2) + i, 1) for i in range(MAX_ENTRIES + 1)]
    assert _code(_table(many, bytes(MAX_ENTRIES + 1))) == "certificate-table-entries"


def test_as_many_entries_as_allowed_are_read() -> None:
    content = {uuid.UUID(int=i + 1): bytes([i]) for i in range(MAX_ENTRIES)}
    assert parse_table(pack_table(content)) == content


def test_every_truncation_is_refused() -> None:
    packed = pack_table({VCEK: b"vcek", ASK: b"ask"})
    for length in range(1, len(packed)):
        assert _code(packed[:length]).startswith("certificate-table-")


def test_packing_refuses_what_reading_would() -> None:
    for content in (
        {VCEK: b""},
        {uuid.UUID(int=i + 1): b"x" for i in range(MAX_ENTRIES + 1)},
        {VCEK: bytes(MAX_TABLE_BYTES)},
    ):
        with pytest.raises(FormatError):
            pack_table(content)


@given(st.binary(max_size=400))
def test_any_bytes_are_a_table_or_refused(data: bytes) -> None:
    try:
        found = parse_table(data)
    except FormatError:
        return
    assert len(found) <= MAX_ENTRIES
    assert sum(map(len, found.values())) <= len(data)
