# SPDX-License-Identifier: MIT OR Apache-2.0
"""The launch that an IGVM file asks for, step by step: what a loader does and what a verifier measures.

Both walk the same iterator, so a page cannot be measured in one order and loaded in another. A step is one 4 KiB
page with its SNP page type, or None as type for a shared page, which is loaded but is no part of the guest's
private memory and so never reaches the AMD-SP.

Decisions where loaders or tools differ (docs/igvm.md has the reasons):

* An empty page is a NORMAL page of zeroes, as QEMU and Hyper-V launch it; ``native_zero`` makes it a ZERO page.
* A 2 MiB page is 512 steps, with its own 2 MiB of data or none.
* A parameter insert is one UNMEASURED page for each page of its area.
* A shared page is loaded, not measured; a VP context counts only for its own platform.
* ``Order.FILE`` is the order of the headers. KVM launches VMSAs at LAUNCH_FINISH, after all pages: ``Order.KVM``.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Final, NamedTuple

from svsm.formats.errors import FormatError
from svsm.formats.igvm.file import IgvmFile
from svsm.formats.igvm.layout import (
    PAGE_SIZE,
    GuestPolicy,
    PageData,
    PageDataType,
    PageFlag,
    ParameterArea,
    ParameterInsert,
    PlatformType,
    SnpIdBlock,
    VpContext,
)
from svsm.formats.igvm.validate import PAGE_2MB
from svsm.formats.snp.page_info import PageType

__all__ = ["MAX_LAUNCH_PAGES", "LaunchStep", "Order", "StepKind", "guest_policy", "id_block_header", "plan"]

MAX_LAUNCH_PAGES: Final = 1 << 21
"""Eight GiB: bounds the work that a small file (2 MiB flags, large parameter areas) can ask for."""


class StepKind(enum.Enum):
    """Where a step comes from, for the loader."""

    PAGE = "page"
    SECRETS = "secrets"
    CPUID = "cpuid"
    PARAMETER = "parameter"
    SHARED = "shared"
    VMSA = "vmsa"


class Order(enum.Enum):
    """In which order VMSAs are launched."""

    FILE = "file"
    KVM = "kvm"


class LaunchStep(NamedTuple):
    """One 4 KiB page of a launch."""

    page_type: PageType | None
    """None: shared, not measured."""
    gpa: int
    contents: memoryview | None
    """4096 bytes, None for zeroes."""
    kind: StepKind
    number: int
    """VMSA: vp_index; PARAMETER: area index; otherwise 0."""
    offset: int
    """PARAMETER: byte offset of this page in its area; otherwise 0."""
    source: int
    """File offset of `contents`, 0 without: equal offsets are equal contents."""


def plan(
    file: IgvmFile,
    platform: PlatformType = PlatformType.SEV_SNP,
    *,
    order: Order = Order.FILE,
    native_zero: bool = False,
) -> Iterator[LaunchStep]:
    """The launch of `file`, page by page.

    Args:
        file: A parsed file.
        platform: Only SEV_SNP.
        order: See `Order`.
        native_zero: Empty pages are ZERO pages.

    Raises:
        FormatError: ``igvm-no-platform``, ``igvm-unsupported-platform``; ``igvm-overlap`` when a page is launched
            twice; ``igvm-limit`` beyond `MAX_LAUNCH_PAGES`. The last two come while iterating.
    """
    if platform != PlatformType.SEV_SNP:
        raise FormatError("only SEV-SNP launches are supported", code="igvm-unsupported-platform", got=platform.name)
    mask = file.platform(platform).compatibility_mask
    return _Planner(file, mask, native_zero=native_zero).run(order)


class _Planner:
    def __init__(self, file: IgvmFile, mask: int, *, native_zero: bool) -> None:
        self._file = file
        self._mask = mask
        self._start = file.data_start
        self._empty = PageType.ZERO if native_zero else PageType.NORMAL
        self._areas: dict[int, ParameterArea] = {}
        self._seen: set[int] = set()

    def run(self, order: Order) -> Iterator[LaunchStep]:
        contexts: list[VpContext] = []
        seen, mask, data, start = self._seen, self._mask, self._file.data, self._start
        plain = StepKind.PAGE, 0, 0
        normal = PageType.NORMAL
        for header in self._file.headers:
            body = header.body
            if isinstance(body, PageData):
                if not body.compatibility_mask & mask:
                    continue
                offset = body.file_offset
                if offset and not (body.flags or body.data_type):  # most pages, and the hot path
                    gpa = body.gpa
                    if gpa in seen or len(seen) >= MAX_LAUNCH_PAGES:
                        raise self._refusal(gpa)
                    seen.add(gpa)
                    first = offset - start
                    yield LaunchStep(normal, gpa, data[first : first + PAGE_SIZE], *plain, offset)
                else:
                    yield from self._page(body)
            elif isinstance(body, ParameterArea):
                self._areas[body.parameter_area_index] = body
            elif isinstance(body, ParameterInsert):
                if body.compatibility_mask & mask:
                    yield from self._insert(body)
            elif isinstance(body, VpContext) and body.compatibility_mask & mask:
                if order is Order.KVM:
                    contexts.append(body)
                else:
                    yield self._context(body)
        for body in contexts:
            yield self._context(body)

    def _refusal(self, gpa: int) -> FormatError:
        if gpa in self._seen:
            return FormatError("a page is launched twice", code="igvm-overlap", gpa=gpa)
        return FormatError("the launch has too many pages", code="igvm-limit", expected=MAX_LAUNCH_PAGES)

    def _claim(self, gpa: int) -> int:
        if gpa in self._seen or len(self._seen) >= MAX_LAUNCH_PAGES:
            raise self._refusal(gpa)
        self._seen.add(gpa)
        return gpa

    def _slice(self, file_offset: int, position: int) -> tuple[memoryview | None, int]:
        """4096 bytes at `position` of the data at `file_offset`, and their own file offset."""
        if not file_offset:
            return None, 0
        source = file_offset + position
        return self._file.data_at(source, PAGE_SIZE, start=self._start), source

    def _page(self, body: PageData) -> Iterator[LaunchStep]:
        kind, page_type = self._classify(body)
        size = PAGE_2MB if body.flags & PageFlag.IS_2MB_PAGE else PAGE_SIZE
        for position in range(0, size, PAGE_SIZE):
            contents, source = self._slice(body.file_offset, position)
            yield LaunchStep(page_type, self._claim(body.gpa + position), contents, kind, 0, 0, source)

    def _classify(self, body: PageData) -> tuple[StepKind, PageType | None]:
        if body.flags & PageFlag.SHARED:
            return StepKind.SHARED, None
        if body.data_type == PageDataType.SECRETS:
            return StepKind.SECRETS, PageType.SECRETS
        if body.data_type in (PageDataType.CPUID_DATA, PageDataType.CPUID_XF):
            return StepKind.CPUID, PageType.CPUID
        if body.flags & PageFlag.UNMEASURED:
            return StepKind.PAGE, PageType.UNMEASURED
        return StepKind.PAGE, PageType.NORMAL if body.file_offset else self._empty

    def _insert(self, body: ParameterInsert) -> Iterator[LaunchStep]:
        area = self._areas[body.parameter_area_index]  # `validate` has seen it declared
        for position in range(0, area.number_of_bytes, PAGE_SIZE):
            contents, source = self._slice(area.file_offset, position)
            yield LaunchStep(
                PageType.UNMEASURED,
                self._claim(body.gpa + position),
                contents,
                StepKind.PARAMETER,
                body.parameter_area_index,
                position,
                source,
            )

    def _context(self, body: VpContext) -> LaunchStep:
        contents, source = self._slice(body.file_offset, 0)
        return LaunchStep(PageType.VMSA, body.gpa, contents, StepKind.VMSA, body.vp_index, 0, source)


def guest_policy(file: IgvmFile, platform: PlatformType = PlatformType.SEV_SNP) -> int | None:
    """The launch policy of a platform, or None: then the host chooses it, and the digest does not show it.

    Raises:
        FormatError: ``igvm-duplicate`` when there are several: which one a loader would use is not defined.
    """
    mask = file.platform(platform).compatibility_mask
    found = [
        h.body.policy for h in file.headers if isinstance(h.body, GuestPolicy) and h.body.compatibility_mask & mask
    ]
    if len(found) > 1:
        raise FormatError("the file has more than one guest policy", code="igvm-duplicate", got=len(found))
    return found[0] if found else None


def id_block_header(file: IgvmFile) -> SnpIdBlock | None:
    """The ID block header of the SNP launch, None without.

    Raises:
        FormatError: ``igvm-duplicate`` when there are several: which one a loader would use is not defined.
    """
    mask = file.platform(PlatformType.SEV_SNP).compatibility_mask
    found = [h.body for h in file.headers if isinstance(h.body, SnpIdBlock) and h.body.compatibility_mask & mask]
    if len(found) > 1:
        raise FormatError("the file has more than one ID block", code="igvm-duplicate", got=len(found))
    return found[0] if found else None
