# SPDX-License-Identifier: MIT OR Apache-2.0
"""Reader and writer on files made here: runs, limits, every truncation, every byte."""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Callable

import pytest

from svsm.formats.errors import FormatError, SvsmError
from svsm.formats.igvm import Header, HeaderType, IgvmBuilder, IgvmFile, PageDataType, PageFlag, PlatformType, plan
from svsm.formats.igvm.file import MAX_HEADER_BYTES
from svsm.formats.igvm.layout import (
    PAGE_2MB,
    ErrorRange,
    PageData,
    Parameter,
    ParameterArea,
    SupportedPlatform,
)
from svsm.formats.igvm.validate import MAX_PARAMETER_AREA_BYTES

_PAGE = bytes(range(256)) * 16


def _small(*, format_version: int = 1, pages: int = 3) -> IgvmFile:
    builder = IgvmBuilder(format_version=format_version)
    builder.platform(PlatformType.SEV_SNP)
    builder.policy(0x30000)
    builder.required_memory(0x100000, 0x1000)
    builder.parameter_area(0, 0x2000)
    builder.parameter(HeaderType.COMMAND_LINE, index=0, byte_offset=0x1000)
    builder.parameter_insert(0x8000, index=0)
    builder.page(0x1000, data_type=PageDataType.SECRETS)
    builder.page(0x2000, data_type=PageDataType.CPUID_DATA)
    builder.pages(0x10000, b"".join(index.to_bytes(2, "big") * 2048 for index in range(1, pages + 1)))
    builder.vp_context(0xFFFFFFFFF000, _PAGE, vp_index=0)
    return builder.finish()


def _resealed(image: bytes) -> bytes:
    """`image` with total size and checksum corrected."""
    fixed = 24 if image[4] == 1 else 32
    blank = image[:16] + struct.pack("<II", len(image), 0) + image[24:]
    size = struct.unpack_from("<I", image, 12)[0]
    checksum = zlib.crc32(blank[: fixed + size])
    return blank[:20] + struct.pack("<I", checksum) + blank[24:]


@pytest.mark.parametrize("format_version", [1, 2])
def test_round_trip(format_version: int) -> None:
    file = _small(format_version=format_version)
    image = file.pack()
    again = IgvmFile.parse(image)
    assert again == file
    assert again.pack() == image
    assert image[:4] == b"IGVM"
    assert struct.unpack_from("<II", image, 4) == (format_version, 24 if format_version == 1 else 32)


def test_consecutive_pages_are_one_run() -> None:
    file = _small(pages=700)
    runs = [header for header in file.headers if header.count > 1]
    assert [header.count for header in runs] == [700]
    bodies = [body for body in runs[0].each() if isinstance(body, PageData)]
    assert [body.gpa for body in bodies] == [0x10000 + 4096 * index for index in range(700)]
    first = bodies[0].file_offset
    assert [body.file_offset for body in bodies] == [first + 4096 * index for index in range(700)]


def test_the_writer_stores_equal_pages_once() -> None:
    builder = IgvmBuilder()
    builder.platform(PlatformType.SEV_SNP)
    builder.pages(0, _PAGE * 5)
    file = builder.finish()
    assert bytes(file.data) == _PAGE
    assert [step.contents for step in plan(file)] == [memoryview(_PAGE)] * 5


def test_a_run_ends_where_anything_but_address_and_offset_differs() -> None:
    builder = IgvmBuilder()
    builder.platform(PlatformType.SEV_SNP)
    builder.page(0x0000, b"1" * 4096)
    builder.page(0x1000, b"2" * 4096, flags=PageFlag.UNMEASURED)
    builder.page(0x2000, b"3" * 4096)
    builder.page(0x4000, b"4" * 4096)
    builder.page(0x5000)
    builder.page(0x6000)
    builder.page(0x7000, data_type=PageDataType.SECRETS)
    file = builder.finish()
    assert [header.count for header in file.headers] == [1, 1, 1, 1, 1, 2, 1]
    assert IgvmFile.parse(file.pack()) == file


def test_zero_pages_are_stored_not_left_empty() -> None:
    builder = IgvmBuilder()
    builder.platform(PlatformType.SEV_SNP)
    builder.pages(0, bytes(8192))
    assert [step.contents for step in plan(builder.finish())] == [memoryview(bytes(4096))] * 2


@pytest.mark.parametrize("format_version", [1, 2])
def test_every_truncation_is_refused(format_version: int) -> None:
    image = _small(format_version=format_version, pages=1).pack()
    for length in range(len(image)):
        with pytest.raises(FormatError):
            IgvmFile.parse(image[:length])


def test_every_truncation_with_a_matching_size_is_refused_or_loses_nothing_used() -> None:
    """The size field corrected after the cut: the headers still demand their data."""
    image = _small(pages=1).pack()
    for length in range(24, len(image)):
        with pytest.raises(FormatError):
            IgvmFile.parse(_resealed(image[:length]) if length > 24 else image[:length])


def test_every_flipped_header_bit_fails_the_checksum_or_earlier() -> None:
    image = _small(pages=1).pack()
    end = 24 + struct.unpack_from("<I", image, 12)[0]
    for position in range(end):
        for bit in range(8):
            damaged = bytearray(image)
            damaged[position] ^= 1 << bit
            with pytest.raises(FormatError):
                IgvmFile.parse(damaged)


def test_every_flipped_header_bit_with_a_new_checksum_is_a_value_or_an_error() -> None:
    image = _small(pages=1).pack()
    end = 24 + struct.unpack_from("<I", image, 12)[0]
    accepted = 0
    for position in range(24, end):
        for bit in range(8):
            damaged = bytearray(image)
            damaged[position] ^= 1 << bit
            resealed = _resealed(bytes(damaged))
            try:
                file = IgvmFile.parse(resealed)
            except SvsmError:
                continue
            accepted += 1
            assert file.pack() == resealed
    assert accepted > 100


def _code(build: Callable[[IgvmBuilder], None], *, platform: PlatformType = PlatformType.SEV_SNP) -> str:
    builder = IgvmBuilder()
    builder.platform(platform)
    build(builder)
    with pytest.raises(FormatError) as caught:
        builder.finish()
    return caught.value.code


def test_limits() -> None:
    size = MAX_PARAMETER_AREA_BYTES + 4096
    assert _code(lambda b: b.parameter_area(0, size)) == "igvm-limit"
    assert _code(lambda b: b.page(PAGE_2MB // 2, flags=PageFlag.IS_2MB_PAGE)) == "igvm-alignment"
    assert _code(lambda b: b.page(0, _PAGE, flags=PageFlag.IS_2MB_PAGE)) == "igvm-data-range"
    assert _code(lambda b: b.page(0x123)) == "igvm-alignment"
    assert _code(lambda b: b.vp_context(0, _PAGE[:-1], vp_index=0)) == "igvm-data-range"
    assert _code(lambda b: b.vp_context(0, _PAGE, vp_index=0), platform=PlatformType.TDX) == "igvm-value"
    error_range = ErrorRange(2**64 - 4096, 1, 8192)
    assert _code(lambda b: b.add(HeaderType.ERROR_RANGE, error_range)) == "igvm-address"


def test_parameter_areas_are_bounded_together() -> None:
    def build(builder: IgvmBuilder) -> None:
        for index in range(5):
            builder.parameter_area(index, MAX_PARAMETER_AREA_BYTES // 4)

    assert _code(build) == "igvm-limit"


def test_pages_may_not_wrap() -> None:
    def build(builder: IgvmBuilder) -> None:
        builder.parameter_area(0, 8192)
        builder.parameter_insert(2**64 - 4096, index=0)

    assert _code(build) == "igvm-address"


def test_a_header_section_beyond_the_bound_is_refused_before_it_is_read() -> None:
    size = MAX_HEADER_BYTES + 8
    image = struct.pack("<6I", 0x4D564749, 1, 24, size, 24 + size, 0) + bytes(size)
    started = time.perf_counter()
    with pytest.raises(FormatError) as caught:
        IgvmFile.parse(image)
    assert caught.value.code == "igvm-size"
    assert time.perf_counter() - started < 0.5


def test_the_writer_refuses_a_header_section_beyond_the_bound() -> None:
    platform = Header(HeaderType.SUPPORTED_PLATFORM, SupportedPlatform(1, 0, 2, 1, 0))
    pages = Header(HeaderType.PAGE_DATA, PageData(0, 1, 0, 0, 0, 0), MAX_HEADER_BYTES // 32)
    with pytest.raises(FormatError) as caught:
        IgvmFile(1, (platform, pages), memoryview(b"")).pack()
    assert caught.value.code == "igvm-size"


def test_platform_by_type() -> None:
    file = _small()
    assert file.platform(PlatformType.SEV_SNP).compatibility_mask == 1
    with pytest.raises(FormatError) as caught:
        file.platform(PlatformType.TDX)
    assert caught.value.code == "igvm-no-platform"


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_any_buffer(wrap: Callable[[bytes], bytes]) -> None:
    image = _small().pack()
    assert IgvmFile.parse(wrap(image)).pack() == image


def test_what_the_builder_is_given_does_not_change_the_file_later() -> None:
    data = bytearray(_PAGE)
    builder = IgvmBuilder()
    builder.platform(PlatformType.SEV_SNP)
    builder.page(0, data)
    data[:] = bytes(4096)
    assert bytes(builder.finish().data) == _PAGE


def test_parameters_need_their_area() -> None:
    assert _code(lambda b: b.parameter(HeaderType.MADT, index=3, byte_offset=0)) == "igvm-parameter-area"
    assert _code(lambda b: b.parameter_insert(0, index=3)) == "igvm-parameter-area"
    parameter, area = Parameter(0, 4096), ParameterArea(4096, 0, 0)

    def past_the_end(builder: IgvmBuilder) -> None:
        builder.add(HeaderType.PARAMETER_AREA, area)
        builder.add(HeaderType.VP_COUNT, parameter)

    assert _code(past_the_end) == "igvm-parameter-range"
