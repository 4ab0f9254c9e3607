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

    def __init__(self) -> None:
        ours, self.device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.device.settimeout(5)
        self.shared = os.memfd_create("shared")
        os.ftruncate(self.shared, 1 << 40)
        self.relay = MmioRelay(ours, self.shared)

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
