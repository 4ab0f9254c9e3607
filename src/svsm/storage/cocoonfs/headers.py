# SPDX-License-Identifier: MIT OR Apache-2.0
"""What stands on a disk, before any key: a volume, a volume that shall be made, or neither.

The decision follows the format's rules for opening. A static header whose first 128 bytes are intact is believed as far
as its kind goes, so what is wrong with it otherwise is final, but for a failed checksum: that is what a torn creation
leaves. Then, and where there is no header at all, the backup copy of the creation info counts. Nothing here proves
anything; every size is bounded before it is used.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from svsm.abi.block import BlockDevice
from svsm.formats.errors import FormatError
from svsm.storage.cocoonfs import creation
from svsm.storage.cocoonfs.aux import AuxMetadata
from svsm.storage.cocoonfs.creation import CreationHeader, backup_offset
from svsm.storage.cocoonfs.layout import CREATION_MAGIC, MAGIC, ImageLayout, StaticHeader

__all__ = ["CreationInfo", "Probe", "find_header", "probe", "read_creation_info", "read_static_header"]

_PIECE = 128  # what is never torn, see abi/block.py


class Probe(enum.Enum):
    """What a device seems to hold, by its magic numbers alone."""

    BLANK = "blank"
    COCOONFS = "cocoonfs"
    CREATION_INFO = "creation-info"


class CreationInfo(NamedTuple):
    """An intact creation-info header with what belongs to it.

    Attributes:
        header: Configuration, salt, size.
        aux: Auxiliary metadata that the new volume gets.
        offset: Where the header was found, in bytes: 0, or the backup's place.
    """

    header: CreationHeader
    aux: AuxMetadata
    offset: int

    @property
    def layout(self) -> ImageLayout:
        """The configuration."""
        return self.header.layout

    @property
    def salt(self) -> bytes:
        """The salt."""
        return self.header.salt

    @property
    def size_bytes(self) -> int:
        """The size that the volume shall have."""
        return self.header.image_ab * self.header.layout.ab_bytes

    @property
    def is_backup(self) -> bool:
        """Whether only the backup copy is intact: a creation was interrupted."""
        return self.offset != 0


def _read(device: BlockDevice, offset: int, length: int) -> bytes:
    """A range of any alignment, cut at the device's end."""
    block = device.block_size_bytes
    begin = offset // block * block
    end = min(-(-(offset + length) // block) * block, device.size_bytes)
    if end <= begin:
        return b""
    return device.read([(begin, end - begin)])[0][offset - begin : offset - begin + length]


def probe(device: BlockDevice) -> Probe:
    """What kind of volume the magic numbers on a device announce; nothing is verified.

    A creation-info header is also looked for in its backup place, so that an interrupted creation is not blank. The
    last write of a creation, torn, counts as blank: the magic is there, the header does not verify, and a piece of it
    is all zeros (`Volume.open` refuses it all the same).
    """
    head = _read(device, 0, len(MAGIC))
    announced = head == CREATION_MAGIC or _has_backup_magic(device)
    if head == MAGIC:
        if not _is_torn_creation(device):
            return Probe.COCOONFS
        return Probe.CREATION_INFO if announced else Probe.BLANK
    return Probe.CREATION_INFO if announced else Probe.BLANK


def _has_backup_magic(device: BlockDevice) -> bool:
    place = backup_offset(device.size_bytes)
    return place is not None and _read(device, place, len(CREATION_MAGIC)) == CREATION_MAGIC


def _is_torn_creation(device: BlockDevice) -> bool:
    """The header's first block was all zeros before it was written, so what did not arrive of it is zero still."""
    try:
        measured = StaticHeader.measure(_read(device, 0, _PIECE))
    except FormatError:
        return False
    data = _read(device, 0, measured.size_bytes)
    first_block = data[: measured.layout.io_bytes]
    if all(any(first_block[at : at + _PIECE]) for at in range(0, len(first_block), _PIECE)):
        return False
    try:
        measured.parse_contents(data)
    except FormatError:
        return True
    return False


def read_static_header(device: BlockDevice) -> StaticHeader:
    """Configuration and salt from the header in clear text; needs no key and proves nothing.

    Raises:
        FormatError: ``cocoonfs-no-magic``, ``cocoonfs-header``, ``cocoonfs-truncated``, ``cocoonfs-layout``,
            ``cocoonfs-unsupported-…``.
    """
    header = StaticHeader.measure(_read(device, 0, _PIECE))
    if header.size_bytes > device.size_bytes:
        raise FormatError("the disk is shorter than its header", code="cocoonfs-truncated", got=device.size_bytes)
    return header.parse_contents(_read(device, 0, header.size_bytes))


def _creation_info_at(device: BlockDevice, offset: int) -> CreationInfo:
    measured = CreationHeader.measure(_read(device, offset, _PIECE))
    blob_offset = offset - measured.blob_bytes if offset else measured.size_bytes
    end = max(offset + measured.size_bytes, blob_offset + measured.blob_bytes)
    if blob_offset < 0 or offset % measured.layout.io_bytes or end > device.size_bytes:
        raise FormatError(
            "the disk is too small for its creation info", code="cocoonfs-truncated", got=device.size_bytes
        )
    header = measured.parse_contents(_read(device, offset, measured.size_bytes))
    encoded = creation.parse_blob(header, _read(device, blob_offset, header.blob_bytes))
    return CreationInfo(header, AuxMetadata.parse(encoded), offset)


def _backup_info(device: BlockDevice) -> CreationInfo | None:
    place = backup_offset(device.size_bytes)
    if place is None:
        return None
    try:
        return _creation_info_at(device, place)
    except FormatError:
        return None


def find_header(device: BlockDevice) -> StaticHeader | CreationInfo:
    """What the device holds, by the format's rules for opening.

    Raises:
        FormatError: ``cocoonfs-no-magic``: neither; ``cocoonfs-header``, ``cocoonfs-creation-damaged``: one that does
            not verify, without a backup; ``cocoonfs-truncated``, ``cocoonfs-layout``, ``cocoonfs-unsupported-…``.
    """
    magic = _read(device, 0, len(MAGIC))
    try:
        return _creation_info_at(device, 0) if magic == CREATION_MAGIC else read_static_header(device)
    except FormatError as error:
        if error.code not in ("cocoonfs-no-magic", "cocoonfs-header", "cocoonfs-creation-damaged"):
            raise
        found = _backup_info(device)
        if found is None:
            raise
        return found


def read_creation_info(device: BlockDevice) -> CreationInfo:
    """The creation info on a device; needs no key and proves nothing.

    Raises:
        FormatError: ``cocoonfs-no-creation-info`` where there is a volume; else as `find_header`.
    """
    found = find_header(device)
    if isinstance(found, StaticHeader):
        raise FormatError("the disk already holds a volume", code="cocoonfs-no-creation-info")
    return found
