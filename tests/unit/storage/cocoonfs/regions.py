# SPDX-License-Identifier: MIT OR Apache-2.0
"""Where the format authenticates nothing, derived from the format for one volume."""

from __future__ import annotations

from svsm.storage.cocoonfs import Volume
from svsm.storage.cocoonfs.layout import MutableHeader
from svsm.storage.drivers.memory import MemoryDevice
from tests.unit.storage.cocoonfs.fsck import image_of

__all__ = ["unauthenticated"]


def unauthenticated(content: bytes, key: bytes) -> dict[str, set[int]]:
    """Offsets of bytes that the format leaves without authentication, by kind.

    Args:
        content: A volume without a pending commit.
        key: Its key.
    """
    image = image_of(Volume.open(MemoryDevice(content, block_size_bytes=128), key))
    layout, places, geometry = image.volume.layout, image.volume.places, image.tree.geometry
    size = layout.ab_bytes

    def span(begin: int, length: int) -> set[int]:
        return set(range(begin * size, (begin + length) * size))

    kinds: dict[str, set[int]] = {}
    kinds["unallocated block"] = {
        byte for block, state in enumerate(image.used.states(0, image.image_ab)) if not state for byte in span(block, 1)
    }
    kinds["inactive journal head"] = span(*places.journal_head)
    begin = places.header_begin_ab * size
    kinds["pointers to auxiliary metadata"] = set(range(begin, begin + 16)) if image.aux.extents else set()
    kinds["auxiliary metadata"] = set().union(*(span(*extent) for extent in image.aux.extents))
    kinds["mutable header padding"] = set(range(begin + MutableHeader.size_bytes(layout), places.header_end_ab * size))
    kinds["behind the image"] = set(range(image.image_ab * size, len(content)))
    needed: set[int] = set()
    for level in range(geometry.levels):
        for block in range(0, geometry.data_blocks, 1 << geometry.bits(level)):
            node, _ = geometry.node_place(level, block)
            needed |= set(range(node * size, node * size + image.tree.used_bytes(level)))
    tree = set().union(*(span(*extent) for extent in geometry.extents))
    kinds["unused part of the tree"] = tree - needed
    return {kind: places for kind, places in kinds.items() if places}
