# SPDX-License-Identifier: MIT OR Apache-2.0
"""The device process with the key's device beside the disk, over its register channel; and the 16550's model."""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from svsm.formats.virtio import MMIO_MAGIC, MMIO_WINDOW_BYTES, DeviceType, RegisterMessage, RegisterOperation
from svsm.host.devices.key_channel import COM3_PORTS, KEY_PORT, KeyChannel, KeyDevice
from svsm.host.devices.uart16550 import UartModel
from svsm.host.devices.virtio_process import serve
from svsm.kernel.channels.uart16550 import COM3
from svsm.kernel.channels.virtio_console import ConsoleChannel
from svsm.kernel.channels.virtio_line import LinePolicy, line_memory_bytes
from svsm.kernel.channels.vsock import DEFAULT_PORT, VsockChannel
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.virtio.mmio import MmioTransport
from svsm.storage.drivers.virtio.socket_registers import SocketRegisters
from svsm.testing.channel_harness import FarEnd

_GPA = 0x3010_0000
_DATA, _IER, _IIR, _LCR, _LSR = 0, 1, 2, 3, 5


class Shifted(SocketRegisters):
    """The window behind the disk's."""

    def read32(self, offset: int) -> int:
        """As there."""
        return super().read32(offset + MMIO_WINDOW_BYTES)

    def write32(self, offset: int, value: int) -> None:
        """As there."""
        super().write32(offset + MMIO_WINDOW_BYTES, value)


@contextlib.contextmanager
def device(kind: KeyChannel) -> Iterator[tuple[socket.socket, socket.socket, DmaMemory]]:
    """The device in a thread: its register channel, the proxy's end, the memory."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    proxy, behind = socket.socketpair()
    disk = os.memfd_create("disk")
    os.ftruncate(disk, 1 << 20)
    memory = mmap.mmap(-1, line_memory_bytes(LinePolicy()))
    thread = threading.Thread(
        target=serve,
        args=(theirs, memory),
        kwargs={"address": _GPA, "disk": disk, "key": functools.partial(KeyDevice, kind, behind)},
        daemon=True,
    )
    thread.start()
    try:
        yield ours, proxy, DmaMemory(memoryview(memory), address=_GPA)
    finally:
        ours.close()
        thread.join(20)
        assert not thread.is_alive()
        for closed in (theirs, proxy, behind):
            closed.close()
        os.close(disk)


@pytest.mark.parametrize("kind", [KeyChannel.VIRTIO_CONSOLE, KeyChannel.VSOCK])
def test_a_virtio_channel_in_the_window_behind_the_disks(kind: KeyChannel) -> None:
    with device(kind) as (registers, proxy, memory):
        transport = MmioTransport(Shifted(registers.dup()))
        channel: ConsoleChannel | VsockChannel
        if kind is KeyChannel.VSOCK:
            assert transport.device_type == DeviceType.VSOCK
            channel = VsockChannel(transport, memory)
        else:
            assert transport.device_type == DeviceType.CONSOLE
            channel = ConsoleChannel(transport, memory)
        deadline = time.monotonic() + 20
        data = os.urandom(100_000)
        sender = threading.Thread(target=proxy.sendall, args=(data,))
        sender.start()
        got = b""
        while len(got) < len(data):
            got += channel.receive(len(data), deadline=deadline)
        sender.join()
        assert got == data
        channel.send(b"an answer", deadline=deadline)
        proxy.settimeout(20)
        assert proxy.recv(100) == b"an answer"
        channel.close()


def _message(operation: RegisterOperation, offset: int, value: int = 0) -> bytes:
    return RegisterMessage(operation, 1, offset, value).pack()


def test_the_disk_is_where_it_was_and_ports_are_the_16550s() -> None:
    with device(KeyChannel.UART16550) as (registers, proxy, _):
        registers.settimeout(20)

        def read(operation: RegisterOperation, offset: int) -> int:
            registers.send(_message(operation, offset))
            while True:
                answer = RegisterMessage.parse(registers.recv(64))
                if answer.operation == operation:
                    return answer.value

        assert read(RegisterOperation.READ, 0) == MMIO_MAGIC
        assert read(RegisterOperation.READ, MMIO_WINDOW_BYTES) == 0
        assert read(RegisterOperation.READ_PORT, COM3_PORTS.start + _LSR) == 0x60
        assert read(RegisterOperation.READ_PORT, COM3_PORTS.stop) == 0xFF
        registers.send(_message(RegisterOperation.WRITE_PORT, COM3_PORTS.start, 0x141))
        assert read(RegisterOperation.READ_PORT, COM3_PORTS.start + _LSR) == 0x60
        proxy.settimeout(20)
        assert proxy.recv(10) == b"A"
        registers.send(b"no message")
        registers.send(_message(RegisterOperation.WRITE, MMIO_WINDOW_BYTES, 1))
        assert read(RegisterOperation.READ, 0) == MMIO_MAGIC


def test_both_sides_mean_the_same_ports() -> None:
    assert COM3_PORTS.start == COM3[0]
    assert KEY_PORT == DEFAULT_PORT


# ---- the 16550's model ----------------------------------------------------------------------------------------------


class Peer:
    """Takes only `room` bytes."""

    def __init__(self) -> None:
        self.room = 1 << 20
        self.taken = b""
        self.waiting = b""

    def read(self, most: int) -> bytes | None:
        """What waits."""
        data, self.waiting = self.waiting[:most], self.waiting[most:]
        return data or None

    def write(self, data: bytes) -> int:
        """Some of it."""
        taken = data[: self.room]
        self.taken += taken
        self.room -= len(taken)
        return len(taken)

    def close(self) -> None:
        """Nothing."""


def test_a_port_without_fifos_and_with() -> None:
    peer = Peer()
    port = UartModel(peer)
    peer.waiting = bytes(range(40))
    assert port.read(_LSR) & 1
    assert [port.read(_DATA), port.read(_DATA)] == [0, 0]
    port.write(_IIR, 0xC7)
    assert port.read(_IIR) & 0xC0 == 0xC0
    port.write(_IER, 1)
    assert port.read(_LSR) & 1
    assert port.read(_IIR) & 0x0F == 0x04, "the trigger level is reached"
    assert [port.read(_DATA) for _ in range(14)] == list(range(1, 15))


def test_what_the_peer_does_not_take_stays_in_the_port() -> None:
    peer = Peer()
    peer.room = 5
    port = UartModel(peer)
    port.write(_IIR, 0xC7)
    for value in range(20):
        port.write(_DATA, value)
    assert port.read(_LSR) == 0, "not empty"
    assert peer.taken == bytes(range(5))
    peer.room = 100
    assert port.read(_LSR) == 0x60
    assert peer.taken == bytes(range(16)), "a full FIFO drops"


def test_the_interrupt_is_raised_once_for_each_reason() -> None:
    raised = []
    peer = Peer()
    port = UartModel(peer, interrupt=lambda: raised.append(1))
    port.write(_IIR, 0xC7)
    peer.waiting = b"a"
    port.service()
    assert not raised, "nobody asked for it"
    port.write(_IER, 1)
    port.service()
    port.service()
    assert len(raised) == 1
    assert port.read(_DATA) == ord("a")
    port.service()
    peer.waiting = b"b"
    port.service()
    assert len(raised) == 2


def test_the_divisor_is_apart() -> None:
    port = UartModel(FarEnd(lambda body: body))
    port.write(_LCR, 0x83)
    port.write(_DATA, 12)
    port.write(_IER, 1)
    assert [port.read(_DATA), port.read(_IER)] == [12, 1]
    port.write(_LCR, 0x03)
    assert [port.read(_DATA), port.read(_IER)] == [0, 0]
    assert port.read(6) == 0xB0
    assert port.read(9) == 0xFF
