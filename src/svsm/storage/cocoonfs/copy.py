# SPDX-License-Identifier: MIT OR Apache-2.0
"""Another size, another key, another configuration: a copy into a new volume that takes the old one's place at once.

A volume's size, key, salt and configuration are fixed when it is made, and its authenticated tree with them; so all of
these changes are the same thing. Every file is read from the old volume (and authenticated), written to the new one,
and read back from there with the new key; auxiliary metadata goes along. Only when all of that came out equal does the
new image get the old one's name, by a rename, which is one step: a power cut leaves the one or the other. The old
image is never written to; a commit that is pending there is copied as carried out. The update counter starts anew, so
a ledger has to be told.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from svsm.abi.block import BlockDevice
from svsm.formats.errors import BackendError, IntegrityError, StateError
from svsm.storage.cocoonfs.check import Progress, check, no_progress
from svsm.storage.cocoonfs.layout import ImageLayout
from svsm.storage.cocoonfs.volume import Volume

__all__ = ["NewVolume", "copy_volume", "rebuild_image"]

_BATCH_BYTES = 4 << 20
_BATCH_FILES = 256


@dataclass(frozen=True, slots=True)
class NewVolume:
    """What the new volume shall be; None keeps what the old one has.

    Attributes:
        key: The key.
        salt: The salt. A new key does not need a new salt, and a new salt makes new subkeys in any case.
        layout: The configuration.
        size_bytes: How much of its device it uses.
        allow_weak: Whether SHA-1 and TDES may be used.
    """

    key: bytes
    salt: bytes | None = None
    layout: ImageLayout | None = None
    size_bytes: int | None = None
    allow_weak: bool = False

    def __repr__(self) -> str:
        return f"NewVolume(size_bytes={self.size_bytes}, layout={self.layout})"


def _verify(source: Volume, device: BlockDevice, wanted: NewVolume, progress: Progress) -> None:
    report = check(device, wanted.key, progress=progress)
    copy = Volume.open(device, wanted.key, read_only=True, allow_weak=wanted.allow_weak)
    files = source.list()
    if not report.is_good or copy.list() != files or copy.aux != source.aux:
        raise IntegrityError("the copy is not what was copied", code="cocoonfs-copy", got=len(report.findings))
    for number, info in enumerate(files, 1):
        if copy.read(info.inode) != source.read(info.inode):
            raise IntegrityError("the copy is not what was copied", code="cocoonfs-copy", inode=info.inode)
        progress("comparing", number, len(files))


def copy_volume(source: Volume, device: BlockDevice, wanted: NewVolume, *, progress: Progress = no_progress) -> None:
    """Make a new volume with all of an old one's files, and compare the two.

    Args:
        source: The old volume; it is only read.
        device: Where the new one goes; what was there is lost.
        wanted: What the new one shall be.
        progress: Told how far it is.

    Raises:
        StateError: ``cocoonfs-full``: the files do not fit.
        IntegrityError: ``cocoonfs-copy``: the copy differs. ``cocoonfs-authentication``: of the old volume.
        FormatError, PolicyError: What `Volume.create` raises.
        BackendError: ``block-io``.
    """
    copy = Volume.create(
        device,
        wanted.key,
        salt=source.salt if wanted.salt is None else wanted.salt,
        layout=source.layout if wanted.layout is None else wanted.layout,
        size_bytes=wanted.size_bytes,
        aux=source.aux,
        allow_weak=wanted.allow_weak,
    )
    files = source.list()
    transaction, held, waiting = copy.transaction(), 0, 0
    for number, info in enumerate(files, 1):
        data = source.read(info.inode)
        transaction.write(info.inode, data, info.flags)
        held, waiting = held + len(data), waiting + 1
        if held >= _BATCH_BYTES or waiting >= _BATCH_FILES:
            transaction.commit()
            transaction, held, waiting = copy.transaction(), 0, 0
        progress("copying", number, len(files))
    transaction.commit()
    _verify(source, device, wanted, progress)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rebuild_image(
    image: Path,
    key: bytes,
    wanted: NewVolume,
    open_device: Callable[[int], BlockDevice],
    *,
    image_bytes: int | None = None,
    progress: Progress = no_progress,
) -> None:
    """Replace an image file by a copy of it with another key, size or configuration, in one step.

    Args:
        image: The image file. It must be a plain file: a device cannot be renamed.
        key: Its key.
        wanted: What it shall become.
        open_device: Makes a device of a descriptor, and locks it; the device closes the descriptor.
        image_bytes: Length of the new file; by default that of the old one.
        progress: Told how far it is.

    Raises:
        StateError: ``cocoonfs-full``; ``cocoonfs-exists`` where the image is no plain file.
        BackendError: ``block-io``, ``volume-image``.
        SvsmError: What `Volume.open` and `copy_volume` raise. In all cases the image is as it was.
    """
    image = image.resolve()
    if not image.is_file():
        raise StateError("the image is no plain file", code="cocoonfs-exists", hint="copy a device's volume to a file")
    temporary = image.with_name(f".{image.name}.{secrets.token_hex(8)}")
    try:
        old = open_device(os.open(image, os.O_RDWR | os.O_CLOEXEC))
        try:
            source = Volume.open(old, key, read_only=True, allow_weak=True)
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.fchmod(descriptor, image.stat().st_mode & 0o777)
            os.ftruncate(descriptor, image.stat().st_size if image_bytes is None else image_bytes)
            new = open_device(descriptor)
            try:
                copy_volume(source, new, wanted, progress=progress)
                new.flush()
                os.fsync(descriptor)
            finally:
                new.close()
            os.rename(temporary, image)
            _sync_folder(image)
        finally:
            old.close()
    except OSError as error:
        raise BackendError(f"cannot rebuild the image: {error.strerror}", code="volume-image") from error
    finally:
        temporary.unlink(missing_ok=True)
