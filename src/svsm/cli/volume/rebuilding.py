# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm volume resize | rekey`: another size, key, salt or configuration, by a verified copy that replaces the image.

The image is as it was until the copy is complete and compared; then a rename puts the copy in its place. The update
counter starts anew, so a ledger of volume states has to be told.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from svsm.cli.volume import access, words
from svsm.cli.volume.meter import meter

if TYPE_CHECKING:
    from svsm.storage.cocoonfs.layout import ImageLayout

__all__ = ["add_verbs"]


def add_verbs(verbs: words.Verbs[argparse.ArgumentParser]) -> None:
    """Add the verbs of this module."""
    resize = words.verb(verbs, "resize", "give a volume in a file another size, by a verified copy", _resize)
    resize.add_argument("size", type=words.size, metavar="SIZE", help="of the file afterwards")
    rekey = words.verb(verbs, "rekey", "give a volume in a file another key, by a verified copy", _rekey)
    words.add_key(rekey, new=True)
    for parser in (resize, rekey):
        words.add_key(parser)
        words.add_json(parser)
        words.add_layout(parser, keep=True)
        words.add_access(parser, writes=True)


def _resize(arguments: argparse.Namespace) -> int:
    key = access.needed_key(arguments)
    return _rebuild(arguments, key, key, size=arguments.size)


def _rekey(arguments: argparse.Namespace) -> int:
    return _rebuild(arguments, access.needed_key(arguments), access.needed_key(arguments, new=True), size=None)


def _layout_now(arguments: argparse.Namespace) -> ImageLayout:
    from svsm.storage.cocoonfs.headers import read_static_header

    device = access.disk(arguments.image)
    try:
        found = read_static_header(device).layout
    finally:
        device.close()
    if not arguments.allow_weak:
        found.refuse_weak()
    return found


def _rebuild(arguments: argparse.Namespace, key: bytes, new_key: bytes, *, size: int | None) -> int:
    from svsm.storage.cocoonfs import Volume
    from svsm.storage.cocoonfs.copy import NewVolume, rebuild_image

    wanted = NewVolume(
        new_key,
        salt=arguments.salt,
        layout=access.layout(arguments, base=_layout_now(arguments)),
        allow_weak=arguments.allow_weak,
    )
    opener = functools.partial(access.device_of_file, ignore_block_size=arguments.ignore_block_size)
    with meter() as progress:
        rebuild_image(Path(arguments.image), key, wanted, opener, image_bytes=size, progress=progress)
    device = access.disk(arguments.image)
    try:
        volume = Volume.open(device, new_key, read_only=True, allow_weak=arguments.allow_weak)
        members: dict[str, object] = {
            "image": arguments.image,
            "size_bytes": volume.size_bytes,
            "free_bytes": volume.free_bytes,
            "files": len(volume.list()),
            "counter": str(volume.counter),
            "root_digest": volume.root_digest.hex(),
        }
    finally:
        device.close()
    text = [
        f"{members['files']} files copied and compared; {volume.size_bytes} bytes, {members['free_bytes']} free",
        *access.rounded(size, volume.size_bytes),
        f"counter {members['counter']}, root digest {members['root_digest']}",
    ]
    access.emit(members, text, as_json=arguments.json)
    return 0
