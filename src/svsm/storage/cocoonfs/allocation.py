# SPDX-License-Identifier: MIT OR Apache-2.0
"""Handing out free space to one transaction, and the shape of the bitmap file.

On the disk the bitmap is a bit per block in little-endian words, as many words to an encrypted bitmap block as fit; in
memory it is a `blockmap.BlockMap`.

`Space` never gives out what was in use before the transaction or is in use after it, so nothing that a crash could
need is overwritten; what was freed becomes usable with the next one.
"""

from __future__ import annotations

from collections.abc import Iterable

from svsm.formats.errors import StateError
from svsm.storage.cocoonfs.blockmap import BlockMap, pack_states, with_ranges
from svsm.storage.cocoonfs.encoding import Extent
from svsm.storage.cocoonfs.entities import block_payload_bytes
from svsm.storage.cocoonfs.layout import ImageLayout, align_up

__all__ = ["Space", "bitmap_blocks", "bits_per_bitmap_block", "no_space", "pack_states", "with_ranges"]


def bits_per_bitmap_block(layout: ImageLayout) -> int:
    """Allocation blocks that one bitmap block tracks."""
    return block_payload_bytes(layout.bitmap_ab * layout.ab_bytes, layout.cipher.block_bytes) // 8 * 64


def bitmap_blocks(layout: ImageLayout, image_ab: int) -> int:
    """Bitmap blocks that an image of this size needs."""
    return -(-image_ab // bits_per_bitmap_block(layout))


def no_space(wanted_ab: int) -> StateError:
    """The error for a full volume."""
    return StateError(
        "the volume is full",
        code="cocoonfs-full",
        hint="remove files, or replace them with smaller ones; nothing was changed",
        wanted_ab=wanted_ab,
    )


class Space:
    """Free space during one transaction.

    Args:
        layout: The configuration.
        used: What was in use before; copied.
        frugal: Use up the smallest holes first, so that whole IO blocks stay for the journal.
    """

    def __init__(self, layout: ImageLayout, used: BlockMap, *, frugal: bool = False) -> None:
        self._layout = layout
        self._taken = used.copy()
        self._frugal = frugal

    def _take(self, extent: Extent) -> Extent:
        self._taken.set((extent,), 1)
        return extent

    def give_back(self, extents: Iterable[Extent]) -> None:
        """Return what this transaction took and does not need after all."""
        self._taken.set(extents, 0)

    def take_rest(self, extent: Extent) -> None:
        """Keep the free part of an extent from being handed out."""
        self._take(extent)

    def aligned(self, length_ab: int, unit_ab: int) -> Extent | None:
        """A free extent that begins on a multiple of `unit_ab`, or None."""
        begin = self._taken.first_run(length_ab, unit_ab)
        return None if begin is None else self._take((begin, length_ab))

    def _small(self, length_ab: int, unit_ab: int) -> Extent | None:
        """The same in the smallest hole that holds it: what is less than a journal block must not break into one."""
        begin = self._taken.smallest_run(length_ab, unit_ab)
        return None if begin is None else self._take((begin, length_ab))

    def pieces(self, total_ab: int, unit_ab: int) -> list[Extent]:
        """Free extents of `total_ab` together, each aligned to and a multiple of `unit_ab`.

        Raises:
            StateError: ``cocoonfs-full``; nothing is taken then.
        """
        frugal = self._frugal and unit_ab == 1
        whole = None if frugal else self.aligned(total_ab, unit_ab)
        if whole is not None:
            return [whole]
        found: list[Extent] = []
        left = total_ab
        for begin, length in sorted(self._runs(unit_ab), key=lambda run: (run[1] if frugal else -run[1], run[0])):
            take = min(left, length)
            found.append((begin, take))
            left -= take
            if not left:
                break
        if left:
            raise no_space(total_ab)
        for extent in found:
            self._take(extent)
        return found

    def _runs(self, unit_ab: int) -> list[Extent]:
        runs = []
        for start, room in self._taken.runs():
            begin = align_up(start, unit_ab)
            length = (start + room - begin) // unit_ab * unit_ab
            if length > 0:
                runs.append((begin, length))
        return runs

    def for_file(self, length_ab: int) -> list[Extent]:
        """Extents for a file's contents.

        A small file goes into the smallest hole that holds it. A larger one prefers whole journal blocks, which can be
        written in place; then any single run; then pieces, largest first.

        Raises:
            StateError: ``cocoonfs-full``; nothing is taken then.
        """
        unit = self._layout.journal_ab
        if length_ab < unit:
            small = self._small(length_ab, 1)
            return [small] if small is not None else self.pieces(length_ab, 1)
        for alignment in () if self._frugal else (unit, 1):
            extent = self.aligned(length_ab, alignment)
            if extent is not None:
                return [extent]
        return self.pieces(length_ab, 1)

    def block(self, length_ab: int) -> int:
        """First block of a free, naturally aligned index node or list block.

        Raises:
            StateError: ``cocoonfs-full``.
        """
        extent = self._small(length_ab, length_ab)
        if extent is None:
            raise no_space(length_ab)
        return extent[0]
