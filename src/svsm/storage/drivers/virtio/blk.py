# SPDX-License-Identifier: MIT OR Apache-2.0
"""virtio-blk as a `BlockDevice`: negotiation, many requests in flight, time. Life and death are `lifecycle`'s.

What a device does not offer is done without, but for flushes: without them nobody knows what is durable, so `flush`
fails. `VirtioBlk.reconnect` resets the device, or takes a new transport.

Waiting: look a few times, ask for an interrupt, look again, sleep; after a wake-up without news look at the status
register, and repeat the kick from time to time, because a device may lie about not wanting one. Interrupts that
bring nothing, again and again, are answered with pauses.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from svsm.abi.block import Range
from svsm.formats.errors import ProtocolError, StateError, SvsmError
from svsm.formats.record import Buffer
from svsm.formats.virtio import SECTOR_BYTES, BlkFeature, BlkSegment, BlkStatus, BlkType, DeviceType, Feature
from svsm.storage.drivers.checks import block_io_error
from svsm.storage.drivers.dma import HAS_FENCE, PAGE_BYTES, DmaMemory
from svsm.storage.drivers.lifecycle import Confirm, QueuedDisk
from svsm.storage.drivers.virtio.blk_config import CONFIG_BYTES, Geometry, RangeLimits, parse_geometry
from svsm.storage.drivers.virtio.blk_lane import BATCH, CHAIN, Lane, LaneShape
from svsm.storage.drivers.virtio.packed import PackedQueue
from svsm.storage.drivers.virtio.queue import QueueShape, VirtQueue
from svsm.storage.drivers.virtio.split import SplitQueue
from svsm.storage.drivers.virtio.transport import Transport, negotiate

__all__ = ["BlkPolicy", "VirtioBlk", "memory_bytes"]

_ID_BYTES = 20
_FRUITLESS_WAKE_UPS = 64
_STORM_PAUSE_SECONDS = 0.001
_MOST_QUEUES = 16
_SEGMENT_FLAG_UNMAP = 1


@dataclasses.dataclass(frozen=True, slots=True)
class BlkPolicy:
    """What the driver wants; what the device does not offer is done without.

    Attributes:
        read_only: Refuse writes.
        packed, indirect, event_idx: Use the feature where it is offered.
        queues: Use so many, at most.
        queue_size: Entries of a queue, at most.
        small_bytes, large_bytes: The two sizes of bounce buffers; multiples of 512.
        large_slots: How many large ones a queue has.
        deadline_seconds: Without an answer for so long, plus a second for every MiB asked for, the device is dead.
        rekick_seconds: Notify again after so long without an answer.
        spins: How often to look before going to sleep.
        early_kick: Notify the device also before a lone request is prepared and when it is done: one that serves lone
            requests one after the other does not go to sleep between them, and one that sleeps wakes up meanwhile. It
            costs the device two turns of its loop. For transports where a kick costs little.
    """

    read_only: bool = False
    packed: bool = True
    indirect: bool = True
    event_idx: bool = True
    queues: int = 1
    queue_size: int = 256
    small_bytes: int = 4096
    large_bytes: int = 1 << 20
    large_slots: int = 4
    deadline_seconds: float = 30.0
    rekick_seconds: float = 0.05
    spins: int = 100
    early_kick: bool = False

    def check(self) -> None:
        """Demand that it makes sense.

        Raises:
            StateError: ``virtio-policy``.
        """
        sizes = (self.small_bytes, self.large_bytes)
        if any(size < SECTOR_BYTES or size % SECTOR_BYTES for size in sizes) or self.small_bytes > self.large_bytes:
            raise StateError(
                "bounce buffers are whole sectors, small ones not larger than large ones", code="virtio-policy"
            )
        if not 0 < self.queues <= _MOST_QUEUES or self.large_slots < 1 or self.queue_size < 1:
            raise StateError("the numbers of queues and buffers are at least 1", code="virtio-policy")
        if self.deadline_seconds <= 0 or self.rekick_seconds <= 0 or self.spins < 1:
            raise StateError("times are positive", code="virtio-policy")


def memory_bytes(policy: BlkPolicy) -> int:
    """Shared memory that a driver with this policy needs at most, a whole number of pages (both halves)."""
    shape = LaneShape(policy.small_bytes, policy.large_bytes, policy.large_slots)
    ring = policy.queue_size * (32 + 64 + CHAIN * 16) + PAGE_BYTES
    half = policy.queues * (ring + shape.total_bytes(policy.queue_size))
    return 2 * (half + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES + 2 * PAGE_BYTES


class VirtioBlk(QueuedDisk[Geometry]):
    """A virtio disk.

    Args:
        transport: Owned: closed with this, also where this raises.
        memory: Shared memory for this device alone; `memory_bytes` says how much is enough.
        policy: What to use.
        clock: The transport's clock.
        pause: Sleeps for seconds.

    Raises:
        ProtocolError: The device cannot be used: ``virtio-…``.
        BackendError: The transport failed.
        StateError: ``virtio-policy``, ``dma-memory``, ``virtio-shape``.

    Attributes:
        features: As negotiated.
    """

    _ahead = BATCH

    def __init__(
        self,
        transport: Transport,
        memory: DmaMemory,
        *,
        policy: BlkPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._transport = transport
        self._policy = policy = policy or BlkPolicy()
        self._pause = pause
        self.features = 0
        self._fruitless = 0
        self._lanes: list[Lane] = []
        try:
            policy.check()
        except SvsmError:
            transport.close()
            raise
        super().__init__(memory, read_only=policy.read_only, deadline_seconds=policy.deadline_seconds, clock=clock)

    # ---- bring-up ---------------------------------------------------------------------------------------------------

    def _bring_up(self, memory: DmaMemory) -> Geometry:
        transport, policy = self._transport, self._policy
        self.features = negotiate(transport, DeviceType.BLOCK, self._wanted(), deadline=self._deadline())
        geometry = parse_geometry(transport.configuration(0, CONFIG_BYTES), self.features)
        self._memory = memory
        self._buffers = LaneShape(
            max(policy.small_bytes, geometry.block_size_bytes),
            max(policy.large_bytes, geometry.block_size_bytes),
            policy.large_slots,
        )
        whole = self._buffers.large_bytes // geometry.block_size_bytes * geometry.block_size_bytes
        self._piece_bytes = min(whole, geometry.transfer_bytes)
        self._lanes = [self._lane(index) for index in range(min(policy.queues, geometry.queues))]
        transport.start()
        return geometry

    def _wanted(self) -> int:
        wanted = BlkFeature.SIZE_MAX | BlkFeature.SEG_MAX | BlkFeature.RO | BlkFeature.BLK_SIZE | BlkFeature.FLUSH
        wanted |= BlkFeature.DISCARD | BlkFeature.WRITE_ZEROES
        bits, policy = int(wanted), self._policy
        for use, bit in (
            (policy.queues > 1, BlkFeature.MQ),
            (policy.packed, Feature.RING_PACKED),
            (policy.indirect, Feature.INDIRECT_DESC),
            (policy.event_idx, Feature.EVENT_IDX),
        ):
            bits |= int(bit) if use else 0
        return bits

    def _lane(self, index: int) -> Lane:
        packed = bool(self.features & Feature.RING_PACKED)
        size = min(self._transport.queue_size(index), self._policy.queue_size)
        if not packed:
            size = 1 << size.bit_length() - 1
        shape = QueueShape.fit(
            size,
            chain=CHAIN,
            indirect=bool(self.features & Feature.INDIRECT_DESC),
            event_idx=bool(self.features & Feature.EVENT_IDX),
            limit=size,
        )
        if not shape.slots:
            raise ProtocolError(
                "the queue has no room for one request", code="virtio-queue-size", expected=CHAIN, got=size
            )
        queue: VirtQueue = PackedQueue(self._memory, shape) if packed else SplitQueue(self._memory, shape)
        lane = Lane(index, queue, self._memory, self._buffers)
        self._transport.activate(index, size, queue.addresses)
        return lane

    def reconnect(self, transport: Transport | None = None) -> None:
        """Reset the device, or take a new transport to it, and start again; what was dead lives again.

        Raises:
            ProtocolError, BackendError: It cannot be used; it stays dead.
            StateError: ``block-closed``.
        """
        self._demand_open()
        if transport is not None:
            self._transport.close()
            self._transport = transport
        self._restart()

    # ---- time -------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """A new call begins: earlier fruitless wake-ups are forgotten."""
        self._fruitless = 0
        self._kicked = self._clock()

    def _await(self, deadline: float) -> None:
        """Wait for news, a while at most; the caller looks and comes back."""
        busy = [lane for lane in self._lanes if lane.queue.in_flight]
        for _ in range(self._policy.spins):
            for lane in busy:
                if lane.queue.pending():
                    return
        now = self._clock()
        if now >= deadline:
            raise ProtocolError("the device does not answer in time", code="virtio-timeout")
        until = min(deadline, now + self._policy.rekick_seconds)
        armed = [lane.queue.arm() for lane in busy]
        if not any(armed):
            if self._fruitless >= _FRUITLESS_WAKE_UPS or not HAS_FENCE:
                self._pause(min(_STORM_PAUSE_SECONDS, until - now))
            else:
                self._transport.wait(until)
        for lane in busy:
            lane.queue.disarm()
        self._look_at_events()
        if any(lane.queue.pending() for lane in busy):
            return
        self._fruitless += 1
        self._transport.check()
        if self._clock() >= self._kicked + self._policy.rekick_seconds:
            for lane in busy:
                self._kick(lane)

    def _kick(self, lane: Lane) -> None:
        self._kicked = self._clock()
        self._transport.notify(lane.index)

    def _look_at_events(self) -> None:
        """Capacity may change while the device runs; nothing else is taken over."""
        if self._transport.take_events().configuration:
            self._resized(parse_geometry(self._transport.configuration(0, CONFIG_BYTES), self.features).size_bytes)

    # ---- requests ---------------------------------------------------------------------------------------------------

    def _transfer(
        self, pieces: Sequence[Any], results: list[bytes] | None, deadline: float, confirm: Confirm | None = None
    ) -> int:
        """Run all pieces, as many at a time as the queues take."""
        self._begin()
        at = done = worst = 0
        total, lanes = len(pieces), self._lanes
        while done < total:
            before = at + done  # neither ever goes back
            for lane in lanes:
                if at < total and lane.wants_more():
                    at, kick = lane.fill_writes(pieces, at) if results is None else lane.fill_reads(pieces, at)
                    if kick:
                        self._kick(lane)
                    if confirm is not None:
                        if not confirm():
                            total = at
                        confirm = None
                finished, status = lane.drain(results)
                done += finished
                if status > worst:
                    worst = status
            if at + done == before:
                self._await(deadline)
        return worst

    def _announce(self) -> None:
        """One more kick, where the policy wants it."""
        if self._policy.early_kick:
            self._transport.notify(0)

    def _single(self, offset: int, length: int, data: Buffer | None) -> tuple[int, bytes]:
        """One request, the short way: what can wait is done when the device is already at work."""
        lane, results = self._lanes[0], [b""]
        _, kick = lane.fill_reads([(offset, length)], 0) if data is None else lane.fill_writes([(offset, data)], 0)
        if kick:
            self._transport.notify(0)
        self._begin()
        deadline = self._deadline(length)
        while True:
            pending = lane.queue.pending
            for _ in range(self._policy.spins):
                if pending():
                    self._announce()
                    break
            finished, status = lane.drain(None if data is not None else results)
            if finished:
                return status, results[0]
            self._await(deadline)

    def _command(self, kind: BlkType, deadline: float, data: bytes = b"", answer_bytes: int = 0) -> tuple[int, bytes]:
        """One request that moves no blocks: its status and answer."""
        self._begin()
        lane = self._lanes[0]
        started = lane.control(kind, data, answer_bytes)
        if started is None:
            raise ProtocolError("no request slot is free", code="virtio-no-slot")
        slot, kick = started
        if kick:
            self._kick(lane)
        while (finished := lane.finish_control(slot, answer_bytes)) is None:
            self._await(deadline)
        return finished

    def _meaning(self, status: int) -> str:
        return "it does not know the request" if status == BlkStatus.UNSUPPORTED else "I/O error"

    def _check_flush(self) -> None:
        if not self._shape.flush:
            raise block_io_error("flush", "it does not offer flushes, so nothing on it is known to be durable")

    def _flush(self, deadline: float) -> int:
        return self._command(BlkType.FLUSH, deadline)[0]

    @property
    def _discards(self) -> bool:
        return self._shape.discard is not None

    def _discard(self, ranges: Sequence[Range], deadline: float) -> int:
        return self._give_up(BlkType.DISCARD, ranges, self._shape.discard, deadline)

    @property
    def _zeroes(self) -> bool:
        return self._shape.write_zeroes is not None

    def _write_zeroes(self, ranges: Sequence[Range], deadline: float) -> int:
        return self._give_up(BlkType.WRITE_ZEROES, ranges, self._shape.write_zeroes, deadline)

    def _give_up(self, kind: BlkType, ranges: Sequence[Range], limits: RangeLimits | None, deadline: float) -> int:
        """Requests for whole ranges, cut to the device's limits; each has the time of a call."""
        if limits is None:
            return BlkStatus.UNSUPPORTED
        segments: list[bytes] = []
        flags = _SEGMENT_FLAG_UNMAP if limits.unmap else 0
        most = min(limits.segments, self._buffers.small_bytes // BlkSegment.SIZE)
        for offset, length in ranges:
            sector, end = offset // SECTOR_BYTES, (offset + length) // SECTOR_BYTES
            while sector < end:
                # Cut at multiples of the limit, which is a multiple of the device's alignment.
                step = min(end - sector, limits.sectors - sector % limits.sectors)
                segments.append(BlkSegment(sector, step, flags).pack())
                sector += step
                if len(segments) == most:
                    status, _ = self._command(kind, deadline, b"".join(segments))
                    if status:
                        return status
                    segments.clear()
                    deadline = self._deadline()
        return self._command(kind, deadline, b"".join(segments))[0] if segments else BlkStatus.OK

    def get_id(self) -> bytes:
        """What the device calls itself: up to 20 bytes, up to the first zero. Not to be believed.

        Raises:
            BackendError, StateError: As `read`; also where the device does not know the request.
        """
        self._admit()
        self._demand_alive("tell its name")
        answer = b""

        def ask(deadline: float) -> int:
            nonlocal answer
            status, answer = self._command(BlkType.GET_ID, deadline, b"", _ID_BYTES)
            return status

        self._request("tell its name", ask)
        return answer.split(b"\0", 1)[0]

    # ---- the rest of its life ---------------------------------------------------------------------------------------

    def _ask_size(self, deadline: float) -> int:
        """Whether a notice has come; a device need not be asked without one."""
        self._look_at_events()
        self._transport.check()
        return self._size

    def _stop(self, *, deadline: float) -> None:
        self._transport.reset(deadline=deadline)

    def _release(self) -> None:
        self._transport.close()
