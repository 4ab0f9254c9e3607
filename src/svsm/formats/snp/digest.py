# SPDX-License-Identifier: MIT OR Apache-2.0
"""The SEV-SNP launch digest: a chain of SHA-384 over one PAGE_INFO a page.

NORMAL and VMSA pages add the digest of their contents; the other types add only their kind and address. So the
digest fixes which pages were launched, as what, where and in which order; not the policy, the ID block or HOST_DATA.

The work is two hashes a page, one of 4096 and one of 112 bytes. `LaunchDigest.extend` keeps what Python adds
below a tenth of that: it works on runs of pages, so that whatever is decided is decided once a run, with the constant
middle of PAGE_INFO made once a page type, and remembers contents digests by the caller's key, because images share
pages and 64 VMSAs are two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final, Protocol

from svsm.formats.errors import FormatError
from svsm.formats.record import Buffer
from svsm.formats.snp.page_info import DIGEST_BYTES, INITIAL_DIGEST, PageInfo, PageType

__all__ = ["KnownDigests", "LaunchDigest", "MeasuredRun"]

_PAGE_BYTES: Final = 4096
_NO_CONTENTS: Final = bytes(DIGEST_BYTES)
_ZERO_PAGE_DIGEST: Final = hashlib.sha384(bytes(_PAGE_BYTES)).digest()
_MIDDLES: Final = [bytes(8)] + [
    PageInfo(_NO_CONTENTS, _NO_CONTENTS, PageInfo.SIZE, kind, 0, 0, 0, 0, 0, 0).pack()[96:104] for kind in PageType
]
"""PAGE_INFO bytes 96 to 103, by page type: a list, because hashing an enum member for a dictionary is slow."""

_REMEMBERED_PAGES: Final = 16
"""Longest run whose contents digests are kept unasked: shared pages come in short runs, and memory is finite."""


class MeasuredRun(Protocol):
    """What `extend` reads of a run of consecutive pages; `svsm.formats.igvm.LaunchStep` is one."""

    @property
    def page_type(self) -> PageType | None:
        """None: not measured, skipped."""

    @property
    def gpa(self) -> int:
        """Guest physical address of the first page."""

    @property
    def contents(self) -> Buffer | None:
        """`pages` times 4096 bytes; None for zeroes."""

    @property
    def source(self) -> int:
        """Non-zero: runs of the same `source` and `pages` have the same contents."""

    @property
    def pages(self) -> int:
        """How many pages."""


KnownDigests = dict[tuple[int, int], list[bytes]]
"""Contents digests by (source, pages)."""


class LaunchDigest:
    """A launch digest being computed.

    Args:
        value: Where to start: 48 bytes, by default the digest before the first page.

    Raises:
        FormatError: ``digest-length``.
    """

    def __init__(self, value: Buffer = INITIAL_DIGEST) -> None:
        if len(value) != DIGEST_BYTES:
            raise FormatError(
                "a launch digest has 48 bytes", code="digest-length", expected=DIGEST_BYTES, got=len(value)
            )
        self._value = bytes(value)

    @property
    def value(self) -> bytes:
        """The digest so far: 48 bytes."""
        return self._value

    def update(self, page_type: PageType, gpa: int, contents: Buffer | None) -> None:
        """Add one page.

        Args:
            page_type: NORMAL and VMSA pages are measured with their contents.
            gpa: Guest physical address, a multiple of 4096.
            contents: 4096 bytes; None stands for zeroes. Not looked at for other types.

        Raises:
            FormatError: ``digest-page`` for contents of another size or an address that is no page's.
        """
        if page_type in (PageType.NORMAL, PageType.VMSA):
            digest = _ZERO_PAGE_DIGEST if contents is None else _contents_digest(contents)
        else:
            digest = _NO_CONTENTS
        if gpa % _PAGE_BYTES or not 0 <= gpa < 1 << 64:
            raise FormatError("a launched page has no page address", code="digest-page", gpa=gpa)
        message = self._value + digest + _MIDDLES[page_type] + gpa.to_bytes(8, "little")
        self._value = hashlib.sha384(message).digest()

    def extend(self, runs: Iterable[MeasuredRun], *, known: KnownDigests | None = None) -> None:
        """Add runs of pages in order; the fast path of `update`.

        Args:
            runs: In launch order.
            known: Contents digests, which this call uses and adds to; pass the same one again to measure one file
                in several ways for the price of the chain.

        Raises:
            FormatError: As `update`; the digest then stands after the last good run.
        """
        most = _REMEMBERED_PAGES if known is None else 1 << 64
        known = {} if known is None else known
        for run in runs:
            page_type, gpa, pages = run.page_type, run.gpa, run.pages
            if page_type is None:
                continue
            if gpa & 0xFFF or gpa < 0 or (gpa + pages * _PAGE_BYTES) > 1 << 64:
                raise FormatError("a launched page has no page address", code="digest-page", gpa=gpa)
            if page_type is not PageType.NORMAL and page_type is not PageType.VMSA:
                digests = [_NO_CONTENTS] * pages
            elif run.contents is None:
                digests = [_ZERO_PAGE_DIGEST] * pages
            else:
                key = run.source, pages
                found = known.get(key)
                digests = _contents_digests(run.contents, pages) if found is None else found
                if run.source and pages <= most:
                    known[key] = digests
            self._chain(_MIDDLES[page_type], gpa, digests)

    def _chain(self, middle: bytes, gpa: int, digests: list[bytes]) -> None:
        sha384, join, value = hashlib.sha384, b"".join, self._value
        for digest in digests:
            value = sha384(join((value, digest, middle, gpa.to_bytes(8, "little")))).digest()
            gpa += 4096
        self._value = value


def _contents_digests(contents: Buffer, pages: int) -> list[bytes]:
    view = memoryview(contents).cast("B")
    if len(view) != pages * _PAGE_BYTES:
        raise _bad_page(view)
    sha384 = hashlib.sha384
    return [sha384(view[start : start + 4096]).digest() for start in range(0, len(view), 4096)]


def _bad_page(contents: Buffer) -> FormatError:
    return FormatError("a launched page has 4096 bytes", code="digest-page", expected=_PAGE_BYTES, got=len(contents))


def _contents_digest(contents: Buffer) -> bytes:
    if len(contents) != _PAGE_BYTES:
        raise _bad_page(contents)
    return hashlib.sha384(contents).digest()
