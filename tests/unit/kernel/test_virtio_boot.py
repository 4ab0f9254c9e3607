# SPDX-License-Identifier: MIT OR Apache-2.0
"""The boot's disk as the kernel reaches it: MMIO exits, shared memory, a device behind the host; and hosts that lie."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from svsm.abi.errors import BackendError, ProtocolError, StateError, SvsmError
from svsm.abi.platform import DeviceKind, Gpa
from svsm.formats.boot_devices import BootDevices, VirtioMmio
from svsm.formats.snp import ghcb
from svsm.formats.snp.hardware_messages import Message
from svsm.formats.virtio import MMIO_MAGIC, MMIO_WINDOW_BYTES, MmioRegister
from svsm.host.attachment import DeviceRelay
from svsm.host.devices.virtio_blk import BlkOptions
from svsm.host.devices.virtio_process import serve
from svsm.host.hypervisor import Hypervisor
from svsm.host.mmio_relay import MmioRelay
from svsm.kernel.devices import open_disk, read_devices
from svsm.kernel.resettable import ResettableDisk
from svsm.kernel.simulated_platform import DEVICE_TREE_BYTES
from svsm.launch.build import build_image
from svsm.storage.drivers.virtio.blk import VirtioBlk
from svsm.storage.volume import Volume
from svsm.testing.machine_harness import RunningMachine, running_machine

DISK_BYTES = 1 << 20
DISK = VirtioMmio(ghcb.VIRTIO_MMIO_GPA)
TREE = BootDevices((DISK,), disk=DISK).tree().pack()


@contextlib.contextmanager
def machine_with_disk(
    folder: Path, *, host: type[Hypervisor] = Hypervisor, host_seconds: float = 5.0, options: BlkOptions | None = None
) -> Iterator[tuple[RunningMachine, socket.socket]]:
    """A machine whose device tree names its disk, and the device's end of the register channel."""
    image = build_image(loader=b"#", archive=b"archive", settings=b"")
    running = running_machine(image, device_tree=TREE, host=host, host_seconds=host_seconds)
    with running as machine, contextlib.ExitStack() as stack:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        descriptor = os.open(folder / "disk", os.O_RDWR | os.O_CREAT, 0o600)
        stack.callback(os.close, descriptor)
        os.ftruncate(descriptor, DISK_BYTES)
        shared = machine.hypervisor._shared_fd
        memory = mmap.mmap(shared, ghcb.DEVICE_MEMORY_BYTES, offset=ghcb.DEVICE_MEMORY_GPA)

        def device() -> None:
            serve(theirs, memory, address=ghcb.DEVICE_MEMORY_GPA, disk=descriptor, options=options)

        thread = threading.Thread(target=device, daemon=True)
        thread.start()

        def attach(hypervisor: Hypervisor) -> None:
            hypervisor._mmio = MmioRelay(ours, shared)

        try:
            machine.as_host(attach)
            yield machine, theirs
        finally:
            with contextlib.suppress(OSError):
                theirs.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            theirs.close()


def disk_of(machine: RunningMachine) -> ResettableDisk:
    """As the kernel does it: from the area that the loader has filled."""
    area = machine.platform.read(Gpa(machine.start.registers["r9"]), DEVICE_TREE_BYTES)
    devices = read_devices(area)
    assert devices.disk is not None
    return open_disk(machine.platform, devices.disk)


def test_a_volume_on_the_disk_that_the_device_tree_names(tmp_path: Path) -> None:
    with machine_with_disk(tmp_path) as (machine, _):
        disk = disk_of(machine)
        assert isinstance(disk.driver, VirtioBlk)
        assert (disk.size_bytes, disk.block_size_bytes) == (DISK_BYTES, 512)
        volume = Volume.create(disk, b"key", salt=bytes(16))
        with volume.transaction() as transaction:
            transaction.write(16, b"state")
        again = Volume.open(disk, b"key")
        assert again.read(16) == b"state"
        disk.close()
    assert (tmp_path / "disk").read_bytes().startswith(b"COCOONFS")


def test_the_disk_and_everything_else_of_the_host_go_on_together(tmp_path: Path) -> None:
    """Devices, interrupts and a report come between register accesses, and none is lost."""
    with machine_with_disk(tmp_path) as (machine, _):
        disk = disk_of(machine)
        read, write = os.pipe()
        os.close(write)
        message = Message(ghcb.HostMessage.DEVICE, (ghcb.DeviceKind.CLIENT, 1, 1)).pack()
        machine.as_host(lambda host: socket.send_fds(host._kernel, [message], [read]))  # type: ignore[arg-type]
        os.close(read)
        machine.as_host(lambda host: host.interrupt())
        for number in range(8):
            disk.write([(number * 512, bytes([number]) * 512)])
            disk.flush()
        assert machine.platform.report(bytes(64)).report
        assert [data[0] for data in disk.read([(number * 512, 512) for number in range(8)])] == list(range(8))
        assert machine.platform.take_interrupt()
        client = machine.platform.next_device()
        assert client is not None
        assert client.kind is DeviceKind.CLIENT
        client.close()


_END = ghcb.MMIO_GPA + ghcb.MMIO_BYTES


@pytest.mark.parametrize(
    ("gpa", "size_bytes"),
    [
        (0, 0x200),
        (0x3000_0000, 0x200),
        (ghcb.DEVICE_MEMORY_GPA, 0x200),
        (ghcb.MMIO_GPA - 0x200, 0x200),
        (ghcb.MMIO_GPA - 0x200, 0x400),
        (ghcb.MMIO_GPA + 4, 0x200),
        (_END, 0x200),
        (_END - 0x200, 0x400),
        (ghcb.MMIO_GPA, ghcb.MMIO_BYTES + 0x200),
        (ghcb.MMIO_GPA, 0),
        ((1 << 64) - 0x200, 0x200),
    ],
)
def test_registers_where_none_may_be_are_refused(gpa: int, size_bytes: int) -> None:
    with running_machine() as machine:
        with pytest.raises(ProtocolError) as refused:
            machine.platform.registers(Gpa(gpa), size_bytes)
        assert refused.value.code == "platform-mmio"


@pytest.mark.parametrize("offset", [-4, 2, 0x1FE, 0x200, 0x1000])
def test_no_access_leaves_its_window(offset: int) -> None:
    with running_machine() as machine:
        registers = machine.platform.registers(Gpa(ghcb.VIRTIO_MMIO_GPA), MMIO_WINDOW_BYTES)
        for access in (lambda: registers.read32(offset), lambda: registers.write32(offset, 0)):
            with pytest.raises(StateError) as refused:
                access()
            assert refused.value.code == "platform-register"


def test_a_disk_without_a_descriptor_is_no_message() -> None:
    with running_machine() as machine:
        for kind in (ghcb.DeviceKind.DISK, 4):  # 4 was a register window once
            message = Message(ghcb.HostMessage.DEVICE, (kind, 0, 0, ghcb.VIRTIO_MMIO_GPA)).pack()
            machine.as_host(lambda host, message=message: host._queue(message, None))  # type: ignore[misc]
        assert machine.platform.next_device() is None


def test_a_host_without_the_device_that_its_loader_named() -> None:
    with running_machine() as machine, pytest.raises(BackendError) as failed:
        machine.platform.registers(Gpa(ghcb.VIRTIO_MMIO_GPA), MMIO_WINDOW_BYTES).read32(MmioRegister.MAGIC)
    assert failed.value.code == "platform-host-refused"


class Silent(Hypervisor):
    """Never answers an access."""

    def _exit(self, message: Message) -> Message | None:
        mmio = message.arguments[0] in (ghcb.ExitCode.MMIO_READ, ghcb.ExitCode.MMIO_WRITE)
        return None if mmio else super()._exit(message)


class Lazy(Hypervisor):
    """Says that each access is done, and does nothing."""

    def _exit(self, message: Message) -> Message | None:
        mmio = message.arguments[0] in (ghcb.ExitCode.MMIO_READ, ghcb.ExitCode.MMIO_WRITE)
        return message.answer() if mmio else super()._exit(message)


class Stuck(Hypervisor):
    """Every register reads as the magic."""

    def _exit(self, message: Message) -> Message | None:
        if message.arguments[0] == ghcb.ExitCode.MMIO_READ:
            os.pwrite(self._shared_fd, MMIO_MAGIC.to_bytes(4, "little"), message.arguments[5])
            return message.answer()
        return super()._exit(message)


@pytest.mark.parametrize(
    ("host", "code"),
    [(Silent, "platform-host-deadline"), (Lazy, "virtio-magic"), (Stuck, "virtio-legacy")],
)
def test_hosts_that_do_not_pass_accesses_on(tmp_path: Path, host: type[Hypervisor], code: str) -> None:
    with machine_with_disk(tmp_path, host=host, host_seconds=0.2) as (machine, _):
        started = time.monotonic()
        with pytest.raises(SvsmError) as failed:
            disk_of(machine)
        assert failed.value.code == code
        assert time.monotonic() < started + 5


class Mute(Hypervisor):
    """Keeps the device's interrupts to itself."""

    def _serve_device(self, mmio: DeviceRelay) -> None:
        for answer in mmio.receive()[0]:
            self._queue(answer.pack(), None)


class Loud(Hypervisor):
    """A hundred interrupts for each."""

    def _serve_device(self, mmio: DeviceRelay) -> None:
        super()._serve_device(mmio)
        for _ in range(100):
            self._send_at_once(ghcb.HostMessage.DEVICE_INTERRUPT)


@pytest.mark.parametrize("host", [Mute, Loud])
def test_interrupts_are_neither_needed_nor_believed(tmp_path: Path, host: type[Hypervisor]) -> None:
    with machine_with_disk(tmp_path, host=host) as (machine, _):
        disk = disk_of(machine)
        for number in range(4):
            disk.write([(0, bytes([number]) * 512)])
            disk.flush()
            assert disk.read([(0, 512)]) == [bytes([number]) * 512]


def test_a_device_that_goes_away_is_an_error_at_once_and_for_good(tmp_path: Path) -> None:
    with machine_with_disk(tmp_path) as (machine, device):
        disk = disk_of(machine)
        disk.write([(0, b"x" * 512)])
        device.shutdown(socket.SHUT_RDWR)
        started = time.monotonic()
        for _ in range(2):
            with pytest.raises(BackendError) as failed:
                disk.flush()
            assert failed.value.code == "block-io"
        assert time.monotonic() < started + 4
        assert machine.platform.report(bytes(64)).report  # the rest of the machine goes on


def test_nothing_but_what_is_written_is_ever_in_shared_memory(tmp_path: Path) -> None:
    """The device's window holds the ciphertext that was written; a canary beside it stays where it is."""
    with machine_with_disk(tmp_path) as (machine, _):
        disk = disk_of(machine)
        canary = os.urandom(32)
        private = bytearray(canary + b"w" * 4096 + canary)
        disk.write([(0, memoryview(private)[32:-32])])
        disk.flush()
        window = os.pread(machine.hypervisor._shared_fd, ghcb.DEVICE_MEMORY_BYTES, ghcb.DEVICE_MEMORY_GPA)
        assert b"w" * 4096 in window
        assert canary not in window
