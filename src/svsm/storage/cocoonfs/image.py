# SPDX-License-Identifier: MIT OR Apache-2.0
"""An opened image: authenticated reading, and everything that is known about it in memory.

The order of opening is what makes a hostile disk harmless: the configuration only leads to keys; the entry leaf has
a MAC of its own, so it may be decrypted; it names the tree and the bitmap; the root digest covers the places of all
of these, the size and the update counter; the bitmap's data blocks are checked before it is decrypted; from there on
every byte that is used was compared with the tree first. Two consequences: a pointer to a block that does not count
for digests is an error, and what was checked once is kept in memory and not asked of the disk again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from svsm.formats.errors import FormatError
from svsm.formats.record import Buffer
from svsm.storage.cocoonfs.allocation import bitmap_blocks
from svsm.storage.cocoonfs.auxarea import AuxArea
from svsm.storage.cocoonfs.blockio import BlockIo
from svsm.storage.cocoonfs.blockmap import BlockMap, Counted, parse_states
from svsm.storage.cocoonfs.encoding import Extent, decode_block_pointer, decode_extents_list
from svsm.storage.cocoonfs.entities import (
    Chain,
    authentication_failure,
    block_payload_bytes,
    decrypt_block,
    decrypt_extents,
)
from svsm.storage.cocoonfs.expected import ANYTHING, Expected
from svsm.storage.cocoonfs.geometry import FixedPlaces, TreeGeometry
from svsm.storage.cocoonfs.index import Entry, Leaf, Node, NodeFormat, find, pointer_extent
from svsm.storage.cocoonfs.keys import COUNTER_DOMAIN, INDEX_DOMAIN, Keys
from svsm.storage.cocoonfs.layout import (
    AUTH_TREE_INODE,
    BITMAP_INODE,
    INDEX_INODE,
    ImageLayout,
    MutableHeader,
    StaticHeader,
    Subject,
    align_up,
)
from svsm.storage.cocoonfs.primitives import equal
from svsm.storage.cocoonfs.tree import AuthTree, image_context

__all__ = ["Image", "VolumeContext", "decode_bitmap", "entry_leaf_mac", "open_image", "preauth_chain", "read_counter"]


_PIECE_BYTES = 1 << 18


class VolumeContext(NamedTuple):
    """What the static header gives: places, keys, and the device in these units."""

    static: StaticHeader
    layout: ImageLayout
    places: FixedPlaces
    keys: Keys
    io: BlockIo
    expected: Expected = ANYTHING


def read_counter(keys: Keys, encrypted: bytes) -> int:
    """The update counter."""
    decrypt = keys.decryptor(COUNTER_DOMAIN)
    plain = decrypt(bytes(decrypt.block_bytes) + encrypted)
    return int.from_bytes(plain, "little")


def preauth_chain(layout: ImageLayout, keys: Keys, inode: int) -> Chain:
    """How the extents lists of the tree and the bitmap are protected: with tags of their own."""
    mac = keys.preauth_mac(inode, extents_list=True)
    return Chain(layout, 0, mac, inode.to_bytes(8, "little") + b"\x00\x02", "extents list")


def _bitmap_words(volume: VolumeContext, raw: bytes) -> bytes:
    layout = volume.layout
    stride = layout.bitmap_ab * layout.ab_bytes
    plain = volume.keys.decryptor(BITMAP_INODE)(raw)
    used = block_payload_bytes(stride, layout.cipher.block_bytes) // 8 * 8
    return b"".join(plain[at : at + used] for at in range(0, len(raw), stride))


def decode_bitmap(volume: VolumeContext, raw: bytes) -> bytearray:
    """States from the raw contents of consecutive bitmap blocks."""
    return parse_states(_bitmap_words(volume, raw))


@dataclass(slots=True)
class Image:
    """The state of an opened image.

    Attributes:
        volume: Keys, places, device.
        header: The mutable header as committed.
        counter: The update counter.
        tree: The authentication tree.
        bitmap_extents: Of the bitmap file.
        aux: Storage of the auxiliary metadata.
        used: What the bitmap says.
        counted: What counts for digests.
        entry_leaf: First block of the entry leaf.
        root: (block, level) of the index's root.
        nodes: Index nodes that were read.
        format: Of index nodes.
    """

    volume: VolumeContext
    header: MutableHeader
    counter: int
    tree: AuthTree
    bitmap_extents: tuple[Extent, ...]
    aux: AuxArea
    used: BlockMap
    counted: Counted
    entry_leaf: int
    root: tuple[int, int]
    nodes: dict[int, Node]
    format: NodeFormat

    @property
    def image_ab(self) -> int:
        """Size in ab."""
        return self.header.image_ab

    def uncounted(self, aux: Sequence[Extent] | None = None) -> list[Extent]:
        """What never counts for digests: headers, journal head, auxiliary metadata (or what it will be), the tree."""
        places = self.volume.places
        extents = self.aux.extents if aux is None else aux
        return [(0, places.header_end_ab), places.journal_head, *extents, *self.tree.geometry.extents]

    def read_checked(self, begin: int, end: int) -> bytes:
        """Whole data blocks ``[begin, end)`` (ab), compared with the tree; what does not count is as the disk has it.

        Raises:
            IntegrityError: ``cocoonfs-authentication``.
        """
        stop = min(end, self.image_ab)
        content = self.volume.io.read((begin, stop - begin))
        if stop < end:
            content += bytes((end - stop) * self.volume.layout.ab_bytes)
        self.tree.check(self.tree.geometry.block_at(begin), content, self.counted.states(begin, end))
        return content

    def pieces(self, extent: Extent) -> Iterator[memoryview]:
        """The authentic contents of an extent, end to end, in pieces that stay in the processor's cache.

        Raises:
            IntegrityError: ``cocoonfs-authentication``.
            FormatError: ``cocoonfs-format`` where it points at what does not count.
        """
        at, end = extent[0], sum(extent)
        if not self.counted.all_counted(extent):
            raise FormatError("a pointer leads to free space", code="cocoonfs-format", field="pointer", begin=at)
        unit, size = self.volume.layout.data_ab, self.volume.layout.ab_bytes
        step = max(_PIECE_BYTES // (unit * size), 1) * unit
        while at < end:
            first = at // unit * unit
            stop = min(first + step, end)
            content = self.read_checked(first, align_up(stop, unit))
            yield memoryview(content)[(at - first) * size : (stop - first) * size]
            at = stop

    def read(self, extent: Extent) -> bytes:
        """The authentic contents of an extent. Raises what `pieces` raises."""
        return b"".join(self.pieces(extent))

    def load(self, block: int, level: int) -> Node:
        """An index node; level 1 is a leaf."""
        known = self.nodes.get(block)
        if known is not None and (level == 1) == isinstance(known, Leaf):
            if isinstance(known, Leaf) or known.level == level:
                return known
            raise FormatError("an index node has the wrong level", code="cocoonfs-format", field="level")
        length = self.volume.layout.leaf_ab if level == 1 else self.volume.layout.internal_ab
        payload = decrypt_block(self.volume.keys.decryptor(INDEX_DOMAIN), self.read((block, length)))
        node: Node
        if level == 1:
            node = self.format.parse_leaf(payload, self.image_ab)
        else:
            node = self.format.parse_internal(payload, self.image_ab)
            if node.level != level:
                raise FormatError("an index node has the wrong level", code="cocoonfs-format", field="level")
        self.nodes[block] = node
        return node

    def find(self, inode: int) -> Entry | None:
        """The index entry of an inode."""
        return find(self.load, self.root, inode)

    def extents_of(self, entry: Entry) -> tuple[list[Extent], list[Extent]]:
        """(extents of an inode's data, extents that hold the list of them)."""
        extent, indirect = pointer_extent(entry, self.image_ab)
        if not indirect:
            return [extent], []
        layout, keys = self.volume.layout, self.volume.keys
        decrypt = keys.decryptor(entry.inode, extents_list=True)
        chain = Chain(layout, 0, None, b"", "extents list")
        encoded, places = chain.decode(decrypt, extent, self.read, limit_ab=self.image_ab)
        return list(decode_extents_list(encoded, limit_ab=self.image_ab)), places

    def read_file(self, entry: Entry) -> bytes:
        """A file's contents.

        Raises:
            IntegrityError: ``cocoonfs-authentication``.
            FormatError: ``cocoonfs-format``.
        """
        extents, _ = self.extents_of(entry)
        if not extents:
            raise FormatError("a file has no extents", code="cocoonfs-format", field="extents list")
        pieces = (piece for extent in extents for piece in self.pieces(extent))
        return decrypt_extents(self.volume.keys.decryptor(entry.inode), pieces)


def _entry_leaf(volume: VolumeContext, header: MutableHeader, node_format: NodeFormat) -> tuple[int, bytes, Leaf]:
    layout, keys = volume.layout, volume.keys
    begin = decode_block_pointer(header.entry_leaf_pointer, length_ab=layout.leaf_ab, limit_ab=header.image_ab)
    if begin is None:
        raise authentication_failure("entry leaf pointer")
    raw = volume.io.read((begin, layout.leaf_ab))
    if not equal(entry_leaf_mac(layout, keys, raw), header.entry_leaf_hmac):
        raise authentication_failure("entry leaf")
    payload = decrypt_block(keys.decryptor(INDEX_DOMAIN), raw)
    return begin, raw, node_format.parse_leaf(payload, header.image_ab)


def entry_leaf_mac(layout: ImageLayout, keys: Keys, raw: Buffer) -> bytes:
    """The MAC in the header that allows decrypting the entry leaf before the tree is known."""
    state = keys.preauth_mac(INDEX_DOMAIN)
    state.update(raw)
    state.update(layout.cipher.encoded + Subject.INDEX_NODE)
    return state.finalize()


def _special(leaf: Leaf, inode: int) -> Entry:
    entry = next((entry for entry in leaf.entries if entry.inode == inode), None)
    if entry is None:
        raise FormatError("a special inode is missing", code="cocoonfs-format", field="entry leaf", inode=inode)
    return entry


def _special_extents(volume: VolumeContext, image_ab: int, entry: Entry) -> tuple[Extent, ...]:
    extent, indirect = pointer_extent(entry, image_ab)
    if not indirect:
        return (extent,)
    chain = preauth_chain(volume.layout, volume.keys, entry.inode)
    decrypt = volume.keys.decryptor(entry.inode, extents_list=True)
    encoded, _ = chain.decode(decrypt, extent, volume.io.read, limit_ab=image_ab)
    return decode_extents_list(encoded, limit_ab=image_ab)


def _read_bitmap(volume: VolumeContext, tree: AuthTree, extents: Sequence[Extent], image_ab: int) -> BlockMap:
    layout = volume.layout
    parts = []
    for begin, length in extents:
        if begin % layout.data_ab or length % layout.data_ab or length % layout.bitmap_ab or begin + length > image_ab:
            raise FormatError("the bitmap's extents are malformed", code="cocoonfs-format", field="bitmap")
        content = volume.io.read((begin, length))
        tree.check(tree.geometry.block_at(begin), content, b"\1" * length)
        parts.append(content)
    raw = b"".join(parts)
    needed = bitmap_blocks(layout, image_ab) * layout.bitmap_ab * layout.ab_bytes
    if len(raw) < needed:
        raise FormatError("the bitmap is too short", code="cocoonfs-format", field="bitmap")
    used = BlockMap.parse(layout, image_ab, _bitmap_words(volume, raw[:needed]))
    if used is None:
        raise FormatError("the bitmap marks blocks beyond the end", code="cocoonfs-format", field="bitmap")
    return used


def open_image(volume: VolumeContext) -> Image:
    """Open an image without a pending journal.

    Raises:
        IntegrityError: ``cocoonfs-authentication``.
        FormatError: ``cocoonfs-format``, ``cocoonfs-truncated``, ``cocoonfs-aux``.
        PolicyError: ``cocoonfs-unexpected``: not the size that the caller expects.
    """
    layout, keys, io = volume.layout, volume.keys, volume.io
    begin, end = volume.places.header_begin_ab, volume.places.header_end_ab
    header = MutableHeader.parse(io.read((begin, end - begin)), layout)
    if header.image_ab > io.size_ab:
        io.read((header.image_ab - 1, 1))  # raises: the disk is shorter than the image
    node_format = NodeFormat(layout)
    entry_begin, entry_raw, leaf = _entry_leaf(volume, header, node_format)
    tree_extents = _special_extents(volume, header.image_ab, _special(leaf, AUTH_TREE_INODE))
    bitmap_extents = _special_extents(volume, header.image_ab, _special(leaf, BITMAP_INODE))
    geometry = TreeGeometry(layout, tree_extents, header.image_ab)
    context = image_context(
        layout,
        keys,
        entry_leaf_pointer=header.entry_leaf_pointer,
        image_ab=header.image_ab,
        tree_extents=tree_extents,
        bitmap_extents=bitmap_extents,
    )
    tree = AuthTree(geometry, keys, io.read, context)
    tree.load_root(header.root_hmac, header.encrypted_counter)
    used = _read_bitmap(volume, tree, bitmap_extents, header.image_ab)
    aux = AuxArea(layout, header.aux_pointers, header.image_ab, io.read)
    image = Image(
        volume=volume,
        header=header,
        counter=read_counter(keys, header.encrypted_counter),
        tree=tree,
        bitmap_extents=bitmap_extents,
        aux=aux,
        used=used,
        counted=Counted(used, ()),
        entry_leaf=entry_begin,
        root=(entry_begin, 1),
        nodes={},
        format=node_format,
    )
    fixed = image.uncounted()
    if not all(used.all_used(extent) for extent in [*fixed, *bitmap_extents]):
        raise authentication_failure("fixed places in the bitmap")
    image.counted = Counted(used, fixed)
    # Anybody may have written the list of these extents. What the tree says does not count may be freed and written;
    # a list that runs over somebody's file does not get past here.
    for first, length in aux.extents:
        image.read_checked(first, first + length)
    # The entry leaf was believed on its own MAC so far; an older one has a valid MAC too, but not in this tree.
    if image.read((entry_begin, layout.leaf_ab)) != entry_raw:
        raise authentication_failure("entry leaf in the tree")
    image.nodes[entry_begin] = leaf
    volume.expected.check_size(image.image_ab * layout.ab_bytes)
    image.root = _root(image, _special(leaf, INDEX_INODE))
    return image


def _root(image: Image, entry: Entry) -> tuple[int, int]:
    layout = image.volume.layout
    extent, indirect = pointer_extent(entry, image.image_ab)
    if extent[0] == image.entry_leaf:
        level = 1
    else:
        payload = decrypt_block(image.volume.keys.decryptor(INDEX_DOMAIN), image.read(extent))
        level = image.format.level_of(payload, leaf=False)
    expected = layout.leaf_ab if level == 1 else layout.internal_ab
    if indirect or extent[1] != expected or (level == 1) != (extent[0] == image.entry_leaf):
        raise FormatError("the index's root pointer is malformed", code="cocoonfs-format", field="root")
    return extent[0], level
