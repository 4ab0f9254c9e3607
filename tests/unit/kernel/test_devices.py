# SPDX-License-Identifier: MIT OR Apache-2.0
"""From a device tree to drivers: which places are refused, and ports, consoles and PCI as the kernel reaches them."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.abi.errors import BackendError, FormatError, ProtocolError, SvsmError
from svsm.abi.platform import Gpa, Platform
from svsm.formats.boot_devices import BootDevice, BootDevices, PciHost, SerialPort, VirtioMmio
from svsm.formats.settings import Settings
from svsm.formats.snp import ghcb
from svsm.formats.snp.hardware_messages import Message
from svsm.host.devices.uart16550 import UartModel
from svsm.host.hypervisor import Hypervisor
from svsm.kernel import devices
from svsm.kernel.boot import Kernel
from svsm.kernel.channels.virtio_line import LinePolicy, line_memory_bytes
from svsm.kernel.console import Console
from svsm.kernel.devices import (
    CHANNEL_MEMORY_BYTES,
    DISK_MEMORY_BYTES,
    MAX_DEVICES,
    NVME_POLICY,
    VIRTIO_POLICY,
    open_channel,
    open_disk,
    read_devices,
)
from svsm.kernel.simulated_platform import WINDOW_BYTES
from svsm.launch.build import build_image
from svsm.storage.drivers.nvme import disk as nvme
from svsm.storage.drivers.virtio import blk
from svsm.testing.machine_harness import running_machine

_VIRTIO = VirtioMmio(0xFEB0_0000)
_COM3 = SerialPort(0x3E8)
_PCI = PciHost(0xE000_0000, 16 << 20)
_END = ghcb.MMIO_GPA + ghcb.MMIO_BYTES


def area(*found: BootDevice, disk: BootDevice | None = None, key_channel: BootDevice | None = None) -> bytes:
    """As the loader fills it."""
    return BootDevices(found, disk, key_channel).tree().pack().ljust(0x4000, b"\0")


def test_each_driver_fits_its_part_of_the_memory() -> None:
    assert blk.memory_bytes(VIRTIO_POLICY) <= DISK_MEMORY_BYTES
    assert nvme.memory_bytes(NVME_POLICY) <= DISK_MEMORY_BYTES
    assert line_memory_bytes(LinePolicy()) <= CHANNEL_MEMORY_BYTES


def test_no_memory_is_where_registers_may_be() -> None:
    assert WINDOW_BYTES <= ghcb.MMIO_GPA
    assert _END <= 0xFEC0_0000  # the interrupt controllers


@pytest.mark.parametrize(
    "found",
    [
        (),
        (_VIRTIO, _COM3, _PCI, SerialPort(0x2F8), VirtioMmio(0xFEB0_0200)),
        (VirtioMmio(ghcb.MMIO_GPA), VirtioMmio(_END - 0x200)),
        (VirtioMmio(0xD000_0000, 0x1000), VirtioMmio(0xD000_1000, 0x1000)),
        (PciHost(ghcb.MMIO_GPA, 1 << 28),),
        tuple(VirtioMmio(0xFEB0_0000 + 0x200 * index) for index in range(MAX_DEVICES)),
    ],
)
def test_places_that_may_be_used(found: tuple[BootDevice, ...]) -> None:
    assert set(read_devices(area(*found)).devices) == set(found)


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ((VirtioMmio(0),), "device-place"),
        ((VirtioMmio(ghcb.DEVICE_MEMORY_GPA),), "device-place"),
        ((VirtioMmio(ghcb.MMIO_GPA - 0x200),), "device-place"),
        ((VirtioMmio(ghcb.MMIO_GPA - 0x200, 0x400),), "device-place"),
        ((VirtioMmio(_END),), "device-place"),
        ((VirtioMmio(_END - 0x200, 0x400),), "device-place"),
        ((VirtioMmio(0xFEB0_0100),), "device-place"),
        ((VirtioMmio(0xFEB0_0000, 0x100),), "device-place"),
        ((VirtioMmio(0xFEB0_0000, 0x300),), "device-place"),
        ((VirtioMmio(0xFE00_0000, 0x2_0000),), "device-place"),
        ((VirtioMmio(0xFEB0_0000, 0),), "device-place"),
        ((VirtioMmio((1 << 64) - 0x200),), "device-place"),
        ((VirtioMmio(0xFEB0_0000, (1 << 64) - 0x200),), "device-place"),
        ((PciHost(0x1000_0000, 1 << 20),), "device-place"),
        ((PciHost(0xE000_0000, 0x8000),), "device-place"),
        ((PciHost(0xE000_0000, 1 << 29),), "device-place"),
        ((PciHost(0xE000_0800, 1 << 20),), "device-place"),
        ((PciHost(_END - 0x1_0000, 1 << 20),), "device-place"),
        ((SerialPort(0),), "device-place"),
        ((SerialPort(0x3EC),), "device-place"),
        ((SerialPort(0x3E8, 4),), "device-place"),
        ((SerialPort(0x3E8, 16),), "device-place"),
        ((_VIRTIO, VirtioMmio(0xFEAF_F000, 0x2000)), "device-overlap"),
        ((VirtioMmio(0xE000_0000), _PCI), "device-overlap"),
        ((_PCI, PciHost(0xD000_0000, 1 << 20)), "device-overlap"),  # both have the configuration ports
        ((_PCI, SerialPort(0xCF8)), "device-overlap"),
        (tuple(VirtioMmio(0xFEB0_0000 + 0x200 * index) for index in range(MAX_DEVICES + 1)), "device-count"),
    ],
)
def test_places_that_are_refused(found: tuple[BootDevice, ...], code: str) -> None:
    with pytest.raises(ProtocolError) as refused:
        read_devices(area(*found))
    assert refused.value.code == code


def test_one_device_is_not_two() -> None:
    with pytest.raises(ProtocolError) as refused:
        read_devices(area(_VIRTIO, disk=_VIRTIO, key_channel=_VIRTIO))
    assert refused.value.code == "device-chosen-twice"


def test_an_area_that_nobody_filled() -> None:
    with pytest.raises(FormatError) as refused:
        read_devices(bytes(0x4000))
    assert refused.value.code == "fdt-header"


@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=8))
def test_a_damaged_tree_is_refused_or_still_safe(changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(area(_VIRTIO, _COM3, _PCI, disk=_PCI, key_channel=_COM3)[:2001])
    for position, value in changes:
        damaged[position] = value
    try:
        found = read_devices(damaged)
    except SvsmError:
        return
    for device in found.devices:
        if isinstance(device, VirtioMmio):
            assert ghcb.MMIO_GPA <= device.gpa <= _END - device.size_bytes
        elif isinstance(device, PciHost):
            assert ghcb.MMIO_GPA <= device.window_gpa <= _END - device.window_bytes


# ---- ports ----------------------------------------------------------------------------------------------------------


class _Echo:
    """The far end of a serial line: what comes, goes back."""

    def __init__(self) -> None:
        self.data = b""

    def read(self, most: int) -> bytes | None:
        taken, self.data = self.data[:most], self.data[most:]
        return taken or None

    def write(self, data: bytes) -> int:
        self.data += data
        return len(data)

    def close(self) -> None:
        pass


class WithPorts(Hypervisor):
    """COM3, and an NVMe controller's configuration space with nothing behind its registers."""

    uart: UartModel
    selected = 0

    def _exit(self, message: Message) -> Message | None:
        if message.arguments[0] != ghcb.ExitCode.IOIO:
            return super()._exit(message)
        _, word, count, rax, _, scratch = message.arguments
        access = ghcb.IoAccess.parse(word)
        if not hasattr(self, "uart"):
            self.uart = UartModel(_Echo())
            self.words = {0x00: 0x0010_1B36, 0x08: 0x0108_0202, 0x10: 4}
        if access.port in (0xCF8, 0xCFC) and access.width_bytes == 4:
            return self._configure(message, access, rax)
        register = access.port - _COM3.port
        if not 0 <= register < 8 or access.width_bytes != 1:
            return message.answer(0, 1 << 32)
        if not access.string:
            if access.reading:
                return message.answer(0, 0, 0, self.uart.read(register) | 0xBAD << 8)
            self.uart.write(register, rax)
        elif access.reading:
            os.pwrite(self._shared_fd, bytes(self.uart.read(register) for _ in range(count)), scratch)
        else:
            for value in os.pread(self._shared_fd, count, scratch):
                self.uart.write(register, value)
        return message.answer()

    def _configure(self, message: Message, access: ghcb.IoAccess, value: int) -> Message:
        if access.port == 0xCF8:
            self.selected = value
            return message.answer()
        offset = self.selected & 0xFC
        if self.selected >> 8 & 0xFFFF != 4 << 3:
            return message.answer(0, 0, 0, 0xFFFF_FFFF)
        if not access.reading:
            self.words[offset] = value & 0xFFFF_C000 | 4 if offset == 0x10 else value
        return message.answer(0, 0, 0, self.words.get(offset, 0))


def test_a_key_channel_by_port_exits() -> None:
    with running_machine(host=WithPorts) as machine:
        found = read_devices(area(_COM3, key_channel=_COM3))
        assert found.key_channel is not None
        channel = open_channel(machine.platform, found.key_channel)
        sent = bytes(range(256))
        taken = b""
        deadline = time.monotonic() + 60
        for start in range(0, len(sent), 16):
            channel.send(sent[start : start + 16], deadline=deadline)
            while len(taken) < start + 16:
                taken += channel.receive(16, deadline=deadline)
        assert taken == sent
        channel.close()


def test_widths_strings_and_refusals() -> None:
    with running_machine(host=WithPorts) as machine:
        ports = machine.platform.ports()
        ports.out8(0x3EF, b"\x5a")
        assert ports.in8(0x3EF) == b"\x5a"  # the host's other bits are not taken
        ports.out8(0x3EF, bytes(range(200)) * 2)  # two exits
        assert ports.in8(0x3EF, 300) == bytes([199]) * 300
        assert ports.in8(0x3EF, 0) == b""
        calls: list[Callable[[], object]] = [
            lambda: ports.in8(0x80),
            lambda: ports.in8(0x80, 4),
            lambda: ports.out8(0x80, b"x"),
            lambda: ports.out8(0x80, b"xy"),
            lambda: ports.in32(0x3E8),
            lambda: ports.out32(0x3E8, 1),
        ]
        for call in calls:
            with pytest.raises(BackendError) as refused:
                call()
            assert refused.value.code == "platform-host-refused"
        with pytest.raises(FormatError) as impossible:
            ports.in8(1 << 16)
        assert impossible.value.code == "ghcb-io"


def test_the_hypervisor_has_no_ports_of_its_own() -> None:
    with running_machine() as machine, pytest.raises(BackendError) as refused:
        open_channel(machine.platform, _COM3)
    assert refused.value.code == "platform-host-refused"


def test_an_nvme_controllers_registers_are_put_into_the_window_and_looked_for_there() -> None:
    with running_machine(host=WithPorts) as machine:
        with pytest.raises(BackendError) as refused:
            open_disk(machine.platform, _PCI)
        assert (refused.value.code, refused.value.details["gpa"]) == ("platform-host-refused", _PCI.window_gpa)


def test_a_serial_port_is_no_disk() -> None:
    with running_machine() as machine, pytest.raises(ProtocolError) as refused:
        open_disk(machine.platform, _COM3)
    assert refused.value.code == "device-kind"


class OtherVirtio(Hypervisor):
    """A virtio-mmio window whose device is of a kind that carries no key: an entropy source."""

    def _exit(self, message: Message) -> Message | None:
        code, address, _, _, _, scratch = message.arguments
        if code != ghcb.ExitCode.MMIO_READ:
            return super()._exit(message)
        value = {0: 0x7472_6976, 4: 2, 8: 4}.get(address - _VIRTIO.gpa, 0)
        os.pwrite(self._shared_fd, value.to_bytes(4, "little"), scratch)
        return message.answer()


@pytest.mark.parametrize("device", [_PCI, _VIRTIO])
def test_no_such_channel(device: BootDevice) -> None:
    with running_machine(host=OtherVirtio) as machine:
        with pytest.raises(ProtocolError) as refused:
            open_channel(machine.platform, device)
        assert refused.value.code == "device-kind"


def test_a_virtio_window_with_another_device_is_no_disk() -> None:
    with running_machine(host=OtherVirtio) as machine, pytest.raises(ProtocolError) as refused:
        open_disk(machine.platform, dataclasses.replace(_VIRTIO))
    assert refused.value.code.startswith("virtio-")


class Slow(WithPorts):
    """Answers everything, each time a little late."""

    def _exit(self, message: Message) -> Message | None:
        if message.arguments[0] in (ghcb.ExitCode.IOIO, ghcb.ExitCode.MMIO_READ, ghcb.ExitCode.MMIO_WRITE):
            time.sleep(0.05)
        return super()._exit(message)


@pytest.mark.parametrize("opened", [lambda platform: open_disk(platform, _PCI), lambda p: open_channel(p, _COM3)])
def test_a_host_that_is_slow_in_everything_does_not_keep_the_kernel(
    monkeypatch: pytest.MonkeyPatch, opened: Callable[[Platform], object]
) -> None:
    monkeypatch.setattr(devices, "SETUP_SECONDS", 0.3)
    with running_machine(host=Slow) as machine:
        begun = time.monotonic()
        with pytest.raises(BackendError) as late:
            opened(machine.platform)
        assert late.value.code == "platform-host-deadline"
        assert time.monotonic() - begun < 4


class Stalling(WithPorts):
    """Takes its time, once the test says so."""

    delay: ClassVar[float] = 0.0

    def _exit(self, message: Message) -> Message | None:
        time.sleep(self.delay)
        return super()._exit(message)


def test_a_channels_call_ends_in_time_however_slow_each_access_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_LATE_SECONDS", 0.1)
    with running_machine(host=Stalling) as machine:
        channel = open_channel(machine.platform, _COM3)
        channel.send(bytes(16), deadline=time.monotonic() + 30)
        monkeypatch.setattr(Stalling, "delay", 0.3)
        with pytest.raises(BackendError) as late:  # the status, what interrupts, and the byte itself: three accesses
            channel.receive(16, deadline=time.monotonic() + 0.4)
        assert late.value.code == "platform-host-deadline"
        monkeypatch.setattr(Stalling, "delay", 0.0)
        assert channel.receive(1, deadline=time.monotonic() + 30) == b"\0"
        channel.close()


# ---- the kernel itself ----------------------------------------------------------------------------------------------


class Watched(Hypervisor):
    """Notes every access to a device."""

    accesses: ClassVar[list[int]] = []

    def _exit(self, message: Message) -> Message | None:
        if message.arguments[0] in (ghcb.ExitCode.IOIO, ghcb.ExitCode.MMIO_READ, ghcb.ExitCode.MMIO_WRITE):
            self.accesses.append(message.arguments[1])
        return super()._exit(message)


@pytest.mark.parametrize(
    ("tree", "code"),
    [
        (b"", "fdt-header"),
        (area(_VIRTIO, disk=_VIRTIO)[:100], "fdt-name"),
        (area(VirtioMmio(0x0800_0000), disk=VirtioMmio(0x0800_0000)), "device-place"),  # the payload
        (area(VirtioMmio(0x4000_0000), disk=VirtioMmio(0x4000_0000)), "device-place"),  # the guest
        (area(_VIRTIO, _PCI, VirtioMmio(0xE000_0000), disk=_VIRTIO), "device-overlap"),
        (area(_COM3, disk=_COM3, key_channel=_COM3), "device-chosen-twice"),
        (area(_PCI, key_channel=_PCI), "device-kind"),
    ],
    ids=["nothing", "half", "payload", "guest", "overlap", "twice", "kind"],
)
def test_a_kernel_whose_loader_lies_stops_before_it_touches_a_device(tree: bytes, code: str) -> None:
    Watched.accesses.clear()
    settings = Settings(b"a broker's key").pack()
    image = build_image(loader=b"#", archive=b"archive", settings=settings)
    with running_machine(image, device_tree=tree, host=Watched) as machine:
        kernel = Kernel(machine.platform, Console(None), archive=-1)
        at = {name: Gpa(machine.start.registers[name]) for name in ("rsi", "rdi", "r9")}
        with pytest.raises(SvsmError) as refused:
            kernel.boot(settings_gpa=at["rsi"], configuration_gpa=at["rdi"], device_tree_gpa=at["r9"])
        assert refused.value.code == code
    assert not Watched.accesses
