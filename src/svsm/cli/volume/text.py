# SPDX-License-Identifier: MIT OR Apache-2.0
"""A volume's map for a terminal: one character for each cell, with colours where there are any, and a legend.

A cell shows what most of its blocks that are not free are for; where that is less than a half of it, its block is
drawn lighter. So the picture without colours still tells what is where: every purpose has a sign of its own in the
legend.
"""

from __future__ import annotations

from collections.abc import Sequence

from svsm.cli.volume.grid import NAMES, Cell, Grid, human, totals
from svsm.storage.cocoonfs.survey import Area, Purpose

__all__ = ["lines"]

_SIGNS = {
    Purpose.STATIC_HEADER: ("◆", "◇", 35),
    Purpose.HEADER: ("◆", "◇", 35),
    Purpose.JOURNAL: ("▼", "▽", 31),
    Purpose.TREE: ("▲", "△", 33),
    Purpose.AUX: ("●", "○", 95),
    Purpose.BITMAP: ("▦", "▦", 36),
    Purpose.INDEX: ("■", "□", 32),
    Purpose.LIST: ("▶", "▷", 92),
    Purpose.FILE: ("█", "▒", 34),
    Purpose.UNCLAIMED: ("?", "?", 91),
    Purpose.FREE: ("·", "·", 90),
}
"""(most of the cell, less than a half of it, SGR colour)"""


def _painted(text: str, purpose: Purpose, *, colours: bool) -> str:
    return f"\x1b[{_SIGNS[purpose][2]}m{text}\x1b[0m" if colours else text


def _sign(cell: Cell) -> str:
    free = dict(cell.blocks).get(Purpose.FREE, 0)
    most, less, _ = _SIGNS[cell.main]
    return less if 2 * free > cell.length else most


def lines(areas: Sequence[Area], *, block_bytes: int, width: int, colours: bool) -> list[str]:
    """The map and its legend.

    Args:
        areas: From `survey`.
        block_bytes: Of an allocation block.
        width: Of the terminal in characters.
        colours: Whether it has any.
    """
    label = len(f"{(areas[-1].begin + areas[-1].length) * block_bytes:#x}")
    columns = 1 << max(3, (width - label - 2).bit_length() - 1)
    grid = Grid.of(areas, columns=columns, most_rows=32)
    shown = {cell.main for cell in grid.cells}
    text = []
    for row in grid.rows():
        drawn = "".join(_painted(_sign(cell), cell.main, colours=colours) for cell in row)
        text.append(f"{row[0].begin * block_bytes:#0{label}x}  {drawn}")
    text += ["", f"each character: {human(grid.cell_ab * block_bytes)}; lighter where most of it is free", ""]
    end = areas[-1].begin + areas[-1].length
    for purpose, blocks in totals(areas).items():
        share = 100 * blocks / end
        size = blocks * block_bytes
        sign = _painted(_SIGNS[purpose][0], purpose, colours=colours)
        hidden = "" if purpose in shown else ", within cells of other signs"
        text.append(f"{sign} {NAMES[purpose]:<20} {human(size):>10} {share:6.2f} %  {size} bytes{hidden}")
    return text
