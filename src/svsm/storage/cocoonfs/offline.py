# SPDX-License-Identifier: MIT OR Apache-2.0
"""Auxiliary metadata without the key, in a volume and beside an announcement.

Nothing that is read here is authenticated, so it is for tools on the owner's side, not for the kernel. Where a commit
is pending, the storage is the one that the journal names, as the format says; a decision that takes the commit back
takes a change made in between back with it.
"""

from __future__ import annotations

from svsm.abi.block import BlockDevice
from svsm.storage.cocoonfs.aux import AuxMetadata
from svsm.storage.cocoonfs.auxarea import AuxArea
from svsm.storage.cocoonfs.blockio import BlockIo
from svsm.storage.cocoonfs.geometry import FixedPlaces
from svsm.storage.cocoonfs.headers import CreationInfo, find_header
from svsm.storage.cocoonfs.journal import head_header, is_active
from svsm.storage.cocoonfs.layout import StaticHeader
from svsm.storage.cocoonfs.provisioning import write_creation_aux

__all__ = ["read_aux", "write_aux"]

_POINTERS_BYTES = 16


def _area(device: BlockDevice, static: StaticHeader) -> tuple[BlockIo, AuxArea]:
    layout, places = static.layout, FixedPlaces.of(static)
    io = BlockIo(device, layout)
    journal = is_active(layout, io.read(places.journal_head))
    if journal is None:
        pointers = io.read((places.header_begin_ab, 1))[:_POINTERS_BYTES]
    else:
        end = len(head_header(layout, bytes(_POINTERS_BYTES)))
        pointers = journal[end - _POINTERS_BYTES : end]
    return io, AuxArea(layout, pointers, io.size_ab, io.read)


def read_aux(device: BlockDevice) -> AuxMetadata:
    """The auxiliary metadata on a device.

    Raises:
        FormatError: ``cocoonfs-aux``, and as `headers.find_header`.
        BackendError: ``block-io``.
    """
    header = find_header(device)
    return header.aux if isinstance(header, CreationInfo) else _area(device, header)[1].read()


def write_aux(device: BlockDevice, metadata: AuxMetadata) -> None:
    """Replace the auxiliary metadata on a device: the old or the new is there at any moment.

    Raises:
        StateError: ``cocoonfs-aux-full``: the volume has no reserve for this, or too little.
        FormatError: ``cocoonfs-aux``, ``cocoonfs-too-small``, and as `headers.find_header`.
        BackendError: ``block-io``.
    """
    header = find_header(device)
    if isinstance(header, CreationInfo):
        write_creation_aux(device, metadata)
        return
    io, area = _area(device, header)
    area.write(io, metadata)
