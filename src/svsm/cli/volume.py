# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm volume info | ls | read`: look into a CocoonFS volume with its key, offline. Nothing is ever written to it.

A commit that is still pending is shown as carried out, in memory; the image stays as it is.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svsm.abi.block import BlockDevice
    from svsm.storage.cocoonfs import Volume

__all__ = ["HELP", "configure"]

HELP = "look into CocoonFS volumes offline"
_MAX_KEY_FILE_BYTES = 4096
_HEX = frozenset(b"0123456789abcdefABCDEF")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of `svsm volume`."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    info = verbs.add_parser("info", help="configuration; with a key also size, update counter and root digest")
    _common(info, key_required=False)
    info.set_defaults(run=_info)
    ls = verbs.add_parser("ls", help="list the files")
    _common(ls, key_required=True)
    ls.set_defaults(run=_ls)
    read = verbs.add_parser("read", help="write a file's contents to stdout")
    _common(read, key_required=True)
    read.add_argument("inode", type=_number, metavar="INODE", help="its number, decimal or 0x…")
    read.add_argument("--output", type=Path, metavar="FILE", help="write there instead, readable by you only")
    read.add_argument("--force", action="store_true", help="overwrite FILE")
    read.set_defaults(run=_read)


def _common(parser: argparse.ArgumentParser, *, key_required: bool) -> None:
    parser.add_argument("image", type=Path, metavar="IMAGE", help="a file or block device with a volume")
    parser.add_argument(
        "--key-file",
        type=Path,
        metavar="FILE",
        required=key_required,
        help="the volume key: hexadecimal digits, or raw bytes",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a number: {text!r}") from None


def _key(path: Path) -> bytes:
    from svsm.formats.errors import PolicyError

    try:
        with path.open("rb") as file:
            data = file.read(_MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise PolicyError(f"cannot read the key file: {error.strerror}", code="volume-key-file") from error
    if not data or len(data) > _MAX_KEY_FILE_BYTES:
        raise PolicyError("the key file is empty or too long", code="volume-key-file", got=len(data))
    digits = data.strip()
    if digits and len(digits) % 2 == 0 and set(digits) <= _HEX:
        return bytes.fromhex(digits.decode())
    return data


def _open(image: Path, key_file: Path) -> tuple[Volume, bool]:
    """The volume, and whether a commit was pending."""
    from svsm.storage.cocoonfs import Decision, FoundJournal, Volume

    key = _key(key_file)
    pending: list[int] = []

    def decide(found: FoundJournal) -> Decision:
        pending.append(found.counter)
        return Decision.YES

    volume = Volume.open(_device(image), key, decide=decide, read_only=True)
    return volume, bool(pending)


def _device(image: Path) -> BlockDevice:
    from svsm.formats.errors import BackendError
    from svsm.storage.drivers.file import FileDevice
    from svsm.storage.drivers.linux import LinuxDevice

    try:
        descriptor = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise BackendError(f"cannot open the image: {error.strerror}", code="volume-image") from error
    if stat.S_ISBLK(os.fstat(descriptor).st_mode):
        return LinuxDevice(descriptor, read_only=True)
    # The smallest block there is: a reader need not care what the medium writes at once.
    return FileDevice(descriptor, block_size_bytes=128, read_only=True)


def _print(lines: dict[str, object], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"schema": 1, **lines}))
        return
    width = max(len(name) for name in lines)
    for name, value in lines.items():
        print(f"{name.replace('_', ' '):<{width}}  {value}")


def _info(arguments: argparse.Namespace) -> int:
    from svsm.storage.cocoonfs.headers import read_static_header

    static = read_static_header(_device(arguments.image))
    layout = static.layout
    lines: dict[str, object] = {
        "allocation_block_bytes": layout.ab_bytes,
        "io_block_bytes": layout.io_bytes,
        "data_block_bytes": layout.data_ab * layout.ab_bytes,
        "tree_node_bytes": layout.node_bytes,
        "layout": layout.pack().hex(),
        "salt": static.salt.hex(),
    }
    if arguments.key_file is not None:
        volume, pending = _open(arguments.image, arguments.key_file)
        lines |= {
            "size_bytes": volume.size_bytes,
            "free_bytes": volume.free_bytes,
            "files": len(volume.list()),
            "counter": str(volume.counter),
            "root_digest": volume.root_digest.hex(),
            "commit_pending": pending,
        }
    _print(lines, as_json=arguments.json)
    return 0


def _ls(arguments: argparse.Namespace) -> int:
    volume, _ = _open(arguments.image, arguments.key_file)
    files = [
        {"inode": info.inode, "flags": info.flags, "length": len(volume.read(info.inode))} for info in volume.list()
    ]
    if arguments.json:
        print(json.dumps({"schema": 1, "files": files}))
        return 0
    for file in files:
        print(f"{file['inode']:#x}  flags {file['flags']:#04x}  {file['length']} bytes")
    return 0


def _read(arguments: argparse.Namespace) -> int:
    volume, _ = _open(arguments.image, arguments.key_file)
    data = volume.read(arguments.inode)
    if arguments.output is not None:
        _write_new(arguments.output, data, force=arguments.force)
    if arguments.json:
        found: dict[str, object] = {"inode": arguments.inode, "length": len(data)}
        if arguments.output is None:
            found["data"] = base64.b64encode(data).decode()
        print(json.dumps({"schema": 1, **found}))
    elif arguments.output is None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    return 0


def _write_new(path: Path, data: bytes, *, force: bool) -> None:
    from svsm.formats.errors import BackendError

    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if force else os.O_EXCL)
    try:
        with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
            file.write(data)
    except OSError as error:
        raise BackendError(
            f"cannot write the output: {error.strerror}", code="volume-output", hint="--force overwrites"
        ) from error
