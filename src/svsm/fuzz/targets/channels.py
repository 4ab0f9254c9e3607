# SPDX-License-Identifier: MIT OR Apache-2.0
"""The channels that the key comes over, with the attacker in the device's seat.

`vsock-packets` is the connection alone, packet by packet: what the host may make it hold is its buffer, what it may
make it send is its credit. The other two run the whole driver on a clock of its own, over a device that completes
buffers as the input says and fills them with what the input says: a call ends at its deadline, gives no more than it
was asked for, and what is dead stays dead.
"""

from __future__ import annotations

from collections.abc import Callable

from svsm.abi.channel import Channel
from svsm.abi.errors import SvsmError
from svsm.formats.virtio import DeviceStatus, Feature
from svsm.formats.virtio_console import ConsoleControl
from svsm.formats.virtio_vsock import HOST_CID, TYPE_STREAM, VsockHeader, VsockOperation
from svsm.fuzz.choices import Choices
from svsm.fuzz.target import Target, expect
from svsm.host.devices.virtio_console import LINE_FEATURES, ConsoleBackend, ConsoleOptions
from svsm.host.devices.virtio_ring import Chain, DevicePackedRing, DeviceRing, DeviceSplitRing, Window
from svsm.host.devices.virtio_stream import MmioStream, StreamBackend
from svsm.host.devices.virtio_vsock import VsockBackend, VsockOptions
from svsm.kernel.channels.virtio_console import ConsolePolicy
from svsm.kernel.channels.virtio_line import LinePolicy
from svsm.kernel.channels.vsock_connection import VsockConnection, VsockState
from svsm.testing.channel_harness import FarEnd, InlineLine, virtio_line

__all__ = ["ROWS"]

_CID, _PORT, _PEER_PORT, _BUFFER = 3, 0x8000_0001, 9999, 4096
_MASK = 0xFFFF_FFFF
_SECONDS = 0.1
_CALLS = 8


def _header(choices: Choices, forwarded: int = 0) -> VsockHeader:
    """A packet about the connection, more or less."""
    length = choices.below(64)
    return VsockHeader(
        source_cid=HOST_CID,
        destination_cid=_CID,
        source_port=_PEER_PORT,
        destination_port=_PORT,
        length=length,
        type=TYPE_STREAM,
        operation=choices.below(9),
        flags=choices.below(4),
        buffer_bytes=choices.pick((0, 1, 100, 4096, _MASK)),
        forwarded=forwarded,
    )


def _packet(choices: Choices, forwarded: int = 0) -> bytes:
    header = _header(choices, forwarded)
    data = header.pack() + bytes(header.length)
    return choices.edited(data) if choices.flag() else data


def _packets(data: bytes) -> None:
    choices = Choices(data)
    connection = VsockConnection(cid=_CID, port=_PORT, peer_port=_PEER_PORT, buffer_bytes=_BUFFER)
    connection.request()
    if choices.flag():
        honest = _header(choices).replace(length=0, operation=VsockOperation.RESPONSE, buffer_bytes=4096)
        connection.take(honest.pack())
        expect(connection.state is VsockState.CONNECTED, "a response connects")
    sent = 0
    while choices.more:
        operation = choices.below(4)
        if operation == 0:
            answer = connection.take(_packet(choices, sent if choices.flag() else choices.number() & _MASK))
            expect(answer is None or answer.operation == VsockOperation.RST, "strangers get RST or nothing")
        elif operation == 1:
            most = choices.below(5000)
            expect(len(connection.read(most)) <= most, "a read gives what was asked for")
        elif operation == 2 and connection.window:
            length = min(connection.window, 1 + choices.below(5000))
            connection.data(length)
            sent = (sent + length) & _MASK
        else:
            connection.owed()
        expect(connection.available <= _BUFFER, "the host has no more than its credit")
        expect(0 <= connection.window <= _MASK, "the window is a window")


class _Device(MmioStream):
    """Completes as the input says, and fills buffers with what it says."""

    choices = Choices(b"")
    make: Callable[[Choices, int], bytes] = staticmethod(lambda _choices, _queue: b"")
    lying = False

    def complete(self, ring: DeviceRing, chain: Chain, written: int) -> None:
        """Honest, or another identifier or length, or twice, or never."""
        kind = self.choices.below(8) if self.lying and self.choices.more else 0
        if kind < 4:
            super().complete(ring, chain, written)
        elif kind == 4:
            _mark(ring, chain.identifier, self.choices.number() & _MASK)
        elif kind == 5:
            _mark(ring, self.choices.unsigned(2), written)
        elif kind == 6:
            super().complete(ring, chain, written)
            _mark(ring, chain.identifier, written)
        if self.lying and self.choices.more and self.choices.below(64) == 1:
            self.status |= DeviceStatus.NEEDS_RESET


def _mark(ring: DeviceRing, identifier: int, length: int) -> None:
    if isinstance(ring, DeviceSplitRing):
        ring.put_used(identifier, length)
        ring.set_used_index(ring.next_used + 1)
    elif isinstance(ring, DevicePackedRing):
        ring.put_used(identifier, length, wrap=ring.used_wrap)
        ring.skip(1)


class _Speaker:
    """A backend that says what the input says where an honest one would say something or nothing."""

    def __init__(self, backend: StreamBackend) -> None:
        self._backend = backend
        self.device: _Device | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self._backend, name)

    def receive(self, index: int, room: int) -> bytes | None:
        """What goes into a buffer."""
        device = self.device
        if device is None or not device.lying or not device.choices.more or device.choices.flag():
            return self._backend.receive(index, room)
        return device.make(device.choices, index)[:room]


def _calls(choices: Choices, line: InlineLine, channel: Channel) -> None:
    """Use the channel until it is dead, or enough."""
    fault: SvsmError | None = None
    for _ in range(_CALLS):
        begun, sending = line.clock.now, choices.flag()
        try:
            if sending:
                channel.send(bytes(1 + choices.below(3000)), deadline=begun + _SECONDS)
            else:
                most = 1 + choices.below(3000)
                expect(len(channel.receive(most, deadline=begun + _SECONDS)) <= most, "no more than was asked for")
            expect(fault is None, "what is dead stays dead")
        except SvsmError as error:
            expect(fault is None or error is fault, "what is dead says why, always the same")
            if error.code != "channel-timeout":
                fault = error
        expect(line.clock.now - begun <= _SECONDS + 1, "a call ends at its deadline")


def _line(
    choices: Choices,
    backend: Callable[[int], StreamBackend],
    make: Callable[[Choices, int], bytes],
    use: Callable[[InlineLine], Channel],
) -> None:
    common = LINE_FEATURES if choices.flag() else LINE_FEATURES & ~int(Feature.RING_PACKED)
    speaker = _Speaker(backend(common))

    def device(stream: StreamBackend, window: Window) -> _Device:
        made = _Device(stream, window)
        made.choices, made.make = choices, make
        speaker.device = made
        return made

    line = virtio_line(speaker, make=device)  # type: ignore[arg-type]
    made = speaker.device
    if made is None:
        return
    made.lying = choices.flag()
    channel = use(line)
    made.lying = True
    try:
        _calls(choices, line, channel)
    finally:
        channel.close()


def _echo() -> FarEnd:
    return FarEnd(lambda body: len(body).to_bytes(8, "little") + body)


def _vsock(data: bytes) -> None:
    choices = Choices(data)
    _line(
        choices,
        lambda common: VsockBackend(lambda _port: _echo(), VsockOptions(common=common)),
        lambda chosen, queue: _packet(chosen) if queue == 0 else chosen.blob(8),
        lambda line: line.vsock(),
    )


def _control(choices: Choices, queue: int) -> bytes:
    if queue != 2:
        return choices.blob(100)
    message = ConsoleControl(choices.below(4), choices.below(9), choices.below(2)).pack()
    return choices.edited(message) if choices.flag() else message


def _console(data: bytes) -> None:
    choices = Choices(data)
    several = choices.flag()
    port = 2 if several else 0
    policy = ConsolePolicy(port=port, line=LinePolicy(buffers=8, buffer_bytes=1024, start_seconds=1.0, spins=2))
    _line(
        choices,
        lambda common: ConsoleBackend(_echo(), ConsoleOptions(common=common, ports=4 if several else 1, port=port)),
        _control,
        lambda line: line.console(policy),
    )


ROWS = (
    Target(
        "vsock-packets",
        "packets of a host to the key's vsock connection",
        _packets,
        lambda: [b"\1" + bytes(40), b"\1" + bytes([0, 5, 0, 0, 3, 1, 0, 1, 100, 2, 50, 3]) * 4],
        max_bytes=256,
    ),
    Target(
        "vsock-device",
        "a virtio socket device that lies, on each ring",
        _vsock,
        lambda: [bytes(30), b"\1\0\1" + bytes(range(60)), b"\0\0" + b"\1\5\0\0\3" * 10],
        max_bytes=256,
        cpu_seconds=10.0,
    ),
    Target(
        "console-device",
        "a virtio console that lies, on each ring, with one port and with several",
        _console,
        lambda: [bytes(30), b"\1\1\0\1" + bytes(range(60)), b"\0\0\0" + b"\1\5\0\0\3" * 10],
        max_bytes=256,
        cpu_seconds=10.0,
    ),
)
