# SPDX-License-Identifier: MIT OR Apache-2.0
"""The authentication tree: a Merkle tree over every data block, its root bound to configuration and update counter.

Nodes are loaded when first needed, checked against their parent, and kept: a node in memory is the truth, whatever
the disk says later. Of the leaves only so many are kept; of the other nodes all are, about 0.2 % of the volume. A
leaf's entry is a MAC over the *allocated* blocks of a data block (and which those are), so that free space may hold
anything. Nothing is decrypted, and no structure parsed, before its data blocks were compared with their entries here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from svsm.formats.record import Buffer
from svsm.storage.cocoonfs.encoding import Extent, encode_extents_list
from svsm.storage.cocoonfs.entities import authentication_failure
from svsm.storage.cocoonfs.geometry import TreeGeometry
from svsm.storage.cocoonfs.keys import Keys
from svsm.storage.cocoonfs.layout import MAGIC, ImageLayout, Subject
from svsm.storage.cocoonfs.primitives import equal

__all__ = ["AuthTree", "DataDigester", "TreeUpdate", "image_context", "root_digest"]

ReadRaw = Callable[[Extent], bytes]
_KEPT_PATTERNS = 4096
_KEPT_LEAVES = 8192


class DataDigester:
    """Digests of data blocks: the leaves' entries."""

    def __init__(self, layout: ImageLayout, keys: Keys) -> None:
        self._copy = keys.data_mac.copy
        self._ab_bytes = layout.ab_bytes
        self._data_ab = layout.data_ab
        self._patterns: dict[bytes, tuple[bytes, list[tuple[int, int]]]] = {}

    def _pattern(self, states: bytes) -> tuple[bytes, list[tuple[int, int]]]:
        known = self._patterns.get(states)
        if known is None:
            word = sum(1 << index for index, state in enumerate(states) if state)
            runs: list[tuple[int, int]] = []
            for index, state in enumerate(states):
                begin, end = index * self._ab_bytes, (index + 1) * self._ab_bytes
                if not state:
                    continue
                if runs and runs[-1][1] == begin:
                    runs[-1] = (runs[-1][0], end)
                else:
                    runs.append((begin, end))
            known = word.to_bytes(8, "little"), runs
            if len(self._patterns) >= _KEPT_PATTERNS:
                self._patterns.clear()
            self._patterns[states] = known
        return known

    def digests(self, first_block: int, content: Buffer, states: bytes) -> list[bytes]:
        """Digests of consecutive data blocks.

        Args:
            first_block: Number of the first.
            content: Whole data blocks.
            states: One byte for each allocation block: 1 where it counts.
        """
        step, size = self._data_ab, self._data_ab * self._ab_bytes
        copy, pattern = self._copy, self._pattern
        out = []
        base = 0
        if states.count(1) == len(states):  # inside a large file: nothing to look up
            word = pattern(states[:step])[0]
            for block in range(first_block, first_block + len(states) // step):
                state = copy()
                state.update(content[base : base + size])
                state.update(word + block.to_bytes(8, "little") + Subject.DATA_BLOCK)
                out.append(state.finalize())
                base += size
            return out
        for block, at in enumerate(range(0, len(states), step), first_block):
            word, runs = pattern(states[at : at + step])
            state = copy()
            for begin, end in runs:
                state.update(content[base + begin : base + end])
            state.update(word + block.to_bytes(8, "little") + Subject.DATA_BLOCK)
            out.append(state.finalize())
            base += size
        return out


def image_context(
    layout: ImageLayout,
    keys: Keys,
    *,
    entry_leaf_pointer: bytes,
    image_ab: int,
    tree_extents: Iterable[Extent],
    bitmap_extents: Iterable[Extent],
) -> bytes:
    """What the root digest binds besides data: configuration, size, and where the structures lie."""
    state = keys.root_mac.copy()
    state.update(MAGIC + b"\x01" + layout.pack() + entry_leaf_pointer + image_ab.to_bytes(8, "little"))
    state.update(encode_extents_list(tree_extents) + encode_extents_list(bitmap_extents) + Subject.IMAGE_CONTEXT)
    return state.finalize()


def root_digest(geometry: TreeGeometry, keys: Keys, root: bytes, encrypted_counter: bytes, context: bytes) -> bytes:
    """The MAC over the root node, the update counter and the image context."""
    state = keys.root_mac.copy()
    state.update(root + geometry.node_id(geometry.levels - 1, 0) + encrypted_counter + context + Subject.TREE_ROOT)
    return state.finalize()


@dataclass(frozen=True, slots=True)
class TreeUpdate:
    """Nodes as a commit changes them, keyed (level, number of the node in its level); and the new root digest."""

    nodes: dict[tuple[int, int], bytes] = field(repr=False)
    root_digest: bytes


class AuthTree:
    """The tree of one opened image."""

    def __init__(self, geometry: TreeGeometry, keys: Keys, read_raw: ReadRaw, context: bytes) -> None:
        layout = geometry.layout
        self.geometry = geometry
        self.digester = DataDigester(layout, keys)
        self._keys = keys
        self._read_raw = read_raw
        self._context = context
        self._hash = layout.node_hash.digest
        self._node_digest = layout.node_hash.digest_bytes
        self.data_digest_bytes = layout.data_hash.digest_bytes
        self._nodes: dict[tuple[int, int], bytes] = {}
        self._leaves: dict[int, bytes] = {}

    def used_bytes(self, level: int) -> int:
        """How many bytes of a node at this level are digests."""
        if level:
            return self._node_digest << self.geometry.node_log2
        return self.data_digest_bytes << self.geometry.leaf_log2

    def _read_node(self, level: int, block: int) -> bytes:
        return self._read_raw(self.geometry.node_place(level, block))[: self.used_bytes(level)]

    def _hash_node(self, level: int, block: int, node: bytes) -> bytes:
        return self._hash(node, self.geometry.node_id(level, block) + Subject.TREE_NODE)

    def load_root(self, expected: bytes, encrypted_counter: bytes) -> None:
        """Read the root and compare it with the header's root digest.

        Raises:
            IntegrityError: ``cocoonfs-authentication``.
        """
        top = self.geometry.levels - 1
        root = self._read_node(top, 0)
        if not equal(root_digest(self.geometry, self._keys, root, encrypted_counter, self._context), expected):
            raise authentication_failure("root")
        self._keep((top, 0), root)

    def _node(self, level: int, block: int) -> bytes:
        name = (level, block >> self.geometry.bits(level))
        known = self._nodes.get(name) if level else self._leaves.get(name[1])
        if known is not None:
            return known
        parent = self._node(level + 1, block)
        slot = (name[1] & ((1 << self.geometry.node_log2) - 1)) * self._node_digest
        node = self._read_node(level, block)
        if not equal(self._hash_node(level, block, node), parent[slot : slot + self._node_digest]):
            raise authentication_failure("tree node", level=level, block=block)
        self._keep(name, node)
        return node

    def _keep(self, name: tuple[int, int], node: bytes) -> None:
        if name[0]:
            self._nodes[name] = node
            return
        if len(self._leaves) >= _KEPT_LEAVES:
            # What goes is on the disk, and is compared with its parent when it comes back.
            for number in list(self._leaves)[: _KEPT_LEAVES // 2]:
                del self._leaves[number]
        self._leaves[name[1]] = node

    def entries(self, first_block: int, count: int) -> bytes:
        """The authentic digests of consecutive data blocks, end to end."""
        size, per_leaf = self.data_digest_bytes, 1 << self.geometry.leaf_log2
        parts = []
        while count > 0:
            slot = first_block % per_leaf
            room = min(count, per_leaf - slot)
            parts.append(self._node(0, first_block)[slot * size : (slot + room) * size])
            first_block += room
            count -= room
        return b"".join(parts)

    def check(self, first_block: int, content: Buffer, states: bytes) -> None:
        """Compare consecutive data blocks with their entries.

        Raises:
            IntegrityError: ``cocoonfs-authentication``.
        """
        made = self.digester.digests(first_block, content, states)
        if not equal(b"".join(made), self.entries(first_block, len(made))):
            raise authentication_failure("data block", block=first_block, count=len(made))

    def _with_entries(self, level: int, changes: Iterable[tuple[int, list[bytes]]]) -> dict[int, bytes]:
        """The nodes of a level, by number, after runs of their entries changed: (number of the first, digests)."""
        fan_out = 1 << (self.geometry.node_log2 if level else self.geometry.leaf_log2)
        size = self._node_digest if level else self.data_digest_bytes
        mixed: dict[int, bytearray] = {}
        whole: dict[int, bytes] = {}
        for first, digests in changes:
            at = 0
            while at < len(digests):
                number, slot = divmod(first + at, fan_out)
                run = digests[at : at + fan_out - slot]
                at += len(run)
                if len(run) == fan_out:  # nothing of the old node is left, so it is not asked for
                    whole[number] = b"".join(run)
                    continue
                if number not in mixed:
                    mixed[number] = bytearray(self._node(level, number << self.geometry.bits(level)))
                mixed[number][slot * size : (slot + len(run)) * size] = b"".join(run)
        return {number: bytes(node) for number, node in mixed.items()} | whole

    def update(self, changes: Iterable[tuple[int, list[bytes]]], encrypted_counter: bytes) -> TreeUpdate:
        """The nodes and root digest after some entries changed; the tree itself stays as it is.

        Args:
            changes: (first data block, digests of the data blocks from there on); each block at most once.
            encrypted_counter: As the new header has it.
        """
        geometry = self.geometry
        fresh: dict[tuple[int, int], bytes] = {}
        for level in range(geometry.levels):
            nodes = self._with_entries(level, changes)
            fresh |= {(level, number): node for number, node in nodes.items()}
            changes = [
                (number, [self._hash_node(level, number << geometry.bits(level), node)])
                for number, node in nodes.items()
            ]
        top = geometry.levels - 1
        root = fresh[top, 0] if (top, 0) in fresh else self._node(top, 0)
        return TreeUpdate(fresh, root_digest(geometry, self._keys, root, encrypted_counter, self._context))

    def entry_after(self, update: TreeUpdate, block: int) -> bytes:
        """The digest of a data block after an update."""
        leaf, slot = divmod(block, 1 << self.geometry.leaf_log2)
        node = update.nodes.get((0, leaf))
        size = self.data_digest_bytes
        return self.entries(block, 1) if node is None else node[slot * size : (slot + 1) * size]

    def node_writes(self, update: TreeUpdate) -> list[tuple[Extent, bytes]]:
        """Where the nodes of an update go and what is written there (whole nodes, zero behind the digests)."""
        geometry = self.geometry
        size = geometry.layout.node_bytes
        return [
            (geometry.node_place(level, number << geometry.bits(level)), node.ljust(size, b"\0"))
            for (level, number), node in update.nodes.items()
        ]

    def adopt(self, update: TreeUpdate) -> None:
        """Make the nodes of an update the tree's own."""
        for name, node in update.nodes.items():
            self._keep(name, node)
