# SPDX-License-Identifier: MIT OR Apache-2.0
"""Which devices behind registers a machine has: the way there for the hypervisor, and what the kernel is told of them.

device process   one virtio-mmio window, and where the key comes over one of    `svsm.host.mmio_relay`
                 our models a second one, or COM3
QEMU microvm     one virtio-mmio window; COM3, chosen as the key's channel      `svsm.host.qtest_relay`
QEMU q35         PCI bus 0 by its configuration ports, and a window for its     `svsm.host.qtest_relay`
                 functions' registers; COM3, chosen as the key's channel
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterable
from typing import Final, Protocol

from svsm.formats.boot_devices import BootDevice, BootDevices, PciHost, SerialPort, VirtioMmio
from svsm.formats.snp.hardware_messages import Message
from svsm.formats.virtio import MMIO_WINDOW_BYTES
from svsm.host.devices.key_channel import COM3_PORTS, KeyChannel
from svsm.host.mmio_relay import MmioRelay
from svsm.host.qemu_command import COM_PORTS, NVME_INTERRUPT, PCI_WINDOW, VIRTIO_SLOT_BYTES, MachineKind, virtio_slot
from svsm.host.qtest_relay import QtestRelay

__all__ = ["Attachment", "DeviceRelay", "attach_process", "attach_qemu"]

_COM3: Final = 2
_PCI_PORTS: Final = range(0xCF8, 0xD00)


class DeviceRelay(Protocol):
    """Carries a kernel's accesses to devices, and their interrupts back. Nothing in it waits."""

    @property
    def closed(self) -> bool:
        """Whether the devices are gone."""

    def fileno(self) -> int:
        """Readable when a device has said something."""

    def access(self, exit_: Message) -> Message | None:
        """Start an MMIO or IOIO exit; its answer, or None when that comes with `receive`."""

    def receive(self) -> tuple[list[Message], bool]:
        """Take in what the devices have said: answers to exits, and whether one has interrupted."""

    def close(self) -> None:
        """Hang up."""


@dataclasses.dataclass(frozen=True, slots=True)
class Attachment:
    """Devices behind registers."""

    relay: DeviceRelay
    devices: BootDevices


def attach_process(channel: socket.socket, shared: int, *, key_channel: KeyChannel = KeyChannel.STREAM) -> Attachment:
    """A virtio disk that a device process plays, and the key's device.

    Args:
        channel: SOCK_SEQPACKET to it; owned.
        shared: The shared memfd; stays the caller's.
        key_channel: What the process plays beside the disk.
    """
    serial = key_channel is KeyChannel.UART16550
    virtio = not serial and key_channel is not KeyChannel.STREAM
    relay = MmioRelay(channel, shared, windows=1 + virtio, ports=COM3_PORTS if serial else range(0))
    disk = VirtioMmio(relay.gpa)
    key: BootDevice | None = None
    if serial:
        key = SerialPort(COM3_PORTS.start)
    elif virtio:
        key = VirtioMmio(relay.gpa + MMIO_WINDOW_BYTES)
    devices = (disk,) if key is None else (disk, key)
    return Attachment(relay, BootDevices(devices, disk=disk, key_channel=key))


def attach_qemu(kind: MachineKind, channel: socket.socket, shared: int) -> Attachment:
    """A disk and COM3 of QEMU's.

    Args:
        kind: Its machine.
        channel: A stream socket to its qtest server; owned.
        shared: The shared memfd, of which QEMU has the first part as RAM; stays the caller's.
    """
    com3, com3_interrupt = COM_PORTS[_COM3]
    serial = SerialPort(com3)
    ports = [range(serial.port, serial.port + serial.ports)]
    if kind is MachineKind.MICROVM:
        gpa, interrupt = virtio_slot()
        window = range(gpa, gpa + VIRTIO_SLOT_BYTES)
        disk: BootDevice = VirtioMmio(gpa)
    else:
        window, interrupt = range(PCI_WINDOW[0], sum(PCI_WINDOW)), NVME_INTERRUPT
        disk = PciHost(*PCI_WINDOW)
        ports.append(_PCI_PORTS)
    lines: Iterable[int] = (interrupt, com3_interrupt)
    relay = QtestRelay(channel, shared, windows=[window], ports=ports, lines=lines)
    return Attachment(relay, BootDevices((disk, serial), disk=disk, key_channel=serial))
