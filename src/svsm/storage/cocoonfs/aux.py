# SPDX-License-Identifier: MIT OR Apache-2.0
"""Auxiliary metadata: finding the extents that hold it, which is all that volumes need to know here.

The extents are marked as allocated but do not count for data block digests, and anybody may rewrite them without a
key. So this walk is over hostile bytes; what it yields only decides which blocks are left out of digests, and a
wrong answer makes the digests differ. The contents are not read yet.
"""

from __future__ import annotations

from collections.abc import Callable

from svsm.formats.errors import FormatError
from svsm.storage.cocoonfs import integrity
from svsm.storage.cocoonfs.encoding import NIL, Extent, decode_extent_pointer
from svsm.storage.cocoonfs.layout import ImageLayout

__all__ = ["NO_AUX", "aux_extents"]

NO_AUX = NIL + NIL
_HEAD_SECTION, _TAIL_SECTION = 17, 16


def _malformed(field: str) -> FormatError:
    return FormatError("the auxiliary metadata's extents are malformed", code="cocoonfs-aux", field=field)


def _pointer(data: bytes, image_ab: int) -> Extent | None:
    found = decode_extent_pointer(data, limit_ab=image_ab)
    if found is None:
        return None
    if found[1]:
        raise _malformed("pointer")
    return found[0]


def aux_extents(layout: ImageLayout, pointers: bytes, image_ab: int, read: Callable[[Extent], bytes]) -> list[Extent]:
    """All extents of the circular list that a header's pointer pair starts.

    Args:
        layout: The configuration.
        pointers: 16 bytes: heads of update group 0 and 1.
        image_ab: End of the image.
        read: Gives the raw contents of an extent.

    Raises:
        FormatError: ``cocoonfs-aux``, ``cocoonfs-format``.
    """
    heads = (_pointer(pointers[:8], image_ab), _pointer(pointers[8:], image_ab))
    if heads[0] is None:
        if heads[1] is not None:
            raise _malformed("pointer")
        return []

    def links(extent: Extent) -> tuple[Extent | None, Extent | None] | None:
        section = _HEAD_SECTION if extent in heads else _TAIL_SECTION
        plain = integrity.tier0(read((extent[0], 1))[:128], section=section, head_skip=0)
        if plain is None:
            return None
        return _pointer(plain[:8], image_ab), _pointer(plain[8:16], image_ab)

    # The list is circular and at most one extent is broken: start where the links can be read.
    first = heads[1] if links(heads[0]) is None and heads[1] is not None else heads[0]
    extents: list[Extent] = []
    taken = bytearray(image_ab)
    current: Extent = first
    after_next: Extent | None = None
    while True:
        begin, length = current
        if begin % layout.journal_ab or length % layout.journal_ab or 1 in taken[begin : begin + length]:
            raise _malformed("extent")
        taken[begin : begin + length] = b"\1" * length
        extents.append(current)
        found = links(current)
        # The one extent that may be broken: its predecessor knows who comes after it.
        following, after_next = (after_next, None) if found is None else found
        if following is None:
            raise _malformed("chain")
        if following == first:
            break
        current = following
    if any(head is not None and head not in extents for head in heads):
        raise _malformed("pointer")
    return extents
