# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm volume map`: areas that add up, a picture that parses, and characters for a terminal."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from svsm.cli.volume.grid import Grid, human, totals
from svsm.cli.volume.svg import picture
from svsm.cli.volume.text import lines
from svsm.storage.cocoonfs.survey import Area, Purpose
from tests.unit.cli.volume.conftest import STATE, Bench

KEYED = "--key-file @key"
_SVG = "{http://www.w3.org/2000/svg}"


def _rectangles(text: str) -> list[tuple[float, float, float, float, str]]:
    root = ElementTree.fromstring(text)
    assert root.tag == f"{_SVG}svg"
    return [
        (
            float(r.get("x", 0)),
            float(r.get("y", 0)),
            float(r.get("width", 0)),
            float(r.get("height", 0)),
            r.get("fill", ""),
        )
        for r in root.iter(f"{_SVG}rect")
    ]


def test_areas_add_up_to_the_volume(bench: Bench) -> None:
    bench.put("in", bytes(20_000))
    bench.run(f"write @image 0x20 @in {KEYED}")
    found = bench.json(f"map @image {KEYED}")
    at = 0
    for area in found["areas"]:
        assert area["begin"] == at
        at += area["bytes"]
    info = bench.json(f"info @image {KEYED}")
    assert at == found["size_bytes"] == info["size_bytes"] == sum(found["totals"].values())
    assert found["totals"]["free"] == info["free_bytes"]
    assert {area["inode"] for area in found["areas"] if area["purpose"] == "file"} == {STATE, 0x20}
    assert {"static-header", "header", "journal", "tree", "aux", "bitmap", "index", "file", "free"} <= set(
        found["totals"]
    )


def test_svg(bench: Bench) -> None:
    assert bench.run(f"map @image {KEYED} -o @map.svg") == b""
    text = (bench.folder / "map.svg").read_text()
    _rectangles(text)
    assert not re.search(r"(href|src|url\(|@import|<script)", text)
    for name in ("authentication tree", "allocation bitmap", "free", f"inode {STATE:#x}"):
        assert name in text
    bench.refused(f"map @image {KEYED} -o @map.svg", "volume-output")
    assert bench.json(f"map @image {KEYED} -o @map.svg --force")["areas"]


def test_names_cannot_break_out_of_the_picture(bench: Bench) -> None:
    areas = [Area(0, 10, Purpose.FREE)]
    text = picture(areas, block_bytes=128, title="<script>&\"'</svg>", subtitle="<x>")
    assert "<script>" not in text
    _rectangles(text)


def test_characters(bench: Bench) -> None:
    text = bench.run(f"map @image {KEYED}").decode()
    assert "\x1b" not in text  # no colours in a pipe
    grid = text.split("\n\n")[0].splitlines()
    assert len({len(line) for line in grid}) == 1
    assert all(len(line) <= 80 for line in grid)
    assert re.search(r"█ files +128 B +0.20 %  128 bytes", text)
    bench.refused("map @image --key-file @wrong", "cocoonfs-authentication", code=3)


@pytest.mark.parametrize("blocks", [1, 5, 4096, 4097, 1 << 23])
def test_a_grid_holds_every_block_once(blocks: int) -> None:
    """From one block to a gigabyte: exact sums, and one block of a file in free space keeps a mark."""
    areas = [Area(0, 1, Purpose.FILE, 16)]
    if blocks > 3:
        areas = [Area(0, blocks // 2, Purpose.FREE), Area(blocks // 2, 1, Purpose.FILE, 16)]
        areas.append(Area(blocks // 2 + 1, blocks - blocks // 2 - 1, Purpose.FREE))
    grid = Grid.of(areas, columns=128, most_rows=32)
    assert len(grid.cells) <= 4096
    assert sum(cell.length for cell in grid.cells) == blocks
    assert all(sum(count for _, count in cell.blocks) == cell.length for cell in grid.cells)
    assert [cell.inodes for cell in grid.cells if cell.inodes] == [(16,)]
    text = picture(areas, block_bytes=128, title="t", subtitle="s")
    assert len(text) < 100_000
    drawn = [rectangle for rectangle in _rectangles(text) if rectangle[4] == "#2f6fb5"]
    assert any(rectangle[2] >= 7 and rectangle[3] >= 2 for rectangle in drawn)
    shown = lines(areas, block_bytes=128, width=100, colours=True)
    assert len(shown) <= 32 + 3 + len(totals(areas))
    assert sum(line.count("▒") + line.count("█") for line in shown[: shown.index("")]) == 1


def test_cells_never_overflow() -> None:
    """Eleven purposes in one cell, and a cell that is full."""
    areas = [Area(at, 1, purpose) for at, purpose in enumerate(Purpose)]
    many = [Area(0, 1 << 20, Purpose.FREE)] + [Area((1 << 20) + area.begin, 1, area.purpose) for area in areas]
    for x, y, width, height, _ in _rectangles(picture(many, block_bytes=128, title="t", subtitle="s")):
        assert min(x, y) >= 0
        assert min(width, height) > 0
    grid = Grid.of(many, columns=128, most_rows=32)
    assert [purpose for purpose, _ in grid.cells[-1].blocks] == list(Purpose)


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (512, "512 B"), (1536, "1.5 KiB"), (1 << 30, "1 GiB")])
def test_sizes_for_people(value: int, text: str) -> None:
    assert human(value) == text
