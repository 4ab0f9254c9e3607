# SPDX-License-Identifier: MIT OR Apache-2.0
"""A volume's map as one SVG file that needs nothing else.

Each cell is filled from below in proportion to what it holds; what is there at all gets a mark of at least a seventh of
the cell, taken from what has most. Neighbours that look the same are drawn as one, so a picture of a gigabyte stays
small. The bar above the grid is in exact proportion, and the legend in exact numbers. Titles say places and inodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from svsm.cli.volume.grid import NAMES, Cell, Grid, human, totals
from svsm.storage.cocoonfs.survey import Area, Purpose

__all__ = ["picture"]

_COLUMNS, _ROWS = 128, 32
_CELL_W, _CELL_H, _GAP = 7, 14, 2
_LEVELS = 7
_LEFT, _TOP, _BAR_H, _LEGEND_H = 84, 96, 16, 22
_COLOURS = {
    Purpose.STATIC_HEADER: "#6a3d9a",
    Purpose.HEADER: "#9e77c9",
    Purpose.JOURNAL: "#d1495b",
    Purpose.TREE: "#e3a63b",
    Purpose.AUX: "#e377c2",
    Purpose.BITMAP: "#2a9d8f",
    Purpose.INDEX: "#3f8f3f",
    Purpose.LIST: "#9bc53d",
    Purpose.FILE: "#2f6fb5",
    Purpose.UNCLAIMED: "#111111",
    Purpose.FREE: "#e9edf2",
}
_Levels = tuple[tuple[Purpose, int], ...]


def _levels(cell: Cell) -> _Levels:
    """Sevenths of the cell for each purpose but free, at least one for each as far as they go."""
    used = [(purpose, blocks) for purpose, blocks in cell.blocks if purpose is not Purpose.FREE][:_LEVELS]
    full = sum(blocks for _, blocks in used) == cell.length
    sevenths: dict[Purpose, int] = {purpose: max(1, round(_LEVELS * blocks / cell.length)) for purpose, blocks in used}
    # Free space keeps a seventh of its own where there is some.
    room = _LEVELS if full else max(len(used), _LEVELS - 1)
    while sum(sevenths.values()) > room:
        sevenths[max(sevenths, key=lambda purpose: sevenths[purpose])] -= 1
    if full and used:
        sevenths[cell.main] += _LEVELS - sum(sevenths.values())
    return tuple(sevenths.items())


def _inside(cell: Cell) -> str:
    files = f" (inode {cell.inodes[0]:#x})" if len(cell.inodes) == 1 else ""
    return ", ".join(NAMES[purpose] + (files if purpose is Purpose.FILE else "") for purpose, _ in cell.blocks)


def _rect(x: float, y: float, width: float, height: float, purpose: Purpose, title: str = "") -> str:
    shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{_COLOURS[purpose]}"'
    return f"{shape}><title>{escape(title)}</title></rect>" if title else f"{shape}/>"


def _text(x: float, y: float, content: str, kind: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(content)}</text>'


def _row(row: Sequence[Cell], y: int, block_bytes: int) -> list[str]:
    """One row of cells, runs that look the same and hold the same drawn as one."""
    drawn: list[str] = []
    at = 0
    while at < len(row):
        levels, inside = _levels(row[at]), _inside(row[at])
        end = at + 1
        while end < len(row) and _levels(row[end]) == levels and _inside(row[end]) == inside:
            end += 1
        first, last = row[at].begin * block_bytes, (row[end - 1].begin + row[end - 1].length) * block_bytes
        title = f"{first:#x} to {last:#x}: {inside}"
        x, width = _LEFT + at * _CELL_W, (end - at) * _CELL_W
        drawn.append(_rect(x, y, width, _CELL_H, Purpose.FREE, title))
        bottom: float = y + _CELL_H
        for purpose, sevenths in levels:
            height = _CELL_H * sevenths / _LEVELS
            bottom -= height
            drawn.append(_rect(x, bottom, width, height, purpose, title))
        at = end
    return drawn


def _grid(grid: Grid, block_bytes: int) -> list[str]:
    drawn: list[str] = []
    for number, row in enumerate(grid.rows()):
        y = _TOP + number * (_CELL_H + _GAP)
        drawn.append(_text(_LEFT - 8, y + _CELL_H - 3, f"{row[0].begin * block_bytes:#x}", "place"))
        drawn += _row(row, y, block_bytes)
        # Thin lines between cells, over all of the row.
        lines = "".join(f"M{_LEFT + at * _CELL_W} {y}v{_CELL_H}" for at in range(1, len(row)))
        drawn.append(f'<path d="{lines}" class="line"/>')
    return drawn


def _proportions(parts: dict[Purpose, int], end: int) -> list[str]:
    drawn: list[str] = []
    x: float = _LEFT
    for purpose, blocks in parts.items():
        width = _COLUMNS * _CELL_W * blocks / end
        drawn.append(_rect(x, _TOP - 30, width, _BAR_H, purpose, f"{NAMES[purpose]}: {100 * blocks / end:.3f} %"))
        x += width
    return drawn


def _legend(parts: dict[Purpose, int], end: int, y: int, block_bytes: int) -> list[str]:
    drawn: list[str] = []
    for number, (purpose, blocks) in enumerate(parts.items()):
        x, line = _LEFT + (number % 2) * 460, y + number // 2 * _LEGEND_H
        size = blocks * block_bytes
        drawn.append(_rect(x, line - 11, 14, 14, purpose))
        drawn.append(_text(x + 24, line, NAMES[purpose], "name"))
        drawn.append(_text(x + 300, line, human(size), "number"))
        drawn.append(_text(x + 390, line, f"{100 * blocks / end:.2f} %", "number"))
    return drawn


_STYLE = """<style>
text { font: 12px system-ui, sans-serif; fill: #24292f }
.title { font-size: 18px; font-weight: 600 } .sub { fill: #57606a }
.place { font: 10px ui-monospace, monospace; fill: #57606a; text-anchor: end } .number { text-anchor: end }
.line { stroke: #ffffff; stroke-width: .6; stroke-opacity: .7; fill: none }
</style>"""


def picture(areas: Sequence[Area], *, block_bytes: int, title: str, subtitle: str) -> str:
    """The whole file.

    Args:
        areas: From `survey`.
        block_bytes: Of an allocation block.
        title: Its heading.
        subtitle: The line below it.
    """
    grid = Grid.of(areas, columns=_COLUMNS, most_rows=_ROWS)
    end = areas[-1].begin + areas[-1].length
    parts = totals(areas)
    legend_y = _TOP + len(grid.rows()) * (_CELL_H + _GAP) + 44
    height = legend_y + (len(parts) + 1) // 2 * _LEGEND_H
    width = _LEFT + _COLUMNS * _CELL_W + 24
    scale = f"Each cell is {human(grid.cell_ab * block_bytes)}, filled from below; what is there at all is marked."
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"',
        f' role="img" aria-label="{escape(title)}">',
        _STYLE,
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(_LEFT, 30, title, "title"),
        _text(_LEFT, 50, subtitle, "sub"),
        *_proportions(parts, end),
        *_grid(grid, block_bytes),
        _text(_LEFT, legend_y - 24, scale, "sub"),
        *_legend(parts, end, legend_y, block_bytes),
        "</svg>",
    ]
    return "\n".join(body) + "\n"
