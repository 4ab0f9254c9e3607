# SPDX-License-Identifier: MIT OR Apache-2.0
"""A virtio disk in a process of its own: registers over a datagram socket, memory shared.

Each message is a `RegisterMessage`. A WRITE is not answered, so a kick costs one message; a READ is; INTERRUPT comes
whenever the line is raised. Messages stay in order, which is all that a register window promises. What does not
parse is ignored, a peer that closes ends the service. While the driver has requests in flight the device looks at
its rings between messages only: a kick is what starts work.

    serve(connection, shared_fd, address=GPA, disk_fd=…, options=BlkOptions())
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket

from svsm.formats.errors import SvsmError
from svsm.formats.virtio import RegisterMessage, RegisterOperation
from svsm.host.devices.virtio_blk import BlkBackend, BlkOptions
from svsm.host.devices.virtio_mmio import MmioBlk, MmioDevice
from svsm.host.devices.virtio_ring import Window

__all__ = ["fork", "send_interrupt", "serve", "serve_access"]

_READ_BYTES = RegisterMessage.SIZE + 1


def serve(
    connection: socket.socket,
    memory: mmap.mmap | memoryview,
    *,
    address: int,
    disk: int,
    options: BlkOptions | None = None,
) -> None:
    """Serve one driver until it hangs up.

    Args:
        connection: SOCK_SEQPACKET; the driver's registers. Stays the caller's.
        memory: The shared pages.
        address: Their guest-physical address.
        disk: Descriptor of the file behind the disk; stays the caller's.
        options: What the device offers.
    """

    window = Window(memoryview(memory), address=address)
    backend = BlkBackend(disk, options or BlkOptions())
    device = MmioBlk(backend, window, interrupt=lambda: send_interrupt(connection))
    while serve_access(connection, device):
        pass


def send_interrupt(connection: socket.socket) -> None:
    """Tell the driver that the line is raised."""
    # A full socket means that the driver has interrupts to read already.
    with contextlib.suppress(OSError):
        connection.send(
            RegisterMessage(RegisterOperation.INTERRUPT, 0, 0, 0).pack(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        )


def serve_access(connection: socket.socket, device: MmioDevice) -> bool:
    """Take one message of the driver and do what it says; False when the driver has hung up."""
    try:
        raw = connection.recv(_READ_BYTES)
    except OSError:
        return False
    if not raw:
        return False
    try:
        message = RegisterMessage.parse(raw)
    except SvsmError:
        return True
    if message.operation == RegisterOperation.WRITE:
        device.write32(message.offset, message.value)
    elif message.operation == RegisterOperation.READ:
        answer = message.replace(value=device.read32(message.offset)).pack()
        with contextlib.suppress(OSError):
            connection.send(answer, socket.MSG_NOSIGNAL)
    return True


def fork(
    memory: mmap.mmap | memoryview, *, address: int, disk: int, options: BlkOptions | None = None
) -> tuple[int, socket.socket]:
    """Serve from a forked process; its pid and the driver's end of the socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            ours.close()
            serve(theirs, memory, address=address, disk=disk, options=options)
        os._exit(0)
    theirs.close()
    return pid, ours
