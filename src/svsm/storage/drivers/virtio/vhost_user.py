# SPDX-License-Identifier: MIT OR Apache-2.0
"""A virtio disk behind a vhost-user back-end (qemu-storage-daemon, SPDK …): the front-end's transport.

Theory. There are no registers: a Unix socket carries what they would (features, configuration, where the rings are),
and three eventfds per queue carry kicks, wake-ups and errors. The data path is the same shared memory as behind any
other transport. The back-end reaches that memory and nothing else, because it is all it has a descriptor of: what
ACCESS_PLATFORM promises elsewhere is a fact here, so only VERSION_1 is mandatory.

Order: GET_FEATURES, GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES (MQ, REPLY_ACK, CONFIG where offered; CONFIG must
be), SET_OWNER, GET_QUEUE_NUM, SET_MEM_TABLE; then what the driver does: SET_FEATURES, GET_CONFIG, for each queue
SET_VRING_NUM, BASE, ADDR, ERR, CALL, KICK, and at the start SET_VRING_ENABLE for all. A reset is GET_VRING_BASE for
every queue: its answer comes when the queue stands still. With REPLY_ACK every message is answered; without it the
start ends with one more GET_FEATURES, whose answer says that everything before has been taken.

Death shows at the socket: a back-end that is killed, or that panics over a ring, closes it, and rarely signals the
error eventfd. So the socket is in the same poll set as the wake-ups, and `check` looks at it. A transport is one
connection and dies with it; a second life is a new connection (`VhostUserBlk.reconnect`).

Eventfds are shared *open files*: the back-end could fill their counters and make them blocking. The wake-ups are
therefore never read (edge-triggered epoll), and a kick that does not fit is dropped: there are kicks enough in the
counter. What remains is docs/vhost-user.md's subject.

Not used: back-end requests (so no notice of a changed capacity), in-flight tracking, logging, STATUS, several regions.
"""

from __future__ import annotations

import math
import os
import select
import socket
import time
from collections.abc import Callable
from typing import Final

from svsm.formats.errors import BackendError, ProtocolError, SvsmError
from svsm.formats.vhost_user import (
    MAX_CONFIG_BYTES,
    ConfigHeader,
    ProtocolFeature,
    Request,
    U64Payload,
    VhostFeature,
    VringState,
)
from svsm.formats.vhost_user_messages import (
    choose_protocol_features,
    demand_protocol_features,
    get_config,
    judge_config,
    judge_queues,
    judge_vring,
    memory_table,
    vring_messages,
)
from svsm.formats.virtio import DeviceType, Feature, QueueAddresses
from svsm.storage.drivers.virtio.blk import BlkPolicy, VirtioBlk, memory_bytes
from svsm.storage.drivers.virtio.transport import Events, Transport
from svsm.storage.drivers.virtio.vhost_user_socket import Connection, SharedMemory, connect

__all__ = ["QUEUE_ENTRIES", "VhostUserBlk", "VhostUserTransport", "open_vhost_user"]

QUEUE_ENTRIES: Final = 1024
"""vhost-user has no message that asks for it; this is what libvhost-user (QEMU) takes."""
_EVENTS_PER_POLL: Final = 64


class _Vring:
    """The eventfds of one queue."""

    def __init__(self) -> None:
        self.descriptors: list[int] = []
        try:
            for _ in range(3):
                self.descriptors.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        except OSError as error:
            self.close()
            raise BackendError(f"no event descriptor: {error}", code="vhost-user-memory") from error
        self.kick, self.call, self.error = self.descriptors

    def close(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())


class VhostUserTransport:
    """A `Transport` over one vhost-user connection.

    Args:
        connected: A stream socket to the back-end; owned.
        memory: What the driver's `DmaMemory` is the view of; stays the caller's.
        clock: What deadlines are measured with; real time, because the poll is.
        answer_seconds: Longest time for one exchange, but for a reset, which has a deadline of its own.
        queue_entries: Largest queue.
        device_type: What is behind the socket: the protocol does not say, whoever chose the socket does.

    Attributes:
        protocol_features: As negotiated.
    """

    mandatory_features = int(Feature.VERSION_1)

    def __init__(
        self,
        connected: socket.socket,
        memory: SharedMemory,
        *,
        clock: Callable[[], float] = time.monotonic,
        answer_seconds: float = 5.0,
        queue_entries: int = QUEUE_ENTRIES,
        device_type: DeviceType = DeviceType.BLOCK,
    ) -> None:
        self._connection = Connection(connected, clock=clock)
        self._memory = memory
        self._clock = clock
        self._answer_seconds = answer_seconds
        self._queue_entries = queue_entries
        self._device_type = device_type
        self.protocol_features = 0
        self._offered: int | None = None
        self._queues = 1
        self._packed = False
        self._vrings: dict[int, _Vring] = {}
        self._errors: set[int] = set()
        self._woken = False
        self._failed = False
        self._poll = select.epoll()
        self._poll.register(self._connection, select.EPOLLIN | select.EPOLLRDHUP)

    # ---- start ------------------------------------------------------------------------------------------------------

    @property
    def device_type(self) -> int:
        """As it was given."""
        return self._device_type

    def _deadline(self) -> float:
        return self._clock() + self._answer_seconds

    def reset(self, *, deadline: float) -> None:
        """The first time, get acquainted; later, stop every queue and wait until it stands still."""
        if self._offered is None:
            self._introduce(deadline)
            return
        for index in sorted(self._vrings):
            payload = VringState(index, 0).pack()
            answer = self._connection.ask(Request.GET_VRING_BASE, payload, VringState.SIZE, deadline=deadline)
            judge_vring(answer, index)
        self._let_go_of_vrings()
        self._offered = self._connection.ask_u64(Request.GET_FEATURES, deadline=deadline)
        demand_protocol_features(self._offered)

    def _introduce(self, deadline: float) -> None:
        connection = self._connection
        self._offered = connection.ask_u64(Request.GET_FEATURES, deadline=deadline)
        demand_protocol_features(self._offered)
        offered = connection.ask_u64(Request.GET_PROTOCOL_FEATURES, deadline=deadline)
        self.protocol_features = choose_protocol_features(offered)
        payload = U64Payload(self.protocol_features).pack()
        connection.tell(Request.SET_PROTOCOL_FEATURES, payload, deadline=deadline)
        connection.acknowledged = bool(self.protocol_features & ProtocolFeature.REPLY_ACK)
        connection.tell(Request.SET_OWNER, deadline=deadline)
        if self.protocol_features & ProtocolFeature.MQ:
            self._queues = judge_queues(connection.ask(Request.GET_QUEUE_NUM, b"", U64Payload.SIZE, deadline=deadline))
        connection.tell(
            Request.SET_MEM_TABLE,
            memory_table([self._memory.region]),
            deadline=deadline,
            descriptors=[self._memory.descriptor],
        )

    def features(self) -> int:
        """What the back-end offered at the last reset, without what is vhost's own."""
        return (self._offered or 0) & ~int(VhostFeature.PROTOCOL_FEATURES | VhostFeature.LOG_ALL)

    def accept(self, features: int) -> None:
        """SET_FEATURES; without acknowledgements nothing says whether the back-end agrees."""
        self._packed = bool(features & Feature.RING_PACKED)
        payload = U64Payload(features | VhostFeature.PROTOCOL_FEATURES).pack()
        self._connection.tell(Request.SET_FEATURES, payload, deadline=self._deadline())

    # ---- queues -----------------------------------------------------------------------------------------------------

    def queue_size(self, index: int) -> int:
        """The same for each: the protocol has no question for it."""
        if index in self._vrings:
            raise ProtocolError("the queue is in use", code="virtio-queue-busy", queue=index)
        if not 0 <= index < self._queues:
            raise ProtocolError("the device has no such queue", code="virtio-queue-missing", queue=index)
        return self._queue_entries

    def activate(self, index: int, size: int, addresses: QueueAddresses) -> None:
        """Everything about one queue, its eventfds last."""
        deadline = self._deadline()
        vring = self._vrings[index] = _Vring()
        try:
            self._poll.register(vring.call, select.EPOLLIN | select.EPOLLET)
            self._poll.register(vring.error, select.EPOLLIN | select.EPOLLET)
        except OSError as error:
            raise BackendError(f"no event descriptor: {error}", code="vhost-user-memory") from error
        self._errors.add(vring.error)
        messages = vring_messages(
            index,
            size,
            addresses,
            packed=self._packed,
            user_address=self._memory.user_address,
            eventfds=(vring.kick, vring.call, vring.error),
        )
        for request, payload, descriptors in messages:
            self._connection.tell(request, payload, deadline=deadline, descriptors=descriptors)

    def start(self) -> None:
        """Enable the queues, and know that the back-end has done so."""
        deadline = self._deadline()
        for index in sorted(self._vrings):
            self._connection.tell(Request.SET_VRING_ENABLE, VringState(index, 1).pack(), deadline=deadline)
        if not self._connection.acknowledged:
            self._connection.ask_u64(Request.GET_FEATURES, deadline=deadline)

    # ---- running ----------------------------------------------------------------------------------------------------

    def notify(self, index: int) -> None:
        """One more in the kick's counter."""
        try:
            os.eventfd_write(self._vrings[index].kick, 1)
        except BlockingIOError:
            pass  # full: only the back-end itself can have done that, and it has its kick
        except (KeyError, OSError) as error:
            raise BackendError("there is no queue to notify", code="vhost-user-gone", queue=index) from error

    def wait(self, deadline: float) -> None:
        """A wake-up, the end of the connection, or the time."""
        seconds = max(0.0, deadline - self._clock())
        try:
            ready = self._poll.poll(math.ceil(seconds * 1000) / 1000, _EVENTS_PER_POLL)
        except (OSError, ValueError) as error:
            raise BackendError("the transport is closed", code="vhost-user-gone") from error
        for descriptor, _ in ready:
            if descriptor in self._errors:
                self._failed = True
            elif descriptor != self._connection.fileno():
                self._woken = True

    def take_events(self) -> Events:
        """Whether `wait` saw a wake-up. Changes of the configuration are not announced on this transport."""
        used, self._woken = self._woken, False
        return Events(used=used, configuration=False)

    def check(self) -> None:
        """The connection stands, and no queue has reported an error."""
        self._connection.check()
        if self._failed:
            raise ProtocolError("the back-end reports an error on a queue", code="virtio-needs-reset")

    def configuration(self, offset: int, length: int) -> bytes:
        """GET_CONFIG: one message, so all of one moment."""
        if not 0 < length <= MAX_CONFIG_BYTES or not 0 <= offset <= MAX_CONFIG_BYTES - length:
            raise ProtocolError("no such part of the configuration", code="virtio-config-range", offset=offset)
        answer = self._connection.ask(
            Request.GET_CONFIG,
            get_config(offset, length),
            ConfigHeader.SIZE + length,
            deadline=self._deadline(),
        )
        return judge_config(answer, offset, length)

    def _let_go_of_vrings(self) -> None:
        while self._vrings:
            self._vrings.popitem()[1].close()
        self._errors.clear()
        self._woken = self._failed = False

    def close(self) -> None:
        """Close the socket, the poller and the eventfds."""
        self._connection.close()
        self._poll.close()
        self._let_go_of_vrings()


class VhostUserBlk(VirtioBlk):
    """A disk behind a back-end's socket, which can be connected to again.

    Args:
        endpoint: Makes a connected socket, each time it is called.
        policy: What to use of the device.
        clock: Real time.
        pause: Sleeps for seconds.
        answer_seconds: Longest time for one message's answer.

    Raises:
        BackendError: ``vhost-user-connect``, ``vhost-user-gone``, ``vhost-user-memory``.
        ProtocolError: ``vhost-user-…``, ``virtio-…``: the back-end cannot be used.
        StateError: ``virtio-policy``, ``dma-memory``.
    """

    def __init__(
        self,
        endpoint: Callable[[], socket.socket],
        *,
        policy: BlkPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
        answer_seconds: float = 5.0,
    ) -> None:
        policy = policy or BlkPolicy(early_kick=True)
        policy.check()
        self._endpoint = endpoint
        self._answer_seconds = answer_seconds
        self._shared = SharedMemory(memory_bytes(policy))
        self._clock = clock
        try:
            super().__init__(self._fresh(), self._shared.dma, policy=policy, clock=clock, pause=pause)
        except SvsmError:
            self._shared.close()
            raise

    def _fresh(self) -> VhostUserTransport:
        return VhostUserTransport(
            self._endpoint(), self._shared, clock=self._clock, answer_seconds=self._answer_seconds
        )

    def reconnect(self, transport: Transport | None = None) -> None:
        """Connect again, or take a transport over; what was dead lives again.

        A live back-end is left first, by closing its connection: it serves one client at a time.

        Raises:
            BackendError, ProtocolError: As at the start; it stays dead.
            StateError: ``block-closed``.
        """
        self._demand_open()
        if transport is None:
            self._transport.close()
            try:
                transport = self._fresh()
            except SvsmError as error:
                self.fault = error
                raise
        super().reconnect(transport)

    def close(self) -> None:
        """Stop the device, if it is there, and let go of everything."""
        super().close()
        self._shared.close()


def open_vhost_user(path: str, *, policy: BlkPolicy | None = None, answer_seconds: float = 5.0) -> VhostUserBlk:
    """The disk that a daemon serves at a Unix socket.

    Args:
        path: Of the socket.
        policy: What to use of the device.
        answer_seconds: Longest time for connecting, and for one message's answer.

    Raises:
        SvsmError: As `VhostUserBlk`.
    """
    return VhostUserBlk(lambda: connect(path, seconds=answer_seconds), policy=policy, answer_seconds=answer_seconds)
