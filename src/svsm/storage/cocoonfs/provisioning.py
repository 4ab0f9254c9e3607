# SPDX-License-Identifier: MIT OR Apache-2.0
"""Volumes that are announced without the key, and made when they are first opened with it.

`provision` writes the creation info; `create_announced` makes the volume. In between anybody may change the
announcement, so who holds the key says with `Expected` what the volume has to be. The order of a creation, where an
arrow is a barrier:

    backup's first block zero -> backup -> its first block ->     (not where only the backup is intact)
    first block of the disk zero -> everything else -> static header's first block -> backup's first block zero ->

Until the last but one the disk is announced, from there on it holds an empty volume, at every moment.
"""

from __future__ import annotations

from typing import NamedTuple

from svsm.abi.block import BlockDevice
from svsm.formats.errors import FormatError
from svsm.storage.cocoonfs.aux import NO_METADATA, AuxMetadata
from svsm.storage.cocoonfs.blockio import BlockIo
from svsm.storage.cocoonfs.creation import CreationHeader, backup_offset, pack_blob
from svsm.storage.cocoonfs.entities import Random
from svsm.storage.cocoonfs.expected import ANYTHING, Expected
from svsm.storage.cocoonfs.geometry import FixedPlaces
from svsm.storage.cocoonfs.headers import CreationInfo, find_header
from svsm.storage.cocoonfs.image import VolumeContext
from svsm.storage.cocoonfs.keys import Keys
from svsm.storage.cocoonfs.layout import CREATION_MAGIC, DEFAULT_LAYOUT, ImageLayout, StaticHeader
from svsm.storage.cocoonfs.mkfs import FormatPlan, plan_format
from svsm.storage.cocoonfs.primitives import KEYSTREAM_SEED_BYTES, keystream

__all__ = [
    "check_salt",
    "context_of",
    "create_announced",
    "drop_stale_backup",
    "provision",
    "write_creation_aux",
]

_MAX_SALT = 255


def context_of(device: BlockDevice, key: bytes, static: StaticHeader, expected: Expected = ANYTHING) -> VolumeContext:
    """Keys, places and device for a static header."""
    io = BlockIo(device, static.layout)
    return VolumeContext(static, static.layout, FixedPlaces.of(static), Keys(key, static), io, expected)


def check_salt(salt: bytes) -> None:
    """Refuse a salt that the format has no room for.

    Raises:
        FormatError: ``cocoonfs-salt``.
    """
    if len(salt) > _MAX_SALT:
        raise FormatError("the salt is longer than 255 bytes", code="cocoonfs-salt", got=len(salt))


class _Copies(NamedTuple):
    """Both copies of one creation info, in bytes: where they lie and what they are."""

    header: CreationHeader
    aux: AuxMetadata
    backup: int

    @staticmethod
    def of(device: BlockDevice, layout: ImageLayout, salt: bytes, image_ab: int, aux: AuxMetadata) -> _Copies:
        """For this device.

        Raises:
            FormatError: ``cocoonfs-too-small``.
        """
        aux_bytes = 0 if aux == NO_METADATA else len(aux.pack())
        header = CreationHeader(layout, salt, image_ab, aux_bytes)
        place = backup_offset(device.size_bytes)
        first = header.size_bytes + header.blob_bytes
        if place is None or place % layout.io_bytes or place - header.blob_bytes < first:
            raise _too_small(device)
        return _Copies(header, aux, place)

    @property
    def backup_range(self) -> tuple[int, int]:
        """Offset and length of the backup with its blob."""
        return self.backup - self.header.blob_bytes, self.header.blob_bytes + self.header.size_bytes

    def put(self, io: BlockIo, *, backup: bool) -> None:
        """Write one copy: it is whole, or recognisably not there, at any moment."""
        size = self.header.layout.ab_bytes
        at = self.backup if backup else 0
        blob_at = at - self.header.blob_bytes if backup else self.header.size_bytes
        packed, blob = self.header.pack(), pack_blob(self.header, self.aux.pack())
        io.zero_first(at // size)
        io.flush()
        tail = io.write_tail(at // size, packed)
        rest = [piece for piece in ((blob_at, blob), tail) if piece is not None and piece[1]]
        if rest:
            io.write_bytes(rest)
            io.flush()
        io.write_first(at // size, packed)
        io.flush()

    def drop_backup(self, io: BlockIo) -> None:
        """Make the backup invalid, durably."""
        io.zero_first(self.backup // self.header.layout.ab_bytes)
        io.flush()


def _too_small(device: BlockDevice) -> FormatError:
    return FormatError(
        "the disk is too small for an announced volume",
        code="cocoonfs-too-small",
        hint="it needs at least 16 IO blocks, and room for a copy of the announcement behind the volume's structures",
        got=device.size_bytes,
    )


def drop_stale_backup(device: BlockDevice, io: BlockIo) -> None:
    """Make an earlier announcement's backup invalid, which otherwise could come to life when a new one is torn."""
    place = backup_offset(device.size_bytes)
    if place is None:
        return
    block = device.block_size_bytes
    first = place // block * block
    if device.read([(first, block)])[0][place - first : place - first + 8] == CREATION_MAGIC:
        device.write([(first, bytes(block))])
        io.flush()


def provision(
    device: BlockDevice,
    *,
    salt: bytes,
    layout: ImageLayout = DEFAULT_LAYOUT,
    size_bytes: int | None = None,
    aux: AuxMetadata = NO_METADATA,
    allow_weak: bool = False,
) -> None:
    """Announce a volume, without its key. Whatever was on the device is lost.

    Args:
        device: The disk.
        salt: At most 255 bytes.
        layout: The configuration.
        size_bytes: Size of the volume; all of the device by default.
        aux: Auxiliary metadata, and what to reserve for it.
        allow_weak: Whether SHA-1 and TDES may be used.

    Raises:
        FormatError: ``cocoonfs-too-small``, ``cocoonfs-salt``, ``cocoonfs-layout``, ``cocoonfs-unsupported-…``,
            ``cocoonfs-device-blocks``.
        PolicyError: ``cocoonfs-weak``.
        BackendError: ``block-io``.
    """
    check_salt(salt)
    layout.validate()
    if not allow_weak:
        layout.refuse_weak()
    image_ab = (device.size_bytes if size_bytes is None else size_bytes) // layout.ab_bytes
    copies = _Copies.of(device, layout, salt, image_ab, aux)
    # The key does not matter for what goes where.
    _plan(context_of(device, b"", StaticHeader(layout, salt)), copies, bytes)
    io = BlockIo(device, layout)
    drop_stale_backup(device, io)
    copies.put(io, backup=False)


def _plan(volume: VolumeContext, copies: _Copies, random: Random) -> FormatPlan:
    """How the volume will look, which has to leave the backup copy alone while it is written."""
    device, size_bytes = volume.io.device, copies.header.image_ab * copies.header.layout.ab_bytes
    if size_bytes > device.size_bytes:
        raise FormatError(
            "the device is smaller than the announced volume",
            code="cocoonfs-too-small",
            hint="put it on a disk of that size",
            expected=size_bytes,
            got=device.size_bytes,
        )
    plan = plan_format(volume, size_bytes=size_bytes, metadata=copies.aux, random=random)
    if plan.used_end_bytes > copies.backup_range[0]:
        raise _too_small(device)
    return plan


def create_announced(
    device: BlockDevice, key: bytes, info: CreationInfo, *, expected: Expected, allow_weak: bool, random: Random
) -> None:
    """Make the volume that a creation info announces.

    Raises:
        PolicyError: ``cocoonfs-unexpected``, ``cocoonfs-weak``; nothing was written.
        FormatError: ``cocoonfs-too-small``, ``cocoonfs-device-blocks``; nothing was written.
        BackendError: ``block-io``; opening again begins anew.
    """
    expected.check_creation(info.layout, info.salt, info.size_bytes, info.aux)
    if not allow_weak:
        info.layout.refuse_weak()
    volume = context_of(device, key, StaticHeader(info.layout, info.salt))
    copies = _Copies.of(device, info.layout, info.salt, info.header.image_ab, info.aux)
    plan = _plan(volume, copies, random)
    if not info.is_backup:
        copies.put(volume.io, backup=True)
    plan.write(sparing=[copies.backup_range])
    copies.drop_backup(volume.io)
    begin, length = copies.backup_range
    volume.io.write_bytes([(begin, keystream(random(KEYSTREAM_SEED_BYTES))(length))])
    volume.io.flush()


def write_creation_aux(device: BlockDevice, aux: AuxMetadata) -> None:
    """Replace the auxiliary metadata of an announced volume: the old or the new is there at any moment.

    Raises:
        FormatError: ``cocoonfs-no-creation-info``, ``cocoonfs-too-small``, and as `find_header`.
        BackendError: ``block-io``.
    """
    info = find_header(device)
    if isinstance(info, StaticHeader):
        raise FormatError("the disk already holds a volume", code="cocoonfs-no-creation-info")
    io = BlockIo(device, info.layout)
    old = _Copies.of(device, info.layout, info.salt, info.header.image_ab, info.aux)
    new = _Copies.of(device, info.layout, info.salt, info.header.image_ab, aux)
    _plan(context_of(device, b"", StaticHeader(info.layout, info.salt)), new, bytes)
    if new.header.size_bytes + new.header.blob_bytes > old.backup_range[0]:
        raise _too_small(device)
    if not info.is_backup:
        old.put(io, backup=True)
    new.put(io, backup=False)
    new.drop_backup(io)
