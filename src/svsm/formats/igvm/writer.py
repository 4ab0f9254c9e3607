# SPDX-License-Identifier: MIT OR Apache-2.0
"""Writing IGVM files: add headers in launch order, get bytes.

The writer places file data in the order of the headers that use it and stores equal blobs once, as Microsoft's
writer does, so a file made from the same directives has the same bytes. `IgvmBuilder.finish` puts the result
through the reader: what we write, we would accept.
"""

from __future__ import annotations

import dataclasses

from svsm.formats.igvm.file import Header, IgvmFile
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
        blank = tuple(Header(kind, body) for kind, body, _ in self._headers)
        start = IgvmFile(self._format_version, blank, memoryview(b"")).data_start
        blobs: dict[bytes, int] = {}
        parts: list[bytes] = []
        headers: list[Header] = []
        end = start
        for kind, body, data in self._headers:
            if data:
                offset = blobs.get(data)
                if offset is None:
                    blobs[data] = offset = end
                    parts.append(data)
                    end += len(data)
                body = dataclasses.replace(body, file_offset=offset)  # type: ignore[type-var]
            headers.append(Header(kind, body))
        made = IgvmFile(self._format_version, tuple(headers), memoryview(b"".join(parts)))
        return IgvmFile.parse(made.pack())
