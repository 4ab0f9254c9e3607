# SPDX-License-Identifier: MIT OR Apache-2.0
"""Making a volume.

Everything that is not allocated is filled with random bytes, so that a fresh volume does not tell what is free. The
static header's first device block is zeroed first and written last: a volume that was not finished has no magic.

Placed in this order: headers; the journal's head; the tree; auxiliary metadata, if any; the bitmap; the entry leaf in
the gap before the journal's head where there is one; extents lists of a large tree and bitmap.

`plan_format` finds out without writing whether everything fits; formatting at first open depends on that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from svsm.formats.errors import FormatError
from svsm.storage.cocoonfs.allocation import bitmap_blocks, bits_per_bitmap_block, pack_states, with_ranges
from svsm.storage.cocoonfs.aux import NO_METADATA, AuxMetadata
from svsm.storage.cocoonfs.auxarea import NO_AUX, fresh_contents, group_lengths
from svsm.storage.cocoonfs.encoding import (
    MAX_POINTER_EXTENT_AB,
    Extent,
    encode_block_pointer,
    encode_extent_pointer,
    encode_extents_list,
)
from svsm.storage.cocoonfs.entities import Random, encrypt_block
from svsm.storage.cocoonfs.geometry import TreeGeometry, plan_tree, too_small
from svsm.storage.cocoonfs.image import VolumeContext, entry_leaf_mac, preauth_chain
from svsm.storage.cocoonfs.index import Entry, Leaf, NodeFormat
from svsm.storage.cocoonfs.keys import COUNTER_DOMAIN, INDEX_DOMAIN
from svsm.storage.cocoonfs.layout import (
    AUTH_TREE_INODE,
    BITMAP_INODE,
    INDEX_INODE,
    ImageLayout,
    MutableHeader,
    Subject,
    align_up,
)
from svsm.storage.cocoonfs.primitives import KEYSTREAM_SEED_BYTES, keystream
from svsm.storage.cocoonfs.tree import DataDigester, image_context, root_digest

__all__ = ["MAX_FORMAT_AB", "FormatPlan", "plan_format"]

MAX_FORMAT_AB = 1 << 27
"""Allocation blocks of the largest volume that is made here: making one needs a few bytes of memory for each."""

_CHUNK_BYTES = 1 << 20
_SPAN_BLOCKS = 64


class _Places(NamedTuple):
    image_ab: int
    tree: Extent
    aux: tuple[list[Extent], list[Extent]]
    bitmap: Extent
    entry_leaf: Extent
    lists: dict[int, Extent]
    used_end: int


def _list_extent(volume: VolumeContext, inode: int, extent: Extent, at: int) -> Extent:
    """Where the list of a special inode's only extent goes; it is needed only above 64 ab."""
    chain = preauth_chain(volume.layout, volume.keys, inode)
    payload = len(encode_extents_list([extent]))
    length = 1
    while chain.capacity(length * volume.layout.ab_bytes, first=True) <= payload:
        length += 1
    return at, length


def _aux_places(layout: ImageLayout, metadata: AuxMetadata, at: int) -> tuple[list[Extent], list[Extent]]:
    """Extents of group 0 and 1, end to end from `at`."""
    groups: tuple[list[Extent], list[Extent]] = ([], [])
    if metadata.is_trivial:
        return groups
    lengths = group_lengths(layout, metadata.storage_bytes)
    for group in groups if metadata.reserve_bytes is not None else groups[:1]:
        for length in lengths:
            group.append((at, length))
            at += length
    return groups


def _places(volume: VolumeContext, wanted_ab: int, metadata: AuxMetadata) -> _Places:
    layout, places = volume.layout, volume.places
    wanted_ab -= wanted_ab % layout.io_ab
    nodes, left = plan_tree(layout, wanted_ab)
    image_ab = (wanted_ab - left) // layout.io_ab * layout.io_ab
    head_end = sum(places.journal_head)
    unit = max(layout.node_ab, layout.journal_ab)
    tree = (head_end, align_up(nodes * layout.node_ab, unit))
    unit = max(layout.bitmap_ab, layout.data_ab)
    aux = _aux_places(layout, metadata, align_up(sum(tree), layout.journal_ab))
    begin = align_up(max(sum(extent) for extent in (tree, *aux[0], *aux[1])), layout.data_ab)
    bitmap = (begin, align_up(bitmap_blocks(layout, image_ab) * layout.bitmap_ab, unit))
    end = sum(bitmap)
    entry = align_up(places.header_end_ab, layout.leaf_ab)
    if entry + layout.leaf_ab > places.journal_head[0]:
        entry = align_up(end, layout.leaf_ab)
        end = entry + layout.leaf_ab
    lists: dict[int, Extent] = {}
    for inode, extent in ((AUTH_TREE_INODE, tree), (BITMAP_INODE, bitmap)):
        if extent[1] > MAX_POINTER_EXTENT_AB:
            lists[inode] = _list_extent(volume, inode, extent, end)
            end = sum(lists[inode])
    if end > image_ab:
        raise too_small(image_ab)
    return _Places(image_ab, tree, aux, bitmap, (entry, layout.leaf_ab), lists, end)


class FormatPlan:
    """A volume that fits, and can be written."""

    def __init__(self, volume: VolumeContext, wanted_ab: int, metadata: AuxMetadata, random: Random) -> None:
        self.volume, self.random = volume, random
        self.layout, self.keys = volume.layout, volume.keys
        self.at = _places(volume, wanted_ab, metadata)
        self._metadata = metadata
        self.geometry = TreeGeometry(self.layout, [self.at.tree], self.at.image_ab)
        self.pieces: dict[int, bytes | bytearray] = {}
        self.used = bytearray(self.at.image_ab)
        with_ranges(
            self.used,
            [
                (0, volume.places.header_end_ab),
                volume.places.journal_head,
                self.at.tree,
                *self.at.aux[0],
                *self.at.aux[1],
                self.at.bitmap,
                self.at.entry_leaf,
                *self.at.lists.values(),
            ],
            1,
        )

    def _pointer(self, inode: int, extent: Extent) -> bytes:
        if inode not in self.at.lists:
            return encode_extent_pointer(extent)
        place = self.at.lists[inode]
        chain = preauth_chain(self.layout, self.keys, inode)
        encrypt = self.keys.encryptor(inode, extents_list=True)
        self.pieces[place[0]] = chain.encode(encrypt, b"", encode_extents_list([extent]), [place], self.random)[0]
        return encode_extent_pointer(place, indirect=True)

    def _bitmap(self) -> None:
        per_block = bits_per_bitmap_block(self.layout)
        size = self.layout.bitmap_ab * self.layout.ab_bytes
        encrypt = self.keys.encryptor(BITMAP_INODE)
        count = self.at.bitmap[1] // self.layout.bitmap_ab
        blocks = []
        for number in range(count):
            bits = self.used[number * per_block : (number + 1) * per_block].ljust(per_block, b"\0")
            blocks.append(encrypt_block(encrypt, pack_states(bits), size, self.random))
        self.pieces[self.at.bitmap[0]] = b"".join(blocks)

    def _entry_leaf(self) -> bytes:
        node_format = NodeFormat(self.layout)
        entries = [
            Entry(AUTH_TREE_INODE, self._pointer(AUTH_TREE_INODE, self.at.tree), 0),
            Entry(BITMAP_INODE, self._pointer(BITMAP_INODE, self.at.bitmap), 0),
            Entry(INDEX_INODE, encode_extent_pointer(self.at.entry_leaf), 0),
        ]
        size = self.layout.leaf_ab * self.layout.ab_bytes
        raw = encrypt_block(self.keys.encryptor(INDEX_DOMAIN), node_format.pack(Leaf(entries, None)), size, self.random)
        self.pieces[self.at.entry_leaf[0]] = raw
        return raw

    def _content(self, begin: int, length: int) -> bytes:
        """What is laid out in a range; zeros where nothing is."""
        size = self.layout.ab_bytes
        content = bytearray(length * size)
        for place, piece in self.pieces.items():
            lo, hi = max(place, begin), min(place + len(piece) // size, begin + length)
            if lo < hi:
                content[(lo - begin) * size : (hi - begin) * size] = piece[(lo - place) * size : (hi - place) * size]
        return bytes(content)

    def _entries(self) -> Iterator[bytes]:
        """The digests of all data blocks."""
        layout, unit = self.layout, self.layout.data_ab
        aux = [*self.at.aux[0], *self.at.aux[1]]
        places = self.volume.places
        fixed = [(0, places.header_end_ab), places.journal_head, self.at.tree, *aux]
        counted = with_ranges(bytearray(self.used), fixed, 0)
        digester = DataDigester(layout, self.keys)
        copy, nothing = self.keys.data_mac.copy, bytes(8)
        for block, (begin, length) in self.geometry.runs(0, self.geometry.data_blocks):
            for at in range(begin, begin + length, _SPAN_BLOCKS * unit):
                span = min(_SPAN_BLOCKS * unit, begin + length - at)
                first = block + (at - begin) // unit
                states = bytes(counted[at : at + span]).ljust(span, b"\0")
                if 1 in states:
                    yield from digester.digests(first, self._content(at, span), states)
                    continue
                # Nearly all of a new volume: worth saving the general case's look at patterns and contents.
                for number in range(first, first + span // unit):
                    state = copy()
                    state.update(nothing + number.to_bytes(8, "little") + Subject.DATA_BLOCK)
                    yield state.finalize()

    def _tree(self) -> bytes:
        """Lay out the tree's nodes; the root comes back."""
        geometry, layout = self.geometry, self.layout
        content = bytearray(self.at.tree[1] * layout.ab_bytes)
        node_hash = layout.node_hash
        entries: Iterator[bytes] = self._entries()
        for level in range(geometry.levels):
            fan_out = 1 << (geometry.node_log2 if level else geometry.leaf_log2)
            size = node_hash.digest_bytes if level else layout.data_hash.digest_bytes
            above: list[bytes] = []
            while digests := list(islice(entries, fan_out)):
                node = b"".join(digests).ljust(fan_out * size, b"\0")
                block = len(above) << geometry.bits(level)
                offset = (geometry.node_place(level, block)[0] - self.at.tree[0]) * layout.ab_bytes
                content[offset : offset + len(node)] = node
                if level == geometry.levels - 1:
                    self.pieces[self.at.tree[0]] = content
                    return node
                above.append(node_hash.digest(node, geometry.node_id(level, block) + Subject.TREE_NODE))
            entries = iter(above)
        raise too_small(self.at.image_ab)

    def _lay_aux(self) -> bytes:
        """Lay out the auxiliary metadata; the pointer pair comes back."""
        if not self.at.aux[0]:
            return NO_AUX
        pointers, contents = fresh_contents(self.layout, *self.at.aux, self._metadata)
        self.pieces |= {extent[0]: content for extent, content in contents}
        return pointers

    def _header(self) -> MutableHeader:
        layout, keys = self.layout, self.keys
        raw = self._entry_leaf()
        aux_pointers = self._lay_aux()
        self._bitmap()
        root = self._tree()
        key, iv = keys.encryption_key(COUNTER_DOMAIN), bytes(layout.cipher.block_bytes)
        counter = layout.cipher.encrypt_with_iv(key, iv, self.random(16))
        pointer = encode_block_pointer(self.at.entry_leaf[0])
        context = image_context(
            layout,
            keys,
            entry_leaf_pointer=pointer,
            image_ab=self.at.image_ab,
            tree_extents=[self.at.tree],
            bitmap_extents=[self.at.bitmap],
        )
        return MutableHeader(
            aux_pointers,
            root_digest(self.geometry, keys, root, counter, context),
            counter,
            entry_leaf_mac(layout, keys, raw),
            pointer,
            self.at.image_ab,
        )

    @property
    def used_end_bytes(self) -> int:
        """Nothing that is needed lies behind this."""
        return self.at.used_end * self.layout.ab_bytes

    def write(self, *, sparing: Sequence[Extent] = ()) -> None:
        """Put the volume on the device.

        Args:
            sparing: Ranges in bytes, behind `used_end_bytes`, that stay as they are.

        Raises:
            BackendError: ``block-io``.
        """
        volume, io, size = self.volume, self.volume.io, self.layout.ab_bytes
        header = self._header()
        static = volume.static.pack()
        self.pieces[0] = static
        self.pieces[volume.places.header_begin_ab] = header.pack(self.layout)
        self.pieces[volume.places.journal_head[0]] = bytes(volume.places.journal_head[1] * size)
        io.zero_first(0)
        io.flush()
        pieces = sorted(self.pieces.items())
        fill = keystream(self.random(KEYSTREAM_SEED_BYTES))
        end = self.at.image_ab * size
        for chunk in range(0, end, _CHUNK_BYTES):
            length = min(_CHUNK_BYTES, end - chunk)
            data = bytearray(fill(length))
            for place, piece in pieces:
                lo, hi = max(place * size, chunk), min(place * size + len(piece), chunk + length)
                if lo < hi:
                    data[lo - chunk : hi - chunk] = memoryview(piece)[lo - place * size : hi - place * size]
            left_out = [(0, io.first_bytes), *sparing]
            io.write_bytes(
                [(lo, bytes(data[lo - chunk : hi - chunk])) for lo, hi in _without(chunk, chunk + length, left_out)]
            )
        io.flush()
        io.write_first(0, static)
        io.flush()


def _without(begin: int, end: int, holes: Sequence[Extent]) -> list[tuple[int, int]]:
    """``[begin, end)`` without the (begin, length) holes."""
    parts = []
    for hole, length in sorted(holes):
        if begin < min(hole, end):
            parts.append((begin, min(hole, end)))
        begin = max(begin, hole + length)
    if begin < end:
        parts.append((begin, end))
    return parts


def plan_format(
    volume: VolumeContext, *, size_bytes: int, metadata: AuxMetadata = NO_METADATA, random: Random
) -> FormatPlan:
    """Find places for an empty volume; nothing is written yet.

    Args:
        volume: Keys, places and device for a static header that is not on the device yet.
        size_bytes: How much of the device to use; the volume comes out up to a few KiB smaller.
        metadata: Auxiliary metadata, and what to reserve for it.
        random: Source of IVs, the update counter's start, and the fill.

    Raises:
        FormatError: ``cocoonfs-too-small``, ``cocoonfs-too-large``, ``cocoonfs-format``.
    """
    wanted_ab = size_bytes // volume.layout.ab_bytes
    if wanted_ab > MAX_FORMAT_AB:
        raise FormatError(
            "the volume would have more allocation blocks than can be laid out in memory",
            code="cocoonfs-too-large",
            hint="use larger allocation blocks, or a smaller part of the disk",
            expected=MAX_FORMAT_AB,
            got=wanted_ab,
        )
    return FormatPlan(volume, wanted_ab, metadata, random)
