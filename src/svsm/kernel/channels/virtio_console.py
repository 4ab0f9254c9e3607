# SPDX-License-Identifier: MIT OR Apache-2.0
"""Channel over one port of a virtio console (VIRTIO 1.2 §5.3).

    one port        queues 0 and 1 carry characters, and nothing says whether anybody is at the other end
    several ports   (MULTIPORT) control messages say which ports there are, and when the far end opens and closes one

Theory. Without MULTIPORT this is a serial line with flow control: there is no end of stream, `receive` never returns
b"", and a far end that has gone costs the deadline. With it, PORT_OPEN 0 for our port ends the stream, and
DEVICE_REMOVE breaks it. The control queue has its own few buffers; what comes there about other ports is ignored, and
what cannot be (a message that is too short, a port that is added twice) ends the channel.

What the device has filled stays where it was copied to until the caller takes it; only then does the device get the
buffer again. So the device can make this side hold the buffers' size in bytes, never more. An empty buffer is nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable
from typing import Final

from svsm.abi.errors import BackendError, ProtocolError, StateError, SvsmError
from svsm.formats.record import Buffer
from svsm.formats.virtio import DeviceType
from svsm.formats.virtio_console import (
    CONTROL_RECEIVE_QUEUE,
    CONTROL_TRANSMIT_QUEUE,
    ConsoleConfig,
    ConsoleControl,
    ConsoleEvent,
    ConsoleFeature,
    port_queues,
)
from svsm.kernel.channels.virtio_line import Inbox, LinePolicy, Outbox, VirtioLine
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.virtio.transport import Transport

__all__ = ["ConsoleChannel", "ConsolePolicy"]

_MOST_PORTS: Final = 511
"""More could not be numbered: 1024 queues are what transports have (QEMU), two for each port."""
_MOST_MESSAGES: Final = 4096
"""Control messages in a device's life; an honest one sends about five for each port."""
_CONTROL_BYTES: Final = 256
_PORT_NAME_BYTES: Final = _CONTROL_BYTES - ConsoleControl.SIZE


@dataclasses.dataclass(frozen=True, slots=True)
class ConsolePolicy:
    """Which port.

    Attributes:
        port: 0, or a port of a device that has several.
        multiport: Speak MULTIPORT where it is offered; a port other than 0 demands it.
        line: Rings, buffers, times.
    """

    port: int = 0
    multiport: bool = False
    line: LinePolicy = dataclasses.field(default_factory=LinePolicy)


class ConsoleChannel:
    """A `Channel` over a virtio console.

    Args:
        transport: Owned: closed with this, also where this raises.
        memory: Shared memory for this device alone; see `line_memory_bytes`.
        policy: What to use.
        clock: The transport's clock, and that of deadlines.
        pause: Sleeps for seconds.
        descriptor: What `fileno` returns: polls readable when the device may have something.

    Raises:
        ProtocolError: The device cannot be used: ``virtio-…``, ``console-…``.
        BackendError: The transport failed, or the port did not appear (``channel-timeout``).
        StateError: ``virtio-policy``, ``dma-memory``.

    Attributes:
        features: As negotiated.
    """

    def __init__(
        self,
        transport: Transport,
        memory: DmaMemory,
        *,
        policy: ConsolePolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
        descriptor: int = -1,
    ) -> None:
        self._policy = policy or ConsolePolicy()
        self._descriptor = descriptor
        self._held: collections.deque[tuple[int, memoryview]] = collections.deque()
        self._control: _Control | None = None
        wanted = ConsoleFeature.MULTIPORT if self._policy.multiport or self._policy.port else ConsoleFeature(0)
        self._line = VirtioLine(
            transport,
            memory,
            device_type=DeviceType.CONSOLE,
            wanted=int(wanted),
            policy=self._policy.line,
            clock=clock,
            pause=pause,
        )
        try:
            self._inbox, self._outbox = self._open()
        except SvsmError:
            self._line.close()
            raise

    def _open(self) -> tuple[Inbox, Outbox]:
        line, port = self._line, self._policy.port
        several = bool(line.features & ConsoleFeature.MULTIPORT)
        ports = ConsoleConfig.parse(line.transport.configuration(0, ConsoleConfig.SIZE)).ports if several else 1
        if not port < ports <= _MOST_PORTS:
            raise ProtocolError(
                "the console has no such port",
                code="console-port",
                hint="the port's number, and a device with max_ports above it",
                expected=port,
                got=ports,
            )
        receive, transmit = port_queues(port)
        inbox, outbox = line.inbox(receive), line.outbox(transmit)
        if several:
            control_inbox = line.inbox(CONTROL_RECEIVE_QUEUE, buffer_bytes=_CONTROL_BYTES)
            self._control = _Control(line, control_inbox, line.outbox(CONTROL_TRANSMIT_QUEUE), port)
        line.start()
        if self._control is not None:
            self._control.greet(deadline=line.clock() + self._policy.line.start_seconds)
        return inbox, outbox

    @property
    def features(self) -> int:
        """As negotiated."""
        return self._line.features

    def send(self, data: Buffer, *, deadline: float) -> None:
        """Send all of `data`, until the device has taken it; see `Channel.send`.

        Raises:
            ProtocolError: The device is broken: ``virtio-…``, ``console-…``.
        """
        self._line.check()
        rest = memoryview(data).cast("B")
        try:
            while rest or not self._outbox.empty:
                self._look_at_control()
                if rest and self._control is not None and self._control.closed:
                    raise BackendError("the far end has closed its port", code="channel-closed")
                while rest and self._outbox.room():
                    piece = rest[: self._outbox.buffer_bytes]
                    if self._outbox.put(piece):
                        self._line.kick(self._outbox.index)
                    rest = rest[len(piece) :]
                    self._line.progress()
                if not self._outbox.room() or not self._outbox.empty:
                    self._line.wait(deadline)
        except SvsmError as error:
            raise self._line.die(error) from error.__cause__

    def receive(self, max_bytes: int, *, deadline: float) -> bytes:
        """Whatever is there, at most `max_bytes`; see `Channel.receive`.

        Raises:
            ProtocolError: The device is broken: ``virtio-…``, ``console-…``.
        """
        self._line.check()
        if max_bytes < 1:
            raise StateError("there is nothing to receive into", code="channel-size", got=max_bytes)
        try:
            while not self._held:
                self._collect()
                if self._held:
                    break
                self._look_at_control()
                if self._control is not None and self._control.closed:
                    return b""
                self._line.wait(deadline)
            return self._take(max_bytes)
        except SvsmError as error:
            raise self._line.die(error) from error.__cause__

    def _collect(self) -> None:
        empty = []
        for slot, data in self._inbox.take():
            if data:
                self._held.append((slot, memoryview(data)))
            else:
                empty.append(slot)
        self._lend(empty)

    def _lend(self, slots: list[int]) -> None:
        if slots and self._inbox.lend(slots):
            self._line.kick(self._inbox.index)

    def _take(self, max_bytes: int) -> bytes:
        slot, data = self._held[0]
        taken = data[:max_bytes].tobytes()
        if len(taken) == len(data):
            self._held.popleft()
            self._lend([slot])
        else:
            self._held[0] = slot, data[max_bytes:]
        self._line.progress()
        return taken

    def _look_at_control(self) -> None:
        if self._control is not None:
            self._control.look()

    def fileno(self) -> int:
        """As it was given."""
        return self._descriptor

    def close(self) -> None:
        """Close the port where the device knows of such things, reset the device, let go of it."""
        self._line.close()


class _Control:
    """The control queues of a device with several ports, as far as one port is concerned.

    Args:
        line: The device.
        inbox: Control receive queue.
        outbox: Control transmit queue.
        port: Ours.

    Attributes:
        added: The device has our port.
        opened: The far end has opened it at some time.
        closed: It has closed it since.
    """

    def __init__(self, line: VirtioLine, inbox: Inbox, outbox: Outbox, port: int) -> None:
        self._line = line
        self._inbox = inbox
        self._outbox = outbox
        self._port = port
        self._messages = 0
        self._due: list[ConsoleControl] = []
        self.added = False
        self.opened = False
        self.closed = False

    def greet(self, *, deadline: float) -> None:
        """DEVICE_READY, then wait for our port and open it.

        Raises:
            BackendError: ``channel-timeout`` where it does not appear.
        """
        self._due.append(ConsoleControl(0, ConsoleEvent.DEVICE_READY, 1))
        while not self.added or self._due or not self._outbox.empty:
            self.look()
            if not self.added or self._due or (self._outbox.room() and not self._outbox.empty):
                self._line.wait(deadline)

    def look(self) -> None:
        """Take what the device has to say, and answer it.

        Raises:
            ProtocolError: ``console-control``.
            BackendError: ``channel-closed`` when our port was removed.
        """
        seen = []
        for slot, message in self._inbox.take():
            seen.append(slot)
            self._messages += 1
            if self._messages > _MOST_MESSAGES or len(message) < ConsoleControl.SIZE:
                raise ProtocolError("a console's control message cannot be", code="console-control", got=len(message))
            control = ConsoleControl.parse(message[: ConsoleControl.SIZE])
            if control.port == self._port:
                self._mind(control)
        if seen and self._inbox.lend(seen):
            self._line.kick(self._inbox.index)
        while self._due and self._outbox.room():
            if self._outbox.put(self._due.pop(0).pack()):
                self._line.kick(self._outbox.index)
        self._outbox.room()  # also where nothing is due: its violations count

    def _mind(self, control: ConsoleControl) -> None:
        if control.event == ConsoleEvent.DEVICE_ADD:
            if self.added:
                raise ProtocolError("the console adds a port twice", code="console-control", got=control.port)
            self.added = True
            self._due.append(ConsoleControl(self._port, ConsoleEvent.PORT_READY, 1))
            self._due.append(ConsoleControl(self._port, ConsoleEvent.PORT_OPEN, 1))
        elif not self.added:
            raise ProtocolError("the console speaks of a port that is not there", code="console-control")
        elif control.event == ConsoleEvent.DEVICE_REMOVE:
            raise BackendError("the port was removed", code="channel-closed")
        elif control.event == ConsoleEvent.CONSOLE_PORT:
            self._due.append(ConsoleControl(self._port, ConsoleEvent.PORT_OPEN, 1))  # §5.3.6.2.2: a MUST
        elif control.event == ConsoleEvent.PORT_OPEN:
            # What was closed stays closed: bytes of a second visitor are not the first one's.
            self.opened = self.opened or bool(control.value)
            self.closed = self.closed or (self.opened and not control.value)
