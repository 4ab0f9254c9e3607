# SPDX-License-Identifier: MIT OR Apache-2.0
"""The qtest client against a scripted other side: order, posted writes, interrupts, and nonsense."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.formats.errors import BackendError, ProtocolError, StateError, SvsmError
from svsm.host.qemu import Machine, MachineKind, MachineOptions
from svsm.host.qtest import QtestClient, QtestProtocol


class Peer(threading.Thread):
    """Answers each line with what `script` says; None closes."""

    def __init__(self, connection: socket.socket, script: Callable[[str], bytes | None]) -> None:
        super().__init__(daemon=True)
        self._connection = connection
        self._script = script
        self.heard: list[str] = []

    def run(self) -> None:
        with self._connection, self._connection.makefile("rb") as lines:
            for line in lines:
                self.heard.append(line.decode().rstrip())
                answer = self._script(self.heard[-1])
                if answer is None:
                    return
                try:
                    self._connection.sendall(answer)
                except OSError:
                    return


Make = Callable[[Callable[[str], bytes | None]], tuple[QtestClient, Peer]]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[QtestClient] = []

    def start(script: Callable[[str], bytes | None]) -> tuple[QtestClient, Peer]:
        ours, theirs = socket.socketpair()
        peer = Peer(theirs, script)
        peer.start()
        made.append(QtestClient(ours, timeout_seconds=0.5))
        return made[-1], peer

    yield start
    for client in made:
        client.close()


def test_accesses_are_in_order_and_posted_writes_are_looked_at_later(make: Make) -> None:
    client, peer = make(lambda line: b"OK 0x00000012\n" if line.startswith("read") else b"OK\n")
    client.write(0x1000, 4, 7)
    client.port_out(0x3F8, 1, [1, 2])
    assert client.read(0x1000, 4) == 0x12
    assert peer.heard == ["writel 0x1000 0x7", "outb 0x3f8 0x1", "outb 0x3f8 0x2", "readl 0x1000"]


def test_a_posted_write_that_was_refused_is_found_by_the_next_call(make: Make) -> None:
    client, _ = make(lambda line: b"FAIL no\n" if line.startswith("write") else b"OK 0x0\n")
    client.write(0, 4, 0)
    with pytest.raises(BackendError) as caught:
        client.read(0, 4)
    assert caught.value.code == "qemu-refused"


def test_many_posted_writes_do_not_pile_up(make: Make) -> None:
    client, peer = make(lambda line: b"OK\n")
    for number in range(500):
        client.write(number, 1, 0)
    client.call(["nothing"])
    assert len(peer.heard) == 501


def test_interrupts_between_answers(make: Make) -> None:
    client, _ = make(lambda line: b"IRQ raise 5\nOK 0x1\nIRQ lower 5\nIRQ raise 6\n")
    assert not client.wait_interrupt(5, 0)
    assert client.read(0, 1) == 1
    assert client.wait_interrupt(6, 1)
    assert client.wait_interrupt(6, 0), "it is a level, and still up"
    assert client.wait_interrupt(5, 0), "it was up meanwhile"
    assert not client.wait_interrupt(5, 0)
    begun = time.monotonic()
    assert not client.wait_interrupt(7, 0.05)
    assert time.monotonic() - begun >= 0.05


def test_memory_both_ways(make: Make) -> None:
    client, peer = make(lambda line: b"OK AAEC\n" if line.startswith("b64read") else b"OK\n")
    assert client.memory_read(0x10, 3) == b"\0\1\2"
    client.memory_write(0x20, b"\3\4")
    assert peer.heard[1] == "b64write 0x20 0x2 AwQ="
    with pytest.raises(ProtocolError):
        client.memory_read(0x10, 4)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (b"hello\n", "qemu-qtest-protocol"),
        (b"OK 12zz\n", "qemu-qtest-protocol"),
        (b"OK\n", "qemu-qtest-protocol"),
        (b"OK 0x1\nOK 0x2\n", "qemu-qtest-protocol"),
        (b"IRQ raise -1\n", "qemu-qtest-protocol"),
        (b"IRQ raise 99999999\n", "qemu-qtest-protocol"),
        (b"FAIL Unknown command\n", "qemu-refused"),
        (b"ERR\n", "qemu-refused"),
        (b"", "qemu-timeout"),
        (None, "qemu-gone"),
    ],
)
def test_what_is_no_answer(make: Make, answer: bytes | None, code: str) -> None:
    client, _ = make(lambda line: answer)
    begun = time.monotonic()
    with pytest.raises(SvsmError) as caught:
        [client.read(0, 4) for _ in range(2)]
    assert caught.value.code == code
    assert time.monotonic() - begun < 3
    if code != "qemu-refused":  # the conversation is lost, and stays lost
        with pytest.raises(SvsmError) as again:
            client.read(0, 4)
        assert again.value.code in (code, "qemu-qtest-protocol")


def test_no_access_of_three_bytes(make: Make) -> None:
    client, peer = make(lambda line: b"OK\n")
    for call in (lambda: client.read(0, 3), lambda: client.write(0, 3, 0), lambda: client.port_out(0, 8, [0])):
        with pytest.raises(StateError):
            call()
    assert peer.heard == []


@given(st.binary(max_size=200), st.integers(0, 3))
def test_any_bytes_are_an_answer_or_an_error(data: bytes, owed: int) -> None:
    protocol = QtestProtocol()
    protocol.encode(["x"] * owed)
    try:
        protocol.feed(data)
        while protocol.take() is not None:
            pass
    except SvsmError:
        pass


@given(st.lists(st.sampled_from([b"OK 0x1\n", b"OK\n", b"IRQ raise 3\n", b"IRQ lower 3\n"]), max_size=20))
def test_whole_or_byte_by_byte(lines: list[bytes]) -> None:
    taken = []
    data = b"".join(lines)
    for cuts in ([data], [data[at : at + 1] for at in range(len(data))]):
        protocol = QtestProtocol()
        protocol.encode(["x"] * len(lines))
        for part in cuts:
            protocol.feed(part)
        answers = []
        while (value := protocol.take()) is not None:
            answers.append(value)
        taken.append((answers, protocol.levels, protocol.raised, protocol.owed))
    assert taken[0] == taken[1]


def test_an_endless_line_is_refused() -> None:
    protocol = QtestProtocol()
    for _ in range(8):
        protocol.feed(b"x" * (1 << 20))
    with pytest.raises(ProtocolError):
        protocol.feed(b"x")


@pytest.mark.parametrize(
    "options",
    [
        MachineOptions(MachineKind.Q35, memory_bytes=1000),
        MachineOptions(MachineKind.Q35, memory_bytes=0),
        MachineOptions(MachineKind.MICROVM, serial_ports=5),
    ],
)
def test_machine_options_are_checked(options: MachineOptions) -> None:
    with pytest.raises(StateError) as caught:
        Machine(options)
    assert caught.value.code == "qemu-options"
