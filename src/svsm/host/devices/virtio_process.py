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
from svsm.host.devices.virtio_mmio import MmioBlk
from svsm.host.devices.virtio_ring import Window

__all__ = ["fork", "serve"]

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

    def interrupt() -> None:
        # A full socket means that the driver has interrupts to read already.
        with contextlib.suppress(OSError):
            connection.send(
                RegisterMessage(RegisterOperation.INTERRUPT, 0, 0, 0).pack(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
            )

    window = Window(memoryview(memory), address=address)
    device = MmioBlk(BlkBackend(disk, options or BlkOptions()), window, interrupt=interrupt)
    while True:
        try:
            raw = connection.recv(_READ_BYTES)
        except OSError:
            return
        if not raw:
            return
        try:
            message = RegisterMessage.parse(raw)
        except SvsmError:
            continue
        if message.operation == RegisterOperation.WRITE:
            device.write32(message.offset, message.value)
        elif message.operation == RegisterOperation.READ:
            answer = message.replace(value=device.read32(message.offset)).pack()
            with contextlib.suppress(OSError):
                connection.send(answer, socket.MSG_NOSIGNAL)


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
