# SPDX-License-Identifier: MIT OR Apache-2.0
"""Carrying out a journal that was found at open.

First everything is worked out without writing: the new header and bitmap are read *through* the writes script (where
a target's contents still wait in staging), every touched leaf of the tree is rebuilt from data, every touched
internal node from its children, and the root digest made from that must be the one in the new header. Only then is
anything written, so a journal that does not authenticate changes nothing. Old target contents are never used, because
an earlier attempt may have torn them; therefore a replay may be interrupted and repeated any number of times.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from svsm.formats.errors import FormatError
from svsm.storage.cocoonfs.allocation import bits_per_bitmap_block
from svsm.storage.cocoonfs.auxarea import aux_extents
from svsm.storage.cocoonfs.blockmap import with_ranges
from svsm.storage.cocoonfs.decision import FoundJournal
from svsm.storage.cocoonfs.encoding import Extent, decode_block_pointer, merge_ranges
from svsm.storage.cocoonfs.entities import authentication_failure
from svsm.storage.cocoonfs.geometry import TreeGeometry
from svsm.storage.cocoonfs.image import VolumeContext, decode_bitmap, entry_leaf_mac, read_counter
from svsm.storage.cocoonfs.journal import JournalLog, journal_chain
from svsm.storage.cocoonfs.keys import JOURNAL_DOMAIN
from svsm.storage.cocoonfs.layout import MutableHeader, Subject
from svsm.storage.cocoonfs.primitives import equal
from svsm.storage.cocoonfs.tree import DataDigester, image_context, root_digest

__all__ = ["ReplayPlan", "bitmap_cover", "plan_replay"]


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """What a replay would write.

    Attributes:
        found: The state after it.
        touched: Ranges in ab of whole data blocks that it changes.
        writes: (first ab, contents), all of which may be repeated.
        discards: Extents in ab to discard once the journal is gone.
    """

    found: FoundJournal
    touched: tuple[Extent, ...]
    writes: list[tuple[int, bytes]] = field(repr=False)
    discards: list[Extent]


def bitmap_cover(
    volume: VolumeContext, geometry: TreeGeometry, bitmap_extents: Iterable[Extent], leaves: Iterable[int]
) -> tuple[list[int], list[Extent]]:
    """What of the bitmap tells which blocks under these tree leaves are allocated.

    Returns:
        (numbers of the bitmap blocks, ascending; the physical data-block-aligned ranges that they lie in, merged)
    """
    layout = volume.layout
    per_block = bits_per_bitmap_block(layout)
    per_leaf = 1 << geometry.leaf_log2
    numbers: set[int] = set()
    for leaf, following in merge_ranges([(leaf, 1) for leaf in set(leaves)]):
        first = leaf * per_leaf
        count = min(following * per_leaf, geometry.data_blocks - first)
        for _, (begin, length) in geometry.runs(first, count):
            end = min(begin + length, geometry.image_ab)
            numbers.update(range(begin // per_block, (end - 1) // per_block + 1))
    unit = layout.data_ab
    ranges = []
    for number in numbers:
        begin = block_place(bitmap_extents, number * layout.bitmap_ab)
        first = begin // unit * unit
        ranges.append((first, -(-(begin + layout.bitmap_ab) // unit) * unit - first))
    return sorted(numbers), merge_ranges(ranges)


def block_place(extents: Iterable[Extent], offset_ab: int) -> int:
    """Physical place of an offset into a file's extents.

    Raises:
        FormatError: ``cocoonfs-format`` where it is beyond them.
    """
    for begin, length in extents:
        if offset_ab < length:
            return begin + offset_ab
        offset_ab -= length
    raise FormatError("the bitmap is too short", code="cocoonfs-format", field="bitmap")


class _Replay:
    def __init__(self, volume: VolumeContext, head: bytes) -> None:
        self.volume = volume
        self.layout, self.io = volume.layout, volume.io
        chain = journal_chain(self.layout, volume.keys)
        self.pointers = head[chain.header_bytes - 16 : chain.header_bytes]
        head_extent = volume.places.journal_head

        def read(extent: Extent) -> bytes:
            return head if extent == head_extent else self.io.read(extent)

        decrypt = volume.keys.decryptor(JOURNAL_DOMAIN)
        payload, places = chain.decode(decrypt, head_extent, read, limit_ab=self.io.size_ab)
        self.tails = places[1:]
        self.log = JournalLog.parse(payload, self.layout, volume.keys, limit_ab=self.io.size_ab)
        self._where = {
            copy.target + index: copy.staging + index for copy in self.log.copies for index in range(copy.length)
        }
        self.header = self._header()
        self.geometry = TreeGeometry(self.layout, self.log.tree_extents, self.header.image_ab)
        self.digester = DataDigester(self.layout, volume.keys)
        self._nodes: dict[tuple[int, int], bytes] = {}

    def _read_io(self, first: int, count: int) -> bytes:
        """IO blocks as they will be."""
        unit = self.layout.io_ab
        parts: list[bytes] = []
        at = first
        while at < first + count:
            source = self._where.get(at)
            run = 1
            if source is None:
                while at + run < first + count and at + run not in self._where:
                    run += 1
            else:
                while at + run < first + count and self._where.get(at + run) == source + run:
                    run += 1
            content = self.io.read(((at if source is None else source) * unit, run * unit))
            if source is not None and source != at and self.log.disguise is not None:
                places = [(at * unit + index, source * unit + index) for index in range(run * unit)]
                content = self.log.disguise.remove(content, places)
            parts.append(content)
            at += run
        return b"".join(parts)

    def read(self, extent: Extent) -> bytes:
        """An extent as it will be."""
        unit, size = self.layout.io_ab, self.layout.ab_bytes
        begin, length = extent
        first = begin // unit
        content = self._read_io(first, -(-(begin + length) // unit) - first)
        skip = (begin - first * unit) * size
        return content[skip : skip + length * size]

    def _header(self) -> MutableHeader:
        begin, end = self.volume.places.header_begin_ab, self.volume.places.header_end_ab
        header = MutableHeader.parse(self.read((begin, end - begin)), self.layout)
        if header.aux_pointers != self.pointers:
            raise FormatError("journal and header disagree", code="cocoonfs-format", field="aux pointers")
        if header.image_ab > self.io.size_ab:
            self.io.read((header.image_ab - 1, 1))  # raises: the disk is shorter than the image
        return header

    def _states(self, leaves: set[int]) -> bytearray:
        """What will count for digests, known under the touched leaves only."""
        layout, image_ab = self.layout, self.header.image_ab
        numbers, ranges = bitmap_cover(self.volume, self.geometry, self.log.bitmap_extents, leaves)
        known = dict(self.log.fragments)
        size = layout.data_ab * layout.ab_bytes
        for begin, length in ranges:
            content = self.read((begin, length))
            for at in range(0, length, layout.data_ab):
                expected = known.get(begin + at)
                chunk = content[at * layout.ab_bytes : at * layout.ab_bytes + size]
                block = self.geometry.block_at(begin + at)
                made = self.digester.digests(block, chunk, b"\1" * layout.data_ab)[0]
                if expected is None or not equal(made, expected):
                    raise authentication_failure("journal bitmap", block=block)
        states = bytearray(image_ab)
        per_block = bits_per_bitmap_block(layout)
        for number in numbers:
            place = block_place(self.log.bitmap_extents, number * layout.bitmap_ab)
            found = decode_bitmap(self.volume, self.read((place, layout.bitmap_ab)))
            begin = number * per_block
            room = max(0, min(per_block, image_ab - begin))
            states[begin : begin + room] = found[:room]
        aux = aux_extents(layout, self.header.aux_pointers, image_ab, self.io.read)
        places = self.volume.places
        return with_ranges(states, [(0, places.header_end_ab), places.journal_head, *aux], 0)

    def _leaf(self, leaf: int, states: bytearray) -> bytes:
        geometry, layout = self.geometry, self.layout
        first = leaf << geometry.leaf_log2
        count = min(1 << geometry.leaf_log2, geometry.data_blocks - first)
        parts: list[bytes] = []
        for block, (begin, length) in geometry.runs(first, count):
            stop = min(begin + length, geometry.image_ab)
            content = self.read((begin, stop - begin)).ljust(length * layout.ab_bytes, b"\0")
            parts.extend(self.digester.digests(block, content, bytes(states[begin:stop]).ljust(length, b"\0")))
        return b"".join(parts).ljust(layout.data_hash.digest_bytes << geometry.leaf_log2, b"\0")

    def _digest(self, level: int, number: int) -> bytes:
        """The digest of a node by its number in its level; zero beyond the image."""
        geometry = self.geometry
        block = number << geometry.bits(level)
        node_hash = self.layout.node_hash
        if block >= geometry.data_blocks:
            return bytes(node_hash.digest_bytes)
        node = self._nodes.get((level, number))
        if node is None:
            used = (
                node_hash.digest_bytes << geometry.node_log2
                if level
                else self.layout.data_hash.digest_bytes << geometry.leaf_log2
            )
            node = self.io.read(geometry.node_place(level, block))[:used]
        return node_hash.digest(node, geometry.node_id(level, block) + Subject.TREE_NODE)

    def _rebuild(self, leaves: set[int]) -> bytes:
        """Fill `_nodes` with every touched node; the root comes back."""
        geometry = self.geometry
        states = self._states(leaves)
        for leaf in sorted(leaves):
            self._nodes[0, leaf] = self._leaf(leaf, states)
        touched = leaves
        for level in range(1, geometry.levels):
            touched = {number >> geometry.node_log2 for number in touched}
            for number in sorted(touched):
                first = number << geometry.node_log2
                children = range(first, first + (1 << geometry.node_log2))
                self._nodes[level, number] = b"".join(self._digest(level - 1, child) for child in children)
        top = geometry.levels - 1
        if (top, 0) not in self._nodes:
            raise FormatError("a journal changes nothing", code="cocoonfs-format", field="journal digests")
        return self._nodes[top, 0]

    def _touched(self) -> set[int]:
        unit = self.layout.data_ab
        leaves: set[int] = set()
        tree = merge_ranges(self.geometry.extents)
        for begin, length in self.log.digests:
            if any(begin < first + count and first < begin + length for first, count in tree):
                raise FormatError("a journal changes the tree itself", code="cocoonfs-format", field="journal digests")
            first = self.geometry.block_at(begin)
            last = self.geometry.block_at(begin + length - unit)
            if last >= self.geometry.data_blocks:
                raise FormatError("a journal reaches beyond the image", code="cocoonfs-format", field="journal digests")
            leaves.update(range(first >> self.geometry.leaf_log2, (last >> self.geometry.leaf_log2) + 1))
        return leaves

    def _check_entry_leaf(self) -> None:
        """The one field of the new header that the root digest does not cover."""
        header, length = self.header, self.layout.leaf_ab
        begin = decode_block_pointer(header.entry_leaf_pointer, length_ab=length, limit_ab=header.image_ab)
        if begin is None:
            raise authentication_failure("journal entry leaf pointer")
        if not equal(entry_leaf_mac(self.layout, self.volume.keys, self.read((begin, length))), header.entry_leaf_hmac):
            raise authentication_failure("journal entry leaf")

    def plan(self) -> ReplayPlan:
        """Everything to write, after the new root digest was found right."""
        header, keys = self.header, self.volume.keys
        root = self._rebuild(self._touched())
        context = image_context(
            self.layout,
            keys,
            entry_leaf_pointer=header.entry_leaf_pointer,
            image_ab=header.image_ab,
            tree_extents=self.log.tree_extents,
            bitmap_extents=self.log.bitmap_extents,
        )
        if not equal(root_digest(self.geometry, keys, root, header.encrypted_counter, context), header.root_hmac):
            raise authentication_failure("journal root")
        self._check_entry_leaf()
        unit = self.layout.io_ab
        moved = [copy for copy in self.log.copies if copy.target != copy.staging]
        writes = [(copy.target * unit, self._read_io(copy.target, copy.length)) for copy in moved]
        for (level, number), node in self._nodes.items():
            place, _ = self.geometry.node_place(level, number << self.geometry.bits(level))
            writes.append((place, node.ljust(self.layout.node_bytes, b"\0")))
        discards: list[Extent] = []
        if self.log.trims is not None:
            discards = [(begin * unit, length * unit) for begin, length in self.log.trims]
            discards += [(copy.staging * unit, copy.length * unit) for copy in moved]
            discards += self.tails
        found = FoundJournal(read_counter(keys, header.encrypted_counter), header.root_hmac)
        return ReplayPlan(found, self.log.digests, writes, discards)


def plan_replay(volume: VolumeContext, head: bytes) -> ReplayPlan:
    """Work out what an active journal does.

    Args:
        volume: Keys, places, device.
        head: The journal's head without its integrity protection.

    Raises:
        IntegrityError: ``cocoonfs-authentication``.
        FormatError: ``cocoonfs-format``, ``cocoonfs-truncated``, ``cursor-truncated``.
    """
    return _Replay(volume, head).plan()
