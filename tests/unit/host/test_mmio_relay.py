# SPDX-License-Identifier: MIT OR Apache-2.0
"""The relay of register accesses: what a kernel may ask for, and what a device may answer."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from svsm.formats.snp import ghcb
from svsm.formats.snp.hardware_messages import Message
from svsm.formats.virtio import MMIO_WINDOW_BYTES, RegisterMessage, RegisterOperation
from svsm.host.mmio_relay import MmioRelay

BASE = ghcb.VIRTIO_MMIO_GPA
SCRATCH = 0x4000
READ, WRITE = ghcb.ExitCode.MMIO_READ, ghcb.ExitCode.MMIO_WRITE


class Pair:
    """A relay and the device's end."""

    def __init__(self, *, windows: int = 1, ports: range = range(0)) -> None:
        ours, self.device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.device.settimeout(5)
        self.shared = os.memfd_create("shared")
        os.ftruncate(self.shared, 1 << 40)
        self.relay = MmioRelay(ours, self.shared, windows=windows, ports=ports)

    def close(self) -> None:
        self.device.close()
        os.close(self.shared)
        if not self.relay.closed:
            self.relay.close()

    def take(self) -> RegisterMessage:
        return RegisterMessage.parse(self.device.recv(64))

    def word(self) -> int:
        return int.from_bytes(os.pread(self.shared, 4, SCRATCH), "little")


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def access(
    code: ghcb.ExitCode, gpa: int = BASE, *, width: int = 4, scratch: int = SCRATCH, identifier: int = 1
) -> Message:
    packed = Message(ghcb.HostMessage.EXIT, (code, gpa, width, 0, 0, scratch), identifier=identifier).pack()
    return Message.parse(packed)


def failed(answer: Message | None) -> bool:
    return answer is not None and answer.arguments[ghcb.ANSWER_INFO_2] != 0


def test_a_write_is_passed_on_and_answered_at_once(pair: Pair) -> None:
    os.pwrite(pair.shared, (0xDEADBEEF).to_bytes(4, "little"), SCRATCH)
    answer = pair.relay.access(access(WRITE, BASE + 0x50))
    assert answer is not None
    assert not failed(answer)
    message = pair.take()
    assert (message.operation, message.offset, message.value) == (RegisterOperation.WRITE, 0x50, 0xDEADBEEF)


def test_a_read_is_answered_when_the_device_has_answered(pair: Pair) -> None:
    assert pair.relay.access(access(READ, BASE + 0x70, identifier=9)) is None
    assert pair.relay.receive() == ([], False)
    pair.device.send(RegisterMessage(RegisterOperation.INTERRUPT, 0, 0, 0).pack())
    pair.device.send(pair.take().replace(value=7).pack())
    answers, interrupted = pair.relay.receive()
    assert interrupted
    assert [answer.identifier for answer in answers] == [9]
    assert pair.word() == 7


@pytest.mark.parametrize("code", [READ, WRITE])
@pytest.mark.parametrize(
    ("gpa", "width", "scratch"),
    [
        (BASE - 4, 4, SCRATCH),
        (BASE + MMIO_WINDOW_BYTES, 4, SCRATCH),
        (BASE + MMIO_WINDOW_BYTES - 2, 4, SCRATCH),
        (0, 4, SCRATCH),
        ((1 << 64) - 4, 4, SCRATCH),
        (BASE, 0, SCRATCH),
        (BASE, 8, SCRATCH),
        (BASE, 1 << 40, SCRATCH),
    ],
)
def test_other_addresses_and_widths_fail(pair: Pair, code: ghcb.ExitCode, gpa: int, width: int, scratch: int) -> None:
    assert failed(pair.relay.access(access(code, gpa, width=width, scratch=scratch)))


def test_an_impossible_scratch_address_fails(pair: Pair) -> None:
    assert failed(pair.relay.access(access(WRITE, scratch=(1 << 64) - 1)))
    assert pair.relay.access(access(READ, scratch=(1 << 64) - 1)) is None
    pair.device.send(pair.take().pack())
    ((answer,), _) = pair.relay.receive()
    assert failed(answer)


def test_what_a_device_says_unasked_is_nothing(pair: Pair) -> None:
    assert pair.relay.access(access(READ)) is None
    asked = pair.take()
    for raw in (b"x", bytes(15), asked.replace(sequence=asked.sequence + 1).pack(), bytes(17)):
        pair.device.send(raw)
    assert pair.relay.receive() == ([], False)
    pair.device.send(asked.replace(value=3).pack())
    pair.device.send(asked.replace(value=4).pack())
    answers, _ = pair.relay.receive()
    assert len(answers) == 1
    assert pair.word() == 3


def test_a_device_that_hangs_up_fails_what_waits_and_all_that_comes(pair: Pair) -> None:
    assert pair.relay.access(access(READ, identifier=5)) is None
    pair.device.close()
    answers, _ = pair.relay.receive()
    assert [(answer.identifier, failed(answer)) for answer in answers] == [(5, True)]
    assert pair.relay.closed
    assert failed(pair.relay.access(access(READ)))
    assert failed(pair.relay.access(access(WRITE)))


def test_a_device_that_reads_nothing_stops_nobody(pair: Pair) -> None:
    answers = [pair.relay.access(access(WRITE)) for _ in range(5000)]
    assert not failed(answers[0])
    assert failed(answers[-1])


# ---- I/O ports, and a second window ---------------------------------------------------------------------------------

PORTS = range(0x3E8, 0x3F0)


@pytest.fixture
def wide() -> Iterator[Pair]:
    made = Pair(windows=2, ports=PORTS)
    yield made
    made.close()


def port_access(
    port: int, *, reading: bool, count: int = 0, rax: int = 0, width: int = 1, string: bool = False, identifier: int = 1
) -> Message:
    word = ghcb.IoAccess(port, width, reading=reading, string=string).pack()
    arguments = (ghcb.ExitCode.IOIO, word, count, rax, 0, SCRATCH)
    return Message.parse(Message(ghcb.HostMessage.EXIT, arguments, identifier=identifier).pack())


def test_the_second_window_is_behind_the_first(wide: Pair) -> None:
    assert wide.relay.access(access(READ, BASE + MMIO_WINDOW_BYTES + 0x70)) is None
    assert wide.take().offset == MMIO_WINDOW_BYTES + 0x70
    assert failed(wide.relay.access(access(READ, BASE + 2 * MMIO_WINDOW_BYTES)))
    assert failed(wide.relay.access(access(READ, BASE + 2 * MMIO_WINDOW_BYTES - 2)))


def test_one_byte_of_a_port_goes_by_a_register(wide: Pair) -> None:
    answer = wide.relay.access(port_access(0x3EF, reading=False, rax=0x1A5))
    assert answer is not None
    assert not failed(answer)
    message = wide.take()
    assert (message.operation, message.offset, message.value) == (RegisterOperation.WRITE_PORT, 0x3EF, 0xA5)
    assert wide.relay.access(port_access(0x3ED, reading=True, identifier=5)) is None
    asked = wide.take()
    assert (asked.operation, asked.offset) == (RegisterOperation.READ_PORT, 0x3ED)
    wide.device.send(asked.replace(value=0xFFFF_FF61).pack())
    (answer,), _ = wide.relay.receive()
    assert (answer.identifier, answer.arguments[ghcb.ANSWER_RAX]) == (5, 0x61), "a byte, whatever the device says"


def test_a_string_of_bytes_is_answered_when_it_is_whole(wide: Pair) -> None:
    os.pwrite(wide.shared, b"hello", SCRATCH)
    assert not failed(wide.relay.access(port_access(0x3E8, reading=False, string=True, count=5)))
    assert bytes(wide.take().value for _ in range(5)) == b"hello"
    assert wide.relay.access(port_access(0x3E8, reading=True, string=True, count=3, identifier=6)) is None
    questions = [wide.take() for _ in range(3)]
    for question, value in zip(questions[:2], b"xy", strict=True):
        wide.device.send(question.replace(value=value).pack())
    assert wide.relay.receive() == ([], False)
    wide.device.send(questions[2].replace(value=ord("z")).pack())
    (answer,), _ = wide.relay.receive()
    assert answer.identifier == 6
    assert os.pread(wide.shared, 3, SCRATCH) == b"xyz"


@pytest.mark.parametrize("change", [{"port": 0x3F0}, {"port": 0x3E7}, {"width": 2}, {"string": True, "count": 0}])
def test_ports_that_are_not_there(wide: Pair, change: dict[str, int]) -> None:
    asked: dict[str, int] = {"port": 0x3E8, **change}
    assert failed(wide.relay.access(port_access(reading=True, **asked)))  # type: ignore[arg-type]
    assert failed(wide.relay.access(port_access(reading=False, **asked)))  # type: ignore[arg-type]


def test_a_device_that_dies_in_a_string_fails_it_once(wide: Pair) -> None:
    assert wide.relay.access(port_access(0x3E8, reading=True, string=True, count=4, identifier=7)) is None
    wide.device.send(wide.take().pack())
    wide.device.close()
    answers, _ = wide.relay.receive()
    assert [answer.identifier for answer in answers] == [7]
    assert failed(answers[0])
    assert failed(wide.relay.access(port_access(0x3E8, reading=False)))


def test_no_ports_where_none_were_given(pair: Pair) -> None:
    assert failed(pair.relay.access(port_access(0x3E8, reading=True)))
