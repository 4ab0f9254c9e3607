# SPDX-License-Identifier: MIT OR Apache-2.0
"""Drivers: one for each way in which a host can offer a disk. Nothing above knows which it is.

`device_from_descriptor` picks the driver for a descriptor that was handed over.
"""

from __future__ import annotations

import os
import socket
import stat

from svsm.abi.block import BlockDevice
from svsm.formats.errors import BackendError

__all__ = ["device_from_descriptor"]


def device_from_descriptor(descriptor: int, *, read_only: bool = False) -> BlockDevice:
    """The device behind a descriptor: a file or block device, or a connected stream socket that speaks the block
    protocol. The descriptor is the device's from then on, and is closed where this raises.

    Raises:
        BackendError: ``block-io`` for any other kind of descriptor, or where the device fails.
        StateError: ``block-in-use``.
        ProtocolError: ``block-protocol``.
    """
    from svsm.storage.drivers.file import FileDevice
    from svsm.storage.drivers.remote import RemoteDevice

    try:
        mode = os.fstat(descriptor).st_mode
    except OSError as error:
        raise BackendError("the disk's descriptor is not open", code="block-io", operation="open") from error
    if not stat.S_ISSOCK(mode):
        return FileDevice(descriptor, read_only=read_only)
    connection = socket.socket(fileno=descriptor)
    if connection.type != socket.SOCK_STREAM:
        connection.close()
        raise BackendError("the disk's socket is not a stream", code="block-io", operation="open")
    return RemoteDevice(connection, read_only=read_only)
