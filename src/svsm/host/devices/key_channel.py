# SPDX-License-Identifier: MIT OR Apache-2.0
"""The device that the key comes over, beside the disk in a device process: one of our models, with the proxy behind it.

A virtio device has the window after the disk's; the 16550 has COM3's ports. `KeyDevice` is what the process's loop
sees of either: accesses, and the proxy's socket to wait for.
"""

from __future__ import annotations

import enum
import socket
from collections.abc import Callable
from typing import Final

from svsm.host.devices.uart16550 import UartModel
from svsm.host.devices.virtio_console import ConsoleBackend
from svsm.host.devices.virtio_ring import Window
from svsm.host.devices.virtio_stream import MmioStream, Peer, SocketPeer, StreamBackend
from svsm.host.devices.virtio_vsock import VsockBackend

__all__ = ["COM3_PORTS", "KEY_PORT", "KeyChannel", "KeyDevice"]

COM3_PORTS: Final = range(0x3E8, 0x3F0)
KEY_PORT: Final = 9999
"""Port of the host, over vsock; the kernel's default."""
_NOTHING: Final = 0xFF


class KeyChannel(enum.StrEnum):
    """What the key comes over."""

    STREAM = "stream"
    """A descriptor of the proxy's socket: no device."""
    UART16550 = "uart16550"
    VIRTIO_CONSOLE = "virtio-console"
    VSOCK = "vsock"


class KeyDevice:
    """The device.

    Args:
        kind: Which; not `KeyChannel.STREAM`.
        proxy: Connected; owned.
        window: Shared memory.
        interrupt: Raises the interrupt line.
    """

    def __init__(self, kind: KeyChannel, proxy: socket.socket, window: Window, interrupt: Callable[[], None]) -> None:
        self._peer = SocketPeer(proxy)
        self._uart: UartModel | None = None
        self._virtio: MmioStream | None = None
        if kind is KeyChannel.UART16550:
            self._uart = UartModel(self._peer, interrupt=interrupt)
            return
        backend: StreamBackend = ConsoleBackend(self._peer)
        if kind is KeyChannel.VSOCK:
            # The proxy is connected once, before confinement: so the first connection gets it, and no other.
            waiting: list[Peer] = [self._peer]
            backend = VsockBackend(lambda port: waiting.pop() if waiting and port == KEY_PORT else None)
        self._virtio = MmioStream(backend, window, interrupt=interrupt)

    def fileno(self) -> int:
        """The proxy's socket."""
        return self._peer.fileno()

    def service(self) -> None:
        """The proxy has sent something, or takes something again."""
        if self._uart is not None:
            self._uart.service()
        elif self._virtio is not None:
            self._virtio.service()

    def read32(self, offset: int) -> int:
        """A register of its window; 0 where it has none."""
        return 0 if self._virtio is None else self._virtio.read32(offset)

    def write32(self, offset: int, value: int) -> None:
        """Set one."""
        if self._virtio is not None:
            self._virtio.write32(offset, value)

    def read_port(self, port: int) -> int:
        """A byte of the 16550."""
        return _NOTHING if self._uart is None or port not in COM3_PORTS else self._uart.read(port - COM3_PORTS.start)

    def write_port(self, port: int, value: int) -> None:
        """Store one."""
        if self._uart is not None and port in COM3_PORTS:
            self._uart.write(port - COM3_PORTS.start, value & 0xFF)
