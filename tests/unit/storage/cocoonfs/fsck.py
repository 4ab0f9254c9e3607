# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a test can know about a volume beyond its files: every block is accounted for exactly once, the index obeys its
fill rules, and the tree agrees with the disk everywhere. Written apart from `svsm.storage.cocoonfs.check`, which has to
come to the same result."""

from __future__ import annotations

from svsm.storage.cocoonfs import Volume
from svsm.storage.cocoonfs.check import CheckReport, check_image
from svsm.storage.cocoonfs.encoding import Extent
from svsm.storage.cocoonfs.image import Image, preauth_chain
from svsm.storage.cocoonfs.index import Entry, Internal, Leaf, pointer_extent

__all__ = ["check", "image_of"]


def image_of(volume: Volume) -> Image:
    """The state behind a volume."""
    return volume._image


def _index(image: Image) -> tuple[list[Extent], list[Leaf]]:
    extents: list[Extent] = []
    leaves: list[Leaf] = []
    places: list[int] = []

    def walk(block: int, level: int, low: int, high: int, *, top: bool) -> None:
        node = image.load(block, level)
        extents.append((block, image.format.node_ab(node)))
        if isinstance(node, Leaf):
            assert level == 1
            assert top or len(node.entries) >= image.format.leaf_minimum
            assert all(low <= entry.inode < high for entry in node.entries)
            leaves.append(node)
            places.append(block)
            return
        assert isinstance(node, Internal)
        assert node.level == level
        assert len(node.keys) >= (1 if top else image.format.internal_minimum)
        bounds = [low, *node.keys, high]
        for slot, child in enumerate(node.children):
            walk(child, level - 1, bounds[slot], bounds[slot + 1], top=False)

    walk(*image.root, 0, 1 << 64, top=True)
    assert places[0] == image.entry_leaf
    assert [leaf.following for leaf in leaves] == [*places[1:], None]
    return extents, leaves


def _special_list(image: Image, entry: Entry) -> list[Extent]:
    """Where the extents list of the tree or the bitmap lies, if it has one."""
    # `check` and `survey` have the like; again on purpose: a second look must not share the mistakes of the first.
    extent, indirect = pointer_extent(entry, image.image_ab)
    if not indirect:
        return []
    volume = image.volume
    chain = preauth_chain(volume.layout, volume.keys, entry.inode)
    decrypt = volume.keys.decryptor(entry.inode, extents_list=True)
    return chain.decode(decrypt, extent, volume.io.read, limit_ab=image.image_ab)[1]


def check(volume: Volume) -> None:
    """Assert all of it, and that the library's check finds nothing either."""
    image = image_of(volume)
    extents, leaves = _index(image)
    extents += [*image.uncounted(), *image.bitmap_extents]
    for leaf in leaves:
        for entry in leaf.entries:
            if entry.inode >= 16:
                data, lists = image.extents_of(entry)
                extents += [*data, *lists]
            elif entry.inode in (1, 2):
                extents += _special_list(image, entry)
    seen = bytearray(image.image_ab)
    for begin, length in extents:
        assert not any(seen[begin : begin + length])
        seen[begin : begin + length] = b"\1" * length
    assert seen == image.used.states(0, image.image_ab)
    geometry = image.tree.geometry
    for _, (begin, length) in geometry.runs(0, geometry.data_blocks):
        image.read_checked(begin, begin + length)
    report = check_image(image, CheckReport())
    assert report.findings == []
    assert report.files == sum(entry.inode >= 16 for leaf in leaves for entry in leaf.entries)
