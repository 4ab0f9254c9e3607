# SPDX-License-Identifier: MIT OR Apache-2.0
"""A volume as a grid of cells, each of which stands for the same number of blocks, in the order of the disk.

A cell says how many blocks of each purpose it holds; sums over all cells are exact. How a cell is shown is the matter
of `svg` and `text`; both give what is there at least a mark, so that one block of a file in a gigabyte of free space
can be seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from svsm.storage.cocoonfs.survey import Area, Purpose

__all__ = ["NAMES", "Cell", "Grid", "human", "totals"]

NAMES = {
    Purpose.STATIC_HEADER: "static header",
    Purpose.HEADER: "mutable header",
    Purpose.JOURNAL: "journal's head",
    Purpose.TREE: "authentication tree",
    Purpose.AUX: "auxiliary metadata",
    Purpose.BITMAP: "allocation bitmap",
    Purpose.INDEX: "index of files",
    Purpose.LIST: "lists of extents",
    Purpose.FILE: "files",
    Purpose.UNCLAIMED: "in use by nothing",
    Purpose.FREE: "free",
}
"""What a person reads."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Consecutive blocks.

    Attributes:
        begin: First allocation block.
        length: In allocation blocks; the last cell may be shorter.
        blocks: How many are for each purpose, in the order of `Purpose`.
        inodes: Files that have blocks here; at most two, which is enough to tell one from several.
    """

    begin: int
    length: int
    blocks: tuple[tuple[Purpose, int], ...]
    inodes: tuple[int, ...]

    @property
    def main(self) -> Purpose:
        """What most of the blocks that are not free are for."""
        used = [(count, purpose) for purpose, count in self.blocks if purpose is not Purpose.FREE]
        return max(used, key=lambda pair: pair[0])[1] if used else Purpose.FREE


@dataclass(frozen=True, slots=True)
class Grid:
    """All cells, and how many are in a row."""

    cells: tuple[Cell, ...]
    columns: int
    cell_ab: int

    @staticmethod
    def of(areas: Sequence[Area], *, columns: int, most_rows: int) -> Grid:
        """The grid with the smallest cells (a power of two of blocks) that has at most so many rows."""
        end = areas[-1].begin + areas[-1].length
        cell_ab = 1
        while -(-end // cell_ab) > columns * most_rows:
            cell_ab *= 2
        counts: list[Counter[Purpose]] = [Counter() for _ in range(-(-end // cell_ab))]
        inodes: list[dict[int, None]] = [{} for _ in counts]
        for area in areas:
            at, stop = area.begin, area.begin + area.length
            while at < stop:
                number = at // cell_ab
                upto = min(stop, (number + 1) * cell_ab)
                counts[number][area.purpose] += upto - at
                if area.inode is not None and len(inodes[number]) < 2:
                    inodes[number][area.inode] = None
                at = upto
        order = list(Purpose)
        cells = [
            Cell(
                begin=number * cell_ab,
                length=min(cell_ab, end - number * cell_ab),
                blocks=tuple(sorted(count.items(), key=lambda pair: order.index(pair[0]))),
                inodes=tuple(inodes[number]),
            )
            for number, count in enumerate(counts)
        ]
        return Grid(tuple(cells), columns, cell_ab)

    def rows(self) -> list[tuple[Cell, ...]]:
        """The cells, a row each."""
        return [self.cells[at : at + self.columns] for at in range(0, len(self.cells), self.columns)]


def totals(areas: Sequence[Area]) -> dict[Purpose, int]:
    """Blocks of each purpose, in the order of `Purpose`; those that there are."""
    count: Counter[Purpose] = Counter()
    for area in areas:
        count[area.purpose] += area.length
    return {purpose: count[purpose] for purpose in Purpose if count[purpose]}


def human(size_bytes: int) -> str:
    """A size as a person reads it."""
    value, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"
