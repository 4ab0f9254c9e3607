# SPDX-License-Identifier: MIT OR Apache-2.0
"""Where a volume keeps its auxiliary metadata, and how that is changed without the key and without a journal.

The storage is a circular list of extents in one or two *groups*, each of which holds all records. The header points
at the groups' heads; every extent points at the next one and at the one after that, so that a single torn extent does
not break the list. A head says whether its group is *active*; group 0 wins. The extents are marked as allocated in the
bitmap but do not count for data block digests.

A change without the key writes one extent at a time, each so that it is whole or recognisably torn, in this order:

    mend what a crash tore -> group 1: inactive, old contents, active -> group 0: inactive, new contents, active

A group's head is written last, and first too where there are other extents, to take the group out of use while they
change. At any moment one group is active and whole, and at most one extent is torn. The last write is the switch.

Everything is read as hostile bytes. What the key can say about it is which blocks do not count (`image`): only there
does an open with the key mend anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from svsm.formats.errors import FormatError, StateError, SvsmError
from svsm.storage.cocoonfs import integrity
from svsm.storage.cocoonfs.aux import MAX_AUX_BYTES, AuxMetadata
from svsm.storage.cocoonfs.blockio import BlockIo
from svsm.storage.cocoonfs.encoding import (
    MAX_POINTER_EXTENT_AB,
    NIL,
    Extent,
    decode_extent_pointer,
    encode_extent_pointer,
)
from svsm.storage.cocoonfs.layout import ImageLayout, align_up

__all__ = ["NO_AUX", "AuxArea", "aux_extents", "fresh_contents", "group_lengths", "place_group"]

NO_AUX = NIL + NIL
_HEAD_SECTION, _TAIL_SECTION = 17, 16
_STATE_OFFSET = 16
_INACTIVE, _ACTIVE, _ACTIVE_MOVE = range(3)
_PIECE = 128
_MAX_AREA_BYTES = 8 * MAX_AUX_BYTES  # two groups of records and reserve, and as much again for large blocks

Read = Callable[[Extent], bytes]


def _malformed(field: str) -> FormatError:
    return FormatError("the auxiliary metadata's extents are malformed", code="cocoonfs-aux", field=field)


def _pointer(data: bytes, image_ab: int) -> Extent | None:
    found = decode_extent_pointer(data, limit_ab=image_ab)
    if found is None:
        return None
    if found[1]:
        raise _malformed("pointer")
    return found[0]


def aux_extents(layout: ImageLayout, pointers: bytes, image_ab: int, read: Read) -> list[Extent]:
    """All extents of the circular list that a header's pointer pair starts, that of group 0's head first.

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
        plain = integrity.tier0(read((extent[0], 1))[:_PIECE], section=section, head_skip=0)
        if plain is None:
            return None
        return _pointer(plain[:8], image_ab), _pointer(plain[8:16], image_ab)

    # The list is circular and at most one extent is broken: start where the links can be read.
    first = heads[1] if links(heads[0]) is None and heads[1] is not None else heads[0]
    extents: list[Extent] = []
    seen: set[int] = set()
    current: Extent = first
    after_next: Extent | None = None
    while True:
        begin, length = current
        if begin in seen or begin % layout.journal_ab or length % layout.journal_ab:
            raise _malformed("extent")
        seen.add(begin)
        extents.append(current)
        found = links(current)
        # The one extent that may be broken: its predecessor knows who comes after it.
        following, after_next = (after_next, None) if found is None else found
        if following is None:
            raise _malformed("chain")
        if following == first:
            break
        current = following
    if any(begin + length > after for (begin, length), (after, _) in pairwise(sorted(extents))):
        raise _malformed("extent")
    if any(head is not None and head not in extents for head in heads):
        raise _malformed("pointer")
    start = extents.index(heads[0])
    return extents[start:] + extents[:start]


def _front(layout: ImageLayout, *, head: bool) -> int:
    return (_HEAD_SECTION if head else _TAIL_SECTION) + integrity.section_bytes(layout.io_bytes)


def _room(layout: ImageLayout, extents: Sequence[Extent]) -> int:
    """Payload bytes in a group."""
    total = sum(length for _, length in extents) * layout.ab_bytes
    return total - _front(layout, head=True) - (len(extents) - 1) * _front(layout, head=False)


def group_lengths(layout: ImageLayout, payload_bytes: int) -> list[int]:
    """Lengths in allocation blocks of the extents of one group that shall have room for a payload."""
    return [length for _, length in place_group(layout, payload_bytes, lambda length: (0, length))]


def place_group(layout: ImageLayout, payload_bytes: int, take: Callable[[int], Extent | None]) -> list[Extent]:
    """Extents for one group that shall have room for a payload.

    Args:
        layout: The configuration.
        payload_bytes: Records and reserve.
        take: Gives a free extent of this length in allocation blocks, on a multiple of `ImageLayout.journal_ab`, or
            None; then a shorter one is tried.

    Returns:
        The extents; none where even the shortest is not to be had.
    """
    unit = layout.journal_ab
    extents: list[Extent] = []
    while not extents or payload_bytes > 0:
        front = _front(layout, head=not extents)
        whole = align_up(align_up(payload_bytes + front, layout.ab_bytes) // layout.ab_bytes, unit)
        length = min(whole, MAX_POINTER_EXTENT_AB // unit * unit)
        extent = take(length)
        while extent is None and length > unit:
            length = align_up(length // 2, unit)
            extent = take(length)
        if extent is None or length * layout.ab_bytes <= front:
            return []
        extents.append(extent)
        payload_bytes -= length * layout.ab_bytes - front
    return extents


def _contents(
    layout: ImageLayout, extents: Sequence[Extent], heads: Sequence[int], parts: dict[int, bytes]
) -> list[bytes]:
    """Raw contents of the extents with these indices: `parts` maps an index to state byte (heads) and payload."""
    count, io_bytes = len(extents), layout.io_bytes
    made = []
    for index, part in parts.items():
        is_head = index in heads
        section = _HEAD_SECTION if is_head else _TAIL_SECTION
        links = b"".join(encode_extent_pointer(extents[(index + step) % count]) for step in (1, 2))
        state, payload = (part[:1], part[1:]) if is_head else (b"", part)
        plain = links + state + bytes(integrity.section_bytes(io_bytes)) + payload
        plain = plain.ljust(extents[index][1] * layout.ab_bytes, b"\0")
        made.append(integrity.protect(plain, section=section, head_skip=0, io_block_bytes=io_bytes))
    return made


def _split(layout: ImageLayout, group: Sequence[Extent], payload: bytes) -> list[bytes]:
    """A payload cut into what goes into each extent of a group."""
    parts = []
    for index, (_, length) in enumerate(group):
        room = length * layout.ab_bytes - _front(layout, head=index == 0)
        parts.append(payload[:room])
        payload = payload[room:]
    return parts


def fresh_contents(
    layout: ImageLayout, group0: Sequence[Extent], group1: Sequence[Extent], metadata: AuxMetadata
) -> tuple[bytes, list[tuple[Extent, bytes]]]:
    """The pointer pair and the contents of new storage: group 0 active, group 1 (if any) inactive and empty."""
    extents = [*group0, *group1]
    heads = [0, len(group0)] if group1 else [0]
    parts = dict(enumerate(_split(layout, group0, metadata.pack())))
    parts[0] = bytes([_ACTIVE]) + parts[0]
    parts |= {len(group0) + index: bytes([_INACTIVE]) if index == 0 else b"" for index in range(len(group1))}
    pointers = encode_extent_pointer(group0[0]) + encode_extent_pointer(group1[0] if group1 else None)
    return pointers, list(zip(extents, _contents(layout, extents, heads, parts), strict=True))


class _Group(NamedTuple):
    """One group as the disk has it: its extents' indices, its state (None: the head is torn), its payload if whole."""

    indices: range
    state: int | None
    payload: bytes | None


class AuxArea:
    """The storage of a volume's auxiliary metadata.

    Args:
        layout: The configuration.
        pointers: 16 bytes from the mutable header or the journal's head.
        image_ab: No extent ends behind this.
        read: Gives the raw contents of an extent.

    Raises:
        FormatError: ``cocoonfs-aux``, ``cocoonfs-format``: the extents cannot be told.
    """

    def __init__(self, layout: ImageLayout, pointers: bytes, image_ab: int, read: Read) -> None:
        self.layout = layout
        self.extents = aux_extents(layout, pointers, image_ab, read)
        self._heads = [0] if self.extents else []
        second = _pointer(pointers[8:], image_ab)
        if second is not None:
            self._heads.append(self.extents.index(second))
        if self._heads == [0, 0]:
            raise _malformed("pointer")
        self._read = read
        self._known_to_fit = False

    def _plain(self, index: int) -> bytes | None:
        section = _HEAD_SECTION if index in self._heads else _TAIL_SECTION
        return integrity.unprotect(
            self._read(self.extents[index]), section=section, head_skip=0, io_block_bytes=self.layout.io_bytes
        )

    def _groups(self) -> list[_Group]:
        if sum(length for _, length in self.extents) * self.layout.ab_bytes > _MAX_AREA_BYTES:
            raise _malformed("size")
        groups = []
        for begin, end in pairwise([*self._heads, len(self.extents)]):
            plains = [self._plain(index) for index in range(begin, end)]
            state = None if plains[0] is None else plains[0][_STATE_OFFSET]
            whole = [plain for plain in plains if plain is not None]
            payload = None
            if len(whole) == len(plains):
                payload = b"".join(plain[_front(self.layout, head=index == 0) :] for index, plain in enumerate(whole))
            groups.append(_Group(range(begin, end), state, payload))
        return groups

    @staticmethod
    def _current(groups: Sequence[_Group]) -> tuple[int, AuxMetadata]:
        """The number of the group that counts, and its records."""
        failure: SvsmError = _malformed("no active group")
        for number, group in enumerate(groups):
            if group.state in (_ACTIVE, _ACTIVE_MOVE) and group.payload is not None:
                try:
                    return number, AuxMetadata.parse(group.payload)
                except FormatError as error:
                    failure = error
        raise failure

    def read(self) -> AuxMetadata:
        """The records.

        Raises:
            FormatError: ``cocoonfs-aux``.
        """
        return self._current(self._groups())[1] if self.extents else AuxMetadata()

    def to_move(self) -> AuxMetadata | None:
        """The records, if a change without the key left the hint that their storage no longer fits the reserve."""
        if self._known_to_fit or not self.extents:
            return None
        try:
            groups = self._groups()
            current, metadata = self._current(groups)
        except FormatError:
            return None  # damaged; reading the records says so
        if groups[current].state == _ACTIVE_MOVE:
            return metadata
        self._known_to_fit = True
        return None

    def is_settled(self) -> bool:
        """Whether no extent is torn and group 0 counts."""
        if not self.extents:
            return True
        groups = self._groups()
        return all(group.payload is not None for group in groups) and self._current(groups)[0] == 0

    # -- writing without the key -------------------------------------------------------------------------------

    def settle(self, io: BlockIo) -> None:
        """Mend what an interrupted change left: no extent torn, group 0 active. Nothing visible changes.

        Raises:
            FormatError: ``cocoonfs-aux`` where no group is whole.
            BackendError: ``block-io``.
        """
        if self.is_settled():
            return
        groups = self._groups()
        current, metadata = self._current(groups)
        move = groups[current].state == _ACTIVE_MOVE
        self._mend(io, groups)
        if current == 1:
            self._write_group(io, groups[0], metadata.pack(), move=move)

    def write(self, io: BlockIo, metadata: AuxMetadata) -> None:
        """Replace the records without the key.

        Raises:
            StateError: ``cocoonfs-aux-full``: there is no second group, or not enough room.
            FormatError: ``cocoonfs-aux``.
            BackendError: ``block-io``; the old or the new records are there then.
        """
        if len(self._heads) < 2:
            raise StateError(
                "this volume has no reserve for changing auxiliary metadata without the key",
                code="cocoonfs-aux-full",
                hint="change it with the key",
            )
        groups = self._groups()
        current, old = self._current(groups)
        rooms = [_room(self.layout, [self.extents[index] for index in group.indices]) for group in groups]
        payload = metadata.pack()
        if len(payload) > min(rooms) or len(old.pack()) > rooms[1]:
            raise StateError(
                "the reserve for auxiliary metadata is used up",
                code="cocoonfs-aux-full",
                hint="change it with the key, or remove records",
                wanted=len(payload),
                got=min(rooms),
            )
        move_old = groups[current].state == _ACTIVE_MOVE
        self._mend(io, groups)
        if current == 0:
            self._write_group(io, groups[1], old.pack(), move=move_old)
        self._write_group(io, groups[0], payload, move=self._should_move(metadata, rooms))

    def _should_move(self, metadata: AuxMetadata, rooms: Sequence[int]) -> bool:
        """Whether other storage would fit records and reserve better."""
        if metadata.is_trivial:
            return True
        fitting = group_lengths(self.layout, metadata.storage_bytes)
        wanted = _room(self.layout, [(0, length) for length in fitting])
        return metadata.reserve_bytes is None or any(room != wanted for room in rooms)

    def _write_extent(self, io: BlockIo, index: int, part: bytes) -> None:
        """One extent, whole or recognisably torn at any moment."""
        begin, _ = self.extents[index]
        content = _contents(self.layout, self.extents, self._heads, {index: part})[0]
        io.zero_first(begin)
        io.flush()
        tail = io.write_tail(begin, content)
        if tail is not None:
            io.write_bytes([tail])
            io.flush()
        io.write_first(begin, content)
        io.flush()

    def _mend(self, io: BlockIo, groups: Sequence[_Group]) -> None:
        """Make torn extents whole again; their contents do not matter, for their group does not count."""
        for group in groups:
            if group.payload is not None:
                continue
            torn = [index for index in group.indices if self._plain(index) is None]
            head = group.indices[0]
            if group.state in (_ACTIVE, _ACTIVE_MOVE):
                # No crash of ours leaves this, damage does: a group that is mended must not count.
                torn.insert(0, head)
            for index in torn:
                self._write_extent(io, index, bytes([_INACTIVE]) if index == head else b"")

    def _write_group(self, io: BlockIo, group: _Group, payload: bytes, *, move: bool) -> None:
        head, *tails = group.indices
        parts = _split(self.layout, [self.extents[index] for index in group.indices], payload)
        if tails:
            self._write_extent(io, head, bytes([_INACTIVE]))
        for index, part in zip(tails, parts[1:], strict=True):
            self._write_extent(io, index, part)
        self._write_extent(io, head, bytes([_ACTIVE_MOVE if move else _ACTIVE]) + parts[0])
