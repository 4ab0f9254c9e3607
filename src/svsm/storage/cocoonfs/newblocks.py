# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the blocks of a commit will hold: what is written, and what of the disk stays around it.

Writes come in allocation blocks; the disk takes IO blocks, and whether one is written in place or staged is decided
for a journal block (the larger of IO block and data block). So a write is cut in three. Its middle, the whole journal
blocks that were free before, is *straight*: it goes to the disk as it is, and nobody looks into it again. That is
nearly all of a large file. What is left at both ends, and small things, is put together in IO blocks, with what is
there already.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

from svsm.formats.record import Buffer
from svsm.storage.cocoonfs.blockmap import Counted
from svsm.storage.cocoonfs.encoding import Extent, merge_ranges
from svsm.storage.cocoonfs.entities import Random
from svsm.storage.cocoonfs.image import Image
from svsm.storage.cocoonfs.layout import align_up

__all__ = ["NewBlocks"]


def _begin(piece: tuple[int, Buffer]) -> int:
    return piece[0]


class NewBlocks:
    """Contents after a commit.

    Args:
        image: As it is; only read.
        writes: (first ab, contents) pieces of whole allocation blocks, which do not overlap.
        random: Fills what is in no use.

    Attributes:
        straight: (first ab, contents) of whole journal blocks that were free, ascending.
    """

    def __init__(self, image: Image, writes: Sequence[tuple[int, Buffer]], random: Random) -> None:
        self._image, self._layout, self._random = image, image.volume.layout, random
        self.straight: list[tuple[int, Buffer]] = []
        self._blocks: dict[int, Buffer] = {}
        self._base: dict[int, bytes] = {}
        unit, size = self._layout.journal_ab, self._layout.ab_bytes
        for begin, data in writes:
            end = begin + len(data) // size
            low, high = align_up(begin, unit), end // unit * unit
            if low >= high or image.used.any_used(low, high):
                self.put(begin, data)
                continue
            view = memoryview(data)
            self.put(begin, view[: (low - begin) * size])
            self.straight.append((low, view[(low - begin) * size : (high - begin) * size]))
            self.put(high, view[(high - begin) * size :])
        self.straight.sort(key=_begin)

    def put(self, begin: int, data: Buffer) -> None:
        """Lay a piece into IO blocks; what is around it in the first and the last one stays as it is."""
        size, unit = self._layout.ab_bytes, self._layout.io_ab
        end = begin + len(data) // size
        for number in range(begin // unit, -(-end // unit)):
            lo, hi = number * unit, (number + 1) * unit
            if begin <= lo and hi <= end:
                self._blocks[number] = data[(lo - begin) * size : (hi - begin) * size]
                continue
            block = self._blocks.get(number)
            if not isinstance(block, bytearray):
                block = self._blocks[number] = bytearray(self._old_io(number) if block is None else block)
            first, last = max(begin, lo), min(end, hi)
            part = data[(first - begin) * size : (last - begin) * size]
            block[(first - lo) * size : (first - lo) * size + len(part)] = part

    def _old(self, number: int) -> bytes:
        """A journal block as it is now, checked."""
        if number not in self._base:
            unit = self._layout.journal_ab
            self._base[number] = self._image.read_checked(number * unit, (number + 1) * unit)
        return self._base[number]

    def _old_io(self, number: int) -> bytes:
        """An IO block as it is now; random where none of it is in use."""
        unit, io_bytes = self._layout.io_ab, self._layout.io_bytes
        if not self._image.used.any_used(number * unit, (number + 1) * unit):
            return self._random(io_bytes)
        per_journal = self._layout.journal_ab // unit
        skip = number % per_journal * io_bytes
        return self._old(number // per_journal)[skip : skip + io_bytes]

    def _mixed(self, begin: int, end: int, counted: Counted) -> bytes:
        """Contents of journal-aligned ``[begin, end)`` outside what is straight, as far as they count."""
        unit, io_unit = self._layout.journal_ab, self._layout.io_ab
        io_bytes = self._layout.io_bytes
        parts: list[Buffer] = []
        for lo in range(begin, end, unit):
            numbers = range(lo // io_unit, (lo + unit) // io_unit)
            missing = any(number not in self._blocks for number in numbers)
            counts = missing and 1 in counted.states(lo, lo + unit)
            old = self._old(lo // unit) if counts else bytes(len(numbers) * io_bytes)
            parts += [
                self._blocks.get(number, old[index * io_bytes : (index + 1) * io_bytes])
                for index, number in enumerate(numbers)
            ]
        return b"".join(parts)

    def _contents(self, begin: int, end: int, counted: Counted) -> Iterator[tuple[int, Buffer]]:
        """Journal-aligned ``[begin, end)`` as (first ab, contents) pieces, end to end."""
        size, at = self._layout.ab_bytes, begin
        for first, content in self.straight[bisect_left(self.straight, begin, key=_begin) :]:
            if first >= end:
                break
            if at < first:
                yield at, self._mixed(at, first, counted)
            yield first, content
            at = first + len(content) // size
        if at < end:
            yield at, self._mixed(at, end, counted)

    def changed(self, freed: Iterable[Extent]) -> list[Extent]:
        """Journal-aligned ranges whose digests change, ascending: what is written, and what is freed."""
        unit, io_unit, size = self._layout.journal_ab, self._layout.io_ab, self._layout.ab_bytes
        ranges = [(begin, len(content) // size) for begin, content in self.straight]
        ranges += [(number * io_unit // unit * unit, unit) for number in self._blocks]
        for begin, length in freed:
            first = begin // unit * unit
            ranges.append((first, align_up(begin + length, unit) - first))
        return merge_ranges(ranges)

    def digests(self, changed: Iterable[Extent], counted: Counted) -> Iterator[tuple[int, list[bytes]]]:
        """(first data block, digests of the data blocks from there on) in these ranges."""
        tree, size = self._image.tree, self._layout.ab_bytes
        image_end = align_up(self._image.image_ab, self._layout.data_ab)
        for begin, length in changed:
            for first, content in self._contents(begin, begin + length, counted):
                end = min(first + len(content) // size, image_end)
                block = tree.geometry.block_at(first)
                yield block, tree.digester.digests(block, content, counted.states(first, end))

    def numbers(self) -> tuple[list[int], list[int]]:
        """(IO blocks to write in place beside what is straight, IO blocks to stage), ascending."""
        unit = self._layout.journal_ab
        per_journal = unit // self._layout.io_ab
        in_place: list[int] = []
        staged: list[int] = []
        for number in sorted(self._blocks):
            lo = number // per_journal * unit
            (staged if self._image.used.any_used(lo, lo + unit) else in_place).append(number)
        return in_place, staged

    def block(self, number: int) -> bytes:
        """An IO block that is not straight."""
        return bytes(self._blocks[number])
