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

from svsm.abi.errors import BackendError, ProtocolError, SvsmError
from svsm.abi.platform import Device, DeviceKind, Gpa
from svsm.formats.snp import ghcb
from svsm.formats.snp.hardware_messages import Message
from svsm.formats.virtio import MMIO_MAGIC, MmioRegister
from svsm.host.devices.virtio_blk import BlkOptions
from svsm.host.devices.virtio_process import serve
from svsm.host.hypervisor import Hypervisor
from svsm.host.mmio_relay import MmioRelay
from svsm.kernel.disk import VIRTIO_POLICY, open_disk
from svsm.storage.drivers.virtio.blk import VirtioBlk, memory_bytes
from svsm.storage.volume import Volume
from svsm.testing.machine_harness import RunningMachine, running_machine

DISK_BYTES = 1 << 20


@contextlib.contextmanager
def machine_with_disk(
    folder: Path, *, host: type[Hypervisor] = Hypervisor, host_seconds: float = 5.0, options: BlkOptions | None = None
) -> Iterator[tuple[RunningMachine, Device, socket.socket]]:
    """A machine, the disk that its host has offered, and the device's end of the register channel."""
    with running_machine(host=host, host_seconds=host_seconds) as machine, contextlib.ExitStack() as stack:
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

        def offer(hypervisor: Hypervisor) -> None:
            hypervisor._mmio = MmioRelay(ours, shared)
            hypervisor.offer_mmio()

        try:
            machine.as_host(offer)
            offered = machine.platform.next_device()
            assert offered is not None
            yield machine, offered, theirs
        finally:
            with contextlib.suppress(OSError):
                theirs.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            theirs.close()


def test_the_policy_fits_the_memory_that_there_is() -> None:
    assert memory_bytes(VIRTIO_POLICY) <= ghcb.DEVICE_MEMORY_BYTES


def test_a_volume_on_the_disk_that_the_host_offers(tmp_path: Path) -> None:
    with machine_with_disk(tmp_path) as (machine, offered, _):
        assert (offered.kind, offered.descriptor, offered.gpa) == (DeviceKind.VIRTIO_MMIO, -1, ghcb.VIRTIO_MMIO_GPA)
        disk = open_disk(machine.platform, offered)
        assert isinstance(disk, VirtioBlk)
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
    with machine_with_disk(tmp_path) as (machine, offered, _):
        disk = open_disk(machine.platform, offered)
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


@pytest.mark.parametrize(
    "gpa",
    [
        0,
        0x3000_0000,
        ghcb.DEVICE_MEMORY_GPA,
        ghcb.MMIO_GPA - 0x200,
        ghcb.MMIO_GPA + 4,
        ghcb.MMIO_GPA + ghcb.MMIO_BYTES,
        ghcb.MMIO_GPA + ghcb.MMIO_BYTES - 4,
        (1 << 64) - 0x200,
    ],
)
def test_registers_where_none_may_be_are_refused(gpa: int) -> None:
    with running_machine() as machine:
        arguments = (ghcb.DeviceKind.VIRTIO_MMIO, 0, 0, gpa)
        message = Message(ghcb.HostMessage.DEVICE, arguments).pack()
        machine.as_host(lambda host: host._queue(message, None))
        offered = machine.platform.next_device()
        assert offered is not None
        with pytest.raises(ProtocolError) as refused:
            open_disk(machine.platform, offered)
        assert refused.value.code == "platform-mmio"


def test_a_register_window_with_a_descriptor_and_a_file_without_one_are_no_messages() -> None:
    with running_machine() as machine:
        registers = Message(ghcb.HostMessage.DEVICE, (ghcb.DeviceKind.VIRTIO_MMIO, 0, 0, ghcb.VIRTIO_MMIO_GPA)).pack()
        file = Message(ghcb.HostMessage.DEVICE, (ghcb.DeviceKind.DISK, 0, 0)).pack()
        read, write = os.pipe()
        machine.as_host(lambda host: host._queue(registers, read))
        machine.as_host(lambda host: host._queue(file, None))
        assert machine.platform.next_device() is None
        with pytest.raises(BrokenPipeError):
            os.write(write, b"x")  # the kernel has closed what came with it
        os.close(write)


def registers_of(machine: RunningMachine, offered: Device | None = None) -> int:
    registers = machine.platform.registers(Gpa(ghcb.VIRTIO_MMIO_GPA) if offered is None else offered.gpa)
    return registers.read32(MmioRegister.MAGIC)


def test_a_host_without_the_device_that_it_named() -> None:
    with running_machine() as machine, pytest.raises(BackendError) as failed:
        registers_of(machine)
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
    with machine_with_disk(tmp_path, host=host, host_seconds=0.2) as (machine, offered, _):
        started = time.monotonic()
        with pytest.raises(SvsmError) as failed:
            open_disk(machine.platform, offered)
        assert failed.value.code == code
        assert time.monotonic() < started + 5


class Mute(Hypervisor):
    """Keeps the device's interrupts to itself."""

    def _serve_device(self, mmio: MmioRelay) -> None:
        for answer in mmio.receive()[0]:
            self._queue(answer.pack(), None)


class Loud(Hypervisor):
    """A hundred interrupts for each."""

    def _serve_device(self, mmio: MmioRelay) -> None:
        super()._serve_device(mmio)
        for _ in range(100):
            self._send_at_once(ghcb.HostMessage.DEVICE_INTERRUPT)


@pytest.mark.parametrize("host", [Mute, Loud])
def test_interrupts_are_neither_needed_nor_believed(tmp_path: Path, host: type[Hypervisor]) -> None:
    with machine_with_disk(tmp_path, host=host) as (machine, offered, _):
        disk = open_disk(machine.platform, offered)
        for number in range(4):
            disk.write([(0, bytes([number]) * 512)])
            disk.flush()
            assert disk.read([(0, 512)]) == [bytes([number]) * 512]


def test_a_device_that_goes_away_is_an_error_at_once_and_for_good(tmp_path: Path) -> None:
    with machine_with_disk(tmp_path) as (machine, offered, device):
        disk = open_disk(machine.platform, offered)
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
    with machine_with_disk(tmp_path) as (machine, offered, _):
        disk = open_disk(machine.platform, offered)
        canary = os.urandom(32)
        private = bytearray(canary + b"w" * 4096 + canary)
        disk.write([(0, memoryview(private)[32:-32])])
        disk.flush()
        window = os.pread(machine.hypervisor._shared_fd, ghcb.DEVICE_MEMORY_BYTES, ghcb.DEVICE_MEMORY_GPA)
        assert b"w" * 4096 in window
        assert canary not in window
