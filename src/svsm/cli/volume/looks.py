# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm volume info | ls | read`: what is in a volume, and what everybody can see of it.

Without the key, `info` shows what the host sees. None of that is authenticated; with the key, what the key vouches for
is added.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from svsm.cli.volume import access, words
from svsm.cli.volume.meter import meter

if TYPE_CHECKING:
    from svsm.abi.block import BlockDevice
    from svsm.storage.cocoonfs import Volume
    from svsm.storage.cocoonfs.layout import ImageLayout, StaticHeader

__all__ = ["add_verbs"]


def add_verbs(verbs: words.Verbs[argparse.ArgumentParser]) -> None:
    """Add the verbs of this module."""
    info = words.verb(
        verbs, "info", "what the host can see; with a key also counter, root digest and free space", _info
    )
    words.add_key(info, required=False)
    ls = words.verb(verbs, "ls", "list the files", _ls)
    words.add_key(ls)
    read = words.verb(verbs, "read", "write a file's contents to stdout", _read)
    words.add_key(read)
    read.add_argument("inode", type=words.inode, metavar="INODE", help="its number, as ls has it")
    words.add_output(read, "them")
    for parser in (info, ls, read):
        words.add_json(parser)
        words.add_access(parser, writes=False)


# -- info ------------------------------------------------------------------------------------------------------------


def _info(arguments: argparse.Namespace) -> int:
    from svsm.storage.cocoonfs.headers import CreationInfo, find_header

    device = access.disk(arguments.image)
    try:
        header = find_header(device)
        if isinstance(header, CreationInfo):
            lines = {
                "state": "announced",
                **_configuration(header.layout, header.salt),
                "size_bytes": header.size_bytes,
                "from_backup": header.is_backup,
            }
        else:
            lines = {"state": "volume", **_configuration(header.layout, header.salt), **_journal(device, header)}
        lines |= {"device_bytes": device.size_bytes, **_aux(device)}
    finally:
        device.close()
    if lines["state"] == "volume" and (arguments.key_file is not None or arguments.key_fd is not None):
        lines |= _with_key(arguments)
    width = max(len(name) for name in lines)
    text = [f"{name.replace('_', ' '):<{width}}  {_shown(value)}" for name, value in lines.items()]
    access.emit(lines, text, as_json=arguments.json)
    return 0


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "unknown" if value is None else str(value)


def _configuration(layout: ImageLayout, salt: bytes) -> dict[str, object]:
    from svsm.storage.cocoonfs.presets import names_of, sizes_of
    from svsm.storage.cocoonfs.profiles import profile_of

    names = names_of(layout)
    return {
        "profile": profile_of(layout) or "custom",
        "algorithms": "custom" if names is None else " ".join(str(name) for name in names),
        **sizes_of(layout),
        "layout": layout.pack().hex(),
        "salt": salt.hex(),
    }


def _journal(device: BlockDevice, header: StaticHeader) -> dict[str, object]:
    """Whether a commit seems to be pending: anybody can see that, and fake it."""
    from svsm.storage.cocoonfs.blockio import BlockIo
    from svsm.storage.cocoonfs.geometry import FixedPlaces
    from svsm.storage.cocoonfs.journal import is_active

    io = BlockIo(device, header.layout)
    return {"commit_pending": is_active(header.layout, io.read(FixedPlaces.of(header).journal_head)) is not None}


def _aux(device: BlockDevice) -> dict[str, object]:
    """Size of the auxiliary metadata; unknown where it is damaged, which does not concern the files."""
    from svsm.formats.errors import FormatError
    from svsm.storage.cocoonfs.offline import read_aux

    try:
        aux = read_aux(device)
    except FormatError:
        return {"aux_records": None, "aux_bytes": None, "aux_reserve_bytes": None}
    return {
        "aux_records": len(aux.entries),
        "aux_bytes": sum(len(entry.data) for entry in aux.entries),
        "aux_reserve_bytes": aux.reserve_bytes,
    }


def _with_key(arguments: argparse.Namespace) -> dict[str, object]:
    with access.looking(arguments) as opened:
        volume = opened.volume
        return {
            "size_bytes": volume.size_bytes,
            "free_bytes": volume.free_bytes,
            "files": len(volume.list()),
            "counter": str(volume.counter),
            "root_digest": volume.root_digest.hex(),
            "commit_pending": opened.pending,
        }


# -- files -----------------------------------------------------------------------------------------------------------


def _ls(arguments: argparse.Namespace) -> int:
    from svsm.storage.cocoonfs.survey import file_lengths

    files = []
    with meter() as progress, access.looking(arguments) as opened:
        count = len(opened.volume.list())
        for entry, length in file_lengths(opened.volume.image):
            files.append({"inode": entry.inode, "flags": entry.flags, "bytes": length})
            progress("files", len(files), count)
    text = [f"{file['inode']:#x}  flags {file['flags']:#04x}  {file['bytes']} bytes" for file in files]
    access.emit({"files": files}, text, as_json=arguments.json)
    return 0


def _stored_bytes(volume: Volume, inode: int) -> int:
    """How much of the disk a file's contents take; 0 where there is no such file."""
    entry = volume.image.find(inode) if volume.exists(inode) else None
    extents = [] if entry is None else volume.image.extents_of(entry)[0]
    return sum(length for _, length in extents) * volume.layout.ab_bytes


def _read(arguments: argparse.Namespace) -> int:
    with meter() as progress, access.looking(arguments, progress) as opened:
        progress.moving("reading", _stored_bytes(opened.volume, arguments.inode))
        data = opened.volume.read(arguments.inode)
    access.give(arguments, data, {"inode": arguments.inode, "bytes": len(data)})
    return 0
