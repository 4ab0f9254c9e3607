# SPDX-License-Identifier: MIT OR Apache-2.0
"""The relay of registers and ports to QEMU: which commands leave, which answers come back, and when it is over."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.formats.snp import ghcb
from svsm.formats.snp.hardware_messages import Message
from svsm.host.qtest_relay import QtestRelay

WINDOW = range(0xFEB0_0000, 0xFEB1_0000)
COM3 = range(0x3E8, 0x3F0)
SCRATCH = 0x4000
LINE = 23


class Bench:
    """A relay, and a test in QEMU's place."""

    def __init__(self) -> None:
        ours, self.qemu = socket.socketpair()
        self.qemu.settimeout(5)
        self.shared = os.memfd_create("shared")
        os.ftruncate(self.shared, 1 << 20)
        self.relay = QtestRelay(ours, self.shared, windows=[WINDOW], ports=[COM3], lines=[LINE])
        assert self.heard() == ["irq_intercept_in ioapic"]
        self.say("OK")
        assert self.relay.receive() == ([], False)

    def close(self) -> None:
        self.relay.close()
        self.qemu.close()
        os.close(self.shared)

    def heard(self) -> list[str]:
        return self.qemu.recv(1 << 16).decode().splitlines()

    def say(self, *lines: str) -> None:
        self.qemu.sendall("".join(f"{line}\n" for line in lines).encode())

    def access(self, code: int, info_1: int, info_2: int, rax: int = 0, scratch: int = SCRATCH) -> Message | None:
        packed = Message(ghcb.HostMessage.EXIT, (code, info_1, info_2, rax, 0, scratch), identifier=7).pack()
        return self.relay.access(Message.parse(packed))

    def port(self, port: int, *, width: int = 1, reading: bool, count: int = 0, rax: int = 0) -> Message | None:
        word = ghcb.IoAccess(port, width, reading, count > 0).pack()
        return self.access(ghcb.ExitCode.IOIO, word, count, rax)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def failed(answer: Message | None) -> bool:
    return answer is not None and answer.arguments[1:2] not in ((), (0,))


def test_a_register_is_read(bench: Bench) -> None:
    assert bench.access(ghcb.ExitCode.MMIO_READ, WINDOW.start + 0xE00, 4) is None
    assert bench.heard() == ["readl 0xfeb00e00"]
    bench.say("OK 0x0000000074726976")
    (answer,), interrupted = bench.relay.receive()
    assert not failed(answer)
    assert answer.identifier == 7
    assert not interrupted
    assert os.pread(bench.shared, 4, SCRATCH) == b"virt"


def test_a_write_is_answered_at_once_and_leaves_in_order(bench: Bench) -> None:
    os.pwrite(bench.shared, (0xDEADBEEF).to_bytes(4, "little"), SCRATCH)
    answer = bench.access(ghcb.ExitCode.MMIO_WRITE, WINDOW.start + 0x50, 4)
    assert answer is not None
    assert not failed(answer)
    assert bench.access(ghcb.ExitCode.MMIO_READ, WINDOW.start + 0x70, 4) is None
    assert bench.heard() == ["writel 0xfeb00050 0xdeadbeef", "readl 0xfeb00070"]
    bench.say("OK", "OK 0x0b")
    assert len(bench.relay.receive()[0]) == 1


def test_ports_are_read_and_written_one_by_one_and_as_strings(bench: Bench) -> None:
    assert not failed(bench.port(0x3EF, reading=False, rax=0x1A5))
    assert bench.port(0x3ED, reading=True) is None
    assert bench.heard() == ["outb 0x3ef 0xa5", "inb 0x3ed"]
    bench.say("OK", "OK 0x0060")
    (answer,), _ = bench.relay.receive()
    assert answer.arguments[ghcb.ANSWER_RAX] == 0x60
    os.pwrite(bench.shared, b"key", SCRATCH)
    assert not failed(bench.port(0x3E8, reading=False, count=3))
    assert bench.port(0x3E8, reading=True, count=2) is None
    assert bench.heard() == ["outb 0x3e8 0x6b", "outb 0x3e8 0x65", "outb 0x3e8 0x79", "inb 0x3e8", "inb 0x3e8"]
    bench.say("OK", "OK", "OK", "OK 0x4f")
    assert bench.relay.receive()[0] == [], "a string is answered as a whole"
    bench.say("OK 0x4b")
    (answer,), _ = bench.relay.receive()
    assert not failed(answer)
    assert os.pread(bench.shared, 2, SCRATCH) == b"OK"


@pytest.mark.parametrize(
    ("code", "info_1", "info_2"),
    [
        (ghcb.ExitCode.MMIO_READ, WINDOW.stop - 2, 4),
        (ghcb.ExitCode.MMIO_READ, WINDOW.start - 4, 4),
        (ghcb.ExitCode.MMIO_READ, 0x3010_0000, 4),
        (ghcb.ExitCode.MMIO_READ, WINDOW.start, 8),
        (ghcb.ExitCode.MMIO_WRITE, (1 << 64) - 4, 4),
        (ghcb.ExitCode.IOIO, ghcb.IoAccess(0x3E7, 1, True, False).pack(), 0),
        (ghcb.ExitCode.IOIO, ghcb.IoAccess(0x3EF, 2, True, False).pack(), 0),
        (ghcb.ExitCode.IOIO, ghcb.IoAccess(0x3E8, 1, True, True).pack(), 0),
        (ghcb.ExitCode.IOIO, ghcb.IoAccess(0x3E8, 1, True, True).pack(), ghcb.MAX_IO_COUNT + 1),
        (ghcb.ExitCode.IOIO, (1 << 64) - 1, 1),
    ],
)
def test_what_the_machine_does_not_have_never_reaches_qemu(bench: Bench, code: int, info_1: int, info_2: int) -> None:
    assert failed(bench.access(code, info_1, info_2))
    assert bench.access(ghcb.ExitCode.MMIO_READ, WINDOW.start, 4) is None
    assert bench.heard() == ["readl 0xfeb00000"]


def test_values_that_lie_nowhere_fail_the_exit(bench: Bench) -> None:
    assert failed(bench.access(ghcb.ExitCode.MMIO_WRITE, WINDOW.start, 4, scratch=(1 << 64) - 1))
    assert bench.access(ghcb.ExitCode.MMIO_READ, WINDOW.start, 4, scratch=(1 << 64) - 1) is None
    bench.say("OK 0x1")
    (answer,), _ = bench.relay.receive()
    assert failed(answer)


def test_a_line_that_goes_up_is_an_interrupt_and_one_that_stays_up_is_one_after_each_write(bench: Bench) -> None:
    bench.say(f"IRQ raise {LINE + 1}")
    assert bench.relay.receive() == ([], False), "a device that is not ours"
    bench.say(f"IRQ raise {LINE}")
    assert bench.relay.receive() == ([], True)
    assert bench.relay.receive() == ([], False)
    bench.access(ghcb.ExitCode.MMIO_WRITE, WINDOW.start, 4)
    bench.say("OK")
    assert bench.relay.receive() == ([], True)
    bench.access(ghcb.ExitCode.MMIO_READ, WINDOW.start, 4)
    bench.say("OK 0x1")
    assert not bench.relay.receive()[1], "a read changes nothing"
    bench.access(ghcb.ExitCode.MMIO_WRITE, WINDOW.start, 4)
    bench.say(f"IRQ lower {LINE}", "OK")
    assert bench.relay.receive() == ([], False)


def test_a_refused_read_fails_its_exit_alone(bench: Bench) -> None:
    bench.access(ghcb.ExitCode.MMIO_READ, WINDOW.start, 4)
    bench.access(ghcb.ExitCode.MMIO_READ, WINDOW.start + 4, 4)
    bench.say("FAIL Unknown command", "OK 0x2")
    first, second = bench.relay.receive()[0]
    assert failed(first)
    assert not failed(second)


@pytest.mark.parametrize("nonsense", ["", "OK\nOK\nOK\n", "what?\n", "OK 0xzz\n", "OK 12 13\n"])
def test_after_nonsense_or_its_end_everything_fails(bench: Bench, nonsense: str) -> None:
    assert bench.access(ghcb.ExitCode.MMIO_READ, WINDOW.start, 4) is None
    bench.qemu.sendall(nonsense.encode())
    if not nonsense:
        bench.qemu.shutdown(socket.SHUT_RDWR)
    (answer,), interrupted = bench.relay.receive()
    assert failed(answer)
    assert not interrupted
    assert bench.relay.closed
    assert failed(bench.access(ghcb.ExitCode.MMIO_READ, WINDOW.start, 4))
    assert failed(bench.port(0x3E8, reading=False, rax=1))


def test_a_qemu_that_does_not_read_is_given_up_and_nobody_waits_for_it(bench: Bench) -> None:
    for _ in range(100_000):
        if failed(bench.port(0x3E8, reading=False, count=256)):
            break
    assert bench.relay.closed


@given(st.binary(max_size=64))
def test_any_bytes_are_taken_or_end_it(data: bytes) -> None:
    made = Bench()
    try:
        made.access(ghcb.ExitCode.MMIO_READ, WINDOW.start, 4)
        made.qemu.sendall(data)
        answers, _ = made.relay.receive()
        assert len(answers) <= 1
    finally:
        made.close()
