# SPDX-License-Identifier: MIT OR Apache-2.0
"""Where things are: the authentication tree's dimensions, its index domain, and the fixed extents.

The tree's nodes lie in depth-first order in the tree's extents; data blocks are numbered over the rest of the image,
as if the tree's extents were cut out. Levels count from 0 (leaf) upwards. With ``c`` and ``d`` the base-2 logarithms
of digests in an internal node and in a leaf, a node at level l covers ``2^(d + c*l)`` data blocks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from svsm.formats.errors import FormatError
from svsm.storage.cocoonfs import integrity
from svsm.storage.cocoonfs.encoding import Extent
from svsm.storage.cocoonfs.layout import ImageLayout, MutableHeader, StaticHeader, align_up

__all__ = ["FixedPlaces", "TreeGeometry", "plan_tree", "too_small"]

_W = 64


def _logs(layout: ImageLayout) -> tuple[int, int]:
    per_node = layout.node_bytes // layout.node_hash.digest_bytes
    per_leaf = layout.node_bytes // layout.data_hash.digest_bytes
    return per_node.bit_length() - 1, per_leaf.bit_length() - 1


def _subtree_nodes(levels: int, node_log2: int) -> int:
    return ((1 << node_log2 * levels) - 1) // ((1 << node_log2) - 1)


def _levels_of(nodes: int, layout: ImageLayout) -> int:
    c, d = _logs(layout)
    most = -(-min(_W, _W - d - layout.auth_tree_data_block_allocation_blocks_log2 + c) // c)
    bottom = nodes - ((nodes - 1) >> c)
    return min(-(-(bottom - 1).bit_length() // c) + 1, most)


def too_small(image_ab: int) -> FormatError:
    """``cocoonfs-too-small``, of an image of this many allocation blocks."""
    return FormatError(
        "the disk is too small for a volume",
        code="cocoonfs-too-small",
        hint="use 64KiB or more, and more still with large blocks or many records; a size without a unit is in bytes",
        allocation_blocks=image_ab,
    )


def plan_tree(layout: ImageLayout, image_ab: int) -> tuple[int, int]:
    """How large a tree an image gets.

    Args:
        layout: The configuration.
        image_ab: Size asked for.

    Returns:
        (number of nodes, allocation blocks at the end that stay without cover and are cut off)

    Raises:
        FormatError: ``cocoonfs-too-small``.
    """
    c, d = _logs(layout)
    node_ab, data_log2 = layout.node_ab, layout.auth_tree_data_block_allocation_blocks_log2
    if image_ab < node_ab:
        raise too_small(image_ab)

    def total(levels: int) -> int:
        return _subtree_nodes(levels, c) * node_ab + (1 << c * (levels - 1) + d + data_log2)

    levels = 1
    while total(levels) < image_ab:
        levels += 1
    if levels > 1 and image_ab - total(levels - 1) < levels * node_ab:
        levels -= 1
    nodes, left = 0, image_ab
    for level in range(levels - 1, -1, -1):
        child_nodes = _subtree_nodes(level, c)
        child_ab = child_nodes * node_ab + (1 << (c * (level - 1) if level else 0) + d + data_log2)
        if level == 0:
            # The "children" of a leaf are data blocks.
            child_nodes, child_ab = 0, 1 << data_log2
        left -= node_ab
        nodes += 1
        # A level that was given up must not grow children beyond what one node can list.
        children = min(left // child_ab, 1 << (c if level else d))
        left -= children * child_ab
        nodes += children * child_nodes
        if level == 0 or left < level * node_ab or children == 1 << c:
            break
    return nodes, left


class FixedPlaces(NamedTuple):
    """What the static header alone determines.

    Attributes:
        header_begin_ab: First block of the mutable header.
        header_end_ab: First block behind it.
        journal_head: The journal's head extent.
    """

    header_begin_ab: int
    header_end_ab: int
    journal_head: Extent

    @staticmethod
    def of(header: StaticHeader) -> FixedPlaces:
        """For this static header."""
        layout = header.layout
        begin = header.size_bytes // layout.ab_bytes
        end = begin + align_up(MutableHeader.size_bytes(layout), layout.ab_bytes) // layout.ab_bytes
        unit = layout.journal_ab
        # Magic, integrity section and pointer pair; tag, IV; then a pointer and one block of padding.
        plain = 8 + integrity.section_bytes(layout.io_bytes) + 16
        least = plain + layout.preauth_hash.digest_bytes + layout.cipher.block_bytes + 16
        length = align_up(least, unit * layout.ab_bytes) // layout.ab_bytes
        return FixedPlaces(begin, end, (align_up(end, unit), length))


class TreeGeometry:
    """Dimensions of a tree that lies in given extents.

    Args:
        layout: The configuration.
        extents: The tree's extents in the order of its nodes.
        image_ab: The image's size.

    Raises:
        FormatError: ``cocoonfs-format`` where the extents are misaligned, overlap, or do not cover the image.
    """

    def __init__(self, layout: ImageLayout, extents: Sequence[Extent], image_ab: int) -> None:
        self.layout = layout
        self.extents = tuple(extents)
        self.image_ab = image_ab
        self.node_log2, self.leaf_log2 = _logs(layout)
        self._data_log2 = layout.auth_tree_data_block_allocation_blocks_log2
        for begin, length in self.extents:
            if begin % layout.journal_ab or length % layout.journal_ab or length % layout.node_ab:
                raise self._bad("alignment")
            if begin + length > image_ab:
                raise self._bad("extents")
        total_ab = sum(length for _, length in self.extents)
        self.nodes = total_ab // layout.node_ab
        if not self.nodes:
            raise self._bad("extents")
        self.levels = _levels_of(self.nodes, layout)
        ordered = sorted(self.extents)
        self._begins = [begin for begin, _ in ordered]
        self._ends = [begin + length for begin, length in ordered]
        self._before = [sum(length for _, length in ordered[:index]) for index in range(len(ordered) + 1)]
        self.data_blocks = -(-(image_ab - total_ab) // layout.data_ab)
        covered = 1 << self.leaf_log2 + self.node_log2 * (self.levels - 1)
        if self.data_blocks > covered or self.dfs_index(0, max(self.data_blocks - 1, 0)) >= self.nodes:
            raise self._bad("dimensions")

    @staticmethod
    def _bad(field: str) -> FormatError:
        return FormatError("the authentication tree's extents are malformed", code="cocoonfs-format", field=field)

    def block_at(self, ab: int) -> int:
        """Number of the data block that contains an allocation block outside the tree."""
        return (ab - self._before[bisect_right(self._begins, ab)]) >> self._data_log2

    def place_of(self, block: int) -> int:
        """First allocation block of a data block."""
        ab = block << self._data_log2
        for begin, end in zip(self._begins, self._ends, strict=True):
            if ab < begin:
                break
            ab += end - begin
        return ab

    def runs(self, first: int, count: int) -> Iterator[tuple[int, Extent]]:
        """Consecutive data blocks as (first block, physical extent), split where the tree lies between."""
        while count > 0:
            begin = self.place_of(first)
            following = bisect_right(self._begins, begin)
            room = count
            if following < len(self._begins):
                room = min(count, (self._begins[following] - begin) >> self._data_log2)
            yield first, (begin, room << self._data_log2)
            first += room
            count -= room

    def bits(self, level: int) -> int:
        """Base-2 logarithm of the data blocks under a node at this level."""
        return self.leaf_log2 + self.node_log2 * level

    def dfs_index(self, level: int, block: int) -> int:
        """Position of the node at `level` above `block` in the depth-first order."""
        index = 0
        for above in range(self.levels - 1, level, -1):
            child = (block >> self.bits(above - 1)) & ((1 << self.node_log2) - 1)
            index += 1 + child * _subtree_nodes(above, self.node_log2)
        return index

    def node_place(self, level: int, block: int) -> Extent:
        """Where the node at `level` above `block` lies."""
        offset = self.dfs_index(level, block) * self.layout.node_ab
        for begin, length in self.extents:
            if offset < length:
                return begin + offset, self.layout.node_ab
            offset -= length
        raise self._bad("node")

    def node_id(self, level: int, block: int) -> bytes:
        """What binds a node's digest to its position: u64, first block under the node's last entry."""
        bits = self.bits(level)
        first = block >> bits << bits
        last = (1 << bits) - (1 << bits - self.node_log2) if level else (1 << bits) - 1
        return ((first | last) % (1 << _W)).to_bytes(8, "little")
