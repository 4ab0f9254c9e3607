# SPDX-License-Identifier: MIT OR Apache-2.0
"""The disk that the host offers, and the volume on it.

The kernel opens nothing. A disk behind registers is `svsm.kernel.devices`' business. Where the device tree names none,
the host gives a descriptor, and what kind it is decides the driver: a regular file, a block
special file, or a connected stream socket, which gets the block protocol of a disk process. Everything else, and
every lie about either, is refused.
"""

from __future__ import annotations

import os
import socket
import stat
import uuid
from typing import Final

from svsm.abi.block import BlockDevice
from svsm.abi.descriptors import client_socket
from svsm.abi.errors import BackendError, FormatError, PolicyError, StateError, SvsmError
from svsm.kernel.decision import DecisionSource, decide_at_open
from svsm.storage.drivers.file import FileDevice
from svsm.storage.drivers.linux import LinuxDevice
from svsm.storage.drivers.remote import RemoteDevice
from svsm.storage.volume import DEFAULT_LAYOUT, Expected, Probe, Volume, probe, read_creation_info

__all__ = ["MAX_FORMAT_BYTES", "VolumeDisk", "open_descriptor"]

MAX_FORMAT_BYTES: Final = 16 << 30
"""The host says how large its disk is, and a format takes memory for each block and time for each byte of it."""


def open_descriptor(descriptor: int) -> BlockDevice:
    """The driver for a descriptor, which it owns from now on.

    Raises:
        BackendError: ``disk-kind`` or what the driver says.
        StateError, ProtocolError: What the driver says.
    """
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError as failed:
        raise BackendError("the disk's descriptor is not usable", code="disk-kind") from failed
    if stat.S_ISREG(mode):
        return FileDevice(descriptor)
    if stat.S_ISBLK(mode):
        return LinuxDevice(descriptor)
    if stat.S_ISSOCK(mode):
        connection = client_socket(descriptor)
        if connection.family == socket.AF_UNIX:
            return RemoteDevice(connection)
        connection.close()
        raise BackendError("the disk is a network connection", code="disk-kind")
    os.close(descriptor)
    raise BackendError("the disk is neither a file, a block device nor a disk process", code="disk-kind")


class VolumeDisk:
    """What `svsm.kernel.volume_birth` asks of a disk; keeps the volume once it is open.

    Args:
        device: The disk.
        key: The volume key.
        volume_id: UUID text; its bytes are the salt of a first format.
        source: Asked about a commit that waits on the disk, and about later ones.
    """

    def __init__(self, device: BlockDevice, *, key: bytes, volume_id: str, source: DecisionSource) -> None:
        self._device = device
        self._key = key
        self._decide = decide_at_open(source)
        self._salt = uuid.UUID(volume_id).bytes
        self.volume: Volume | None = None

    def try_open(self) -> SvsmError | None:
        """Open with the key; None, or why it does not open.

        Raises:
            BackendError: The disk cannot be read.
            StateError: It opens with the key, but the commit that waits on it is not settled: ``cocoonfs-undecided``
                (whatever were read now could change under its readers), ``cocoonfs-half-applied``,
                ``cocoonfs-journal-pending``.
        """
        try:
            volume = Volume.open(self._device, self._key, decide=self._decide)
        except (BackendError, StateError):
            raise
        except SvsmError as refused:
            return refused
        if volume.pending is not None:
            raise StateError(
                "a commit waits on the disk, and nobody says whether it shall happen",
                code="cocoonfs-undecided",
                hint="boot again when the ledger can be reached; nothing was changed",
            )
        self.volume = volume
        return None

    def has_magic(self) -> bool:
        """Whether a CocoonFS or creation magic is on the disk."""
        return probe(self._device) is not Probe.BLANK

    def announces_ours(self) -> bool:
        """Whether the disk only announces a volume, and exactly the one that `format` makes.

        The announcement is not authenticated: configuration, salt and size must be ours. Its auxiliary metadata is
        taken along; that never is authenticated, and the kernel does not read it.
        """
        try:
            info = read_creation_info(self._device)
            self._ours().check_creation(info.layout, info.salt, info.size_bytes, info.aux)
        except (FormatError, PolicyError):
            return False
        return True

    def _ours(self) -> Expected:
        size = self._device.size_bytes // DEFAULT_LAYOUT.io_bytes * DEFAULT_LAYOUT.io_bytes
        return Expected(DEFAULT_LAYOUT, self._salt, min_size_bytes=size, max_size_bytes=size)

    def format(self) -> Volume:
        """Make the volume. Only for a disk that the rules of a first format allow.

        Raises:
            PolicyError: ``disk-too-large``; nothing was written.
            SvsmError: What the volume and the disk say.
        """
        if self._device.size_bytes > MAX_FORMAT_BYTES:
            raise PolicyError(
                "the disk is larger than what a first boot formats",
                code="disk-too-large",
                hint="give the VM a disk of at most 16 GiB, or one on which its owner has made the volume",
                expected=MAX_FORMAT_BYTES,
                got=self._device.size_bytes,
            )
        if self.announces_ours():
            self.volume = Volume.open(
                self._device, self._key, decide=self._decide, first_use=True, expected=self._ours()
            )
        else:
            self.volume = Volume.create(self._device, self._key, salt=self._salt)
        return self.volume
