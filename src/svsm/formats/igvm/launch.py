# SPDX-License-Identifier: MIT OR Apache-2.0
"""The launch that an IGVM file asks for, step by step: what a loader does and what a verifier measures.

Both walk the same plan, so a page cannot be measured in one order and loaded in another. A step is a run of 4 KiB
pages with their SNP page type, or None as type for shared pages, which are loaded but are no part of the guest's
private memory and so never reach the AMD-SP.

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
from svsm.formats.igvm.file import IgvmFile, page_bytes
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
from svsm.formats.snp.page_info import PageType

__all__ = [
    "MAX_LAUNCH_PAGES",
    "MAX_RUN_PAGES",
    "LaunchStep",
    "Order",
    "StepKind",
    "guest_policy",
    "id_block_header",
    "plan",
    "plan_runs",
]

MAX_LAUNCH_PAGES: Final = 1 << 20
"""Four GiB: bounds the work that a small file (2 MiB flags, large parameter areas) can ask for."""


MAX_RUN_PAGES: Final = 4096
"""So that whoever holds something per page of a run holds little."""


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
    """Consecutive 4 KiB pages of a launch that are launched alike."""

    page_type: PageType | None
    """None: shared, not measured."""
    gpa: int
    """Of the first page."""
    contents: memoryview | None
    """`pages` times 4096 bytes, None for zeroes."""
    kind: StepKind
    number: int
    """VMSA: vp_index; PARAMETER: area index; otherwise 0."""
    offset: int
    """PARAMETER: byte offset of the first page in its area; otherwise 0."""
    source: int
    """File offset of `contents`, 0 without."""
    pages: int
    """1 from `plan`; 1 to `MAX_RUN_PAGES` from `plan_runs`."""


def plan(
    file: IgvmFile,
    platform: PlatformType = PlatformType.SEV_SNP,
    *,
    order: Order = Order.FILE,
    native_zero: bool = False,
) -> Iterator[LaunchStep]:
    """The launch of `file`, page by page: `plan_runs` taken apart."""
    for run in plan_runs(file, platform, order=order, native_zero=native_zero):
        page_type, gpa, contents, kind, number, offset, source, pages = run
        for start in range(0, pages * PAGE_SIZE, PAGE_SIZE):
            yield LaunchStep(
                page_type,
                gpa + start,
                None if contents is None else contents[start : start + PAGE_SIZE],
                kind,
                number,
                offset + start if kind is StepKind.PARAMETER else 0,
                source + start if source else 0,
                1,
            )


def plan_runs(
    file: IgvmFile,
    platform: PlatformType = PlatformType.SEV_SNP,
    *,
    order: Order = Order.FILE,
    native_zero: bool = False,
) -> Iterator[LaunchStep]:
    """The launch of `file`, run by run.

    Args:
        file: A parsed file.
        platform: Only SEV_SNP.
        order: See `Order`.
        native_zero: Empty pages are ZERO pages.

    Raises:
        FormatError: ``igvm-no-platform``, ``igvm-unsupported-platform``; ``igvm-overlap`` when a page is launched
            twice; ``igvm-limit`` beyond `MAX_LAUNCH_PAGES`. Nothing is raised while iterating.
    """
    if platform != PlatformType.SEV_SNP:
        raise FormatError("only SEV-SNP launches are supported", code="igvm-unsupported-platform", got=platform.name)
    mask = file.platform(platform).compatibility_mask
    planner = _Planner(file, mask, native_zero=native_zero)
    planner.check()
    return planner.run(order)


class _Planner:
    def __init__(self, file: IgvmFile, mask: int, *, native_zero: bool) -> None:
        self._file = file
        self._mask = mask
        self._start = file.data_start
        self._empty = PageType.ZERO if native_zero else PageType.NORMAL
        self._areas: dict[int, ParameterArea] = {}

    def run(self, order: Order) -> Iterator[LaunchStep]:
        contexts: list[VpContext] = []
        for header in self._file.headers:
            body = header.body
            if isinstance(body, PageData):
                if body.compatibility_mask & self._mask:
                    yield from self._page(body, header.count)
            elif isinstance(body, ParameterArea):
                self._areas[body.parameter_area_index] = body
            elif isinstance(body, ParameterInsert):
                if body.compatibility_mask & self._mask:
                    yield from self._insert(body)
            elif isinstance(body, VpContext) and body.compatibility_mask & self._mask:
                if order is Order.KVM:
                    contexts.append(body)
                else:
                    yield self._context(body)
        for context in contexts:
            yield self._context(context)

    def check(self) -> None:
        """Refuse pages that are launched twice, and too many; not VMSAs, which KVM launches all at one address."""
        sizes = {}
        claims: list[tuple[int, int]] = []
        for header in self._file.headers:
            body = header.body
            if isinstance(body, ParameterArea):
                sizes[body.parameter_area_index] = body.number_of_bytes
            elif isinstance(body, PageData) and body.compatibility_mask & self._mask:
                claims.append((body.gpa, header.count * page_bytes(body)))
            elif isinstance(body, ParameterInsert) and body.compatibility_mask & self._mask:
                claims.append((body.gpa, sizes[body.parameter_area_index]))
        if sum(size for _, size in claims) > MAX_LAUNCH_PAGES * PAGE_SIZE:
            raise FormatError("the launch has too many pages", code="igvm-limit", expected=MAX_LAUNCH_PAGES)
        end = 0
        for gpa, size in sorted(claims):
            if gpa < end and size:
                raise FormatError("a page is launched twice", code="igvm-overlap", gpa=gpa)
            end = max(end, gpa + size)

    def _steps(
        self, page_type: PageType | None, gpa: int, pages: int, kind: StepKind, file_offset: int, number: int = 0
    ) -> Iterator[LaunchStep]:
        for first in range(0, pages, MAX_RUN_PAGES):
            count, position = min(MAX_RUN_PAGES, pages - first), first * PAGE_SIZE
            contents, source = None, 0
            if file_offset:
                source = file_offset + position
                contents = self._file.data_at(source, count * PAGE_SIZE, start=self._start)
            offset = position if kind is StepKind.PARAMETER else 0
            yield LaunchStep(page_type, gpa + position, contents, kind, number, offset, source, count)

    def _page(self, body: PageData, count: int) -> Iterator[LaunchStep]:
        kind, page_type = self._classify(body)
        return self._steps(page_type, body.gpa, count * page_bytes(body) // PAGE_SIZE, kind, body.file_offset)

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
        pages = area.number_of_bytes // PAGE_SIZE
        return self._steps(
            PageType.UNMEASURED, body.gpa, pages, StepKind.PARAMETER, area.file_offset, body.parameter_area_index
        )

    def _context(self, body: VpContext) -> LaunchStep:
        contents = self._file.data_at(body.file_offset, PAGE_SIZE, start=self._start)
        return LaunchStep(PageType.VMSA, body.gpa, contents, StepKind.VMSA, body.vp_index, 0, body.file_offset, 1)


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
