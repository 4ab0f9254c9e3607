# SPDX-License-Identifier: MIT OR Apache-2.0
"""The inode index: a B+-tree from inode number to (pointer, flags).

Nodes are encrypted blocks. The leftmost leaf (the *entry leaf*) is pinned: the header points at it, splitting it
makes a new right sibling, and merging always merges into the left node. A separator is the first key of its right
subtree. Leaves are chained. Node records are immutable for readers; a transaction edits its own copies in an
`IndexEditor` and says at the end which blocks changed, came and went.

Keys 1, 2 and 3 are the tree, the bitmap and the index's own root; they stand in the entry leaf.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from svsm.formats.errors import FormatError
from svsm.storage.cocoonfs.encoding import (
    NIL,
    Extent,
    decode_block_pointer,
    decode_extent_pointer,
    encode_block_pointer,
)
from svsm.storage.cocoonfs.entities import block_payload_bytes
from svsm.storage.cocoonfs.layout import ImageLayout

__all__ = ["Entry", "IndexEditor", "Internal", "Leaf", "NodeFormat", "find", "iterate", "pointer_extent"]

_MAX_LEVELS = 40


class Entry(NamedTuple):
    """One inode: its encoded extent pointer and its flags byte."""

    inode: int
    pointer: bytes
    flags: int


@dataclass(slots=True)
class Leaf:
    """A leaf node."""

    entries: list[Entry]
    following: int | None


@dataclass(slots=True)
class Internal:
    """An internal node; `children` is one longer than `keys`. `level` counts from 1 at the leaves."""

    children: list[int]
    keys: list[int]
    level: int


Node = Leaf | Internal
Load = Callable[[int, int], Node]
"""(block, level expected) -> node; level 1 is a leaf, 0 means whatever is there."""


def _malformed(what: str) -> FormatError:
    return FormatError("an index node is malformed", code="cocoonfs-format", field=what)


class NodeFormat:
    """Bytes to nodes and back, for one configuration."""

    def __init__(self, layout: ImageLayout) -> None:
        self.layout = layout
        self.leaf_bytes = block_payload_bytes(layout.leaf_ab * layout.ab_bytes, layout.cipher.block_bytes)
        self.internal_bytes = block_payload_bytes(layout.internal_ab * layout.ab_bytes, layout.cipher.block_bytes)
        self.leaf_entries = (self.leaf_bytes - 12) // 20
        self.internal_keys = (self.internal_bytes - 12) // 16
        self.leaf_minimum = -(-self.leaf_entries // 2)
        self.internal_minimum = (self.internal_keys - 1) // 2
        if self.leaf_minimum < 3 or self.internal_minimum < 1:
            raise FormatError("an index node is too small", code="cocoonfs-layout")
        m = self.leaf_entries
        self._leaf = struct.Struct(f"<8s{8 * m}s{m}Q{m}II")
        m = self.internal_keys
        self._internal = struct.Struct(f"<{8 * (m + 1)}s{m}QI")

    def node_ab(self, node: Node) -> int:
        """Size of a node of this kind in ab."""
        return self.layout.leaf_ab if isinstance(node, Leaf) else self.layout.internal_ab

    def level_of(self, payload: bytes, *, leaf: bool) -> int:
        """The level field of a decrypted block read as a leaf or as an internal node."""
        end = self._leaf.size if leaf else self._internal.size
        return int.from_bytes(payload[end - 4 : end], "little")

    def parse_leaf(self, payload: bytes, limit_ab: int) -> Leaf:
        """Decode a leaf.

        Raises:
            FormatError: ``cocoonfs-format``.
        """
        m = self.leaf_entries
        following, pointers, *rest = self._leaf.unpack_from(payload)
        keys, flags, level = rest[:m], rest[m : 2 * m], rest[2 * m]
        if level != 1:
            raise _malformed("level")
        entries: list[Entry] = []
        ended = False
        previous = 0
        for slot, (key, flag) in enumerate(zip(keys, flags, strict=True)):
            pointer = pointers[8 * slot : 8 * slot + 8]
            if key == 0:
                if flag or pointer != NIL:
                    raise _malformed("empty slot")
                ended = True
                continue
            if ended or key <= previous or flag > 0xFF or pointer == NIL:
                raise _malformed("slot")
            previous = key
            entries.append(Entry(key, pointer, flag))
        return Leaf(entries, decode_block_pointer(following, length_ab=self.layout.leaf_ab, limit_ab=limit_ab))

    def parse_internal(self, payload: bytes, limit_ab: int) -> Internal:
        """Decode an internal node.

        Raises:
            FormatError: ``cocoonfs-format``.
        """
        pointers, *rest = self._internal.unpack_from(payload)
        level = rest[-1]
        keys = list(rest[:-1])
        while keys and keys[-1] == 0:
            keys.pop()
        if not 2 <= level <= _MAX_LEVELS or any(a >= b for a, b in zip([0, *keys], keys, strict=False)):
            raise _malformed("keys")
        child_ab = self.layout.leaf_ab if level == 2 else self.layout.internal_ab
        children: list[int] = []
        for slot in range(self.internal_keys + 1):
            raw = pointers[8 * slot : 8 * slot + 8]
            child = decode_block_pointer(raw, length_ab=child_ab, limit_ab=limit_ab)
            if (child is None) != (slot > len(keys)):
                raise _malformed("children")
            if child is not None:
                children.append(child)
        return Internal(children, keys, level)

    def pack(self, node: Node) -> bytes:
        """Encode a node (without padding)."""
        if isinstance(node, Leaf):
            m = self.leaf_entries
            gap = m - len(node.entries)
            return self._leaf.pack(
                encode_block_pointer(node.following),
                b"".join(entry.pointer for entry in node.entries) + NIL * gap,
                *[entry.inode for entry in node.entries],
                *[0] * gap,
                *[entry.flags for entry in node.entries],
                *[0] * gap,
                1,
            )
        gap = self.internal_keys - len(node.keys)
        return self._internal.pack(
            b"".join(encode_block_pointer(child) for child in node.children) + NIL * gap,
            *node.keys,
            *[0] * gap,
            node.level,
        )


def _slot(node: Internal, inode: int) -> int:
    return sum(1 for key in node.keys if inode >= key)


def find(load: Load, root: tuple[int, int], inode: int) -> Entry | None:
    """The entry of an inode.

    Args:
        load: Gives a node.
        root: (block, level) of the root.
        inode: Its number.
    """
    block, level = root
    node = load(block, level)
    while isinstance(node, Internal):
        level -= 1
        node = load(node.children[_slot(node, inode)], level)
    return next((entry for entry in node.entries if entry.inode == inode), None)


def iterate(load: Load, entry_leaf: int, limit: int) -> Iterator[Entry]:
    """All entries in order, along the chain of leaves; at most `limit` leaves.

    Raises:
        FormatError: ``cocoonfs-format`` where the chain is circular or out of order.
    """
    block: int | None = entry_leaf
    previous = 0
    for _ in range(limit):
        if block is None:
            return
        leaf = load(block, 1)
        if not isinstance(leaf, Leaf):
            raise _malformed("chain")
        for entry in leaf.entries:
            if entry.inode <= previous:
                raise _malformed("order")
            previous = entry.inode
            yield entry
        block = leaf.following
    if block is not None:
        raise _malformed("chain")


@dataclass(slots=True)
class IndexEditor:
    """Changes to the index within a transaction.

    Attributes:
        format: Of the nodes.
        load: Gives the committed node at a block.
        root: (block, level) of the root, as it is now.
        allocate: Gives a block for a new node of so many ab.
        dirty: Nodes that must be written, by block.
        freed: Extents of nodes that went away, in order; some may have been `created` here.
        created: Extents of nodes that are new.
    """

    format: NodeFormat
    load: Load
    root: tuple[int, int]
    allocate: Callable[[int], int]
    dirty: dict[int, Node] = field(default_factory=dict)
    freed: list[Extent] = field(default_factory=list)
    created: list[Extent] = field(default_factory=list)

    def node(self, block: int, level: int) -> Node:
        """A node as this transaction sees it."""
        return self.dirty[block] if block in self.dirty else self.load(block, level)

    def _edit(self, block: int, level: int) -> Node:
        if block not in self.dirty:
            node = self.load(block, level)
            if isinstance(node, Leaf):
                self.dirty[block] = Leaf(list(node.entries), node.following)
            else:
                self.dirty[block] = Internal(list(node.children), list(node.keys), node.level)
        return self.dirty[block]

    def _new(self, node: Node) -> int:
        length = self.format.node_ab(node)
        block = self.allocate(length)
        self.created.append((block, length))
        self.dirty[block] = node
        return block

    def _drop(self, block: int, node: Node) -> None:
        self.dirty.pop(block, None)
        self.freed.append((block, self.format.node_ab(node)))

    def find(self, inode: int) -> Entry | None:
        """The entry of an inode as this transaction sees it."""
        return find(self.node, self.root, inode)

    def _path(self, inode: int) -> list[tuple[int, int]]:
        """(block, slot taken) from the root down; the leaf's slot is meaningless."""
        block, level = self.root
        path: list[tuple[int, int]] = []
        node = self.node(block, level)
        while isinstance(node, Internal):
            slot = _slot(node, inode)
            path.append((block, slot))
            block, level = node.children[slot], level - 1
            node = self.node(block, level)
        path.append((block, 0))
        return path

    def _leaf(self, block: int) -> Leaf:
        node = self._edit(block, 1)
        if not isinstance(node, Leaf):
            raise _malformed("level")
        return node

    def _internal(self, block: int, level: int) -> Internal:
        node = self._edit(block, level)
        if not isinstance(node, Internal):
            raise _malformed("level")
        return node

    def put(self, entry: Entry) -> None:
        """Insert or replace an entry."""
        path = self._path(entry.inode)
        leaf = self._leaf(path[-1][0])
        at = sum(1 for known in leaf.entries if known.inode < entry.inode)
        if at < len(leaf.entries) and leaf.entries[at].inode == entry.inode:
            leaf.entries[at] = entry
            return
        leaf.entries.insert(at, entry)
        if len(leaf.entries) > self.format.leaf_entries:
            half = len(leaf.entries) // 2
            right = self._new(Leaf(leaf.entries[half:], leaf.following))
            separator = leaf.entries[half].inode
            del leaf.entries[half:]
            leaf.following = right
            self._insert_child(path[:-1], separator, right, 1)

    def _insert_child(self, path: list[tuple[int, int]], key: int, child: int, below: int) -> None:
        """Hang `child` (a node at level `below`) right of the slot that `path` took."""
        if not path:
            top = Internal([self.root[0], child], [key], below + 1)
            self.root = (self._new(top), below + 1)
            return
        block, slot = path[-1]
        node = self._internal(block, below + 1)
        node.keys.insert(slot, key)
        node.children.insert(slot + 1, child)
        if len(node.keys) > self.format.internal_keys:
            middle = len(node.keys) // 2
            separator = node.keys[middle]
            right = self._new(Internal(node.children[middle + 1 :], node.keys[middle + 1 :], node.level))
            del node.keys[middle:], node.children[middle + 1 :]
            self._insert_child(path[:-1], separator, right, below + 1)

    def remove(self, inode: int) -> Entry | None:
        """Remove an entry; gives it back, None where there is none."""
        path = self._path(inode)
        found = self.find(inode)
        if found is None:
            return None
        leaf = self._leaf(path[-1][0])
        leaf.entries = [entry for entry in leaf.entries if entry.inode != inode]
        if len(path) > 1 and len(leaf.entries) < self.format.leaf_minimum:
            self._mend_leaf(path)
        return found

    def _mend_leaf(self, path: list[tuple[int, int]]) -> None:
        parent_block, slot = path[-2]
        parent = self._internal(parent_block, 2)
        at = slot - 1 if slot else 0  # index of the left one of the pair
        left = self._leaf(parent.children[at])
        right = self._leaf(parent.children[at + 1])
        together = left.entries + right.entries
        if len(together) <= self.format.leaf_entries:
            left.entries, left.following = together, right.following
            self._drop(parent.children[at + 1], right)
            self._drop_child(path[:-1], at)
            return
        half = len(together) // 2
        left.entries, right.entries = together[:half], together[half:]
        parent.keys[at] = right.entries[0].inode

    def _drop_child(self, path: list[tuple[int, int]], at: int) -> None:
        """Take separator `at` and the child right of it out of the last node of `path`."""
        block, _ = path[-1]
        node = self.dirty[block]
        if not isinstance(node, Internal):
            raise _malformed("level")
        del node.keys[at], node.children[at + 1]
        if len(path) == 1:
            if not node.keys:
                self._drop(block, node)
                self.root = (node.children[0], node.level - 1)
            return
        if len(node.keys) >= self.format.internal_minimum:
            return
        parent_block, slot = path[-2]
        parent = self._internal(parent_block, node.level + 1)
        pair = slot - 1 if slot else 0
        left = self._internal(parent.children[pair], node.level)
        right = self._internal(parent.children[pair + 1], node.level)
        keys = [*left.keys, parent.keys[pair], *right.keys]
        children = left.children + right.children
        if len(keys) <= self.format.internal_keys:
            left.keys, left.children = keys, children
            self._drop(parent.children[pair + 1], right)
            self._drop_child(path[:-1], pair)
            return
        half = len(keys) // 2
        left.keys, parent.keys[pair], right.keys = keys[:half], keys[half], keys[half + 1 :]
        left.children, right.children = children[: half + 1], children[half + 1 :]

    def root_pointer(self) -> Extent:
        """Where inode 3 must point."""
        block, level = self.root
        layout = self.format.layout
        return block, layout.leaf_ab if level == 1 else layout.internal_ab


def pointer_extent(entry: Entry, limit_ab: int) -> tuple[Extent, bool]:
    """The extent of an entry and whether it holds an extents list.

    Raises:
        FormatError: ``cocoonfs-format``.
    """
    found = decode_extent_pointer(entry.pointer, limit_ab=limit_ab)
    if found is None:
        raise _malformed("pointer")
    return found
