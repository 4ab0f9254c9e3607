# SPDX-License-Identifier: MIT OR Apache-2.0
"""The key over QEMU's devices: its 16550 (COM3) and its virtio console, with one port and with several.

The same attestation, and the same lines that lose, double, stall, hang up or never end, as over our own models
(`tests/unit/kernel/test_key_over_channels.py`); time is real here, so positions are samples.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from svsm.abi.channel import Channel
from svsm.abi.errors import BackendError, ProtocolError, SvsmError
from svsm.formats.virtio import Feature
from svsm.formats.virtio_console import ConsoleFeature
from svsm.host.qemu import ConsoleOptions, DiskOptions, Machine, MachineKind, MachineOptions
from svsm.kernel.attestation import attest
from svsm.kernel.channels.stream import FramedChannel
from svsm.kernel.channels.virtio_console import ConsoleChannel, ConsolePolicy
from svsm.kernel.channels.virtio_line import LinePolicy, line_memory_bytes
from svsm.storage.drivers.virtio.mmio import MmioTransport
from svsm.testing.channel_harness import FarEnd, FarEndThread
from svsm.testing.qemu_harness import dma_memory, serial_channel
from tests.channel_support import Recording, attempt, double, drop, live
from tests.key_support import Desk
from tests.support import peer

pytestmark = pytest.mark.interop

_COM3 = 2
_SOON = 20.0
_CONSOLE_BYTES = 75_000
"""More than the 16 buffers of 4 KiB, and less than half of what QEMU's end of the socket holds (176 KiB measured)."""
_LINES = {
    "uart16550": None,
    "console-split": ConsoleOptions(),
    "console-packed": ConsoleOptions(packed=True),
    "console-ports": ConsoleOptions(packed=True, ports=4, port=2),
    "console-split-ports": ConsoleOptions(ports=4, port=3),
}
lines = pytest.mark.parametrize("line", _LINES)


def _machine(line: str) -> Machine:
    console = _LINES[line]
    return Machine(
        MachineOptions(
            MachineKind.MICROVM,
            console=console,
            serial_ports=0 if console is not None else _COM3 + 1,
            program=peer("qemu-system-x86_64"),
        )
    )


def console_channel(machine: Machine, policy: ConsolePolicy | None = None) -> ConsoleChannel:
    options = machine.options.console
    assert options is not None
    policy = policy or ConsolePolicy(port=options.port, line=LinePolicy(packed=options.packed))
    memory = dma_memory(machine, line_memory_bytes(policy.line))
    return ConsoleChannel(MmioTransport(machine.virtio_registers()), memory, policy=policy)


@contextlib.contextmanager
def opened(line: str, far: FarEnd) -> Iterator[Channel]:
    """The kernel's channel over a fresh QEMU, `far` at the other end."""
    machine = _machine(line)
    with contextlib.ExitStack() as stack:
        stack.callback(machine.close)
        channel: Channel
        if machine.console is None:
            channel, connected = serial_channel(machine, _COM3), machine.take_serial(_COM3)
        else:
            channel, connected = console_channel(machine), machine.console.dup()
            machine.console.close()
        thread = FarEndThread(connected, far)
        stack.callback(thread.end)
        thread.start()
        stack.callback(channel.close)
        yield channel


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return Recording.make(Desk(tmp_path_factory.mktemp("desk")))


def tried(line: str, recording: Recording, far: FarEnd, *, seconds: float) -> SvsmError | None:
    """One attempt: None for the right key; anything but the key or a refusal fails the test."""
    with opened(line, far) as channel:
        begun = time.monotonic()
        outcome = attempt(channel, recording, deadline=begun + seconds)
        assert time.monotonic() - begun < seconds + 5
    if isinstance(outcome, bytes):
        assert outcome == recording.volume_key
        return None
    return outcome


@lines
@pytest.mark.parametrize("piece_bytes", [1 << 20, 1], ids=["whole", "one-byte-at-a-time"])
def test_the_key_comes(line: str, piece_bytes: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    desk = Desk(tmp_path_factory.mktemp("desk"))
    with opened(line, FarEnd(live(desk), piece_bytes=piece_bytes)) as channel:
        release = attest(
            FramedChannel(channel),
            desk.chip(),
            settings=desk.settings,
            configuration_json=desk.configuration.to_json(),
            deadline=time.monotonic() + 30,
        )
    assert len(release.volume_key) == 32


@lines
@pytest.mark.parametrize("position", [3, 300, *(pytest.param(at, marks=pytest.mark.long) for at in range(0, 1960, 49))])
def test_a_byte_lost_or_doubled(line: str, position: int, recording: Recording) -> None:
    for damage in (drop, double):
        tried(line, recording, FarEnd(recording.replayed(damage(position))), seconds=0.5)


@lines
@pytest.mark.parametrize("offset", [200, *(pytest.param(at, marks=pytest.mark.long) for at in range(0, 1960, 98))])
def test_a_stall_and_a_hang_up(line: str, offset: int, recording: Recording) -> None:
    error = tried(line, recording, FarEnd(recording.replayed(), stop_after=offset), seconds=0.5)
    assert error is not None
    assert error.code == "channel-timeout"
    # Only a console with several ports says that the far end has gone; it has the time that a loaded host needs.
    told = line.endswith("ports")
    seconds = _SOON if told else 0.5
    error = tried(line, recording, FarEnd(recording.replayed(), close_after=offset), seconds=seconds)
    assert error is not None
    ends = {"channel-closed", "frame-truncated"} if told else {"channel-timeout"}
    assert error.code in ends


@lines
@pytest.mark.parametrize("endless", [b"\0", b"\xff", (1 << 14).to_bytes(8, "little") + b"x" * 1000])
def test_input_without_end(line: str, endless: bytes, recording: Recording) -> None:
    assert tried(line, recording, FarEnd(lambda _body: b"", endless=endless), seconds=10) is not None


@pytest.mark.parametrize("line", [name for name in _LINES if name.startswith("console")])
def test_many_bytes_each_way(line: str) -> None:
    """300 kB through 16 buffers of 4 KiB, and the features that were asked for are in force.

    At once on a port that waits for its far end. A port 0 ("virtconsole") throws away what does not fit into the
    socket: there the next piece goes out when the last one is back, so that it fits however slow the far end is.
    """
    machine = _machine(line)
    with contextlib.ExitStack() as stack:
        stack.callback(machine.close)
        channel = console_channel(machine)
        options = _LINES[line]
        assert options is not None
        assert bool(channel.features & Feature.RING_PACKED) == options.packed
        assert bool(channel.features & ConsoleFeature.MULTIPORT) == (options.port > 0)
        assert channel.features & Feature.ACCESS_PLATFORM
        assert machine.console is not None
        echo = FarEnd(lambda body: len(body).to_bytes(8, "little") + body[::-1])
        thread = FarEndThread(machine.console.dup(), echo)
        stack.callback(thread.end)
        thread.start()
        frames = FramedChannel(channel)
        data = random.Random(3).randbytes(300_000)
        step = len(data) if options.port else _CONSOLE_BYTES
        for start in range(0, len(data), step):
            piece = data[start : start + step]
            frames.send(piece, deadline=time.monotonic() + _SOON)
            assert frames.receive(deadline=time.monotonic() + _SOON) == piece[::-1]
        assert echo.received > len(data)
        channel.close()


def test_a_far_end_that_does_not_read_costs_the_deadline() -> None:
    """On a plain port; a port 0 ("virtconsole") of QEMU throws away what its far end does not take."""
    machine = _machine("console-split-ports")
    try:
        channel = console_channel(machine)
        begun = time.monotonic()
        with pytest.raises(BackendError) as caught:
            channel.send(bytes(4 << 20), deadline=begun + 1)
        assert caught.value.code == "channel-timeout"
        assert time.monotonic() - begun < 6
    finally:
        machine.close()


def test_a_machine_that_dies() -> None:
    machine = _machine("console-packed")
    try:
        channel = console_channel(machine)
        machine.kill()
        with pytest.raises(SvsmError):
            channel.receive(1, deadline=time.monotonic() + _SOON)
        with pytest.raises(SvsmError) as caught:
            channel.send(b"x", deadline=time.monotonic() + _SOON)
        assert caught.value.code != "channel-timeout", "it is dead, and stays so"
        channel.close()
    finally:
        machine.close()


def test_the_device_asks_for_a_reset_and_a_new_driver_gives_it() -> None:
    """Buffers that no device can use: QEMU sets NEEDS_RESET, the channel ends; the next one works."""
    machine = _machine("console-split")
    try:
        channel = console_channel(machine)
        queue = channel._inbox.queue
        table = (queue.addresses.descriptors - (16 << 20)) // 8
        for entry in range(queue.shape.size):
            queue._memory.u64[table + 2 * entry + 1] = entry << 48 | 3 << 32 | 8  # a chain that is a circle
        assert machine.console is not None
        machine.console.sendall(b"x")
        with pytest.raises(ProtocolError) as caught:
            channel.receive(1, deadline=time.monotonic() + _SOON)
        assert caught.value.code == "virtio-needs-reset"
        again = console_channel(machine)
        machine.console.settimeout(_SOON)
        again.send(b"hello", deadline=time.monotonic() + _SOON)
        assert machine.console.recv(5) == b"hello"
        again.close()
    finally:
        machine.close()


def test_a_port_that_is_not_there() -> None:
    """Port 1 exists in number, and QEMU never adds it: the deadline. Port 4 cannot be."""
    machine = _machine("console-ports")
    try:
        for port, code in ((1, "channel-timeout"), (4, "console-port")):
            with pytest.raises(SvsmError) as caught:
                console_channel(machine, ConsolePolicy(port=port, line=LinePolicy(start_seconds=0.5)))
            assert caught.value.code == code
    finally:
        machine.close()


def test_a_disk_is_no_console(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    machine = Machine(MachineOptions(MachineKind.MICROVM, disk=DiskOptions(image), program=peer("qemu-system-x86_64")))
    try:
        with pytest.raises(ProtocolError) as caught:
            ConsoleChannel(
                MmioTransport(machine.virtio_registers()), dma_memory(machine, line_memory_bytes(LinePolicy()))
            )
        assert caught.value.code == "virtio-device-type"
    finally:
        machine.close()
