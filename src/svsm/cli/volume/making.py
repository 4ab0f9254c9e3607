# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm volume create | provision`: a new volume, with its key or announced without it.

What exists is only overwritten with `--force`. A new file is taken away again where no volume came of it; with
`--force`, what was there before is lost from the moment the first block is written.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

from svsm.cli.volume import access, words
from svsm.cli.volume.meter import Watched, meter
from svsm.formats.errors import BackendError, StateError

if TYPE_CHECKING:
    from svsm.abi.block import BlockDevice
    from svsm.storage.cocoonfs.aux import AuxMetadata

__all__ = ["add_verbs"]

_SALT_BYTES = 16


def add_verbs(verbs: words.Verbs[argparse.ArgumentParser]) -> None:
    """Add the verbs of this module."""
    create = words.verb(verbs, "create", "make an empty volume", _create)
    words.add_key(create)
    provision = words.verb(verbs, "provision", "announce a volume without its key; its first use makes it", _provision)
    for parser in (create, provision):
        words.add_json(parser)
        parser.add_argument(
            "--size",
            type=words.size,
            metavar="SIZE",
            help="of the volume, which gets as much of it as whole blocks fill (default: all that is there)",
        )
        parser.add_argument(
            "--aux-reserve",
            type=_reserve,
            default=None,
            metavar="SIZE",
            help="room for auxiliary metadata that can be changed without the key (default: none)",
        )
        parser.add_argument("--force", action="store_true", help="overwrite what is there")
        words.add_layout(parser)
        words.add_access(parser, writes=True)


def _reserve(text: str) -> int | None:
    return None if text == "none" else words.size(text)


def _create(arguments: argparse.Namespace) -> int:
    from svsm.storage.cocoonfs import Volume
    from svsm.storage.cocoonfs.layout import DEFAULT_LAYOUT

    key = access.key(arguments) or b""
    layout = access.layout(arguments) or DEFAULT_LAYOUT
    salt = _salt(arguments)
    with _place(arguments) as device, meter() as progress:
        progress.moving("writing", device.size_bytes)  # making a volume writes all of it once
        volume = Volume.create(
            Watched(device, progress),
            key,
            salt=salt,
            layout=layout,
            size_bytes=_size_on(arguments),
            aux=_aux(arguments),
            allow_weak=arguments.allow_weak,
        )
        members: dict[str, object] = {
            "image": arguments.image,
            "size_bytes": volume.size_bytes,
            "free_bytes": volume.free_bytes,
            "layout": layout.pack().hex(),
            "salt": salt.hex(),
            "counter": str(volume.counter),
            "root_digest": volume.root_digest.hex(),
        }
    text = [f"created {arguments.image}: {volume.size_bytes} bytes, {volume.free_bytes} free, salt {salt.hex()}"]
    text += access.rounded(arguments.size, volume.size_bytes)
    access.emit(members, text, as_json=arguments.json)
    return 0


def _provision(arguments: argparse.Namespace) -> int:
    from svsm.storage.cocoonfs.headers import read_creation_info
    from svsm.storage.cocoonfs.layout import DEFAULT_LAYOUT
    from svsm.storage.cocoonfs.provisioning import provision

    layout = access.layout(arguments) or DEFAULT_LAYOUT
    salt = _salt(arguments)
    with _place(arguments) as device:
        provision(
            device,
            salt=salt,
            layout=layout,
            size_bytes=_size_on(arguments),
            aux=_aux(arguments),
            allow_weak=arguments.allow_weak,
        )
        size = read_creation_info(device).size_bytes
    members: dict[str, object] = {
        "image": arguments.image,
        "size_bytes": size,
        "layout": layout.pack().hex(),
        "salt": salt.hex(),
    }
    text = [
        f"announced on {arguments.image}: {size} bytes, salt {salt.hex()}",
        *access.rounded(arguments.size, size),
        "Nothing of this is authenticated: whoever uses it first should say --expect-salt, -size and -layout.",
    ]
    access.emit(members, text, as_json=arguments.json)
    return 0


def _salt(arguments: argparse.Namespace) -> bytes:
    salt: bytes = os.urandom(_SALT_BYTES) if arguments.salt is None else arguments.salt
    return salt


def _aux(arguments: argparse.Namespace) -> AuxMetadata:
    from svsm.storage.cocoonfs.aux import NO_METADATA

    return NO_METADATA.with_reserve(arguments.aux_reserve)


@contextlib.contextmanager
def _place(arguments: argparse.Namespace) -> Iterator[BlockDevice]:
    """The disk for a new volume, locked; a file has the size that was named.

    Raises:
        StateError: ``volume-exists``; ``volume-size``: a new file without a size; ``block-in-use``.
        BackendError: ``volume-image``, ``block-io``.
    """
    image: str = arguments.image
    if os.path.exists(image):
        if not arguments.force:
            raise StateError(
                "there is something already",
                code="volume-exists",
                hint="--force makes a new volume there; what it holds is lost",
                path=image,
            )
        with access.writable(arguments) as device:
            _resize(image, arguments.size, device)
            yield device
        return
    if arguments.size is None:
        raise StateError("a new file needs a size", code="volume-size", hint="give --size, for example --size 8MiB")
    descriptor = _new_file(image, arguments.size)
    try:
        device = access.device_of_file(descriptor, ignore_block_size=arguments.ignore_block_size)
        try:
            yield device
        finally:
            device.close()
    except BaseException:
        _forget(image)
        raise


def _resize(image: str, size: int | None, device: BlockDevice) -> None:
    """Give a file that is overwritten the size that was named; its lock is held already."""
    if size is None or stat.S_ISBLK(os.stat(image).st_mode):
        return
    try:
        os.truncate(image, size)
    except OSError as error:
        raise BackendError(f"cannot resize the image: {error.strerror}", code="volume-image", path=image) from error
    device.poll()


def _new_file(image: str, size: int) -> int:
    try:
        descriptor = os.open(image, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, size)
        except OSError:
            os.close(descriptor)
            _forget(image)
            raise
    except OSError as error:
        raise BackendError(f"cannot make the image: {error.strerror}", code="volume-image", path=image) from error
    return descriptor


def _forget(image: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(image)


def _size_on(arguments: argparse.Namespace) -> int | None:
    """How much of a block device to use; a file has the right size already."""
    size: int | None = arguments.size if stat.S_ISBLK(os.stat(arguments.image).st_mode) else None
    return size
