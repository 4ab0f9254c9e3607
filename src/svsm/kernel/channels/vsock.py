# SPDX-License-Identifier: MIT OR Apache-2.0
"""Channel over one stream connection of a virtio socket device (VIRTIO 1.2 §5.10), from this guest to the host.

Theory. `VsockConnection` is the rules; this is the device around it: packets in from the receive queue, packets out to
the transmit queue, and an event queue, on which the only event there is (the transport was reset: this guest was
moved) ends the connection. Buffers go back to the device as soon as they are copied, because the connection's credit
bounds what is held here. Answers to strangers wait in a short queue and are dropped where it is full: a host that
floods this side with packets for connections that do not exist keeps it busy until the deadline, and costs no memory.

The end: SHUTDOWN by the host ends the stream after what it had sent (`receive` returns b""); RST breaks it.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import time
from collections.abc import Callable
from typing import Final

from svsm.abi.errors import BackendError, ProtocolError, StateError, SvsmError
from svsm.formats.record import Buffer
from svsm.formats.virtio import DeviceType
from svsm.formats.virtio_vsock import (
    EVENT_QUEUE,
    RECEIVE_QUEUE,
    RESERVED_CIDS,
    TRANSMIT_QUEUE,
    TRANSPORT_RESET,
    VsockConfig,
    VsockEvent,
    VsockFeature,
    VsockHeader,
    VsockShutdown,
)
from svsm.kernel.channels.virtio_line import LinePolicy, VirtioLine
from svsm.kernel.channels.vsock_connection import VsockConnection, VsockState
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.virtio.transport import Transport

__all__ = ["DEFAULT_PORT", "VsockChannel", "VsockPolicy"]

DEFAULT_PORT: Final = 9999
"""Of the proxy at the host."""
_CID_LIMIT: Final = 1 << 32
_EPHEMERAL_PORTS: Final = 1 << 31
"""Ports of this side are random above this, so that a connection of an earlier life is not met again."""
_EVENT_BUFFERS: Final = 2
_EVENT_BYTES: Final = 64
_MOST_ANSWERS: Final = 16


@dataclasses.dataclass(frozen=True, slots=True)
class VsockPolicy:
    """What to connect to, and how.

    Attributes:
        port: At the host (CID 2).
        receive_bytes: What the host may send before somebody reads.
        connect_seconds: For the host to accept the connection.
        line: Rings, buffers, times.
    """

    port: int = DEFAULT_PORT
    receive_bytes: int = 64 << 10
    connect_seconds: float = 10.0
    line: LinePolicy = dataclasses.field(default_factory=LinePolicy)

    def check(self) -> None:
        """Demand that it makes sense.

        Raises:
            StateError: ``virtio-policy``.
        """
        if not 0 < self.port < 1 << 32 or not 64 <= self.receive_bytes < 1 << 31 or self.connect_seconds <= 0:
            raise StateError("a socket has a port, a buffer and time to connect", code="virtio-policy")


class VsockChannel:
    """A `Channel` over a connection to the host, which this makes.

    Args:
        transport: Owned: closed with this, also where this raises.
        memory: Shared memory for this device alone; see `line_memory_bytes`.
        policy: What to use.
        clock: The transport's clock, and that of deadlines.
        pause: Sleeps for seconds.
        descriptor: What `fileno` returns: polls readable when the device may have something.
        port: Of this side; random by default.

    Raises:
        ProtocolError: The device cannot be used: ``virtio-…``, ``vsock-…``.
        BackendError: ``channel-closed`` when the host refuses, ``channel-timeout``, or the transport failed.
        StateError: ``virtio-policy``, ``dma-memory``.

    Attributes:
        cid: What this guest is called.
    """

    def __init__(
        self,
        transport: Transport,
        memory: DmaMemory,
        *,
        policy: VsockPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
        descriptor: int = -1,
        port: int | None = None,
    ) -> None:
        self._policy = policy or VsockPolicy()
        self._descriptor = descriptor
        self._answers: collections.deque[VsockHeader] = collections.deque()
        self._line = VirtioLine(
            transport,
            memory,
            device_type=DeviceType.VSOCK,
            wanted=int(VsockFeature.STREAM | VsockFeature.NO_IMPLIED_STREAM),
            policy=self._policy.line,
            clock=clock,
            pause=pause,
        )
        try:
            self._policy.check()
            self._set_up(port if port is not None else _EPHEMERAL_PORTS | int.from_bytes(os.urandom(4)) >> 1)
            self._connect(clock() + self._policy.connect_seconds)
        except SvsmError:
            self._line.close()
            raise

    def _set_up(self, port: int) -> None:
        line = self._line
        if line.features & VsockFeature.NO_IMPLIED_STREAM and not line.features & VsockFeature.STREAM:
            raise ProtocolError("the socket device has no streams", code="virtio-features-missing")
        self.cid = VsockConfig.parse(line.transport.configuration(0, VsockConfig.SIZE)).guest_cid
        if self.cid in RESERVED_CIDS or self.cid >= _CID_LIMIT:
            raise ProtocolError("no guest can have this context id", code="vsock-cid", got=self.cid)
        self._inbox = line.inbox(RECEIVE_QUEUE)
        self._outbox = line.outbox(TRANSMIT_QUEUE)
        self._events = line.inbox(EVENT_QUEUE, buffers=_EVENT_BUFFERS, buffer_bytes=_EVENT_BYTES)
        self._connection = VsockConnection(
            cid=self.cid, port=port, peer_port=self._policy.port, buffer_bytes=self._policy.receive_bytes
        )
        line.start()

    def _connect(self, deadline: float) -> None:
        self._put(self._connection.request())
        while True:
            self._turn()
            if self._connection.state is not VsockState.REQUESTED:
                return
            self._line.wait(deadline)

    @property
    def features(self) -> int:
        """As negotiated."""
        return self._line.features

    # ---- packets ----------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Take what has arrived, and send what is owed; never waits."""
        seen = []
        for slot, packet in self._inbox.take():
            seen.append(slot)
            answer = self._connection.take(packet)
            if answer is not None and len(self._answers) < _MOST_ANSWERS:
                self._answers.append(answer)
        if seen and self._inbox.lend(seen):
            self._line.kick(self._inbox.index)
        self._look_at_events()
        while self._outbox.room():
            owed = self._connection.owed()
            if owed is None:
                if not self._answers:
                    break
                owed = self._answers.popleft()
            self._put(owed)

    def _look_at_events(self) -> None:
        for _, event in self._events.take():
            if len(event) < VsockEvent.SIZE or VsockEvent.parse(event[: VsockEvent.SIZE]).id != TRANSPORT_RESET:
                raise ProtocolError("the socket device's event is none", code="vsock-packet", got=len(event))
            raise BackendError("the socket device was reset by its host", code="channel-closed")

    def _put(self, header: VsockHeader, payload: Buffer = b"") -> None:
        if self._outbox.put(header.pack(), payload):
            self._line.kick(self._outbox.index)

    # ---- Channel ----------------------------------------------------------------------------------------------------

    def send(self, data: Buffer, *, deadline: float) -> None:
        """Send all of `data`, until the device has taken it; see `Channel.send`.

        Raises:
            ProtocolError: The device is broken: ``virtio-…``, ``vsock-…``.
        """
        self._line.check()
        rest = memoryview(data).cast("B")
        asked = False
        try:
            while rest or not self._outbox.empty:
                self._turn()
                if rest:  # what the device has got already may be answered before a hang-up
                    self._demand_listener()
                window = self._connection.window
                if rest and self._outbox.room() and (window or not asked):
                    if not window:  # once for each time that it ran out
                        self._put(self._connection.ask_credit())
                        asked = True
                        continue
                    piece = rest[: min(window, self._outbox.buffer_bytes - VsockHeader.SIZE)]
                    self._put(self._connection.data(len(piece)), piece)
                    rest = rest[len(piece) :]
                    asked = False
                    self._line.progress()
                elif rest or not self._outbox.empty:
                    self._line.wait(deadline)
        except SvsmError as error:
            raise self._line.die(error) from error.__cause__

    def _demand_listener(self) -> None:
        if self._connection.state is VsockState.RESET or self._connection.peer_shutdown & VsockShutdown.RECEIVE:
            raise BackendError("the host has closed the connection", code="channel-closed")

    def receive(self, max_bytes: int, *, deadline: float) -> bytes:
        """Whatever is there, at most `max_bytes`; see `Channel.receive`.

        Raises:
            BackendError: Also ``channel-closed`` when the host broke the connection.
            ProtocolError: The device is broken: ``virtio-…``, ``vsock-…``.
        """
        self._line.check()
        if max_bytes < 1:
            raise StateError("there is nothing to receive into", code="channel-size", got=max_bytes)
        connection = self._connection
        try:
            while True:
                self._turn()
                if connection.available:
                    break
                if connection.peer_shutdown & VsockShutdown.SEND:
                    return b""
                if connection.state is VsockState.RESET:
                    raise BackendError("the host has broken the connection", code="channel-closed")
                self._line.wait(deadline)
            data = connection.read(max_bytes)
            self._line.progress()
            self._turn()  # the host may be waiting for the credit that this gave back
            return data
        except SvsmError as error:
            raise self._line.die(error) from error.__cause__

    def fileno(self) -> int:
        """As it was given."""
        return self._descriptor

    def close(self) -> None:
        """Say SHUTDOWN where somebody listens, reset the device, let go of it."""
        try:
            self._line.check()
            if self._connection.state is VsockState.CONNECTED and self._outbox.room():
                self._put(self._connection.shutdown())
        except SvsmError:
            pass  # it is over already
        finally:
            self._line.close()
