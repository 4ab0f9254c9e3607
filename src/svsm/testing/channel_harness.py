# SPDX-License-Identifier: MIT OR Apache-2.0
"""Every way that the key can come, without a machine: the kernel's channel, a device model, a scripted far end.

A `FarEnd` is a proxy reduced to bytes: it answers whole frames, gives its bytes in pieces of any size, stops, hangs
up, or never ends. `open_line` puts it behind one of the channels. All but *stream* run on a clock that moves only while
the driver waits: a deadline passes at once, and every run is the same. *stream* is a socket pair in real time, whose
far end has its turn before each `receive`. `FarEndThread` is the far end of a real device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

from svsm.abi.channel import Channel
from svsm.formats.frames import FrameDecoder
from svsm.formats.virtio import Feature
from svsm.host.devices.uart16550 import UartModel
from svsm.host.devices.virtio_console import LINE_FEATURES, ConsoleBackend, ConsoleOptions
from svsm.host.devices.virtio_ring import Window
from svsm.host.devices.virtio_stream import MmioStream, Peer, StreamBackend
from svsm.host.devices.virtio_vsock import VsockBackend, VsockOptions
from svsm.kernel.channels.stream import StreamChannel
from svsm.kernel.channels.uart16550 import COM3, UartChannel
from svsm.kernel.channels.virtio_console import ConsoleChannel, ConsolePolicy
from svsm.kernel.channels.virtio_line import LinePolicy, line_memory_bytes
from svsm.kernel.channels.vsock import VsockChannel, VsockPolicy
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.virtio.mmio import MmioTransport
from svsm.testing.virtio_harness import GPA, Clock, shared_memory

__all__ = ["LINES", "FarEnd", "FarEndThread", "InlineLine", "Line", "LineRegisters", "open_line", "virtio_line"]

LINES: Final = (
    "stream",
    "uart16550",
    "console-split",
    "console-packed",
    "console-ports",
    "vsock-split",
    "vsock-packed",
)
"""What `open_line` knows."""

_POLICY: Final = LinePolicy(buffers=8, buffer_bytes=1024, start_seconds=1.0, rekick_seconds=0.25, spins=2)


class FarEnd:
    """A `Peer` that answers frames.

    Args:
        answer: From the body of each frame that arrives to the bytes that go back (frames and all).
        piece_bytes: Give at most so many bytes at once.
        close_after: Hang up after so many bytes; None never.
        stop_after: Fall silent after so many bytes; None never.
        endless: Once the answers are out, or where `answer` gives none, repeat this for ever.
    """

    def __init__(
        self,
        answer: Callable[[bytes], bytes],
        *,
        piece_bytes: int = 1 << 20,
        close_after: int | None = None,
        stop_after: int | None = None,
        endless: bytes = b"",
    ) -> None:
        self._answer = answer
        self._decoder = FrameDecoder()
        self._waiting = bytearray()
        self._piece_bytes = piece_bytes
        self._close_after = close_after
        self._stop_after = stop_after
        self._endless = endless
        self._asked = False
        self.given = 0
        self.received = 0

    def write(self, data: bytes) -> int:
        """Take what the kernel sends."""
        self.received += len(data)
        for body in self._decoder.feed(data):
            self._waiting += self._answer(body)
            self._asked = True
        return len(data)

    def read(self, most: int) -> bytes | None:
        """Give a piece of what waits."""
        most = min(most, self._piece_bytes)
        if self._close_after is not None:
            most = min(most, self._close_after - self.given)
            if not most:
                return b""
        if self._stop_after is not None:
            most = min(most, self._stop_after - self.given)
        if self._endless and self._asked and len(self._waiting) < most:
            self._waiting += self._endless * (most // len(self._endless) + 1)
        piece = bytes(self._waiting[:most])
        del self._waiting[: len(piece)]
        self.given += len(piece)
        return piece or None

    def close(self) -> None:
        """Nothing is held."""


class FarEndThread(threading.Thread):
    """Serves a `Peer` at one end of a connected stream socket: what is behind QEMU's serial ports, or a stream.

    Args:
        connected: Owned.
        peer: Who it is.
    """

    def __init__(self, connected: socket.socket, peer: Peer) -> None:
        super().__init__(daemon=True)
        self._socket = connected
        self._peer = peer
        self._ended = threading.Event()
        connected.setblocking(False)

    def run(self) -> None:
        """Until the other side, or `end`, hangs up."""
        pending = b""
        try:
            while not self._ended.is_set():
                if not pending:
                    data = self._peer.read(65536)
                    if data == b"":
                        self._socket.shutdown(socket.SHUT_WR)
                        return
                    pending = data or b""
                wanted = [self._socket] if pending else []
                readable, writable, _ = select.select([self._socket], wanted, [], 0.05)
                if writable:
                    pending = pending[self._socket.send(pending, socket.MSG_NOSIGNAL) :]
                if readable:
                    arrived = self._socket.recv(65536)
                    if not arrived:
                        return
                    self._peer.write(arrived)
        except OSError:
            return  # the other side is gone, which is what ends tests

    def end(self) -> None:
        """Hang up and wait."""
        self._ended.set()
        self.join()
        self._socket.close()


class LineRegisters:
    """`Registers` of a device that has its turn while the driver waits.

    Args:
        device: The model.
        clock: Moved by waiting in vain.
    """

    def __init__(self, device: MmioStream, clock: Clock) -> None:
        self._device = device
        self._clock = clock

    def read32(self, offset: int) -> int:
        """A trapped load."""
        return self._device.read32(offset)

    def write32(self, offset: int, value: int) -> None:
        """A trapped store."""
        self._device.write32(offset, value)

    def wait_interrupt(self, seconds: float) -> bool:
        """The device's turn; where it has nothing to do, all the time passes."""
        if self._device.service():
            self._clock.pause(1e-6)
            return True
        self._clock.pause(seconds)
        return False

    def close(self) -> None:
        """Nothing."""


class _Ports:
    """`UartPorts` in front of a model; an access takes a microsecond."""

    def __init__(self, model: UartModel, clock: Clock) -> None:
        self._model = model
        self._clock = clock

    def in8(self, port: int, count: int = 1) -> bytes:
        """Read."""
        self._clock.pause(1e-6 * count)
        return bytes(self._model.read(port - COM3[0]) for _ in range(count))

    def out8(self, port: int, data: bytes) -> None:
        """Write."""
        self._clock.pause(1e-6 * len(data))
        for value in data:
            self._model.write(port - COM3[0], value)

    def wait_interrupt(self, line: int, seconds: float) -> bool:
        """All the time passes."""
        del line
        self._clock.pause(seconds)
        return False

    def fileno(self) -> int:
        """None."""
        return -1


class _PumpedStream(StreamChannel):
    """The stream, whose far end gives one piece before each `receive`."""

    def __init__(self, peer: Peer) -> None:
        ours, self._far = socket.socketpair()
        super().__init__(ours)
        self._far.setblocking(False)
        self._peer = peer
        self._pending = b""

    def receive(self, max_bytes: int, *, deadline: float) -> bytes:
        """See `Channel.receive`."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            self._pump_out()
        return super().receive(max_bytes, deadline=deadline)

    def _pump_out(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := self._far.recv(65536):
                self._peer.write(data)
        piece = self._pending or self._peer.read(65536)
        if piece == b"":
            self._far.shutdown(socket.SHUT_WR)
        elif piece is not None:
            self._pending = piece
            self._pending = piece[self._far.send(piece, socket.MSG_NOSIGNAL) :]

    def close(self) -> None:
        """Both ends."""
        super().close()
        self._far.close()


@dataclasses.dataclass(slots=True)
class Line:
    """A channel, and its clock."""

    channel: Channel
    clock: Callable[[], float]

    def close(self) -> None:
        """The channel."""
        self.channel.close()


@dataclasses.dataclass(slots=True)
class InlineLine:
    """What a virtio channel is made of.

    Attributes:
        device: The model.
        transport: To it.
        memory: What both share.
        clock: Moves when the driver waits.
    """

    device: MmioStream
    transport: MmioTransport
    memory: DmaMemory
    clock: Clock

    def console(self, policy: ConsolePolicy | None = None) -> ConsoleChannel:
        """The console driver on it."""
        policy = policy or ConsolePolicy(line=_POLICY)
        return ConsoleChannel(
            self.transport, self.memory, policy=policy, clock=self.clock, pause=self.clock.pause, descriptor=-1
        )

    def vsock(self, policy: VsockPolicy | None = None) -> VsockChannel:
        """The socket driver on it; its own port is always the same."""
        policy = policy or VsockPolicy(receive_bytes=4096, connect_seconds=1.0, line=_POLICY)
        return VsockChannel(
            self.transport, self.memory, policy=policy, clock=self.clock, pause=self.clock.pause, port=0x8000_0001
        )


def virtio_line(backend: StreamBackend, *, make: Callable[..., MmioStream] = MmioStream) -> InlineLine:
    """Memory, clock and transport around a device model.

    Args:
        backend: What the device is.
        make: Its class or factory, called as `MmioStream` is.
    """
    view = shared_memory(line_memory_bytes(_POLICY))
    clock = Clock()
    device = make(backend, Window(view, address=GPA))
    transport = MmioTransport(LineRegisters(device, clock), clock=clock, pause=clock.pause)
    return InlineLine(device, transport, DmaMemory(view, address=GPA), clock)


def open_line(name: str, peer: Peer) -> Line:
    """One of `LINES`, with this peer at its far end.

    Raises:
        SvsmError: The driver refuses the device.
        KeyError: There is no such line.
    """
    if name == "stream":
        return Line(_PumpedStream(peer), time.monotonic)
    if name == "uart16550":
        clock = Clock()
        return Line(UartChannel(_Ports(UartModel(peer), clock), clock=clock), clock)
    packed = {"split": False, "packed": True, "ports": True}[name.partition("-")[2]]
    common = LINE_FEATURES if packed else LINE_FEATURES & ~int(Feature.RING_PACKED)
    if name.startswith("vsock"):
        line = virtio_line(VsockBackend(lambda _port: peer, VsockOptions(common=common)))
        return Line(line.vsock(), line.clock)
    ports = name == "console-ports"
    options = ConsoleOptions(common=common, ports=4 if ports else 1, port=2 if ports else 0)
    line = virtio_line(ConsoleBackend(peer, options))
    return Line(line.console(ConsolePolicy(port=options.port, line=_POLICY)), line.clock)
