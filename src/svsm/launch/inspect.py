# SPDX-License-Identifier: MIT OR Apache-2.0
"""What is in an IGVM file, as data for printing: no decisions, no digests.

Pages are shown as ranges: consecutive PAGE_DATA headers with consecutive addresses and the same meaning are one
line, because a real image has thousands of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final

from svsm.formats.igvm import Header, HeaderType, IgvmFile, PageDataType, PageFlag, PlatformType
from svsm.formats.igvm.file import page_bytes
from svsm.formats.igvm.layout import PageData, SupportedPlatform, VpContext
from svsm.formats.record import Record
from svsm.formats.snp.vmsa import VMSA_FIELDS, Vmsa, VmsaView

__all__ = ["Description", "describe"]

Description = dict[str, object]

_HEXADECIMAL: Final = ("gpa", "mask", "policy", "boundary", "number_of_bytes", "size")


def describe(file: IgvmFile) -> Description:
    """All headers of `file` in order, pages in ranges.

    Returns:
        JSON-able data with the keys ``format_version``, ``headers`` (their number), ``file_data_bytes``,
        ``platforms`` and ``launch`` (list of headers after the platforms). Addresses and masks are hexadecimal
        strings; every entry has ``header``.
    """
    return {
        "format_version": file.format_version,
        "headers": sum(header.count for header in file.headers),
        "file_data_bytes": len(file.data),
        "platforms": [_platform(platform) for platform in file.platforms()],
        "launch": list(_launch(file)),
    }


def _platform(platform: SupportedPlatform) -> Description:
    return {
        "platform": PlatformType(platform.platform_type).name,
        "mask": hex(platform.compatibility_mask),
        "highest_vtl": platform.highest_vtl,
        "shared_gpa_boundary": hex(platform.shared_gpa_boundary),
    }


def _launch(file: IgvmFile) -> Iterator[Description]:
    open_range: _Range | None = None
    start = file.data_start
    kinds = {platform.compatibility_mask: platform.platform_type for platform in file.platforms()}
    for header in file.headers:
        body = header.body
        if isinstance(body, PageData):
            if open_range is not None and open_range.extend(body, header.count):
                continue
            if open_range is not None:
                yield open_range.describe()
            open_range = _Range(body, header.count)
            continue
        if open_range is not None:
            yield open_range.describe()
            open_range = None
        if isinstance(body, VpContext):
            yield _context(file, body, kinds[body.compatibility_mask], start)
        elif not isinstance(body, SupportedPlatform):
            yield _fields(header)
    if open_range is not None:
        yield open_range.describe()


class _Range:
    """Consecutive pages of one kind."""

    def __init__(self, first: PageData, count: int) -> None:
        self._first = first
        self._page_bytes = page_bytes(first)
        self._pages = count

    def _kind(self, page: PageData) -> tuple[int, int, int, bool]:
        return page.compatibility_mask, page.flags, page.data_type, bool(page.file_offset)

    def extend(self, page: PageData, count: int) -> bool:
        """Take `count` pages from `page` on in if they continue the range."""
        if self._kind(page) != self._kind(self._first):
            return False
        if page.gpa != self._first.gpa + self._pages * self._page_bytes:
            return False
        self._pages += count
        return True

    def describe(self) -> Description:
        """The range as one entry."""
        first = self._first
        flags = [flag.name.lower() for flag in PageFlag if flag & first.flags and flag.name]
        return {
            "header": HeaderType.PAGE_DATA.name,
            "gpa": hex(first.gpa),
            "size_bytes": hex(self._pages * self._page_bytes),
            "mask": hex(first.compatibility_mask),
            "type": PageDataType(first.data_type).name,
            "flags": flags,
            "content": "data" if first.file_offset else "empty",
        }


def _context(file: IgvmFile, body: VpContext, platform: int, start: int) -> Description:
    shown: Description = {
        "header": HeaderType.VP_CONTEXT.name,
        "gpa": hex(body.gpa),
        "mask": hex(body.compatibility_mask),
        "platform": PlatformType(platform).name,
        "vp_index": body.vp_index,
    }
    if platform in (PlatformType.SEV_SNP, PlatformType.SEV_ES):
        page = file.data_at(body.file_offset, Vmsa.SIZE, start=start)
        view = VmsaView(bytearray(page))
        shown["registers"] = {name: hex(value) for name in VMSA_FIELDS if (value := view.get(name))}
    return shown


def _fields(header: Header) -> Description:
    shown: Description = {"header": header.kind.name}
    for name, value in _flatten(header.body):
        if name.startswith("reserved"):
            continue
        short = "mask" if name == "compatibility_mask" else name
        if isinstance(value, bytes):
            shown[short] = value.hex()
        elif isinstance(value, int):
            shown[short] = hex(value) if any(word in short for word in _HEXADECIMAL) else value
    return shown


def _flatten(body: Record, prefix: str = "") -> Iterator[tuple[str, object]]:
    for field in dataclasses.fields(body):  # type: ignore[arg-type]  # records are dataclasses; only their decorator says so
        value = getattr(body, field.name)
        if isinstance(value, Record):
            yield from _flatten(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value
