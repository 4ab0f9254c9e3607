# SPDX-License-Identifier: MIT OR Apache-2.0
"""The 16550 driver against a port in memory that can also lie."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from svsm.abi.errors import BackendError, FormatError, ProtocolError, StateError
from svsm.formats.frames import encode_frame
from svsm.kernel.channels.stream import FramedChannel
from svsm.kernel.channels.uart16550 import COM3, UartChannel

_BASE = COM3[0]
_LSR = _BASE + 5


class Port:
    """A 16550, as far as a driver can see one; time moves by a little with each access.

    Attributes:
        sent: What the driver sent.
        line: What is to come.
        status: Further LSR bits.
        lies: Instead of a register's value.
    """

    def __init__(self, *, fifo: bool = True) -> None:
        self.now = 100.0
        self.fifo = fifo
        self.sent = bytearray()
        self.line = bytearray()
        self.status = 0
        self.busy = False
        self.lies: dict[int, Callable[[], bytes]] = {}
        self.registers = dict.fromkeys(range(8), 0)
        self.reads = 0
        self.waits = 0
        self.burst = 0

    def in8(self, port: int, count: int = 1) -> bytes:
        """Read."""
        self.now += 1e-5
        self.reads += 1
        if port in self.lies:
            return self.lies[port]()
        return bytes(self._one(port - _BASE) for _ in range(count))

    def _one(self, register: int) -> int:
        if register == 0:
            return self.line.pop(0) if self.line else 0
        if register == 2:
            return (0xC0 if self.fifo else 0) | (0x04 if self.fifo and len(self.line) >= 14 else 0x01)
        if register == 5:
            self.burst = 0
            return self.status | (0 if self.busy else 0x60) | bool(self.line)
        return self.registers[register]

    def out8(self, port: int, data: bytes) -> None:
        """Write."""
        self.now += 1e-5
        register = port - _BASE
        for value in data:
            if register == 0 and not self.registers[3] & 0x80:
                self.sent.append(value)
                self.burst += 1
                assert self.burst <= (16 if self.fifo else 1), "the FIFO overflows"
            elif register == 2:
                self.line.clear()
            else:
                self.registers[register] = value

    def wait_interrupt(self, line: int, seconds: float) -> bool:
        """All the time passes."""
        self.waits += 1
        self.now += seconds
        return False

    def fileno(self) -> int:
        """Some number."""
        return 7


def channel(port: Port) -> UartChannel:
    return UartChannel(port, clock=lambda: port.now)


def test_it_is_set_up_as_8n1_with_fifos() -> None:
    port = Port()
    port.line += b"from before"
    made = channel(port)
    assert (port.registers[3], port.registers[1], port.registers[4]) == (3, 1, 0x0B)
    assert not port.line
    assert made.fileno() == 7
    made.close()
    made.close()
    assert port.registers[1] == 0


class Filling(Port):
    """A FIFO as QEMU fills it: to the trigger and no further, a little later; a timeout hides that it is full again."""

    def __init__(self, *, timeout: bool) -> None:
        super().__init__()
        self.coming = bytearray()
        self.timeout = timeout
        self.timed_out = False

    def _fill(self) -> None:
        room = 14 - len(self.line)
        self.line += self.coming[:room]
        del self.coming[:room]

    def _one(self, register: int) -> int:
        if register == 0:
            self.timed_out = False
            value = super()._one(register)
            if self.timeout:
                self._fill()
            return value
        if register == 2 and self.timed_out:
            return 0xCC
        return super()._one(register)

    def wait_interrupt(self, line: int, seconds: float) -> bool:
        """What is coming comes; when nothing does, the port says so."""
        super().wait_interrupt(line, seconds)
        self._fill()
        self.timed_out = self.timeout or len(self.line) < 14
        return True


@pytest.mark.parametrize("timeout", [False, True])
def test_a_fifo_that_is_filling_is_taken_in_bursts(timeout: bool) -> None:
    port = Filling(timeout=timeout)
    made = channel(port)
    data = random.Random(2).randbytes(14 * 20)
    port.line += data[:5]
    port.coming += data[5:]
    reads, taken = port.reads, b""
    while len(taken) < len(data):
        taken += made.receive(len(data) - len(taken), deadline=port.now + 10)
    assert taken == data
    assert port.reads - reads < 0.5 * len(data), "byte by byte it is three accesses each"


@pytest.mark.parametrize("fifo", [True, False])
def test_both_ways(fifo: bool) -> None:
    port = Port(fifo=fifo)
    made = channel(port)
    data = random.Random(1).randbytes(1000)
    made.send(data, deadline=port.now + 10)
    assert port.sent == data
    port.line += data
    reads = port.reads
    got = b""
    while len(got) < 1000:
        got += made.receive(1000 - len(got), deadline=port.now + 10)
    assert got == data
    assert port.reads - reads < (300 if fifo else 4000)


def test_receive_takes_no_more_than_asked() -> None:
    port = Port()
    made = channel(port)
    port.line += bytes(range(40))
    assert made.receive(5, deadline=port.now + 1) == bytes(range(5))
    assert made.receive(20, deadline=port.now + 1) == bytes(range(5, 25))
    with pytest.raises(StateError):
        made.receive(0, deadline=port.now + 1)


def test_deadlines() -> None:
    port = Port()
    made = channel(port)
    begun = port.now
    with pytest.raises(BackendError) as caught:
        made.receive(1, deadline=begun + 3)
    assert caught.value.code == "channel-timeout"
    assert 3 <= port.now - begun < 3.1
    port.busy = True
    begun = port.now
    with pytest.raises(BackendError) as caught:
        made.send(b"x", deadline=begun + 3)
    assert caught.value.code == "channel-timeout"
    assert 3 <= port.now - begun < 3.1
    assert port.waits < 4000


def test_a_line_that_never_runs_dry_ends_at_the_deadline() -> None:
    port = Port()
    made = channel(port)
    port.lies[_LSR] = lambda: b"\x61"
    begun = port.now
    assert set(made.receive(1 << 30, deadline=begun + 0.5)) == {0}
    assert port.now - begun < 0.51
    port.lies.clear()
    with pytest.raises(BackendError):
        made.send(bytes(1 << 20), deadline=port.now + 0.01)


@pytest.mark.parametrize("bit", [0x02, 0x04, 0x08, 0x10])
def test_what_the_port_knows_it_lost_ends_the_channel(bit: int) -> None:
    port = Port()
    made = channel(port)
    port.line += b"abc"
    port.status = bit
    for call in (lambda: made.receive(1, deadline=port.now + 1), lambda: made.send(b"x", deadline=port.now + 1)):
        with pytest.raises(BackendError) as caught:
            call()
        assert caught.value.code == "channel-closed"


@pytest.mark.parametrize("answer", [b"\xff", b"", b"\xff\xff"])
def test_no_port(answer: bytes) -> None:
    port = Port()
    port.lies[_BASE + 7] = lambda: answer
    with pytest.raises(ProtocolError) as caught:
        channel(port)
    assert caught.value.code == "uart-missing"


def test_a_port_that_disappears() -> None:
    port = Port()
    made = channel(port)
    port.lies[_LSR] = lambda: b"\xff"
    with pytest.raises(BackendError) as caught:
        made.receive(1, deadline=port.now + 1)
    assert caught.value.code == "channel-closed"
    port.lies[_LSR] = lambda: b""
    with pytest.raises(ProtocolError):
        made.receive(1, deadline=port.now + 1)


def test_a_closed_channel_is_closed() -> None:
    port = Port()
    made = channel(port)
    made.close()
    for call in (lambda: made.receive(1, deadline=port.now + 1), lambda: made.send(b"x", deadline=port.now + 1)):
        with pytest.raises(BackendError) as caught:
            call()
        assert caught.value.code == "channel-closed"


def _lossy(source: random.Random, data: bytes) -> bytes:
    """Drop, double or damage a byte somewhere."""
    at = source.randrange(len(data))
    kind = source.randrange(3)
    middle = (b"", data[at : at + 1] * 2, bytes([data[at] ^ 1 << source.randrange(8)]))[kind]
    return data[:at] + middle + data[at + 1 :]


def test_frames_over_a_line_that_drops_and_doubles_end_in_bounded_time() -> None:
    """What comes out is a frame, an error, or the deadline: frames carry no checksum, the token above does."""
    source = random.Random(3)
    body = b'{"challenge":"' + bytes(65 + number % 26 for number in range(200)) + b'"}'
    outcomes = set()
    for _ in range(200):
        port = Port()
        frames = FramedChannel(channel(port))
        port.line += _lossy(source, encode_frame(body))
        begun = port.now
        try:
            got = frames.receive(deadline=begun + 5)
            outcomes.add("damaged" if got != body else "whole")
        except (BackendError, FormatError) as error:
            outcomes.add(error.code)
        assert port.now - begun < 5.1
    assert outcomes <= {"whole", "damaged", "channel-timeout", "frame-too-long"}
    assert {"damaged", "channel-timeout", "frame-too-long"} <= outcomes
