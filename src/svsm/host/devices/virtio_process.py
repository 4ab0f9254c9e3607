# SPDX-License-Identifier: MIT OR Apache-2.0
"""A virtio disk in a process of its own: registers over a datagram socket, memory shared.

Each message is a `RegisterMessage`. A WRITE is not answered, so a kick costs one message; a READ is; INTERRUPT comes
whenever the line is raised. Messages stay in order, which is all that a register window promises. What does not
parse is ignored, a peer that closes ends the service. While the driver has requests in flight the device looks at
its rings between messages only: a kick is what starts work. The key's device, where there is one, also works when the
proxy behind it has something: its socket is watched for changes, so what nobody has room for does not keep it busy.

    serve(connection, shared_fd, address=GPA, disk_fd=…, options=BlkOptions())
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
from collections.abc import Callable

from svsm.formats.errors import SvsmError
from svsm.formats.virtio import MMIO_WINDOW_BYTES, RegisterMessage, RegisterOperation
from svsm.host.devices.key_channel import KeyDevice
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
    key: Callable[[Window, Callable[[], None]], KeyDevice] | None = None,
) -> None:
    """Serve one driver until it hangs up.

    Args:
        connection: SOCK_SEQPACKET; the driver's registers. Stays the caller's.
        memory: The shared pages.
        address: Their guest-physical address.
        disk: Descriptor of the file behind the disk; stays the caller's.
        options: What the device offers.
        key: Makes the key's device, if there is one, from the memory and the interrupt line.
    """

    window = Window(memoryview(memory), address=address)
    backend = BlkBackend(disk, options or BlkOptions())
    device = MmioBlk(backend, window, interrupt=lambda: send_interrupt(connection))
    if key is None:
        while serve_access(connection, device):
            pass
        return
    _serve_both(connection, device, key(window, lambda: send_interrupt(connection)))


def _serve_both(connection: socket.socket, device: MmioDevice, key: KeyDevice) -> None:
    with select.epoll() as poll:
        poll.register(connection, select.EPOLLIN)
        poll.register(key, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
        while True:
            ready = [descriptor for descriptor, _ in poll.poll()]
            if key.fileno() in ready:
                key.service()
            if connection.fileno() in ready and not serve_access(connection, device, key):
                return


def send_interrupt(connection: socket.socket) -> None:
    """Tell the driver that the line is raised."""
    # A full socket means that the driver has interrupts to read already.
    with contextlib.suppress(OSError):
        connection.send(
            RegisterMessage(RegisterOperation.INTERRUPT, 0, 0, 0).pack(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        )


def serve_access(connection: socket.socket, device: MmioDevice, key: KeyDevice | None = None) -> bool:
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
    value = _access(message, device) if key is None else _access_either(message, device, key)
    if value is not None:
        with contextlib.suppress(OSError):
            connection.send(message.replace(value=value).pack(), socket.MSG_NOSIGNAL)
    return True


def _access(message: RegisterMessage, device: MmioDevice | KeyDevice) -> int | None:
    """Perform one access to registers; the value that was read."""
    if message.operation == RegisterOperation.READ:
        return device.read32(message.offset)
    if message.operation == RegisterOperation.WRITE:
        device.write32(message.offset, message.value)
    return None


def _access_either(message: RegisterMessage, device: MmioDevice, key: KeyDevice) -> int | None:
    if message.operation == RegisterOperation.READ_PORT:
        return key.read_port(message.offset)
    if message.operation == RegisterOperation.WRITE_PORT:
        key.write_port(message.offset, message.value)
        return None
    beyond = message.offset - MMIO_WINDOW_BYTES
    return _access(message, device) if beyond < 0 else _access(message.replace(offset=beyond), key)


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
