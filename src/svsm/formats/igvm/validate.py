# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a well-formed IGVM file may say: every rule that needs more than one field's width.

Rules that hold for a whole file are here; rules about one platform's launch (overlapping pages, total size, more
than one ID block) are in `svsm.formats.igvm.launch`, because a file may be wrong for one platform and fine for
another. Each check raises `FormatError`; the table in docs/igvm.md says which of them Microsoft's reader shares.
"""

from __future__ import annotations

from typing import Final

from svsm.formats.errors import FormatError
from svsm.formats.igvm.file import Header, IgvmFile, page_bytes
from svsm.formats.igvm.layout import (
    PAGE_SIZE,
    Corim,
    ErrorRange,
    GuestPolicy,
    HeaderType,
    PageData,
    PageDataType,
    PageFlag,
    PageTableRelocation,
    Parameter,
    ParameterArea,
    ParameterInsert,
    PlatformType,
    RelocatableRegion,
    RequiredMemory,
    SnpIdBlock,
    SupportedPlatform,
    VbsMeasurement,
    VpContext,
)
from svsm.formats.record import Record

__all__ = ["MAX_GPA", "MAX_PARAMETER_AREA_BYTES", "NATIVE_CONTEXT_BYTES", "validate"]

MAX_GPA: Final = 1 << 64
"""Nothing may wrap. Processors have at most 52 address bits; what a guest really has is for its loader to check."""

MAX_PARAMETER_AREA_BYTES: Final = 64 << 20
"""Of all areas together: they cost a loader memory, and a file may claim 2^64 bytes for 40 of its own."""

NATIVE_CONTEXT_BYTES: Final = 232
"""Bytes of a NATIVE or SEV context that mean something; the rest of the page must be zero."""

_ALL_FLAGS: Final = int(PageFlag.IS_2MB_PAGE | PageFlag.UNMEASURED | PageFlag.SHARED)
_REGION_FLAGS: Final = 7
_MAX_REGIONS: Final = 1024
_CORIM: Final = frozenset({HeaderType.CORIM_DOCUMENT, HeaderType.CORIM_SIGNATURE})
_VBS_REGISTER_BYTES: Final = 32
_MAX_VBS_REGISTERS: Final = 4096


def validate(file: IgvmFile) -> None:
    """Check a file as a whole.

    Raises:
        FormatError: With the ``igvm-*`` code of the first rule that is broken.
    """
    _Validator(file).run()


def _overlaps(ranges: list[tuple[int, int, int]], mask: int, gpa: int, size: int) -> bool:
    return any(other & mask and gpa < start + length and start < gpa + size for other, start, length in ranges)


class _Validator:
    def __init__(self, file: IgvmFile) -> None:
        self._file = file
        self._start = file.data_start
        self._platforms: dict[int, SupportedPlatform] = {}
        self._areas: dict[int, int | None] = {}
        self._area_bytes = 0
        self._documents = 0
        self._signatures = 0
        self._regions: list[tuple[int, int, int]] = []
        self._page_tables: list[tuple[int, int, int]] = []
        self._needed: list[tuple[int, int, int]] = []
        self._contexts: set[tuple[int, int, int]] = set()
        self._index = 0

    def run(self) -> None:
        for index, header in enumerate(self._file.headers):
            self._index = index
            if header.kind in _CORIM:
                self._corim(header)
            else:
                self._check(header.body, header.count)
        if not self._platforms:
            raise self._error("the file names no platform", "igvm-no-platform")
        present: dict[tuple[int, int], int] = {}
        for mask, vp_index, level in self._contexts:
            present[vp_index, level] = present.get((vp_index, level), 0) | mask
        for mask, vp_index, level in self._needed:
            if not mask & present.get((vp_index, level), 0):
                raise self._error("a relocation needs a VP context that is not there", "igvm-relocation", got=vp_index)

    def _check(self, body: Record, count: int) -> None:
        match body:
            case PageData():
                self._page(body, count)
            case SupportedPlatform():
                self._platform(body)
            case GuestPolicy():
                self._policy(body)
            case ParameterArea():
                self._area(body)
            case Parameter():
                self._parameter(body)
            case ParameterInsert():
                self._insert(body)
            case VpContext():
                self._context(body)
            case RelocatableRegion():
                self._region(body)
            case PageTableRelocation():
                self._page_table(body)
            case VbsMeasurement():
                pass  # a signature over the VSM platform's measurement: nothing to check without computing that
            case RequiredMemory():
                self._required_memory(body)
            case SnpIdBlock():
                self._id_block(body)
            case ErrorRange():
                self._error_range(body)
            case _:
                raise self._error("a header of no known kind", "igvm-unsupported-header")

    def _error(self, message: str, code: str, **details: int) -> FormatError:
        return FormatError(message, code=code, hint=None, header=self._index, **details)

    def _demand(self, holds: bool, message: str, code: str, got: int) -> None:
        if not holds:
            raise self._error(message, code, got=got)

    def _pages(self, gpa: int, size: int, what: str) -> None:
        if gpa % PAGE_SIZE or size % PAGE_SIZE:
            raise self._error(f"{what} is not page aligned", "igvm-alignment", gpa=gpa, size=size)
        if gpa + size > MAX_GPA:
            raise self._error(f"{what} is outside the address space", "igvm-address", gpa=gpa, size=size)

    def _data(self, file_offset: int, length: int) -> memoryview:
        return self._file.data_at(file_offset, length, start=self._start)

    def _platform(self, body: SupportedPlatform) -> None:
        kinds = {platform.platform_type for platform in self._platforms.values()}
        mask = body.compatibility_mask
        self._demand(mask.bit_count() == 1, "a platform needs exactly one mask bit", "igvm-mask", mask)
        self._demand(mask not in self._platforms, "two platforms share a mask bit", "igvm-duplicate", mask)
        if body.platform_type not in PlatformType.__members__.values():
            raise self._error("the platform is not supported", "igvm-unsupported-platform", got=body.platform_type)
        self._demand(body.platform_type not in kinds, "a platform twice", "igvm-duplicate", body.platform_type)
        self._demand(body.highest_vtl in (0, 2), "highest_vtl must be 0 or 2", "igvm-value", body.highest_vtl)
        self._demand(body.platform_version == 1, "unknown platform version", "igvm-value", body.platform_version)
        boundary = body.shared_gpa_boundary
        self._demand(boundary % PAGE_SIZE == 0, "the shared boundary is not page aligned", "igvm-alignment", boundary)
        self._demand(
            boundary == 0 or body.platform_type not in (PlatformType.NATIVE, PlatformType.VSM_ISOLATION),
            "this platform has no shared boundary",
            "igvm-value",
            boundary,
        )
        self._platforms[mask] = body

    def _policy(self, body: GuestPolicy) -> None:
        self._demand(body.reserved_0xc == 0, "reserved bytes are not zero", "igvm-reserved", body.reserved_0xc)

    def _area(self, body: ParameterArea) -> None:
        size, index = body.number_of_bytes, body.parameter_area_index
        self._demand(size % PAGE_SIZE == 0, "a parameter area has a partial page", "igvm-alignment", size)
        self._area_bytes += size
        self._demand(
            self._area_bytes <= MAX_PARAMETER_AREA_BYTES, "the parameter areas are too large", "igvm-limit", size
        )
        self._demand(index not in self._areas, "a parameter area index is declared twice", "igvm-duplicate", index)
        if body.file_offset:
            self._data(body.file_offset, size)
        self._areas[index] = size

    def _live_area(self, index: int) -> int:
        size = self._areas.get(index)
        if size is None:
            raise self._error("the parameter area does not exist (any more)", "igvm-parameter-area", got=index)
        return size

    def _parameter(self, body: Parameter) -> None:
        size = self._live_area(body.parameter_area_index)
        self._demand(
            body.byte_offset < size, "a parameter lies outside its area", "igvm-parameter-range", body.byte_offset
        )

    def _insert(self, body: ParameterInsert) -> None:
        size = self._live_area(body.parameter_area_index)
        self._pages(body.gpa, size, "a parameter insert")
        if _overlaps(self._page_tables, body.compatibility_mask, body.gpa, size):
            raise self._error("a parameter insert lies in the page tables", "igvm-relocation", gpa=body.gpa)
        self._areas[body.parameter_area_index] = None

    def _page(self, body: PageData, count: int) -> None:
        if body.flags & ~_ALL_FLAGS:
            raise self._error("a page has unknown flags", "igvm-flags", got=body.flags)
        if body.data_type > PageDataType.CPUID_XF:
            raise self._error("a page has an unknown data type", "igvm-value", got=body.data_type)
        if body.reserved_0x16:
            raise self._error("reserved bytes are not zero", "igvm-reserved", got=body.reserved_0x16)
        size = page_bytes(body)
        if body.gpa % size:
            raise self._error("a page is not aligned to its size", "igvm-alignment", gpa=body.gpa)
        if body.gpa + size * count > MAX_GPA:
            raise self._error("a page is outside the address space", "igvm-address", gpa=body.gpa)
        if body.file_offset:
            self._data(body.file_offset, size * count)

    def _context(self, body: VpContext) -> None:
        platform = self._platforms.get(body.compatibility_mask)
        if platform is None:
            raise self._error(
                "a VP context must be for exactly one platform of the file", "igvm-mask", got=body.compatibility_mask
            )
        self._demand(body.reserved_0x12 == 0, "reserved bytes are not zero", "igvm-reserved", body.reserved_0x12)
        self._pages(body.gpa, PAGE_SIZE, "a VP context")
        kind = platform.platform_type
        if kind == PlatformType.TDX:
            raise self._error("TDX has no VP context", "igvm-value", got=body.compatibility_mask)
        if kind == PlatformType.VSM_ISOLATION:
            self._once(body, level=self._vbs_level(body))
            return
        self._once(body, level=0)
        page = self._data(body.file_offset, PAGE_SIZE)
        if kind in (PlatformType.NATIVE, PlatformType.SEV) and any(page[NATIVE_CONTEXT_BYTES:]):
            raise self._error("the rest of a native context is not zero", "igvm-reserved", offset=body.file_offset)

    def _once(self, body: VpContext, *, level: int) -> None:
        key = (body.compatibility_mask, body.vp_index, level)
        self._demand(key not in self._contexts, "a processor has two contexts", "igvm-duplicate", body.vp_index)
        self._contexts.add(key)

    def _vbs_level(self, body: VpContext) -> int:
        count = int.from_bytes(self._data(body.file_offset, 4), "little")
        self._demand(0 < count <= _MAX_VBS_REGISTERS, "an impossible register count", "igvm-limit", count)
        registers = self._data(body.file_offset + 4, count * _VBS_REGISTER_BYTES)
        levels = set(registers[::_VBS_REGISTER_BYTES])
        if len(levels) != 1 or max(levels) > 2 or body.vp_index:
            raise self._error("a VBS context is for one level of processor 0", "igvm-value", got=body.vp_index)
        return max(levels)

    def _required_memory(self, body: RequiredMemory) -> None:
        self._pages(body.gpa, body.number_of_bytes, "required memory")
        self._demand(body.flags in (0, 1), "required memory has unknown flags", "igvm-flags", body.flags)
        self._demand(body.reserved_0x14 == 0, "reserved bytes are not zero", "igvm-reserved", body.reserved_0x14)

    def _id_block(self, body: SnpIdBlock) -> None:
        platform = self._platforms.get(body.compatibility_mask)
        if platform is None or platform.platform_type != PlatformType.SEV_SNP:
            raise self._error("an ID block must be for SEV-SNP", "igvm-mask", got=body.compatibility_mask)
        self._demand(not any(body.reserved_0x5), "reserved bytes are not zero", "igvm-reserved", 1)
        enabled = body.author_key_enabled
        self._demand(enabled in (0, 1), "author_key_enabled must be 0 or 1", "igvm-value", enabled)
        self._demand(body.version == 1, "unknown ID block version", "igvm-value", body.version)
        self._demand(body.id_key_algorithm == 1, "unknown ID key algorithm", "igvm-value", body.id_key_algorithm)
        algorithm = body.author_key_algorithm
        self._demand(algorithm == 1 or (not enabled and algorithm == 0), "unknown algorithm", "igvm-value", algorithm)

    def _region(self, body: RelocatableRegion) -> None:
        alignment, gpa, size = body.relocation_alignment, body.relocation_region_gpa, body.relocation_region_size
        if alignment.bit_count() != 1 or alignment % PAGE_SIZE:
            raise self._error("the alignment is no power of two of pages", "igvm-relocation", got=alignment)
        limits = body.minimum_relocation_gpa, body.maximum_relocation_gpa
        if any(value % alignment for value in (gpa, *limits)) or limits[0] > limits[1]:
            raise self._error("a relocatable region has impossible limits", "igvm-relocation", gpa=gpa)
        if body.vtl > 2 or body.flags & ~_REGION_FLAGS:
            raise self._error("a relocatable region has unknown flags", "igvm-flags", got=body.flags)
        self._movable(body.compatibility_mask, gpa, size)
        self._needed.append((body.compatibility_mask, body.vp_index, body.vtl))

    def _movable(self, mask: int, gpa: int, size: int) -> None:
        self._pages(gpa, size, "a relocation region")
        if not size or _overlaps(self._regions, mask, gpa, size):
            raise self._error("a relocation region is empty or overlaps another", "igvm-relocation", gpa=gpa)
        if len(self._regions) >= _MAX_REGIONS:
            raise self._error("too many relocation regions", "igvm-limit", expected=_MAX_REGIONS)
        self._regions.append((mask, gpa, size))

    def _page_table(self, body: PageTableRelocation) -> None:
        self._demand(body.reserved_0x7 == 0, "reserved bytes are not zero", "igvm-reserved", body.reserved_0x7)
        mask = body.compatibility_mask
        if body.used_size > body.size or body.used_size % PAGE_SIZE or body.vtl > 2:
            raise self._error("page tables have an impossible size", "igvm-relocation", got=body.used_size)
        if any(mask & other for other, *_ in self._page_tables):
            raise self._error("a platform has page tables twice", "igvm-duplicate", got=mask)
        self._movable(mask, body.gpa, body.size)
        self._page_tables.append((mask, body.gpa, body.size))
        self._needed.append((mask, body.vp_index, body.vtl))

    def _corim(self, header: Header) -> None:
        body = header.body
        if not isinstance(body, Corim):
            raise self._error("a header of no known kind", "igvm-unsupported-header")
        mask = body.compatibility_mask
        self._demand(body.reserved_0xc == 0, "reserved bytes are not zero", "igvm-reserved", body.reserved_0xc)
        self._data(body.file_offset, body.size_bytes)
        if header.kind == HeaderType.CORIM_DOCUMENT:
            self._demand(not self._documents & mask, "a platform has two CoRIM documents", "igvm-duplicate", mask)
            self._documents |= mask
        else:
            self._demand(not self._signatures & mask, "a document has two signatures", "igvm-duplicate", mask)
            self._demand(mask & ~self._documents == 0, "a signature without document", "igvm-value", mask)
            self._signatures |= mask

    def _error_range(self, body: ErrorRange) -> None:
        if body.gpa % PAGE_SIZE:
            raise self._error("an error range is not page aligned", "igvm-alignment", gpa=body.gpa)
        if body.gpa + body.size_bytes > MAX_GPA:
            raise self._error("an error range is outside the address space", "igvm-address", gpa=body.gpa)
