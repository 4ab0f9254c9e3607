# SPDX-License-Identifier: MIT OR Apache-2.0
"""Devices behind registers and ports: from the loader's device tree to a disk and a key channel.

    parameter area ─▶ nodes (`svsm.formats.boot_devices`) ─▶ places that may be used ─▶ the chosen two ─▶ drivers

Theory. The tree is unmeasured, and comes from the host: it may send the kernel to another device, or to none, as the
host may anyway. What it may not do is to have the kernel touch something else than registers. So a window must lie
where registers lie and memory never does, ports must be ports, and no two devices may share any of it. What is refused
here is refused before anything was touched.

The shared memory for devices is cut into two parts, so that neither device has a say in what the other one moves.

Setting a device up is a hundred accesses, each of which the host may answer in the last moment; all of them together
have one deadline. So have those of one call of the key channel.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from svsm.abi.channel import Channel
from svsm.abi.errors import ProtocolError
from svsm.abi.platform import PAGE_SIZE, DevicePorts, DeviceRegisters, Gpa, Platform
from svsm.formats.boot_devices import SERIAL_PORTS, BootDevice, BootDevices, PciHost, SerialPort, VirtioMmio
from svsm.formats.record import Buffer
from svsm.formats.snp import ghcb
from svsm.formats.virtio import MMIO_WINDOW_BYTES, DeviceType
from svsm.kernel.channels.uart16550 import UartChannel
from svsm.kernel.channels.virtio_console import ConsoleChannel
from svsm.kernel.channels.vsock import VsockChannel
from svsm.kernel.resettable import ResettableDisk, ResettableDriver
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.nvme.disk import NvmeDisk, NvmePolicy
from svsm.storage.drivers.nvme.pci import ConfigurationSpace, enable_memory_bar, find_nvme
from svsm.storage.drivers.virtio.blk import BlkPolicy, VirtioBlk
from svsm.storage.drivers.virtio.mmio import MmioTransport

__all__ = [
    "CHANNEL_MEMORY_BYTES",
    "DISK_MEMORY_BYTES",
    "MAX_DEVICES",
    "NVME_POLICY",
    "VIRTIO_POLICY",
    "open_channel",
    "open_disk",
    "read_devices",
]

MAX_DEVICES: Final = 32
CHANNEL_MEMORY_BYTES: Final = 0x8_0000
"""Of the shared memory for devices, the last part; the disk has the rest."""
DISK_MEMORY_BYTES: Final = ghcb.DEVICE_MEMORY_BYTES - CHANNEL_MEMORY_BYTES
SETUP_SECONDS: Final = 30.0
"""For all accesses that set a device up, or reset it."""
_LATE_SECONDS: Final = 1.0
"""After a channel's deadline, for the access that is under way: whose time is over is the channel's to say."""
DISK_SECONDS: Final = 10.0
"""Nobody is served while the kernel waits for its disk, so its patience is everybody's: long enough for a host that
writes out its cache, short enough for a TPM's client."""

VIRTIO_POLICY: Final = BlkPolicy(queue_size=128, large_bytes=256 << 10, large_slots=2, deadline_seconds=DISK_SECONDS)
NVME_POLICY: Final = NvmePolicy(depth=64, large_bytes=256 << 10, large_slots=2, deadline_seconds=DISK_SECONDS)
"""Both fit the disk's part of the memory."""

_WINDOW_MOST: Final = 0x1_0000
_PCI_LEAST, _PCI_MOST = 0x1_0000, 1 << 28
_PCI_PORTS: Final = (0xCF8, 8)
_PORT_LIMIT: Final = 1 << 16


def read_devices(area: Buffer) -> BootDevices:
    """What the loader says, where every place may be used.

    Args:
        area: The parameter area; the tree is at its start.

    Raises:
        FormatError: ``fdt-…``, ``boot-devices-…``.
        ProtocolError: ``device-count``, ``device-place``, ``device-overlap``, ``device-chosen-twice``.
    """
    found = BootDevices.parse(area)
    if len(found.devices) > MAX_DEVICES:
        raise ProtocolError("the device tree has too many devices", code="device-count", got=len(found.devices))
    for device in found.devices:
        if not _may_be_there(device):
            raise ProtocolError("a device is where none may be", code="device-place", path=device.path)
    for places in (_windows, _ports):
        taken = sorted(
            (start, start + length, device.path) for device in found.devices for start, length in places(device)
        )
        for (_, end, _), (start, _, path) in itertools.pairwise(taken):
            if start < end:
                raise ProtocolError("two devices are at one place", code="device-overlap", path=path)
    if found.disk is not None and found.disk == found.key_channel:
        raise ProtocolError("one device is chosen for two things", code="device-chosen-twice", path=found.disk.path)
    return found


def _windows(device: BootDevice) -> Iterator[tuple[int, int]]:
    if isinstance(device, VirtioMmio):
        yield device.gpa, device.size_bytes
    elif isinstance(device, PciHost):
        yield device.window_gpa, device.window_bytes


def _ports(device: BootDevice) -> Iterator[tuple[int, int]]:
    if isinstance(device, SerialPort):
        yield device.port, device.ports
    elif isinstance(device, PciHost):
        yield _PCI_PORTS


def _may_be_there(device: BootDevice) -> bool:
    if isinstance(device, SerialPort):
        return device.ports == SERIAL_PORTS and device.port % SERIAL_PORTS == 0 and 0 < device.port < _PORT_LIMIT
    if isinstance(device, VirtioMmio):
        start, length, alignment = device.gpa, device.size_bytes, MMIO_WINDOW_BYTES
        fits = MMIO_WINDOW_BYTES <= length <= _WINDOW_MOST
    else:
        start, length, alignment = device.window_gpa, device.window_bytes, PAGE_SIZE
        fits = _PCI_LEAST <= length <= _PCI_MOST
    inside = start >= ghcb.MMIO_GPA and start + length <= ghcb.MMIO_GPA + ghcb.MMIO_BYTES
    return fits and inside and not start % alignment and not length % alignment


# ---- drivers --------------------------------------------------------------------------------------------------------


def open_disk(
    platform: Platform, device: BootDevice, *, on_reset: Callable[[str], None] = lambda _code: None
) -> ResettableDisk:
    """The driver for the chosen disk.

    Args:
        platform: The hardware.
        device: The disk's node.
        on_reset: See `ResettableDisk`.

    Raises:
        ProtocolError: ``device-kind``; ``virtio-…``, ``nvme-…`` for a device that cannot be used.
        BackendError: ``platform-host-…``.
    """
    gpa, memory = platform.device_memory()
    part = DmaMemory(memory[:DISK_MEMORY_BYTES], address=gpa)
    driver: ResettableDriver
    if isinstance(device, VirtioMmio):
        registers = platform.registers(Gpa(device.gpa), device.size_bytes)
        with _in_time(registers):
            driver = VirtioBlk(MmioTransport(registers), part, policy=VIRTIO_POLICY)
    elif isinstance(device, PciHost):
        registers = _nvme_registers(platform, device)
        with _in_time(registers):
            driver = NvmeDisk(registers, part, policy=NVME_POLICY)
    else:
        raise _wrong_kind(device, "disk")
    return ResettableDisk(driver, on_reset=on_reset, limit=lambda: _in_time(registers))


def _nvme_registers(platform: Platform, device: PciHost) -> DeviceRegisters:
    """BAR 0 of the first NVMe controller, put into the window."""
    ports = platform.ports()
    with _in_time(ports):
        space = ConfigurationSpace(ports)
        window = {"window_gpa": device.window_gpa, "window_bytes": device.window_bytes}
        base, size = enable_memory_bar(space, find_nvme(space), **window)
    return platform.registers(Gpa(base), size)


@contextlib.contextmanager
def _until(access: DeviceRegisters | DevicePorts, deadline: float) -> Iterator[None]:
    """All accesses in this context have one deadline."""
    access.expires = deadline
    try:
        yield
    finally:
        access.expires = math.inf


def _in_time(access: DeviceRegisters | DevicePorts) -> contextlib.AbstractContextManager[None]:
    return _until(access, time.monotonic() + SETUP_SECONDS)


class _TimedChannel:
    """A `Channel` whose accesses to registers end with the call that makes them, however slowly the host answers."""

    def __init__(self, channel: Channel, access: DeviceRegisters | DevicePorts) -> None:
        self._channel = channel
        self._access = access

    def send(self, data: Buffer, *, deadline: float) -> None:
        """See `Channel`."""
        with _until(self._access, deadline + _LATE_SECONDS):
            self._channel.send(data, deadline=deadline)

    def receive(self, max_bytes: int, *, deadline: float) -> bytes:
        """See `Channel`."""
        with _until(self._access, deadline + _LATE_SECONDS):
            return self._channel.receive(max_bytes, deadline=deadline)

    def fileno(self) -> int:
        """See `Channel`."""
        return self._channel.fileno()

    def close(self) -> None:
        """See `Channel`."""
        with _in_time(self._access):
            self._channel.close()


def open_channel(platform: Platform, device: BootDevice) -> Channel:
    """The driver for the chosen key channel.

    Raises:
        ProtocolError: ``device-kind``; ``uart-missing``, ``virtio-…``, ``console-…``, ``vsock-…``.
        BackendError: ``platform-host-…``, ``channel-…``.
    """
    if isinstance(device, SerialPort):
        ports = platform.ports()
        with _in_time(ports):
            return _TimedChannel(UartChannel(ports, base=device.port), ports)
    if isinstance(device, VirtioMmio):
        registers = platform.registers(Gpa(device.gpa), device.size_bytes)
        with _in_time(registers):
            transport = MmioTransport(registers)
            driver = _VIRTIO_CHANNELS.get(transport.device_type)
            if driver is not None:
                gpa, memory = platform.device_memory()
                part = DmaMemory(memory[DISK_MEMORY_BYTES:], address=gpa + DISK_MEMORY_BYTES)
                return _TimedChannel(driver(transport, part, platform.fileno()), registers)
            transport.close()
    raise _wrong_kind(device, "key channel")


def _console(transport: MmioTransport, memory: DmaMemory, descriptor: int) -> Channel:
    return ConsoleChannel(transport, memory, descriptor=descriptor)


def _vsock(transport: MmioTransport, memory: DmaMemory, descriptor: int) -> Channel:
    return VsockChannel(transport, memory, descriptor=descriptor)


_VIRTIO_CHANNELS: Final[Mapping[int, Callable[[MmioTransport, DmaMemory, int], Channel]]] = {
    DeviceType.CONSOLE: _console,
    DeviceType.VSOCK: _vsock,
}
"""By the type that the device names."""


def _wrong_kind(device: BootDevice, use: str) -> ProtocolError:
    return ProtocolError(
        f"the device tree chooses a {use} that is none",
        code="device-kind",
        hint="docs/boot.md lists which kinds of nodes can be what",
        path=device.path,
    )
