# SPDX-License-Identifier: MIT OR Apache-2.0
"""Any bytes, and any damage to a real file, give a file that packs to the same bytes, or an `SvsmError`."""

from __future__ import annotations

import functools
import struct
import zlib

from hypothesis import given
from hypothesis import strategies as st

from svsm.formats.errors import SvsmError
from svsm.formats.igvm import HeaderType, IgvmBuilder, IgvmFile, PageDataType, PageFlag, PlatformType, plan, plan_runs
from svsm.formats.snp.digest import LaunchDigest
from svsm.launch.build import build_image
from svsm.launch.digest import launch_digest
from svsm.launch.inspect import describe


def _resealed(data: bytes) -> bytes:
    size = min(struct.unpack_from("<I", data, 12)[0], len(data))
    blank = data[:16] + struct.pack("<II", len(data), 0) + data[24:]
    return blank[:20] + struct.pack("<I", zlib.crc32(blank[: 24 + size])) + blank[24:]


def _exercise(image: bytes) -> None:
    try:
        file = IgvmFile.parse(image)
        assert file.pack() == image
        assert describe(file)["headers"] == sum(header.count for header in file.headers)
        launch_digest(file)
    except SvsmError:
        pass


@given(st.binary(max_size=400))
def test_any_bytes(data: bytes) -> None:
    _exercise(data)
    start = struct.pack("<6I", 0x4D564749, 1, 24, len(data) & ~7, 0, 0)
    _exercise(_resealed(start + data))


@functools.cache
def _base() -> bytes:
    return build_image(loader=b"l" * 5000, archive=b"a" * 9000, settings=b"s")


@given(st.lists(st.tuples(st.integers(24, 500), st.sampled_from([1, 2, 4, 0x80, 0xFF])), min_size=1, max_size=4))
def test_damaged_headers_with_a_right_checksum(changes: list[tuple[int, int]]) -> None:
    data = bytearray(_base())
    for position, bits in changes:
        data[position] ^= bits
    _exercise(_resealed(bytes(data)))


@given(st.integers(24, 480), st.integers(0, 200), st.integers(0, 200))
def test_headers_cut_out_or_doubled(start: int, cut: int, doubled: int) -> None:
    base = _base()
    start &= ~7
    spliced = base[:start] + base[start : start + (doubled & ~7)] + base[start + (cut & ~7) :]
    size = struct.unpack_from("<I", base, 12)[0] + (doubled & ~7) - (cut & ~7)
    if size > 0:
        _exercise(_resealed(spliced[:12] + struct.pack("<I", size) + spliced[16:]))


_page = st.tuples(
    st.integers(0, 600),
    st.sampled_from([0, 1, 2, 3]),
    st.sampled_from(list(PageDataType)),
    st.sampled_from([PageFlag.NONE, PageFlag.UNMEASURED, PageFlag.SHARED]),
)


@given(st.lists(_page, max_size=30, unique_by=lambda page: page[0]), st.integers(0, 3), st.sampled_from([1, 2]))
def test_what_the_writer_makes_the_reader_reads(
    pages: list[tuple[int, int, PageDataType, PageFlag]], area_pages: int, version: int
) -> None:
    builder = IgvmBuilder(format_version=version)
    builder.platform(PlatformType.SEV_SNP)
    builder.parameter_area(9, area_pages * 4096)
    if area_pages:
        builder.parameter(HeaderType.VP_COUNT, index=9, byte_offset=0)
    builder.parameter_insert(0x1000000, index=9)
    for number, fill, data_type, flags in pages:
        builder.page(number * 4096, bytes([fill]) * 4096 if fill else b"", data_type=data_type, flags=flags)
    file = builder.finish()
    assert IgvmFile.parse(file.pack()) == file
    steps = list(plan(file))
    assert len(steps) == area_pages + len(pages)
    for step, (number, fill, *_) in zip(steps[area_pages:], pages, strict=True):
        assert step.gpa == number * 4096
        assert step.contents == (bytes([fill]) * 4096 if fill else None)
    slow = LaunchDigest()
    for step in steps:
        if step.page_type is not None:
            slow.update(step.page_type, step.gpa, step.contents)
    assert launch_digest(file) == slow.value
    assert sum(run.pages for run in plan_runs(file)) == len(steps)
