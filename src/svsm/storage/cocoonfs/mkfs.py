# SPDX-License-Identifier: MIT OR Apache-2.0
"""Making a volume.

Everything that is not allocated is filled with random bytes, so that a fresh volume does not tell what is free. The
static header's first device block is zeroed first and written last: a volume that was not finished has no magic.

Placed in this order: headers; the journal's head; the tree; the bitmap; the entry leaf in the gap before the
journal's head where there is one. No auxiliary metadata is laid out (both pointers NIL), which the format allows.
"""

from __future__ import annotations

from dataclasses import dataclass

from svsm.formats.errors import FormatError
from svsm.storage.cocoonfs.allocation import bitmap_blocks, bits_per_bitmap_block, pack_states, with_ranges
from svsm.storage.cocoonfs.auxarea import NO_AUX
from svsm.storage.cocoonfs.encoding import (
    MAX_POINTER_EXTENT_AB,
    Extent,
    encode_block_pointer,
    encode_extent_pointer,
    encode_extents_list,
)
from svsm.storage.cocoonfs.entities import Random, encrypt_block
from svsm.storage.cocoonfs.geometry import TreeGeometry, plan_tree
from svsm.storage.cocoonfs.image import VolumeContext, entry_leaf_mac, preauth_chain
from svsm.storage.cocoonfs.index import Entry, Leaf, NodeFormat
from svsm.storage.cocoonfs.keys import COUNTER_DOMAIN, INDEX_DOMAIN
from svsm.storage.cocoonfs.layout import (
    AUTH_TREE_INODE,
    BITMAP_INODE,
    INDEX_INODE,
    MutableHeader,
    Subject,
    align_up,
)
from svsm.storage.cocoonfs.tree import DataDigester, image_context, root_digest

__all__ = ["format_volume"]

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Places:
    image_ab: int
    tree: Extent
    bitmap: Extent
    entry_leaf: Extent
    lists: dict[int, Extent]
    used_end: int


def _too_small(image_ab: int) -> FormatError:
    return FormatError(
        "the disk is too small for a volume",
        code="cocoonfs-too-small",
        hint="use a disk of at least 64 KiB",
        got=image_ab,
    )


def _list_extent(volume: VolumeContext, inode: int, extent: Extent, at: int) -> Extent:
    """Where the list of a special inode's only extent goes; it is needed only above 64 ab."""
    chain = preauth_chain(volume.layout, volume.keys, inode)
    payload = len(encode_extents_list([extent]))
    length = 1
    while chain.capacity(length * volume.layout.ab_bytes, first=True) <= payload:
        length += 1
    return at, length


def _places(volume: VolumeContext, wanted_ab: int) -> _Places:
    layout, places = volume.layout, volume.places
    wanted_ab -= wanted_ab % layout.io_ab
    nodes, left = plan_tree(layout, wanted_ab)
    image_ab = (wanted_ab - left) // layout.io_ab * layout.io_ab
    head_end = sum(places.journal_head)
    unit = max(layout.node_ab, layout.journal_ab)
    tree = (head_end, align_up(nodes * layout.node_ab, unit))
    unit = max(layout.bitmap_ab, layout.data_ab)
    begin = align_up(sum(tree), layout.data_ab)
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
        raise _too_small(image_ab)
    return _Places(image_ab, tree, bitmap, (entry, layout.leaf_ab), lists, end)


class _Maker:
    def __init__(self, volume: VolumeContext, wanted_ab: int, random: Random) -> None:
        self.volume, self.random = volume, random
        self.layout, self.keys = volume.layout, volume.keys
        self.at = _places(volume, wanted_ab)
        self.geometry = TreeGeometry(self.layout, [self.at.tree], self.at.image_ab)
        self.pieces: dict[int, bytes] = {}
        self.used = bytearray(self.at.image_ab)
        with_ranges(
            self.used,
            [
                (0, volume.places.header_end_ab),
                volume.places.journal_head,
                self.at.tree,
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

    def _tree(self) -> bytes:
        """Lay out the tree's nodes; the root comes back."""
        geometry, layout, volume = self.geometry, self.layout, self.volume
        counted = with_ranges(
            bytearray(self.used), [(0, volume.places.header_end_ab), volume.places.journal_head, self.at.tree], 0
        )
        digester = DataDigester(layout, self.keys)
        entries: list[bytes] = []
        for block, (begin, length) in geometry.runs(0, geometry.data_blocks):
            content = bytearray(length * layout.ab_bytes)
            for place, piece in self.pieces.items():
                if begin <= place < begin + length:
                    offset = (place - begin) * layout.ab_bytes
                    content[offset : offset + len(piece)] = piece
            states = bytes(counted[begin : begin + length]).ljust(length, b"\0")
            entries += digester.digests(block, bytes(content), states)
        node_hash = layout.node_hash
        for level in range(geometry.levels):
            fan_out = 1 << (geometry.node_log2 if level else geometry.leaf_log2)
            size = node_hash.digest_bytes if level else layout.data_hash.digest_bytes
            above: list[bytes] = []
            for number, first in enumerate(range(0, len(entries), fan_out)):
                node = b"".join(entries[first : first + fan_out]).ljust(fan_out * size, b"\0")
                block = number << geometry.bits(level)
                place, _ = geometry.node_place(level, block)
                self.pieces[place] = node.ljust(layout.node_bytes, b"\0")
                if level == geometry.levels - 1:
                    return node
                above.append(node_hash.digest(node, geometry.node_id(level, block) + Subject.TREE_NODE))
            entries = above
        raise _too_small(self.at.image_ab)

    def _header(self) -> MutableHeader:
        layout, keys = self.layout, self.keys
        raw = self._entry_leaf()
        self._bitmap()
        root = self._tree()
        counter = layout.cipher.encrypt_with_iv(keys.encryption_key(COUNTER_DOMAIN), bytes(16), self.random(16))
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
            NO_AUX,
            root_digest(self.geometry, keys, root, counter, context),
            counter,
            entry_leaf_mac(layout, keys, raw),
            pointer,
            self.at.image_ab,
        )

    def write(self) -> None:
        """Put the volume on the device."""
        volume, io, size = self.volume, self.volume.io, self.layout.ab_bytes
        header = self._header()
        static = volume.static.pack()
        self.pieces[0] = static
        self.pieces[volume.places.header_begin_ab] = header.pack(self.layout)
        self.pieces[volume.places.journal_head[0]] = bytes(volume.places.journal_head[1] * size)
        io.zero_first(0)
        io.flush()
        pieces = sorted(self.pieces.items())
        end = self.at.image_ab * size
        for chunk in range(0, end, _CHUNK_BYTES):
            length = min(_CHUNK_BYTES, end - chunk)
            data = bytearray(self.random(length))
            for place, piece in pieces:
                lo, hi = max(place * size, chunk), min(place * size + len(piece), chunk + length)
                if lo < hi:
                    data[lo - chunk : hi - chunk] = piece[lo - place * size : hi - place * size]
            skip = io.first_bytes if chunk == 0 else 0
            io.write_bytes([(chunk + skip, bytes(data[skip:]))])
        io.flush()
        io.write_first(0, static)
        io.flush()


def format_volume(volume: VolumeContext, *, size_bytes: int, random: Random) -> None:
    """Write an empty volume.

    Args:
        volume: Keys, places and device for a static header that is not on the device yet.
        size_bytes: How much of the device to use; the volume comes out up to a few KiB smaller.
        random: Source of IVs, the update counter's start, and the fill.

    Raises:
        FormatError: ``cocoonfs-too-small``, ``cocoonfs-format``.
    """
    _Maker(volume, size_bytes // volume.layout.ab_bytes, random).write()
