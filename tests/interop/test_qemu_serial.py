# SPDX-License-Identifier: MIT OR Apache-2.0
"""The kernel's 16550 driver on QEMU's serial ports, and the whole key exchange over COM3."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from svsm.abi.errors import BackendError, FormatError, ProtocolError, SvsmError
from svsm.host.qemu import COM_PORTS, Machine, MachineKind, MachineOptions
from svsm.kernel.attestation import Release
from svsm.kernel.channels.stream import FramedChannel, StreamChannel
from svsm.kernel.channels.uart16550 import UartChannel
from svsm.testing.qemu_harness import COM_BASES, serial_channel
from tests.key_support import Desk, Relay
from tests.support import peer

pytestmark = pytest.mark.interop

_COM3 = 2


@contextlib.contextmanager
def machine(kind: MachineKind = MachineKind.MICROVM, ports: int = 4) -> Iterator[Machine]:
    made = Machine(MachineOptions(kind, serial_ports=ports, program=peer("qemu-system-x86_64")))
    try:
        yield made
    finally:
        made.close()


def soon(seconds: float = 20) -> float:
    return time.monotonic() + seconds


def receive(channel: UartChannel, length: int) -> bytes:
    data = b""
    while len(data) < length:
        data += channel.receive(length - len(data), deadline=soon())
    return data


def test_both_tables_of_ports_agree() -> None:
    assert COM_BASES == COM_PORTS


_KINDS = [MachineKind.MICROVM, pytest.param(MachineKind.Q35, marks=pytest.mark.long)]


@pytest.mark.parametrize("kind", _KINDS)
def test_all_four_ports_both_ways(kind: MachineKind) -> None:
    with machine(kind) as made:
        for index in range(4):
            channel = serial_channel(made, index)
            sent = random.Random(index).randbytes(200)
            channel.send(sent, deadline=soon())
            far = made.serial[index]
            far.settimeout(20)
            got = b""
            while len(got) < len(sent):
                got += far.recv(4096)
            assert got == sent
            far.sendall(sent[::-1])
            assert receive(channel, len(sent)) == sent[::-1]
            for other in (*range(index), *range(index + 1, 4)):
                assert not select.select([made.serial[other]], [], [], 0)[0]
            channel.close()


def test_twenty_thousand_bytes_each_way() -> None:
    with machine() as made:
        channel, far = serial_channel(made), made.serial[_COM3]
        data = random.Random(9).randbytes(20_000)
        sender = threading.Thread(target=far.sendall, args=(data,))
        sender.start()
        assert receive(channel, len(data)) == data
        sender.join()
        got = bytearray()

        def drain() -> None:
            while len(got) < len(data):
                got.extend(far.recv(65536))

        reader = threading.Thread(target=drain)
        reader.start()
        channel.send(data, deadline=soon())
        reader.join(20)
        assert bytes(got) == data


def test_a_far_end_that_does_not_read_costs_the_deadline() -> None:
    with machine() as made:
        channel = serial_channel(made)
        begun = time.monotonic()
        with pytest.raises(BackendError) as caught:
            channel.send(bytes(20_000), deadline=begun + 1)
        assert caught.value.code == "channel-timeout"
        assert time.monotonic() - begun < 3


def test_deadlines_and_ends() -> None:
    with machine() as made:
        channel = serial_channel(made)
        begun = time.monotonic()
        with pytest.raises(BackendError) as caught:
            channel.receive(1, deadline=begun + 0.2)
        assert caught.value.code == "channel-timeout"
        assert 0.2 <= time.monotonic() - begun < 2
        made.kill()
        with pytest.raises(BackendError):
            channel.receive(1, deadline=soon())
        channel.close()
        with pytest.raises(BackendError) as caught:
            channel.send(b"x", deadline=soon())
        assert caught.value.code == "channel-closed"


def test_a_port_that_is_not_there() -> None:
    with machine(ports=2) as made, pytest.raises(ProtocolError) as caught:
        serial_channel(made, _COM3)
    assert caught.value.code == "uart-missing"


class FarEnd(threading.Thread):
    """The proxy at the other end of COM3; `mangle` is what the line does to its bytes."""

    def __init__(self, connection: socket.socket, relay: Relay, mangle: Callable[[bytes], list[bytes]]) -> None:
        super().__init__(daemon=True)
        self._line = connection
        self._stream = StreamChannel(connection)
        self._frames = FramedChannel(self._stream)
        self._relay = relay
        self._mangle = mangle
        self.error: SvsmError | None = None

    def _send(self, body: bytes) -> None:
        framed = len(body).to_bytes(8, "little") + body
        for part in self._mangle(framed):
            self._stream.send(part, deadline=soon())

    def end(self) -> None:
        """Hang up."""
        self._line.shutdown(socket.SHUT_RDWR)
        self.join(20)
        self._line.close()

    def run(self) -> None:
        """Two answers."""
        try:
            for answer in (self._relay.negotiate, self._relay.attest):
                self._send(answer(self._frames.receive(deadline=soon())))
        except SvsmError as error:
            self.error = error


def exchange(made: Machine, desk: Desk, mangle: Callable[[bytes], list[bytes]], seconds: float = 30) -> Release:
    """The kernel's side of an attestation over COM3."""
    frames = FramedChannel(serial_channel(made))
    far = FarEnd(made.take_serial(_COM3), desk.relay(), mangle)
    far.start()
    client, chip = desk.client(), desk.chip()
    deadline = time.monotonic() + seconds
    try:
        frames.send(client.start(), deadline=deadline)
        report_data = client.negotiated(frames.receive(deadline=deadline))
        frames.send(client.reported(chip.report(report_data)), deadline=deadline)
        return client.answered(frames.receive(deadline=deadline))
    finally:
        frames.close()
        far.end()


def whole(data: bytes) -> list[bytes]:
    return [data]


def one_byte_at_a_time(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


def dropped(data: bytes) -> list[bytes]:
    return [data[:100] + data[101:]]


def doubled(data: bytes) -> list[bytes]:
    return [data[:100] + data[99:]]


def first_byte_dropped(data: bytes) -> list[bytes]:
    return [data[1:]]


def length_doubled(data: bytes) -> list[bytes]:
    return [data[:1] + data]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("desk"))


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("mangle", [whole, one_byte_at_a_time], ids=lambda mangle: str(mangle.__name__))
def test_the_key_comes_over_com3(kind: MachineKind, mangle: Callable[[bytes], list[bytes]], desk: Desk) -> None:
    with machine(kind, ports=3) as made:
        release = exchange(made, desk, mangle)
    assert len(release.volume_key) == 32
    again, _ = desk.attest()
    assert release.volume_key == again.volume_key


@pytest.mark.parametrize(
    "mangle", [dropped, doubled, first_byte_dropped, length_doubled], ids=lambda mangle: str(mangle.__name__)
)
def test_a_line_that_loses_or_doubles_bytes_gives_no_key(mangle: Callable[[bytes], list[bytes]], desk: Desk) -> None:
    """A byte too few or too many shifts the frames: refused or timed out, never a hang and never a key."""
    begun = time.monotonic()
    with machine(ports=3) as made, pytest.raises(SvsmError) as caught:
        exchange(made, desk, mangle, seconds=1)
    assert isinstance(caught.value, FormatError | ProtocolError | BackendError)
    assert time.monotonic() - begun < 12


def test_guest_memory_is_shared_and_time_is_real() -> None:
    with machine(ports=0) as made:
        data = random.Random(7).randbytes(3 << 20)
        made.qtest.memory_write(0x20_0000, data)
        assert bytes(made.memory[0x20_0000 : 0x20_0000 + len(data)]) == data
        made.memory[0x30_0000:0x30_0004] = b"\1\2\3\4"
        assert made.qtest.memory_read(0x30_0000, 4) == b"\1\2\3\4"
        assert [made.qtest.read(0x30_0000, width) for width in (1, 2, 4)] == [1, 0x201, 0x0403_0201]
        made.qtest.write(0x30_0000, 8, 0x1122_3344_5566_7788)
        assert made.qtest.read(0x30_0000, 8) == 0x1122_3344_5566_7788
        with pytest.raises(BackendError) as caught:
            made.qtest.clock_step(1000)
        assert caught.value.code == "qemu-refused"
        assert made.qtest.read(0x30_0000, 1) == 0x88, "a refusal does not end the conversation"
