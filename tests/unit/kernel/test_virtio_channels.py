# SPDX-License-Identifier: MIT OR Apache-2.0
"""The console and vsock drivers against devices that lie: rings, features, packets, control messages, floods."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from svsm.abi.channel import Channel
from svsm.abi.errors import BackendError, ProtocolError, StateError, SvsmError
from svsm.formats.virtio import DeviceStatus, DeviceType, Feature
from svsm.formats.virtio_console import ConsoleControl, ConsoleEvent
from svsm.formats.virtio_vsock import EVENT_QUEUE, HOST_CID, TYPE_STREAM, VsockHeader, VsockOperation, VsockShutdown
from svsm.host.devices.virtio_console import LINE_FEATURES, ConsoleBackend, ConsoleOptions
from svsm.host.devices.virtio_ring import Chain, DevicePackedRing, DeviceRing, DeviceSplitRing
from svsm.host.devices.virtio_stream import MmioStream, StreamBackend
from svsm.host.devices.virtio_vsock import VsockBackend, VsockOptions
from svsm.kernel.channels.virtio_console import ConsoleChannel, ConsolePolicy
from svsm.kernel.channels.virtio_line import LinePolicy
from svsm.kernel.channels.vsock import VsockChannel, VsockPolicy
from svsm.testing.channel_harness import FarEnd, InlineLine, virtio_line

_SPLIT = LINE_FEATURES & ~int(Feature.RING_PACKED)
rings = pytest.mark.parametrize("common", [_SPLIT, LINE_FEATURES], ids=["split", "packed"])


def echo() -> FarEnd:
    return FarEnd(lambda body: len(body).to_bytes(8, "little") + body)


class Liar(MmioStream):
    """A device with a hook at every completion.

    Attributes:
        lie: (ring, chain, honest length) → instead of an honest completion.
        seen: Lengths of readable buffers, as the driver exposed them.
    """

    lie: Callable[[DeviceRing, Chain, int], None] | None = None

    def complete(self, ring: DeviceRing, chain: Chain, written: int) -> None:
        """Return it, or lie."""
        self.seen.extend(part.length for part in chain.parts if not part.device_writes)
        if self.lie is None:
            super().complete(ring, chain, written)
        else:
            self.lie(ring, chain, written)

    def _reset(self) -> None:
        super()._reset()
        self.seen: list[int] = []


def mark(ring: DeviceRing, identifier: int, length: int, entries: int = 1) -> None:
    """Any completion, published."""
    if isinstance(ring, DeviceSplitRing):
        ring.put_used(identifier, length)
        ring.set_used_index(ring.next_used + 1)
    elif isinstance(ring, DevicePackedRing):
        ring.put_used(identifier, length, wrap=ring.used_wrap)
        ring.skip(entries)


def mark_twice(ring: DeviceRing, identifier: int, length: int) -> None:
    """The same one, two times."""
    mark(ring, identifier, length)
    mark(ring, identifier, length)


def ask(channel: Channel, line: InlineLine) -> bytes:
    """A frame there, and the start of its echo."""
    channel.send(b"\3\0\0\0\0\0\0\0abc", deadline=line.clock.now + 5)
    return channel.receive(100, deadline=line.clock.now + 5)


def console(common: int = LINE_FEATURES) -> tuple[InlineLine, ConsoleChannel, Liar]:
    line = virtio_line(ConsoleBackend(echo(), ConsoleOptions(common=common)), make=Liar)
    assert isinstance(line.device, Liar)
    return line, line.console(), line.device


# ---- rings ----------------------------------------------------------------------------------------------------------

_LIES: dict[str, tuple[str, Callable[[DeviceRing, Chain, int], None]]] = {
    "longer than the buffer": ("virtio-used-length", lambda ring, chain, _: mark(ring, chain.identifier, 1025)),
    "as long as can be": ("virtio-used-length", lambda ring, chain, _: mark(ring, chain.identifier, 0xFFFF_FFFF)),
    "a number that does not exist": ("virtio-used-id", lambda ring, _chain, n: mark(ring, 0x7FFF, n)),
    "twice": ("virtio-used-unexpected", lambda ring, chain, n: mark_twice(ring, chain.identifier, n)),
    "NEEDS_RESET": ("virtio-needs-reset", lambda _ring, _chain, _n: None),
}


@rings
@pytest.mark.parametrize("lie", _LIES)
def test_a_lie_about_a_buffer_ends_the_channel(common: int, lie: str) -> None:
    line, channel, device = console(common)
    code, device.lie = _LIES[lie]
    if lie == "NEEDS_RESET":
        device.status |= DeviceStatus.NEEDS_RESET
    with pytest.raises(ProtocolError) as caught:
        ask(channel, line)
    assert caught.value.code == code or caught.value.code in ("virtio-used-unexpected", "virtio-used-index")
    device.lie = None
    for again in (lambda: channel.send(b"x", deadline=line.clock.now + 5), lambda: channel.receive(1, deadline=1e9)):
        with pytest.raises(ProtocolError) as second:
            again()
        assert second.value is caught.value, "what is dead stays dead"
    channel.close()
    with pytest.raises(BackendError) as closed:
        channel.receive(1, deadline=1e9)
    assert closed.value.code == "channel-closed"
    channel.close()


@rings
def test_a_new_driver_on_the_same_device(common: int) -> None:
    line, channel, device = console(common)
    device.lie = _LIES["as long as can be"][1]
    with pytest.raises(ProtocolError):
        ask(channel, line)
    device.lie = None
    channel.close()
    assert ask(line.console(), line).startswith(b"\3\0")


@rings
def test_nothing_is_exposed_but_what_is_sent(common: int) -> None:
    """Buffers that were sent keep their old contents, so a short one must not show the rest of a long one."""
    line, channel, device = console(common)
    for length in (1000, 9, 1, 1024):
        channel.send(b"\0" * length, deadline=line.clock.now + 5)
    assert device.seen == [1000, 9, 1, 1024]


@rings
def test_what_is_lent_is_zeroed(common: int) -> None:
    line, channel, _ = console(common)
    channel.send(b"\5\0\0\0\0\0\0\0hello", deadline=line.clock.now + 5)
    got = b""
    while len(got) < 13:
        got += channel.receive(3, deadline=line.clock.now + 5)
    inbox = channel._inbox
    for offset in inbox._offsets:
        assert bytes(line.memory.bytes[offset : offset + inbox.buffer_bytes]) == bytes(inbox.buffer_bytes)


# ---- bring-up -------------------------------------------------------------------------------------------------------


def _backends(common: int) -> list[tuple[str, StreamBackend]]:
    return [
        ("console", ConsoleBackend(echo(), ConsoleOptions(common=common))),
        ("vsock", VsockBackend(lambda _port: echo(), VsockOptions(common=common))),
    ]


@pytest.mark.parametrize("missing", [Feature.VERSION_1, Feature.ACCESS_PLATFORM])
def test_what_a_confidential_vm_needs(missing: Feature) -> None:
    for name, backend in _backends(LINE_FEATURES & ~int(missing)):
        with pytest.raises(ProtocolError) as caught:
            getattr(virtio_line(backend), name)()
        assert caught.value.code == "virtio-features-missing"


def test_one_device_is_not_the_other() -> None:
    (_, first), (_, second) = _backends(LINE_FEATURES)
    for open_wrong in (virtio_line(first).vsock, virtio_line(second).console):
        with pytest.raises(ProtocolError) as caught:
            open_wrong()
        assert caught.value.code == "virtio-device-type"


def test_policies_that_make_no_sense() -> None:
    for policy in (LinePolicy(buffers=0), LinePolicy(buffer_bytes=1), LinePolicy(start_seconds=0.0)):
        with pytest.raises(StateError) as caught:
            virtio_line(_backends(LINE_FEATURES)[0][1]).console(ConsolePolicy(line=policy))
        assert caught.value.code == "virtio-policy"
    for vsock_policy in (VsockPolicy(port=0), VsockPolicy(port=1 << 32), VsockPolicy(receive_bytes=1)):
        with pytest.raises(StateError) as caught:
            virtio_line(_backends(LINE_FEATURES)[1][1]).vsock(vsock_policy)
        assert caught.value.code == "virtio-policy"


@pytest.mark.parametrize("cid", [0, 1, 2, 0xFFFF_FFFF, 1 << 32, (1 << 64) - 1])
def test_context_ids_that_no_guest_has(cid: int) -> None:
    with pytest.raises(ProtocolError) as caught:
        virtio_line(VsockBackend(lambda _port: echo(), VsockOptions(cid=cid))).vsock()
    assert caught.value.code == "vsock-cid"


# ---- floods ---------------------------------------------------------------------------------------------------------


class Flood:
    """A backend that fills every buffer of some queues with what `make` gives, for ever."""

    def __init__(self, backend: StreamBackend, queues: tuple[int, ...], make: Callable[[], bytes]) -> None:
        self._backend = backend
        self._queues = queues
        self._make = make
        self.open = False

    def __getattr__(self, name: str) -> object:
        return getattr(self._backend, name)

    def receive(self, index: int, room: int) -> bytes | None:
        """The flood, once it is open; honest before, and beside it."""
        if self.open and index in self._queues:
            return self._make()[:room]
        return self._backend.receive(index, room)


@rings
def test_empty_buffers_without_end_cost_the_deadline(common: int) -> None:
    flood = Flood(ConsoleBackend(echo(), ConsoleOptions(common=common)), (0,), lambda: b"")
    line = virtio_line(flood)  # type: ignore[arg-type]
    channel = line.console()
    flood.open = True
    begun = line.clock.now
    with pytest.raises(BackendError) as caught:
        channel.receive(1, deadline=begun + 1)
    assert caught.value.code == "channel-timeout"
    assert 1 <= line.clock.now - begun < 2


def _stranger(counter: itertools.count[int]) -> bytes:
    header = VsockHeader(HOST_CID, 3, next(counter), 1, 0, TYPE_STREAM, VsockOperation.REQUEST, 0, 4096, 0)
    return header.pack()


@rings
def test_packets_for_nobody_cost_the_deadline_and_no_memory(common: int) -> None:
    counter = itertools.count()
    backend = VsockBackend(lambda _port: echo(), VsockOptions(common=common))
    flood = Flood(backend, (0,), lambda: _stranger(counter))
    line = virtio_line(flood)  # type: ignore[arg-type]
    channel = line.vsock()
    flood.open = True
    begun = line.clock.now
    with pytest.raises(BackendError) as caught:
        channel.receive(1, deadline=begun + 0.2)
    assert caught.value.code == "channel-timeout"
    assert 0.2 <= line.clock.now - begun < 1
    assert channel._connection.strays > 100
    assert len(channel._answers) <= 16
    flood.open = False
    channel.send(b"\2\0\0\0\0\0\0\0ok", deadline=line.clock.now + 5)
    assert channel.receive(100, deadline=line.clock.now + 5).startswith(b"\2\0")


# ---- vsock ----------------------------------------------------------------------------------------------------------


def vsock(
    *, common: int = LINE_FEATURES, buffer_bytes: int = 64 << 10, far: FarEnd | None = None
) -> tuple[InlineLine, VsockChannel, VsockBackend]:
    peer = far or echo()
    backend = VsockBackend(lambda _port: peer, VsockOptions(common=common, buffer_bytes=buffer_bytes))
    line = virtio_line(backend)
    return line, line.vsock(), backend


def test_a_port_where_nobody_listens() -> None:
    line = virtio_line(VsockBackend(lambda _port: None))
    with pytest.raises(BackendError) as caught:
        line.vsock()
    assert caught.value.code == "channel-closed"


@rings
@pytest.mark.parametrize("buffer_bytes", [1, 100, 65536])
def test_credit_is_kept_both_ways(common: int, buffer_bytes: int) -> None:
    """The device gives RST for a byte beyond its credit, the driver an error: nothing of the kind happens."""
    line, channel, backend = vsock(common=common, buffer_bytes=buffer_bytes)
    data = bytes(range(256)) * (2 if buffer_bytes == 1 else 80)
    framed = len(data).to_bytes(8, "little") + data
    channel.send(framed, deadline=line.clock.now + 60)
    got = b""
    while len(got) < len(framed):
        got += channel.receive(700, deadline=line.clock.now + 60)
    assert got == framed
    assert backend.peers


def test_a_host_that_gives_no_credit_costs_the_deadline() -> None:
    line, channel, _ = vsock(buffer_bytes=0)
    begun = line.clock.now
    with pytest.raises(BackendError) as caught:
        channel.send(b"x", deadline=begun + 1)
    assert caught.value.code == "channel-timeout"
    assert 1 <= line.clock.now - begun < 2


@pytest.mark.parametrize(
    "event", [(b"\0\0\0\0", "channel-closed"), (b"\1\0\0\0", "vsock-packet"), (b"", "vsock-packet")]
)
def test_events(event: tuple[bytes, str]) -> None:
    flood = Flood(VsockBackend(lambda _port: echo()), (EVENT_QUEUE,), lambda: event[0])
    line = virtio_line(flood)  # type: ignore[arg-type]
    channel = line.vsock()
    flood.open = True
    with pytest.raises(SvsmError) as caught:
        channel.receive(1, deadline=line.clock.now + 5)
    assert caught.value.code == event[1]


def test_the_host_hangs_up_and_this_side_says_goodbye() -> None:
    line, channel, backend = vsock(far=FarEnd(lambda body: body, close_after=3))
    channel.send(b"\5\0\0\0\0\0\0\0hello", deadline=line.clock.now + 5)
    assert channel.receive(10, deadline=line.clock.now + 5) == b"hel"
    assert channel.receive(10, deadline=line.clock.now + 5) == b""
    with pytest.raises(BackendError) as caught:
        channel.send(b"more", deadline=line.clock.now + 5)
    assert caught.value.code == "channel-closed"
    line, channel, backend = vsock()
    assert len(backend.peers) == 1
    channel.close()
    assert not backend.peers


def test_a_broken_connection_is_no_end_of_stream() -> None:
    header = VsockHeader(HOST_CID, 3, 9999, 0x8000_0001, 0, TYPE_STREAM, VsockOperation.RST, 0, 0, 0)
    flood = Flood(VsockBackend(lambda _port: echo()), (0,), header.pack)
    line = virtio_line(flood)  # type: ignore[arg-type]
    channel = line.vsock()
    flood.open = True
    with pytest.raises(BackendError) as caught:
        channel.receive(1, deadline=line.clock.now + 5)
    assert caught.value.code == "channel-closed"


def test_half_a_shutdown_stops_one_direction() -> None:
    flags = int(VsockShutdown.RECEIVE)
    header = VsockHeader(HOST_CID, 3, 9999, 0x8000_0001, 0, TYPE_STREAM, VsockOperation.SHUTDOWN, flags, 9, 0)
    flood = Flood(VsockBackend(lambda _port: echo()), (0,), header.pack)
    line = virtio_line(flood)  # type: ignore[arg-type]
    channel = line.vsock()
    flood.open = True
    with pytest.raises(BackendError) as caught:
        channel.receive(1, deadline=line.clock.now + 1)
    assert caught.value.code == "channel-timeout", "it may still send"
    with pytest.raises(BackendError) as caught:
        channel.send(b"x", deadline=line.clock.now + 1)
    assert caught.value.code == "channel-closed"


# ---- console, several ports -----------------------------------------------------------------------------------------

_PORT = 2


def _ports(flood: Callable[[], bytes] | None = None) -> tuple[InlineLine, Flood]:
    backend = ConsoleBackend(echo(), ConsoleOptions(ports=4, port=_PORT))
    made = Flood(backend, (2,), flood or (lambda: b""))
    return virtio_line(made), made  # type: ignore[arg-type]


def _policy(port: int = _PORT) -> ConsolePolicy:
    return ConsolePolicy(port=port, line=LinePolicy(buffers=8, buffer_bytes=1024, start_seconds=1.0, spins=2))


def _message(event: int, value: int = 0, port: int = _PORT) -> bytes:
    return ConsoleControl(port, event, value).pack()


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (b"", "console-control"),
        (_message(ConsoleEvent.PORT_OPEN, 1)[:7], "console-control"),
        (_message(ConsoleEvent.DEVICE_ADD), "console-control"),
        (_message(ConsoleEvent.DEVICE_REMOVE), "channel-closed"),
        (_message(ConsoleEvent.PORT_OPEN, 1), "console-control"),  # valid, and without end
        (_message(ConsoleEvent.CONSOLE_PORT, 1), "console-control"),
        (_message(ConsoleEvent.RESIZE) + bytes(4), "console-control"),
        (_message(77, port=3), "console-control"),
    ],
)
def test_control_messages_without_end(message: bytes, code: str) -> None:
    line, flood = _ports(lambda: message)
    channel = line.console(_policy())
    flood.open = True
    with pytest.raises(SvsmError) as caught:
        channel.receive(1, deadline=line.clock.now + 1000)
    assert caught.value.code == code


def test_a_port_that_closes_stays_closed() -> None:
    messages = iter([_message(ConsoleEvent.PORT_OPEN, 0), _message(ConsoleEvent.PORT_OPEN, 1)])
    line, flood = _ports(lambda: next(messages, _message(99)))
    channel = line.console(_policy())
    flood.open = True
    assert channel.receive(1, deadline=line.clock.now + 5) == b""
    with pytest.raises(BackendError) as caught:
        channel.send(b"x", deadline=line.clock.now + 5)
    assert caught.value.code == "channel-closed"


@pytest.mark.parametrize(("port", "code"), [(1, "channel-timeout"), (4, "console-port"), (510, "console-port")])
def test_a_port_that_is_not_there(port: int, code: str) -> None:
    line, _ = _ports()
    begun = line.clock.now
    with pytest.raises(SvsmError) as caught:
        line.console(_policy(port))
    assert caught.value.code == code
    assert line.clock.now - begun < 3


def test_a_port_of_a_device_with_one() -> None:
    line = virtio_line(ConsoleBackend(echo()))
    with pytest.raises(ProtocolError) as caught:
        line.console(_policy(1))
    assert caught.value.code == "console-port"


def test_receive_into_nothing() -> None:
    for channel in (console()[1], vsock()[1]):
        with pytest.raises(StateError) as caught:
            channel.receive(0, deadline=1e9)
        assert caught.value.code == "channel-size"
        assert channel.fileno() == -1


def test_types_of_devices() -> None:
    assert [backend.device_type for _, backend in _backends(0)] == [DeviceType.CONSOLE, DeviceType.VSOCK]
