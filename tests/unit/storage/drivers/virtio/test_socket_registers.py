# SPDX-License-Identifier: MIT OR Apache-2.0
"""A device in another process, and everything that it can say on the socket."""

from __future__ import annotations

import mmap
import os
import signal
import socket
from collections.abc import Callable

import pytest

from svsm.formats.errors import BackendError, SvsmError
from svsm.formats.virtio import RegisterMessage, RegisterOperation
from svsm.host.devices.virtio_process import fork
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.virtio.blk import BlkPolicy, VirtioBlk, memory_bytes
from svsm.storage.drivers.virtio.mmio import MmioTransport
from svsm.storage.drivers.virtio.socket_registers import SocketRegisters
from svsm.testing.virtio_harness import GPA, disk_file

_POLICY = BlkPolicy(queue_size=16, large_bytes=65536, large_slots=2, deadline_seconds=10.0)


def _start(disk: int, memory: mmap.mmap) -> tuple[int, MmioTransport]:
    pid, connection = fork(memory, address=GPA, disk=disk)
    return pid, MmioTransport(SocketRegisters(connection, deadline_seconds=10.0))


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_disk_in_another_process_killed_and_started_again() -> None:
    content = os.urandom(1 << 20)
    disk = disk_file(1 << 20, content)
    memory = mmap.mmap(-1, memory_bytes(_POLICY))
    pid, transport = _start(disk, memory)
    driver = VirtioBlk(transport, DmaMemory(memoryview(memory), address=GPA), policy=_POLICY)
    assert driver.read([(0, 1 << 20)]) == [content]
    driver.write([(4096, content[:8192])])
    driver.flush()
    driver.write([(0, content[8192:16384])])
    _end(pid)
    with pytest.raises(BackendError) as caught:
        driver.read([(0, 4096)])
    assert caught.value.details["violation"] == "virtio-registers"
    pid, transport = _start(disk, memory)
    driver.reconnect(transport)
    assert driver.read([(8192, 4096)]) == [content[4096:8192]]
    with pytest.raises(BackendError):
        driver.flush()
    driver.flush()
    driver.close()
    os.waitpid(pid, 0)  # hung up on: it ends by itself
    os.close(disk)


def _answer(sequence: int = 1, offset: int = 4, operation: int = RegisterOperation.READ) -> bytes:
    return RegisterMessage(operation, sequence, offset, 7).pack()


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ([_answer()], 7),
        ([_answer(operation=RegisterOperation.INTERRUPT)] * 3 + [_answer()], 7),
        ([_answer(sequence=2)], None),
        ([_answer(offset=8)], None),
        ([_answer(operation=RegisterOperation.WRITE)], None),
        ([_answer(operation=99)], None),
        ([_answer()[:-1]], None),
        ([_answer() + b"x"], None),
        ([], None),
    ],
)
def test_answers(said: list[bytes], value: int | None) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    registers = SocketRegisters(ours, deadline_seconds=0.05)
    for message in said:
        theirs.send(message)
    if value is not None:
        assert registers.read32(4) == value
    else:
        calls: list[Callable[[], object]] = [
            lambda: registers.read32(4),
            lambda: registers.read32(4),
            lambda: registers.wait_interrupt(0.01),
            lambda: registers.write32(0, 0),
        ]
        for call in calls:
            with pytest.raises(SvsmError) as caught:
                call()
            assert caught.value.code == "virtio-registers"
    registers.close()
    theirs.close()


def test_interrupts_are_kept_and_forgotten() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    registers = SocketRegisters(ours, deadline_seconds=1.0)
    assert not registers.wait_interrupt(0.0)
    theirs.send(_answer(operation=RegisterOperation.INTERRUPT))
    theirs.send(_answer())
    assert registers.read32(4) == 7
    assert registers.wait_interrupt(0.0)
    assert not registers.wait_interrupt(0.001)
    theirs.send(_answer())
    with pytest.raises(SvsmError):
        registers.wait_interrupt(1.0)
    registers.close()
    theirs.close()


def test_a_peer_that_hangs_up() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    registers = SocketRegisters(ours, deadline_seconds=1.0)
    theirs.close()
    with pytest.raises(SvsmError) as caught:
        registers.wait_interrupt(1.0)
    assert caught.value.code == "virtio-registers"
    registers.close()
