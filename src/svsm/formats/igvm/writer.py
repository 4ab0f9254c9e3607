# SPDX-License-Identifier: MIT OR Apache-2.0
"""Writing IGVM files: add headers in launch order, get bytes.

The writer places file data in the order of the headers that use it and stores equal blobs once, as Microsoft's
writer does, so a file made from the same directives has the same bytes. `IgvmBuilder.finish` checks the result
by the reader's rules: what we write, we would accept.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from svsm.formats.igvm.file import Header, IgvmFile, page_bytes
from svsm.formats.igvm.layout import (
    PAGE_SIZE,
    GuestPolicy,
    HeaderType,
    PageData,
    PageDataType,
    PageFlag,
    Parameter,
    ParameterArea,
    ParameterInsert,
    PlatformType,
    RequiredMemory,
    SnpIdBlock,
    SupportedPlatform,
    VpContext,
)
from svsm.formats.igvm.validate import validate
from svsm.formats.record import Buffer, Record

__all__ = ["IgvmBuilder"]


class IgvmBuilder:
    """Collects headers and their data.

    Args:
        format_version: 1 or 2.
        mask: The compatibility mask that headers get unless told otherwise.
    """

    def __init__(self, *, format_version: int = 1, mask: int = 1) -> None:
        self._format_version = format_version
        self._mask = mask
        self._headers: list[tuple[HeaderType, Record, bytes]] = []

    def add(self, kind: HeaderType, body: Record, data: Buffer = b"") -> None:
        """Append one header.

        Args:
            kind: The header type; `body` must be its record.
            body: Its `file_offset`, where it has one, is replaced.
            data: What `file_offset` shall point at, b"" for nothing.
        """
        self._headers.append((kind, body, bytes(data)))

    def platform(self, kind: PlatformType, *, shared_gpa_boundary: int = 0, highest_vtl: int = 0) -> None:
        """Append SUPPORTED_PLATFORM."""
        body = SupportedPlatform(self._mask, highest_vtl, kind, 1, shared_gpa_boundary)
        self.add(HeaderType.SUPPORTED_PLATFORM, body)

    def policy(self, policy: int) -> None:
        """Append GUEST_POLICY."""
        self.add(HeaderType.GUEST_POLICY, GuestPolicy(policy, self._mask, 0))

    def required_memory(self, gpa: int, size_bytes: int) -> None:
        """Append REQUIRED_MEMORY."""
        self.add(HeaderType.REQUIRED_MEMORY, RequiredMemory(gpa, self._mask, size_bytes, 0, 0))

    def parameter_area(self, index: int, size_bytes: int, initial: Buffer = b"") -> None:
        """Append PARAMETER_AREA; `initial` is empty or exactly `size_bytes` long."""
        self.add(HeaderType.PARAMETER_AREA, ParameterArea(size_bytes, index, 0), initial)

    def parameter(self, kind: HeaderType, *, index: int, byte_offset: int) -> None:
        """Append one of the parameter headers (`PARAMETER_TYPES`)."""
        self.add(kind, Parameter(index, byte_offset))

    def parameter_insert(self, gpa: int, *, index: int) -> None:
        """Append PARAMETER_INSERT."""
        self.add(HeaderType.PARAMETER_INSERT, ParameterInsert(gpa, self._mask, index))

    def page(
        self,
        gpa: int,
        data: Buffer = b"",
        *,
        data_type: PageDataType = PageDataType.NORMAL,
        flags: PageFlag = PageFlag.NONE,
    ) -> None:
        """Append PAGE_DATA; no `data` makes an empty page."""
        self.add(HeaderType.PAGE_DATA, PageData(gpa, self._mask, 0, flags, data_type, 0), data)

    def pages(self, gpa: int, data: Buffer) -> None:
        """Append PAGE_DATA for each 4 KiB of `data`, the last page padded with zeroes; every page has data.

        A page of zeroes is stored, not left empty, because loaders measure empty pages in two different ways.
        """
        view = memoryview(data).cast("B")
        for start in range(0, len(view), PAGE_SIZE):
            self.page(gpa + start, bytes(view[start : start + PAGE_SIZE]).ljust(PAGE_SIZE, b"\0"))

    def vp_context(self, gpa: int, data: Buffer, *, vp_index: int) -> None:
        """Append VP_CONTEXT; for SNP `data` is a 4096-byte VMSA."""
        self.add(HeaderType.VP_CONTEXT, VpContext(gpa, self._mask, 0, vp_index, 0), data)

    def id_block(self, body: SnpIdBlock) -> None:
        """Append SNP_ID_BLOCK."""
        self.add(HeaderType.SNP_ID_BLOCK, body)

    def finish(self) -> IgvmFile:
        """The checked file.

        Raises:
            FormatError: When what was added is not a valid file.
        """
        end = IgvmFile(self._format_version, tuple(Header(k, b) for k, b, _ in self._headers), _NO_DATA).data_start
        blobs: dict[bytes, int] = {}
        headers: list[Header] = []
        for kind, body, data in self._headers:
            offset = 0
            if data:
                offset = blobs.setdefault(data, end)
                if offset == end:
                    end += len(data)
            if not isinstance(body, PageData):
                placed = dataclasses.replace(body, file_offset=offset) if data else body  # type: ignore[type-var]  # records are dataclasses; only their decorator says so
                headers.append(Header(kind, placed))
            elif headers and _continues(headers[-1], body, offset):
                headers[-1] = Header(kind, headers[-1].body, headers[-1].count + 1)
            else:
                headers.append(Header(kind, body.replace(file_offset=offset)))
        made = IgvmFile(self._format_version, tuple(headers), memoryview(b"".join(blobs)))
        validate(made)
        return made


_NO_DATA: Final = memoryview(b"")


def _continues(run: Header, page: PageData, file_offset: int) -> bool:
    """Whether `page`, with its data at `file_offset`, is the next of a run (see `Header`)."""
    first = run.body
    if not isinstance(first, PageData):
        return False
    grown = run.count * page_bytes(first)
    return (
        page.gpa == first.gpa + grown
        and file_offset == (first.file_offset + grown if first.file_offset else 0)
        and page.flags == first.flags
        and page.data_type == first.data_type
        and page.compatibility_mask == first.compatibility_mask
        and page.reserved_0x16 == first.reserved_0x16
    )
