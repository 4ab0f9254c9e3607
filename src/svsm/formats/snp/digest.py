# SPDX-License-Identifier: MIT OR Apache-2.0
"""The SEV-SNP launch digest: a chain of SHA-384 over one PAGE_INFO a page.

NORMAL and VMSA pages add the digest of their contents; the other types add only their kind and address. So the
digest fixes which pages were launched, as what, where and in which order; not the policy, the ID block or HOST_DATA.

The work is two hashes a page, one of 4096 and one of 112 bytes. `LaunchDigest.extend` keeps what Python adds
below a tenth of that: constructors bound once, the constant middle of PAGE_INFO made once a page type, and
contents digests remembered by the caller's key, because images share pages and 64 VMSAs are two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final, Protocol

from svsm.formats.errors import FormatError
from svsm.formats.record import Buffer
from svsm.formats.snp.page_info import DIGEST_BYTES, INITIAL_DIGEST, PageInfo, PageType

__all__ = ["LaunchDigest", "MeasuredPage"]

_PAGE_BYTES: Final = 4096
_NO_CONTENTS: Final = bytes(DIGEST_BYTES)
_ZERO_PAGE_DIGEST: Final = hashlib.sha384(bytes(_PAGE_BYTES)).digest()
_WITH_CONTENTS: Final = frozenset({PageType.NORMAL, PageType.VMSA})
_MIDDLES: Final = {
    kind: PageInfo(_NO_CONTENTS, _NO_CONTENTS, PageInfo.SIZE, kind, 0, 0, 0, 0, 0, 0).pack()[96:104]
    for kind in PageType
}
_MAX_REMEMBERED: Final = 1 << 16


class MeasuredPage(Protocol):
    """What `extend` reads of a page; `svsm.formats.igvm.LaunchStep` is one."""

    @property
    def page_type(self) -> PageType | None:
        """None: not measured, skipped."""

    @property
    def gpa(self) -> int:
        """Guest physical address of the page."""

    @property
    def contents(self) -> Buffer | None:
        """4096 bytes; None for zeroes."""

    @property
    def source(self) -> int:
        """Non-zero: pages with the same `source` have the same contents."""


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
        if page_type in _WITH_CONTENTS:
            digest = _ZERO_PAGE_DIGEST if contents is None else _contents_digest(contents)
        else:
            digest = _NO_CONTENTS
        if gpa % _PAGE_BYTES or not 0 <= gpa < 1 << 64:
            raise FormatError("a launched page has no page address", code="digest-page", gpa=gpa)
        message = self._value + digest + _MIDDLES[page_type] + gpa.to_bytes(8, "little")
        self._value = hashlib.sha384(message).digest()

    def extend(self, pages: Iterable[MeasuredPage]) -> None:
        """Add pages in order; the fast path of `update`.

        Raises:
            FormatError: As `update`; the digest then stands after the last good page.
        """
        sha384, middles, measured = hashlib.sha384, _MIDDLES, _WITH_CONTENTS
        known: dict[int, bytes] = {}
        value = self._value
        try:
            for page in pages:
                page_type = page.page_type
                if page_type is None:
                    continue
                gpa = page.gpa
                if gpa & 0xFFF or not 0 <= gpa < 1 << 64:
                    raise FormatError("a launched page has no page address", code="digest-page", gpa=gpa)
                if page_type not in measured:
                    digest = _NO_CONTENTS
                elif (contents := page.contents) is None:
                    digest = _ZERO_PAGE_DIGEST
                else:
                    source = page.source
                    cached = known.get(source)
                    if cached is not None:
                        digest = cached
                    else:
                        digest = _contents_digest(contents)
                        if source and len(known) < _MAX_REMEMBERED:
                            known[source] = digest
                value = sha384(value + digest + middles[page_type] + gpa.to_bytes(8, "little")).digest()
        finally:
            self._value = value


def _contents_digest(contents: Buffer) -> bytes:
    if len(contents) != _PAGE_BYTES:
        raise FormatError("a launched page has 4096 bytes", code="digest-page", expected=_PAGE_BYTES, got=len(contents))
    return hashlib.sha384(contents).digest()
