# SPDX-License-Identifier: MIT OR Apache-2.0
"""What every block of a volume is for, and how long its files are: for tools that show a volume.

Everything comes from the opened volume: fixed places from the header, extents from the authenticated index and the
lists that it points at, the rest from the bitmap. The areas lie end to end and add up to the volume's size; where two
structures claim the same block there is no truthful answer, and the survey refuses (`check` says more).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from svsm.formats.errors import FormatError
from svsm.storage.cocoonfs.blockmap import BlockMap
from svsm.storage.cocoonfs.encoding import Extent
from svsm.storage.cocoonfs.entities import strip_padding
from svsm.storage.cocoonfs.image import Image, preauth_chain
from svsm.storage.cocoonfs.index import Entry, Internal, iterate, pointer_extent
from svsm.storage.cocoonfs.layout import AUTH_TREE_INODE, BITMAP_INODE, FIRST_USER_INODE

if TYPE_CHECKING:
    from svsm.storage.cocoonfs.check import Progress

__all__ = ["Area", "Purpose", "file_bytes", "file_lengths", "survey"]

_PIECE_BYTES = 64 << 10


class Purpose(enum.Enum):
    """What a block is for."""

    STATIC_HEADER = "static-header"
    HEADER = "header"
    JOURNAL = "journal"
    TREE = "tree"
    AUX = "aux"
    BITMAP = "bitmap"
    INDEX = "index"
    LIST = "extent-list"
    FILE = "file"
    UNCLAIMED = "unclaimed"
    """Marked as in use, and nothing uses it; `repair` gives it back."""
    FREE = "free"


@dataclass(frozen=True, slots=True, order=True)
class Area:
    """Consecutive blocks for one purpose.

    Attributes:
        begin: First allocation block.
        length: In allocation blocks.
        purpose: What they are for.
        inode: Of the file, where it is one's.
    """

    begin: int
    length: int
    purpose: Purpose
    inode: int | None = None


def _nodes(image: Image, block: int, level: int) -> Iterator[Extent]:
    node = image.load(block, level)
    yield block, image.format.node_ab(node)
    if isinstance(node, Internal):
        for child in node.children:
            yield from _nodes(image, child, level - 1)


def _entries(image: Image) -> Iterator[Entry]:
    return iterate(image.load, image.entry_leaf, image.image_ab)


def _special_list(image: Image, entry: Entry) -> list[Extent]:
    """Where the list of the tree's or the bitmap's extents lies, if there is one."""
    extent, indirect = pointer_extent(entry, image.image_ab)
    if not indirect:
        return []
    volume = image.volume
    chain = preauth_chain(volume.layout, volume.keys, entry.inode)
    decrypt = volume.keys.decryptor(entry.inode, extents_list=True)
    return chain.decode(decrypt, extent, volume.io.read, limit_ab=image.image_ab)[1]


def _claims(image: Image, progress: Progress | None) -> Iterator[Area]:
    def areas(extents: Sequence[Extent], purpose: Purpose, inode: int | None = None) -> Iterator[Area]:
        return (Area(begin, length, purpose, inode) for begin, length in extents)

    places = image.volume.places
    yield Area(0, places.header_begin_ab, Purpose.STATIC_HEADER)
    yield Area(places.header_begin_ab, places.header_end_ab - places.header_begin_ab, Purpose.HEADER)
    yield from areas([places.journal_head], Purpose.JOURNAL)
    yield from areas(image.tree.geometry.extents, Purpose.TREE)
    yield from areas(image.aux.extents, Purpose.AUX)
    yield from areas(image.bitmap_extents, Purpose.BITMAP)
    yield from areas(list(_nodes(image, *image.root)), Purpose.INDEX)
    entries = list(_entries(image))
    for number, entry in enumerate(entries, 1):
        if entry.inode in (AUTH_TREE_INODE, BITMAP_INODE):
            yield from areas(_special_list(image, entry), Purpose.LIST)
        elif entry.inode >= FIRST_USER_INODE:
            extents, lists = image.extents_of(entry)
            yield from areas(extents, Purpose.FILE, entry.inode)
            yield from areas(lists, Purpose.LIST, entry.inode)
        if progress is not None:
            progress("files", number, len(entries))


def _gaps(used: BlockMap, claimed: Sequence[Area], end: int) -> Iterator[Area]:
    """What nobody claims: free, or marked as in use all the same."""
    free = used.runs()
    run = next(free, None)
    at = 0
    for begin, length in [*((area.begin, area.length) for area in claimed), (end, 0)]:
        while at < begin:
            while run is not None and run[0] + run[1] <= at:
                run = next(free, None)
            if run is None or run[0] >= begin:
                yield Area(at, begin - at, Purpose.UNCLAIMED)
                break
            if at < run[0]:
                yield Area(at, run[0] - at, Purpose.UNCLAIMED)
                at = run[0]
            stop = min(run[0] + run[1], begin)
            yield Area(at, stop - at, Purpose.FREE)
            at = stop
        at = begin + length


def survey(image: Image, progress: Progress | None = None) -> list[Area]:
    """All areas of a volume, in order, end to end.

    Args:
        image: The opened image.
        progress: Told how far it is.

    Raises:
        FormatError: ``cocoonfs-format``: blocks belong to two structures, or one to a structure is marked as free.
        IntegrityError: ``cocoonfs-authentication``.
        BackendError: ``block-io``.
    """
    claimed = sorted(
        (area for area in _claims(image, progress) if area.length), key=lambda area: (area.begin, area.length)
    )
    end = 0
    for area in claimed:
        if area.begin < end or not image.used.all_used((area.begin, area.length)):
            raise FormatError(
                "blocks of the volume belong to two things, or to something and to free space",
                code="cocoonfs-format",
                hint="check the volume; export its files and make a new one",
                field="areas",
                block=area.begin,
            )
        end = area.begin + area.length
    gaps = _gaps(image.used, claimed, image.image_ab)
    return sorted([*claimed, *gaps], key=lambda area: area.begin)


def _pieces_from_the_end(extents: Sequence[Extent], step: int) -> Iterator[Extent]:
    for begin, length in reversed(extents):
        for at in range(begin + (length - 1) // step * step, begin - 1, -step):
            yield at, min(step, begin + length - at)


def file_bytes(image: Image, entry: Entry) -> int:
    """A file's length. Only its end is read and decrypted, where its padding says it.

    Raises:
        FormatError: ``cocoonfs-format``.
        IntegrityError: ``cocoonfs-authentication``.
        BackendError: ``block-io``.
    """
    layout = image.volume.layout
    decrypt = image.volume.keys.decryptor(entry.inode)
    extents, _ = image.extents_of(entry)
    at = sum(length for _, length in extents) * layout.ab_bytes
    following = b""
    for extent in _pieces_from_the_end(extents, max(1, _PIECE_BYTES // layout.ab_bytes)):
        # The first cipher block is what the next one was chained to; it is decrypted with the piece before it.
        raw = image.read(extent) + following
        at -= extent[1] * layout.ab_bytes
        plain = decrypt(raw)
        if any(plain):
            return at + len(strip_padding(plain, "file"))
        following = raw[: decrypt.block_bytes]
    raise FormatError("a file has no padding", code="cocoonfs-format", field="padding", inode=entry.inode)


def file_lengths(image: Image) -> Iterator[tuple[Entry, int]]:
    """Every file's index entry and length, by inode number. Raises what `file_bytes` raises."""
    return ((entry, file_bytes(image, entry)) for entry in _entries(image) if entry.inode >= FIRST_USER_INODE)
