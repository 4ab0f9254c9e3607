# SPDX-License-Identifier: MIT OR Apache-2.0
"""OVMF's table and SEV metadata, on firmware made here and under damage."""

from __future__ import annotations

import struct
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.formats.errors import FormatError, SvsmError
from svsm.formats.ovmf import Ovmf, Section, SectionType

_FOOTER = "96b582de-1fb2-45f7-baea-a366c55a082d"
_RESET = "00f771de-1a7e-4fcb-890e-68c77e2fb44e"
_METADATA = "dc886566-984a-4798-a75e-5585a7bf67cc"


def firmware(
    sections: list[tuple[int, int, int]], *, reset: int | None = 0x80B004, size: int = 8192, version: int = 1
) -> bytes:
    """A firmware-shaped file with SEV metadata 1024 bytes before its end."""
    image = bytearray(size)
    at = size - 1024
    metadata = struct.pack("<4sIII", b"ASEV", 16 + 12 * len(sections), version, len(sections))
    metadata += b"".join(struct.pack("<III", *section) for section in sections)
    image[at : at + len(metadata)] = metadata
    entries = [(_METADATA, struct.pack("<I", 1024))]
    if reset is not None:
        entries.insert(0, (_RESET, struct.pack("<I", reset)))
    table = b"".join(data + struct.pack("<H", len(data) + 18) + uuid.UUID(guid).bytes_le for guid, data in entries)
    table += struct.pack("<H", len(table) + 18) + uuid.UUID(_FOOTER).bytes_le
    image[size - 32 - len(table) : size - 32] = table
    return bytes(image)


_GOOD = [(0x800000, 0x9000, 1), (0x80D000, 0x1000, 2), (0x80E000, 0x1000, 3)]


def test_good_firmware() -> None:
    found = Ovmf.parse(firmware(_GOOD))
    assert found.gpa == 0x100000000 - 8192
    assert found.reset_eip == 0x80B004
    assert found.sections == (
        Section(0x800000, 0x9000, SectionType.SNP_SEC_MEM),
        Section(0x80D000, 0x1000, SectionType.SNP_SECRETS),
        Section(0x80E000, 0x1000, SectionType.CPUID),
    )


def test_without_reset_block() -> None:
    assert Ovmf.parse(firmware(_GOOD, reset=None)).reset_eip is None


@pytest.mark.parametrize(
    ("image", "code"),
    [
        (b"", "ovmf-size"),
        (bytes(4095), "ovmf-size"),
        (bytes(65 << 20), "ovmf-size"),
        (bytes(8192), "ovmf-no-sev-metadata"),
        (firmware([]), "ovmf-no-sev-metadata"),
        (firmware(_GOOD, version=2), "ovmf-metadata"),
        (firmware([(0x800000, 0x1000, 5)]), "ovmf-metadata"),
        (firmware([(0x800001, 0x1000, 1)]), "ovmf-metadata"),
        (firmware([(0x800000, 0x1001, 1)]), "ovmf-metadata"),
        (firmware([(0x800000, 0x2000, 2)]), "ovmf-metadata"),
        (firmware([(0xFFFFE000, 0x1000, 1)]), "ovmf-metadata"),
        (firmware([(0xFFFFF000, 0xFFFFF000, 1)]), "ovmf-metadata"),
    ],
)
def test_refused(image: bytes, code: str) -> None:
    with pytest.raises(FormatError) as caught:
        Ovmf.parse(image)
    assert caught.value.code == code


@pytest.mark.parametrize("count", [257, 0xFFFFFFFF])
def test_section_counts_are_bounded(count: int) -> None:
    image = bytearray(firmware(_GOOD))
    struct.pack_into("<I", image, 8192 - 1024 + 12, count)
    with pytest.raises(FormatError) as caught:
        Ovmf.parse(image)
    assert caught.value.code == "ovmf-metadata"


@pytest.mark.parametrize("where", [0, 8193, 0xFFFFFFFF, 4])
def test_metadata_outside_the_file(where: int) -> None:
    image = bytearray(firmware(_GOOD))
    at = image.index(struct.pack("<IH", 1024, 22))
    struct.pack_into("<I", image, at, where)
    with pytest.raises(SvsmError):
        Ovmf.parse(image)


def test_every_byte_of_the_table_changed_is_a_value_or_an_error() -> None:
    image = firmware(_GOOD)
    changed = 0
    for position in [*range(8192 - 200, 8192), *range(8192 - 1024, 8192 - 950)]:
        for value in (0, 1, 0x7F, 0xFF):
            damaged = bytearray(image)
            damaged[position] = value
            try:
                Ovmf.parse(damaged)
            except SvsmError:
                changed += 1
    assert changed > 100


@given(st.binary(max_size=300), st.integers(0, 4096))
def test_any_tail_is_a_value_or_an_error(tail: bytes, before_end: int) -> None:
    image = bytearray(firmware(_GOOD))
    start = max(0, len(image) - before_end - len(tail))
    image[start : start + len(tail)] = tail
    try:
        assert Ovmf.parse(image[:8192]).sections
    except SvsmError as error:
        assert error.code.startswith(("ovmf-", "record-"))  # noqa: PT017
