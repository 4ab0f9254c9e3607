# SPDX-License-Identifier: MIT OR Apache-2.0
"""Changing a volume: collect, lay out, write the journal, apply.

A commit's order, where each arrow is a barrier:

    in-place data, staging copies, log, tail of the log's head  ->  the head's first device block  ->
    tree nodes and targets  ->  zeros over the head's first device block  ->

In place goes only what lies in journal blocks that were wholly free before; everything else is staged, disguised, in
space that is free before *and* after. So until the head is there the old state is untouched, and from then on the
journal alone leads to the new one. The first arrow pair is `prepare`, the rest `PreparedCommit.apply`; in between a
ledger may decide, and `cancel` takes the head away again.

The layout of a commit (`_Layout`) is made wholly in memory: index, bitmap, digests, tree, header, log. Nothing of the
image's own state changes before the journal has been applied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from svsm.formats.errors import StateError
from svsm.formats.record import Buffer
from svsm.storage.cocoonfs.allocation import Space, bits_per_bitmap_block, no_space
from svsm.storage.cocoonfs.aux import AuxMetadata
from svsm.storage.cocoonfs.auxarea import NO_AUX, AuxArea, fresh_contents, place_group
from svsm.storage.cocoonfs.blockmap import BlockMap, Counted
from svsm.storage.cocoonfs.encoding import (
    MAX_POINTER_EXTENT_AB,
    Extent,
    encode_extent_pointer,
    encode_extents_list,
    merge_ranges,
)
from svsm.storage.cocoonfs.entities import (
    Chain,
    Random,
    encrypt_block,
    encrypt_extents,
    extents_bytes_needed,
)
from svsm.storage.cocoonfs.image import Image, entry_leaf_mac
from svsm.storage.cocoonfs.index import Entry, IndexEditor, Leaf, Node
from svsm.storage.cocoonfs.journal import (
    Copy,
    Disguise,
    JournalLog,
    head_header,
    journal_chain,
    protect_head,
)
from svsm.storage.cocoonfs.keys import COUNTER_DOMAIN, INDEX_DOMAIN, JOURNAL_DOMAIN
from svsm.storage.cocoonfs.layout import BITMAP_INODE, INDEX_INODE, MutableHeader, align_up
from svsm.storage.cocoonfs.newblocks import NewBlocks
from svsm.storage.cocoonfs.replay import bitmap_cover, block_place
from svsm.storage.cocoonfs.tree import TreeUpdate

__all__ = ["AUX_CHANGE", "Change", "CommitPlan", "plan_commit"]

AUX_CHANGE = 0
"""Stands for the auxiliary metadata among the changes of a commit; no file has this number."""

_COUNTER_LIMIT = 1 << 128
_RESERVED_BITMAP_BLOCKS = 64
_RESERVED_SHARE = 32  # at most this part of a volume is kept for removing many files at once


@dataclass(frozen=True, slots=True)
class Change:
    """A file's new contents, or its removal (`data` None); for `AUX_CHANGE` the encoded records."""

    data: bytes | None = field(repr=False)
    flags: int = 0


@dataclass(frozen=True, slots=True)
class CommitPlan:
    """Everything that a commit writes, and the state that it leads to."""

    header: MutableHeader
    counter: int
    in_place: list[tuple[int, Buffer]] = field(repr=False)
    staging: list[tuple[int, bytes]] = field(repr=False)
    targets: list[tuple[int, bytes]] = field(repr=False)
    log_tails: list[tuple[int, bytes]] = field(repr=False)
    head: bytes = field(repr=False)
    discards: list[Extent]
    tree: TreeUpdate
    used: BlockMap = field(repr=False)
    nodes: dict[int, Node] = field(repr=False)
    freed_nodes: list[Extent] = field(repr=False)
    root: tuple[int, int]

    def adopt(self, image: Image) -> None:
        """Make the new state the image's own."""
        if self.header.aux_pointers != image.header.aux_pointers:
            volume = image.volume
            image.aux = AuxArea(volume.layout, self.header.aux_pointers, image.image_ab, volume.io.read)
        image.header, image.counter, image.root = self.header, self.counter, self.root
        image.tree.adopt(self.tree)
        image.used = self.used
        image.counted = Counted(self.used, image.uncounted())
        for block, _ in self.freed_nodes:
            image.nodes.pop(block, None)
        image.nodes.update(self.nodes)


class _Layout:
    def __init__(self, image: Image, random: Random, *, frugal: bool, trim: bool) -> None:
        self.image = image
        self.trim = trim
        self.random = random
        self.layout = image.volume.layout
        self.keys = image.volume.keys
        self.space = Space(self.layout, image.used, frugal=frugal)
        self.used = image.used.copy()
        self.freed: list[Extent] = []
        self.writes: list[tuple[int, Buffer]] = []
        self.editor = IndexEditor(image.format, image.load, image.root, self.space.block)
        self.aux = image.aux.extents
        self.aux_pointers = image.header.aux_pointers

    # -- files -------------------------------------------------------------------------------------------------

    def change(self, inode: int, change: Change) -> None:
        """Lay out one file's change, or that of the auxiliary metadata."""
        if inode == AUX_CHANGE:
            self.move_aux(AuxMetadata.parse(change.data or b""))
            return
        old = self.editor.find(inode)
        if old is not None:
            extents, lists = self.image.extents_of(old)
            self.freed += [*extents, *lists]
        if change.data is None:
            self.editor.remove(inode)
        else:
            self.editor.put(Entry(inode, self._place(inode, change.data), change.flags))

    def move_aux(self, metadata: AuxMetadata) -> None:
        """New storage for auxiliary metadata; the old is freed. No digest covers either."""
        self.freed += self.image.aux.extents
        self.aux, self.aux_pointers = [], NO_AUX
        if metadata.is_trivial:
            return
        groups: tuple[list[Extent], list[Extent]] = ([], [])
        unit = self.layout.journal_ab
        for group in groups if metadata.reserve_bytes is not None else groups[:1]:
            group += place_group(self.layout, metadata.storage_bytes, lambda length: self.space.aligned(length, unit))
            if not group:
                raise no_space(unit)
        self.aux_pointers, contents = fresh_contents(self.layout, *groups, metadata)
        self.aux = [*groups[0], *groups[1]]
        for extent, content in contents:
            self._lay((extent,), content)

    def _place(self, inode: int, data: bytes) -> bytes:
        size = self.layout.ab_bytes
        length = align_up(extents_bytes_needed(len(data), self.layout.cipher.block_bytes), size) // size
        extents = self.space.for_file(length)
        sealed = encrypt_extents(self.keys.encryptor(inode), data, length * size, self.random)
        self._lay(extents, sealed)
        if len(extents) == 1 and extents[0][1] <= MAX_POINTER_EXTENT_AB:
            return encode_extent_pointer(extents[0])
        return encode_extent_pointer(self._place_list(inode, encode_extents_list(extents)), indirect=True)

    def _lay(self, extents: Iterable[Extent], content: bytes) -> None:
        at = 0
        for begin, length in extents:
            end = at + length * self.layout.ab_bytes
            whole = end - at == len(content)
            self.writes.append((begin, content if whole else memoryview(content)[at:end]))
            self.used.set(((begin, length),), 1)
            at = end

    def _place_list(self, inode: int, encoded: bytes) -> Extent:
        chain = Chain(self.layout, 0, None, b"", "extents list")
        size = self.layout.ab_bytes
        length = 1
        while length < MAX_POINTER_EXTENT_AB and chain.capacity(length * size, first=True) <= len(encoded):
            length += 1
        head = self.space.aligned(length, 1)
        while head is None and length > 1:
            length //= 2
            head = self.space.aligned(length, 1)
        if head is None:
            raise no_space(length)
        extents = [head, *self._tails(chain, len(encoded), head, 1)]
        encrypt = self.keys.encryptor(inode, extents_list=True)
        for extent, content in zip(extents, chain.encode(encrypt, b"", encoded, extents, self.random), strict=True):
            self._lay((extent,), content)
        return head

    def _tails(self, chain: Chain, payload_bytes: int, head: Extent, unit: int) -> list[Extent]:
        size = self.layout.ab_bytes
        rest = payload_bytes - chain.capacity(head[1] * size, first=True)
        tails: list[Extent] = []
        while rest >= 0:
            length = unit
            while length + unit <= MAX_POINTER_EXTENT_AB and chain.capacity(length * size, first=False) <= rest:
                length += unit
            extent = self.space.aligned(length, unit)
            while extent is None and length > unit:
                length -= unit
                extent = self.space.aligned(length, unit)
            if extent is None or chain.capacity(length * size, first=False) <= 0:
                raise no_space(length)
            tails.append(extent)
            rest -= chain.capacity(length * size, first=False)
        return tails

    # -- metadata ----------------------------------------------------------------------------------------------

    def _index(self) -> dict[int, Node]:
        """Write the index's dirty nodes; they come back by block."""
        editor = self.editor
        if editor.root != self.image.root:
            editor.put(Entry(INDEX_INODE, encode_extent_pointer(editor.root_pointer()), self._flags_of_index()))
        created = set(editor.created)
        for extent in editor.freed:
            if extent in created:
                self.space.give_back((extent,))
            else:
                self.freed.append(extent)
        encrypt = self.keys.encryptor(INDEX_DOMAIN)
        for block, node in editor.dirty.items():
            size = editor.format.node_ab(node) * self.layout.ab_bytes
            self._lay(
                ((block, editor.format.node_ab(node)),),
                encrypt_block(encrypt, editor.format.pack(node), size, self.random),
            )
        return dict(editor.dirty)

    def _flags_of_index(self) -> int:
        entry = self.editor.find(INDEX_INODE)
        return entry.flags if entry else 0

    def _bitmap(self) -> None:
        """Write the bitmap blocks whose bits changed."""
        per_block = bits_per_bitmap_block(self.layout)
        encrypt = self.keys.encryptor(BITMAP_INODE)
        size = self.layout.bitmap_ab * self.layout.ab_bytes
        for number in self.used.differing(self.image.used, per_block):
            place = block_place(self.image.bitmap_extents, number * self.layout.bitmap_ab)
            words = self.used.words(number * per_block, (number + 1) * per_block)
            self.writes.append((place, encrypt_block(encrypt, words, size, self.random)))

    # -- the commit --------------------------------------------------------------------------------------------

    def plan(self) -> CommitPlan:
        """Lay out everything after all files."""
        nodes = self._index()
        self.used.set(self.freed, 0)
        # A block freed and taken again in one transaction does not happen: `Space` keeps what was in use.
        self._bitmap()
        self._check_room()
        image, layout = self.image, self.layout
        counted = Counted(self.used, image.uncounted(self.aux))
        counter = (image.counter + 1) % _COUNTER_LIMIT
        header = self._header(counter, nodes)
        begin = image.volume.places.header_begin_ab
        blocks = NewBlocks(image, [*self.writes, (begin, header.pack(layout))], self.random)
        changed = blocks.changed(self.freed)
        update = image.tree.update(blocks.digests(changed, counted), header.encrypted_counter)
        header = MutableHeader(
            header.aux_pointers,
            update.root_digest,
            header.encrypted_counter,
            header.entry_leaf_hmac,
            header.entry_leaf_pointer,
            header.image_ab,
        )
        # Headers do not count for digests, so the root digest may go in now.
        blocks.put(begin, header.pack(layout))
        return self._journal(header, counter, blocks, changed, update, nodes)

    def _header(self, counter: int, nodes: Mapping[int, Node]) -> MutableHeader:
        image, layout = self.image, self.layout
        key = self.keys.encryption_key(COUNTER_DOMAIN)
        encrypted = layout.cipher.encrypt_with_iv(key, bytes(layout.cipher.block_bytes), counter.to_bytes(16, "little"))
        leaf_mac = image.header.entry_leaf_hmac
        if image.entry_leaf in nodes:
            raw = next(data for begin, data in self.writes if begin == image.entry_leaf)
            leaf_mac = entry_leaf_mac(layout, self.keys, raw)
        return MutableHeader(
            self.aux_pointers,
            bytes(layout.root_hash.digest_bytes),
            encrypted,
            leaf_mac,
            image.header.entry_leaf_pointer,
            image.image_ab,
        )

    def _check_room(self) -> None:
        """Refuse what would leave too little room for the journal of a later removal."""
        reserve = self._reserve()
        many = self.image.image_ab // self.layout.io_ab // _RESERVED_SHARE
        if self.used.free_units(at_most=reserve + many) >= reserve + many:
            return
        reserve += self._leaves(many)
        if self.used.free_units(at_most=reserve) >= reserve:
            return
        if self.used.free_units() < self.image.used.free_units():
            raise no_space(self.image.used.free_ab - self.used.free_ab)

    def _leaves(self, at_most: int) -> int:
        """How many leaves the index has: a removal of many files may have to stage an IO block for each."""
        count = 0
        block: int | None = self.image.entry_leaf
        while block is not None and count < at_most:
            leaf = self.editor.node(block, 1)
            block = leaf.following if isinstance(leaf, Leaf) else None
            count += 1
        return count

    def _reserve(self) -> int:
        """IO blocks that the journal of a removal may need."""
        layout, image = self.layout, self.image
        per_journal = layout.journal_ab // layout.io_ab
        node_io = align_up(max(layout.leaf_ab, layout.internal_ab), layout.io_ab) // layout.io_ab
        bitmaps = -(-image.image_ab // bits_per_bitmap_block(layout))
        bitmap_io = align_up(layout.bitmap_ab, layout.io_ab) // layout.io_ab
        bitmaps = min(bitmaps, _RESERVED_BITMAP_BLOCKS)
        log_io = per_journal * (4 + bitmaps // 4)
        return 1 + 2 * node_io * image.root[1] + bitmap_io * bitmaps + log_io

    def _journal(
        self,
        header: MutableHeader,
        counter: int,
        blocks: NewBlocks,
        changed: list[Extent],
        update: TreeUpdate,
        nodes: dict[int, Node],
    ) -> CommitPlan:
        image, layout, unit = self.image, self.layout, self.layout.io_ab
        in_place, staged = blocks.numbers()
        # Blocks that are only partly used by this transaction must not serve as staging space as well.
        for number in in_place:
            self.space.take_rest((number * unit, unit))
        where = [
            place + index
            for begin, length in self.space.pieces(len(staged) * unit, unit)
            for place in (begin // unit,)
            for index in range(length // unit)
        ]
        disguise = Disguise.draw(layout.cipher, self.random)
        places = [
            (target * unit + index, staging * unit + index)
            for target, staging in zip(staged, where, strict=True)
            for index in range(unit)
        ]
        covered = disguise.apply(b"".join(blocks.block(number) for number in staged), places)
        size = layout.io_bytes
        log = JournalLog(
            tree_extents=image.tree.geometry.extents,
            bitmap_extents=image.bitmap_extents,
            fragments=self._fragments(update),
            copies=_copies(staged, where),
            digests=self._ranges(changed),
            trims=self._trims() if self.trim else None,
            disguise=disguise,
        )
        head, tails = self._log(log.pack(layout, self.keys), header.aux_pointers)
        return CommitPlan(
            header=header,
            counter=counter,
            in_place=[*blocks.straight, *((number * unit, blocks.block(number)) for number in in_place)],
            staging=[(place * unit, covered[at * size : (at + 1) * size]) for at, place in enumerate(where)],
            targets=[(number * unit, blocks.block(number)) for number in staged]
            + [(extent[0], content) for extent, content in image.tree.node_writes(update)],
            log_tails=tails,
            head=head,
            discards=self._discards(log.trims, where, tails),
            tree=update,
            used=self.used,
            nodes=nodes,
            freed_nodes=self.editor.freed,
            root=self.editor.root,
        )

    def _trims(self) -> tuple[Extent, ...]:
        """What was given up, in IO blocks of which nothing is in use any more."""
        unit = self.layout.io_ab
        numbers = [
            (number, 1)
            for begin, length in merge_ranges(self.freed)
            for number in range(begin // unit, -(-(begin + length) // unit))
            if not self.used.any_used(number * unit, (number + 1) * unit)
        ]
        return tuple(merge_ranges(numbers))

    def _discards(
        self, trims: tuple[Extent, ...] | None, staging: Sequence[int], tails: Sequence[tuple[int, bytes]]
    ) -> list[Extent]:
        """Extents to discard once the journal is gone: what was freed, and what only the journal needed."""
        if trims is None:
            return []
        unit, size = self.layout.io_ab, self.layout.ab_bytes
        return [
            *((number * unit, count * unit) for number, count in trims),
            *((place * unit, unit) for place in staging),
            *((begin, len(content) // size) for begin, content in tails),
        ]

    def _ranges(self, changed: Iterable[Extent]) -> tuple[Extent, ...]:
        """Changed ranges as the log has them: up to the image's last data block."""
        image_end = align_up(self.image.image_ab, self.layout.data_ab)
        return tuple((begin, min(begin + length, image_end) - begin) for begin, length in changed)

    def _fragments(self, update: TreeUpdate) -> tuple[tuple[int, bytes], ...]:
        """Digests of the bitmap blocks that a replay needs to rebuild the leaves that change."""
        image, unit = self.image, self.layout.data_ab
        tree = image.tree
        leaves = [number for level, number in update.nodes if level == 0]
        _, ranges = bitmap_cover(image.volume, tree.geometry, image.bitmap_extents, leaves)
        return tuple(
            (at, tree.entry_after(update, tree.geometry.block_at(at)))
            for begin, length in ranges
            for at in range(begin, begin + length, unit)
        )

    def _log(self, payload: bytes, aux_pointers: bytes) -> tuple[bytes, list[tuple[int, bytes]]]:
        """(the head, unprotected transformation applied; the tails)."""
        chain = journal_chain(self.layout, self.keys)
        head = self.image.volume.places.journal_head
        extents = [head, *self._tails(chain, len(payload), head, self.layout.journal_ab)]
        contents = chain.encode(
            self.keys.encryptor(JOURNAL_DOMAIN), head_header(self.layout, aux_pointers), payload, extents, self.random
        )
        tails = [(extent[0], content) for extent, content in zip(extents[1:], contents[1:], strict=True)]
        return protect_head(self.layout, contents[0]), tails


def _copies(targets: list[int], stagings: list[int]) -> tuple[Copy, ...]:
    copies: list[Copy] = []
    for target, staging in zip(targets, stagings, strict=True):
        last = copies[-1] if copies else None
        if last and last.target + last.length == target and last.staging + last.length == staging:
            copies[-1] = Copy(last.target, last.staging, last.length + 1)
        else:
            copies.append(Copy(target, staging, 1))
    return tuple(copies)


def plan_commit(
    image: Image,
    changes: Mapping[int, Change],
    random: Random,
    *,
    trim: bool = False,
    release: Sequence[Extent] = (),
) -> CommitPlan:
    """Lay out a commit in memory.

    Args:
        image: The opened image; it is only read.
        changes: By inode.
        random: Source of IVs, padding and one-time keys.
        trim: Whether what becomes free is discarded.
        release: Extents that become free besides.

    Raises:
        StateError: ``cocoonfs-full``.
        IntegrityError: ``cocoonfs-authentication``.
        FormatError: ``cocoonfs-format``.
    """
    wish = image.aux.to_move() if AUX_CHANGE not in changes else None
    if wish is not None:
        try:
            moved = {AUX_CHANGE: Change(wish.pack()), **changes}
            return _planned(image, moved, random, frugal=False, trim=trim, release=release)
        except StateError as error:
            if error.code != "cocoonfs-full":
                raise
    try:
        return _planned(image, changes, random, frugal=False, trim=trim, release=release)
    except StateError as error:
        if error.code != "cocoonfs-full":
            raise
    # Nearly full: the same again, in the smallest holes there are.
    return _planned(image, changes, random, frugal=True, trim=trim, release=release)


def _planned(
    image: Image, changes: Mapping[int, Change], random: Random, *, frugal: bool, trim: bool, release: Sequence[Extent]
) -> CommitPlan:
    layout = _Layout(image, random, frugal=frugal, trim=trim)
    layout.freed += release
    # Removals first: they only free, so what they need of the index is not in the way of what comes.
    for inode, change in sorted(changes.items(), key=lambda item: (item[1].data is not None, item[0])):
        layout.change(inode, change)
    return layout.plan()
