# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm volume map`: what every block of a volume is for, in the terminal, as SVG, or as JSON.

Everything drawn comes from the opened volume's own structures, and adds up to its size. The picture shows which blocks
are in use, which the disk alone does not: keep it as you keep the key's other traces.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from svsm.cli.volume import access, words
from svsm.cli.volume.meter import meter

if TYPE_CHECKING:
    from svsm.storage.cocoonfs import Volume
    from svsm.storage.cocoonfs.survey import Area

__all__ = ["add_verbs"]

_WIDTH_IN_A_PIPE = 80


def add_verbs(verbs: words.Verbs[argparse.ArgumentParser]) -> None:
    """Add the verbs of this module."""
    draw = words.verb(verbs, "map", "draw what every block is for", _map)
    words.add_key(draw)
    words.add_json(draw)
    words.add_access(draw, writes=False)
    draw.add_argument("-o", "--output", metavar="FILE", help="an SVG file instead of characters")
    draw.add_argument("--force", action="store_true", help="overwrite FILE")


def _map(arguments: argparse.Namespace) -> int:
    from svsm.storage.cocoonfs.survey import survey

    with meter() as progress, access.looking(arguments) as opened:
        volume = opened.volume
        areas = survey(volume.image, progress)
    if arguments.output is not None:
        drawing = _svg(volume, areas, os.path.basename(arguments.image))
        with access.output(arguments.output, force=arguments.force, image=arguments.image) as file:
            file.write(drawing.encode())
    if arguments.json:
        access.emit(_members(volume, areas), [], as_json=True)
    elif arguments.output is None:
        access.emit({}, _characters(volume, areas), as_json=False)
    return 0


def _svg(volume: Volume, areas: Sequence[Area], name: str) -> str:
    from svsm.cli.volume.grid import human
    from svsm.cli.volume.svg import picture

    subtitle = (
        f"CocoonFS, {human(volume.size_bytes)}, {human(volume.free_bytes)} free, {len(volume.list())} files, "
        f"counter {volume.counter}, root {volume.root_digest.hex()[:16]}…"
    )
    return picture(areas, block_bytes=volume.layout.ab_bytes, title=name, subtitle=subtitle)


def _characters(volume: Volume, areas: Sequence[Area]) -> list[str]:
    from svsm.cli.volume.text import lines

    terminal = sys.stdout.isatty()
    width = os.get_terminal_size(sys.stdout.fileno()).columns if terminal else _WIDTH_IN_A_PIPE
    colours = terminal and "NO_COLOR" not in os.environ
    return lines(areas, block_bytes=volume.layout.ab_bytes, width=width, colours=colours)


def _members(volume: Volume, areas: Sequence[Area]) -> dict[str, object]:
    from svsm.cli.volume.grid import totals

    unit = volume.layout.ab_bytes
    return {
        "size_bytes": volume.size_bytes,
        "totals": {purpose.value: blocks * unit for purpose, blocks in totals(areas).items()},
        "areas": [
            {"purpose": area.purpose.value, "begin": area.begin * unit, "bytes": area.length * unit}
            | ({} if area.inode is None else {"inode": area.inode})
            for area in areas
        ],
    }
