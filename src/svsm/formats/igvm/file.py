# SPDX-License-Identifier: MIT OR Apache-2.0
"""An IGVM file as a value: headers in file order and the file data they point into.

`IgvmFile.parse` takes the file apart strictly and then checks it (`svsm.formats.igvm.validate`); an object that
exists has passed. Offsets in the bodies stay what they are in the file, so ``parse(x).pack() == x`` holds for
every accepted file, whoever wrote it, and the digest loop can recognise shared data by its offset.

Strict on purpose, where Microsoft's reader is lenient: no gap between fixed and variable headers, zero padding, and
no header type that this code does not know, not even one marked optional: a measurement that skipped something
would be a measurement of another guest. Lenient on purpose: a file without file data (the format allows it), data
that no header uses, data at odd offsets, mask bits that no platform has (COCONUT's builder writes those).

The checksum covers headers only; damaged file data shows as another launch digest.
"""

from __future__ import annotations

import dataclasses
import struct
import zlib
from collections.abc import Iterator
from typing import Final, Self

from svsm.formats.errors import FormatError
from svsm.formats.igvm.layout import (
    BODY_TYPES,
    MAGIC,
    OPTIONAL_BIT,
    PAGE_2MB,
    PAGE_SIZE,
    FixedHeaderV1,
    FixedHeaderV2,
    HeaderHead,
    HeaderType,
    PageData,
    PageFlag,
    PlatformType,
    SupportedPlatform,
)
from svsm.formats.record import Buffer, Record

__all__ = ["MAX_HEADER_BYTES", "Header", "IgvmFile", "page_bytes"]

MAX_HEADER_BYTES: Final = 16 << 20
"""Upper bound for the variable header section: half a million page headers, two GiB of guest memory."""

_FIXED: Final[dict[int, type[FixedHeaderV1] | type[FixedHeaderV2]]] = {1: FixedHeaderV1, 2: FixedHeaderV2}
_PAGE_HEADER: Final = struct.Struct("<IIQIIIHH")
"""Head and body of PAGE_DATA in one: the only header that files have thousands of."""
_BODIES: Final = {int(kind): (kind, body) for kind, body in BODY_TYPES.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """One variable header, or a run of PAGE_DATA headers.

    A run is what real images consist of: thousands of headers that differ only in that address, and file offset
    unless it is 0, grow by a page from one to the next. `body` is the first of them. Files hold maximal runs.
    """

    kind: HeaderType
    body: Record
    count: int = 1

    def each(self) -> Iterator[Record]:
        """The bodies, one by one."""
        body = self.body
        yield body
        if isinstance(body, PageData):
            size = page_bytes(body)
            for index in range(1, self.count):
                offset = body.file_offset + index * size if body.file_offset else 0
                yield body.replace(gpa=body.gpa + index * size, file_offset=offset)


@dataclasses.dataclass(frozen=True, slots=True)
class IgvmFile:
    """A checked IGVM file.

    Args:
        format_version: 1 or 2.
        headers: In file order, which is the launch order.
        data: The file data section, everything after the variable headers.
    """

    format_version: int
    headers: tuple[Header, ...]
    data: memoryview = dataclasses.field(repr=False)

    @classmethod
    def parse(cls, image: Buffer) -> Self:
        """Read and check a whole file.

        Args:
            image: The file. It is not copied: it must not change while the result is in use.

        Raises:
            FormatError: With an ``igvm-*`` code; ``igvm-unsupported-header`` for a header type not known here.
        """
        from svsm.formats.igvm.validate import validate

        view = memoryview(image).cast("B").toreadonly()
        fixed = _parse_fixed(view)
        start = fixed.variable_header_offset
        end = start + fixed.variable_header_size
        headers = tuple(_parse_headers(view[start:end], start))
        made = cls(fixed.format_version, headers, view[end:])
        validate(made)
        return made

    def pack(self) -> bytes:
        """The file's bytes, with a fresh checksum.

        Raises:
            FormatError: ``igvm-size`` when the file would not fit its 32-bit sizes; ``record-width``.
        """
        kind = _FIXED[self.format_version]
        total = self.data_start + len(self.data)
        if total >= 1 << 32 or self.data_start - kind.SIZE > MAX_HEADER_BYTES:
            raise FormatError("the file is too large for the format", code="igvm-size", got=total)
        section = b"".join(part for header in self.headers for part in _pack_header(header))
        words = (MAGIC, self.format_version, kind.SIZE, len(section), total)
        if kind is FixedHeaderV2:
            blank = FixedHeaderV2(*words, 0, 0, PAGE_SIZE).pack()
        else:
            blank = FixedHeaderV1(*words, 0).pack()
        checksum = zlib.crc32(section, zlib.crc32(blank))
        return b"".join((blank[:20], checksum.to_bytes(4, "little"), blank[24:], section, self.data))

    @property
    def data_start(self) -> int:
        """Offset of `data` in the file: what `file_offset` values are relative to, negatively speaking."""
        fixed = _FIXED[self.format_version].SIZE
        return fixed + sum(packed_size_bytes(header.body.SIZE) * header.count for header in self.headers)

    def data_at(self, file_offset: int, length: int, *, start: int) -> memoryview:
        """`length` bytes of file data at `file_offset`.

        Args:
            file_offset: From the start of the file.
            length: Bytes.
            start: `data_start`, which the caller computes once.

        Raises:
            FormatError: ``igvm-data-range`` when they are not all inside the file data.
        """
        first = file_offset - start
        if first < 0 or length < 0 or first + length > len(self.data):
            raise FormatError(
                "a header points outside the file data",
                code="igvm-data-range",
                offset=file_offset,
                expected=length,
                got=max(0, len(self.data) - max(first, 0)),
            )
        return self.data[first : first + length]

    def platforms(self) -> Iterator[SupportedPlatform]:
        """The platforms, in file order."""
        return (header.body for header in self.headers if isinstance(header.body, SupportedPlatform))

    def platform(self, kind: PlatformType) -> SupportedPlatform:
        """The entry of one platform.

        Raises:
            FormatError: ``igvm-no-platform`` when the file is not for that platform.
        """
        for platform in self.platforms():
            if platform.platform_type == kind:
                return platform
        raise FormatError(f"the file has no {kind.name} platform", code="igvm-no-platform", expected=kind.name)


def packed_size_bytes(length: int) -> int:
    """Size of a variable header whose body has `length` bytes: head, body, padding to 8."""
    return HeaderHead.SIZE + length + (-length % 8)


def page_bytes(page: PageData) -> int:
    """4096, or 2 MiB with the flag for that."""
    return PAGE_2MB if page.flags & PageFlag.IS_2MB_PAGE else PAGE_SIZE


def _pack_header(header: Header) -> Iterator[bytes]:
    body = header.body.pack()
    head = HeaderHead(header.kind, len(body)).pack()
    yield head + body + bytes(-len(body) % 8)
    if isinstance(header.body, PageData) and header.count > 1:
        page, size = header.body, page_bytes(header.body)
        step = size if page.file_offset else 0
        tail = page.flags, page.data_type, page.reserved_0x16
        for index in range(1, header.count):
            gpa, offset = page.gpa + index * size, page.file_offset + index * step
            if gpa >> 64 or offset >> 32:
                raise FormatError("a run of pages leaves its fields", code="igvm-address", gpa=gpa)
            yield _PAGE_HEADER.pack(header.kind, PageData.SIZE, gpa, page.compatibility_mask, offset, *tail)


def _parse_fixed(view: memoryview) -> FixedHeaderV1 | FixedHeaderV2:
    first = FixedHeaderV1.parse_at(view, 0)
    if first.magic != MAGIC:
        raise FormatError(
            "this is not an IGVM file",
            code="igvm-magic",
            hint="name an .igvm file; a firmware image (.fd) goes to `svsm igvm measure --ovmf`",
            expected=MAGIC,
            got=first.magic,
        )
    kind = _FIXED.get(first.format_version)
    if kind is None:
        raise FormatError("unknown IGVM format version", code="igvm-version", got=first.format_version)
    fixed = kind.parse_at(view, 0)
    if fixed.total_file_size != len(view):
        raise FormatError(
            "the file does not have the size that it states",
            code="igvm-size",
            expected=fixed.total_file_size,
            got=len(view),
        )
    if fixed.variable_header_offset != kind.SIZE:
        raise FormatError(
            "the variable headers do not follow the fixed header",
            code="igvm-header-gap",
            expected=kind.SIZE,
            got=fixed.variable_header_offset,
        )
    size = fixed.variable_header_size
    if size > min(MAX_HEADER_BYTES, len(view) - kind.SIZE) or size % 8:
        raise FormatError("the variable header section has an impossible size", code="igvm-size", got=size)
    _check_checksum(view, fixed, kind.SIZE)
    if isinstance(fixed, FixedHeaderV2) and (fixed.architecture, fixed.page_size) != (0, PAGE_SIZE):
        raise FormatError(
            "only x64 files with 4 KiB pages are supported",
            code="igvm-unsupported-architecture",
            architecture=fixed.architecture,
            page_size=fixed.page_size,
        )
    return fixed


def _check_checksum(view: memoryview, fixed: FixedHeaderV1 | FixedHeaderV2, fixed_size: int) -> None:
    blank = fixed.replace(checksum=0).pack()
    section = view[fixed_size : fixed_size + fixed.variable_header_size]
    checksum = zlib.crc32(section, zlib.crc32(blank))
    if checksum != fixed.checksum:
        raise FormatError(
            "the header checksum does not match", code="igvm-checksum", expected=checksum, got=fixed.checksum
        )


def _parse_headers(section: memoryview, start: int) -> Iterator[Header]:
    """Yields the variable headers of `section`, which starts at file offset `start`."""
    position = 0
    previous = 0
    head_at = HeaderHead.parse_at
    while position < len(section):
        head = head_at(section, position)
        known = _BODIES.get(head.header_type)
        if known is None:
            raise _unsupported(head, start + position)
        kind, body = known
        if head.length != body.SIZE:
            raise FormatError(
                f"a {kind.name} header has the wrong length",
                code="igvm-header-length",
                offset=start + position,
                expected=body.SIZE,
                got=head.length,
            )
        section_number = kind >> 8
        if section_number < previous:
            raise FormatError(
                f"a {kind.name} header comes after a later section", code="igvm-header-order", offset=start + position
            )
        previous = section_number
        body_at = position + HeaderHead.SIZE
        parsed = body.parse_at(section, body_at)
        position = body_at + head.length
        if isinstance(parsed, PageData):
            count = 1 + _followers(parsed, section[position:])
            yield Header(kind, parsed, count)
            position += (count - 1) * _PAGE_HEADER.size
            continue
        yield Header(kind, parsed)
        padding = section[position : position + (-head.length % 8)]
        if any(padding):
            raise FormatError("header padding is not zero", code="igvm-padding", offset=start + position)
        position += len(padding)


def _followers(first: PageData, rest: memoryview) -> int:
    """How many PAGE_DATA headers at the start of `rest` continue the run that `first` begins."""
    size = page_bytes(first)
    step = size if first.file_offset else 0
    gpa, offset = first.gpa, first.file_offset
    tail = first.flags, first.data_type, first.reserved_0x16
    mask = first.compatibility_mask
    count = 0
    usable = len(rest) - len(rest) % _PAGE_HEADER.size
    for header_type, length, next_gpa, next_mask, next_offset, *next_tail in _PAGE_HEADER.iter_unpack(rest[:usable]):
        gpa += size
        offset += step
        if next_gpa != gpa or next_offset != offset or header_type != HeaderType.PAGE_DATA:
            break
        if length != PageData.SIZE or next_mask != mask or tuple(next_tail) != tail:
            break
        count += 1
    return count


def _unsupported(head: HeaderHead, offset: int) -> FormatError:
    return FormatError(
        "the file has a header of a type that is not supported",
        code="igvm-unsupported-header",
        hint="it is not skipped, because what it asks of the loader would not be in the measurement",
        offset=offset,
        header_type=head.header_type,
        optional=bool(head.header_type & OPTIONAL_BIT),
    )
