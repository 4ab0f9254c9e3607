# SPDX-License-Identifier: MIT OR Apache-2.0
"""What channels over virtio have in common: the device brought up, queues of single buffers, time, and death.

Theory. A line is a virtio device whose requests are one bounce buffer each. An `Inbox` lends the device zeroed buffers
to fill; what it says that it wrote, at most a buffer, is copied out once and judged there. An `Outbox` copies data
into a buffer of shared memory and exposes exactly that much. The queues below (`svsm.storage.drivers.virtio`) keep
the private shadow: which buffer is where, and how much may have been written.

The first thing that cannot be true ends the line: the same error on every later call, until somebody makes a new one.
A device that does nothing costs the deadline of the call. One that keeps the driver busy with nothing (empty buffers,
packets for nobody, interrupts without news) is answered with pauses, and costs the deadline too.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Final

from svsm.abi.errors import BackendError, StateError, SvsmError
from svsm.formats.record import Buffer
from svsm.formats.virtio import DeviceType, Feature
from svsm.storage.drivers.dma import HAS_FENCE, PAGE_BYTES, DmaMemory
from svsm.storage.drivers.virtio.packed import PackedQueue
from svsm.storage.drivers.virtio.queue import QueueShape, Segment, VirtQueue
from svsm.storage.drivers.virtio.split import SplitQueue
from svsm.storage.drivers.virtio.transport import Transport, negotiate

__all__ = ["Inbox", "LinePolicy", "Outbox", "VirtioLine", "line_memory_bytes"]

_FRUITLESS_TURNS: Final = 64
_STORM_PAUSE_SECONDS: Final = 0.001
_CLOSE_SECONDS: Final = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class LinePolicy:
    """What the driver wants; what the device does not offer is done without.

    Attributes:
        packed, event_idx: Use the feature where it is offered.
        buffers: In each direction, at most.
        buffer_bytes: Of each.
        start_seconds: For the device to take its reset.
        rekick_seconds: Notify again after so long without news.
        spins: How often to look before going to sleep.
    """

    packed: bool = True
    event_idx: bool = True
    buffers: int = 16
    buffer_bytes: int = 4096
    start_seconds: float = 10.0
    rekick_seconds: float = 0.05
    spins: int = 20

    def check(self) -> None:
        """Demand that it makes sense.

        Raises:
            StateError: ``virtio-policy``.
        """
        if self.buffers < 1 or not 64 <= self.buffer_bytes <= 1 << 20 or self.spins < 1:
            raise StateError("a line has buffers of 64 bytes to 1 MiB", code="virtio-policy")
        if self.start_seconds <= 0 or self.rekick_seconds <= 0:
            raise StateError("times are positive", code="virtio-policy")


def line_memory_bytes(policy: LinePolicy, *, queues: int = 4) -> int:
    """Shared memory that a line with so many queues needs at most, a whole number of pages."""
    queue = policy.buffers * (policy.buffer_bytes + 64) + PAGE_BYTES
    return (queues * queue + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES


class _Buffers:
    """A queue and its bounce buffers, one for each slot."""

    def __init__(self, index: int, queue: VirtQueue, memory: DmaMemory, buffer_bytes: int, *, inward: bool) -> None:
        self.index = index
        self.queue = queue
        self._memory = memory
        self.buffer_bytes = buffer_bytes
        self._offsets = []
        for slot in range(queue.shape.slots):
            offset = memory.allocate(buffer_bytes)
            self._offsets.append(offset)
            queue.prepare(slot, [Segment(memory.device_address(offset), buffer_bytes, device_writes=inward)])


class Inbox(_Buffers):
    """Buffers that the device fills."""

    def lend(self, slots: Sequence[int]) -> bool:
        """Give buffers to the device, zeroed; returns whether it wants to be notified."""
        for slot in slots:
            self._memory.zero(self._offsets[slot], self.buffer_bytes)
        return self.queue.publish(slots)

    def lend_all(self) -> bool:
        """Give it all of them, at the start."""
        return self.lend(range(self.queue.shape.slots))

    def take(self) -> list[tuple[int, bytes]]:
        """What the device has filled: slot, and a private copy of as much as it says that it wrote.

        Raises:
            ProtocolError: The queue's violations.
        """
        taken = []
        for slot in self.queue.collect():
            start = self._offsets[slot]
            taken.append((slot, self._memory.bytes[start : start + self.queue.written[slot]].tobytes()))
        return taken


class Outbox(_Buffers):
    """Buffers that the device reads."""

    def __init__(self, index: int, queue: VirtQueue, memory: DmaMemory, buffer_bytes: int, *, inward: bool) -> None:
        super().__init__(index, queue, memory, buffer_bytes, inward=inward)
        self._free = list(range(queue.shape.slots))

    @property
    def empty(self) -> bool:
        """Whether the device has returned everything."""
        return not self.queue.in_flight

    def room(self) -> bool:
        """Take back what the device has read; whether there is a buffer for more.

        Raises:
            ProtocolError: The queue's violations.
        """
        self._free += self.queue.collect()
        return bool(self._free)

    def put(self, *parts: Buffer) -> bool:
        """Hand one buffer over, 1 to `buffer_bytes` bytes in all, where there is `room`; whether to notify."""
        slot = self._free.pop()
        start = at = self._offsets[slot]
        for part in parts:
            view = memoryview(part).cast("B")
            self._memory.bytes[at : at + len(view)] = view
            at += len(view)
        self.queue.resize(slot, 0, at - start, False)
        return self.queue.publish([slot])


class VirtioLine:
    """A device with such queues.

    Args:
        transport: Owned: closed with this, also where this raises.
        memory: Shared memory for this device alone; see `line_memory_bytes`.
        device_type: What it has to be.
        wanted: Feature bits of the device type that are used where they are offered.
        policy: What to use.
        clock: The transport's clock.
        pause: Sleeps for seconds.

    Raises:
        ProtocolError: The device cannot be used: ``virtio-…``.
        BackendError: The transport failed.
        StateError: ``virtio-policy``.

    Attributes:
        features: As negotiated.
        transport: For its configuration space.
    """

    def __init__(
        self,
        transport: Transport,
        memory: DmaMemory,
        *,
        device_type: DeviceType,
        wanted: int,
        policy: LinePolicy,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.transport = transport
        self.policy = policy
        self.clock = clock
        self._memory = memory
        self._pause = pause
        self._boxes: list[_Buffers] = []
        self._fault: SvsmError | None = None
        self._closed = False
        self._fruitless = 0
        self._kicked = 0.0
        try:
            policy.check()
            self.features = self._negotiate(device_type, wanted)
        except SvsmError:
            transport.close()
            raise

    def _negotiate(self, device_type: DeviceType, wanted: int) -> int:
        wanted |= int(Feature.RING_PACKED) if self.policy.packed else 0
        wanted |= int(Feature.EVENT_IDX) if self.policy.event_idx else 0
        deadline = self.clock() + self.policy.start_seconds
        features = negotiate(self.transport, device_type, wanted, deadline=deadline)
        self._memory.release_all()
        return features

    def _queue(self, index: int, most: int) -> VirtQueue:
        packed = bool(self.features & Feature.RING_PACKED)
        size = min(self.transport.queue_size(index), most)
        if not packed:
            size = 1 << size.bit_length() - 1
        event_idx = bool(self.features & Feature.EVENT_IDX)
        shape = QueueShape.fit(size, chain=1, indirect=False, event_idx=event_idx, limit=size)
        queue: VirtQueue = PackedQueue(self._memory, shape) if packed else SplitQueue(self._memory, shape)
        self.transport.activate(index, size, queue.addresses)
        return queue

    def inbox(self, index: int, *, buffers: int | None = None, buffer_bytes: int | None = None) -> Inbox:
        """Set a queue up that the device writes to. Before `start`."""
        queue = self._queue(index, buffers or self.policy.buffers)
        box = Inbox(index, queue, self._memory, buffer_bytes or self.policy.buffer_bytes, inward=True)
        self._boxes.append(box)
        return box

    def outbox(self, index: int) -> Outbox:
        """Set a queue up that the device reads from. Before `start`."""
        queue = self._queue(index, self.policy.buffers)
        box = Outbox(index, queue, self._memory, self.policy.buffer_bytes, inward=False)
        self._boxes.append(box)
        return box

    def start(self) -> None:
        """DRIVER_OK, then every inbox is filled."""
        self.transport.start()
        for box in self._boxes:
            if isinstance(box, Inbox):
                box.lend_all()
        self._kick_all()

    # ---- time -------------------------------------------------------------------------------------------------------

    def kick(self, index: int) -> None:
        """Notify the device."""
        self._kicked = self.clock()
        self.transport.notify(index)

    def _kick_all(self) -> None:
        for box in self._boxes:
            self.kick(box.index)

    def progress(self) -> None:
        """Bytes have moved: what comes next is no storm."""
        self._fruitless = 0

    def wait(self, deadline: float) -> None:
        """Until a queue may have news, a while at most; the caller looks and comes back.

        Raises:
            BackendError: ``channel-timeout`` at the deadline.
            ProtocolError: The device has failed.
        """
        now = self.clock()
        if now >= deadline:
            raise BackendError(
                "nothing moved on the channel before the deadline",
                code="channel-timeout",
                hint="look whether the proxy runs and whether it reaches the broker",
            )
        self._fruitless += 1
        if self._fruitless > _FRUITLESS_TURNS:
            self._pause(min(_STORM_PAUSE_SECONDS, deadline - now))
        queues = [box.queue for box in self._boxes if box.queue.in_flight]
        for _ in range(self.policy.spins):
            for queue in queues:
                if queue.pending():
                    return
        self._sleep(queues, min(deadline, now + self.policy.rekick_seconds))
        self.transport.take_events()  # acknowledged, not believed: the queues are looked at anyway
        if any(queue.pending() for queue in queues):
            return
        self.transport.check()
        if self.clock() >= self._kicked + self.policy.rekick_seconds:
            self._kick_all()

    def _sleep(self, queues: Sequence[VirtQueue], until: float) -> None:
        armed = [queue.arm() for queue in queues]
        if not any(armed):
            if self._fruitless > _FRUITLESS_TURNS or not HAS_FENCE:
                self._pause(min(_STORM_PAUSE_SECONDS, max(0.0, until - self.clock())))
            else:
                self.transport.wait(until)
        for queue in queues:
            queue.disarm()

    # ---- the end ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Demand that nothing has ended the line.

        Raises:
            SvsmError: What did.
        """
        if self._fault is not None:
            raise self._fault

    def die(self, error: SvsmError) -> SvsmError:
        """Nothing more over this line; a deadline alone does not end it."""
        if error.code != "channel-timeout" and self._fault is None:
            self._fault = error
        return error

    def close(self) -> None:
        """Reset the device, if it takes one, and let go of the transport."""
        if self._closed:
            return
        self._closed = True
        self._boxes = []
        self._fault = BackendError("the channel was closed on this side", code="channel-closed")
        try:
            self.transport.reset(deadline=self.clock() + min(_CLOSE_SECONDS, self.policy.start_seconds))
        except SvsmError:
            pass  # it keeps its memory, which is only ever shared memory
        finally:
            self.transport.close()
