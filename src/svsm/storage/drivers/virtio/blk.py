# SPDX-License-Identifier: MIT OR Apache-2.0
"""virtio-blk as a `BlockDevice`: negotiation, many requests in flight, time, death and a second life.

Theory. A call cuts its ranges into pieces that fit a buffer, keeps the queues filled with them, and returns when the
last one is done, in whatever order the device likes. Nothing is in flight between calls. The first thing that the
device cannot mean, a missed deadline, or a status register that asks for a reset kills the device: the call ends with
``block-io`` (its `violation` names the code), so does every later one, and its memory stays lent. `reconnect` resets
it (or takes a new transport) and starts again in the other half of the memory, so that a device which is merely slow
writes into a half that nobody reads. If writes had been accepted since the last flush, the next flush fails once:
nobody knows whether they outlived the reset.

What virtio cannot see: old contents replayed, sectors swapped, data corrupted. That is for whoever is above.

Waiting: look a few times, ask for an interrupt, look again, sleep; after a wake-up without news look at the status
register, and repeat the kick from time to time, because a device may lie about not wanting one. Interrupts that
bring nothing, again and again, are answered with pauses. A call's deadline grows with what it moves.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence

from svsm.abi.block import Extent, Range
from svsm.formats.errors import BackendError, ProtocolError, StateError, SvsmError
from svsm.formats.virtio import SECTOR_BYTES, BlkFeature, BlkSegment, BlkStatus, BlkType, DeviceType, Feature
from svsm.storage.drivers.checks import block_io_error, check_ranges, closed_error, read_only_error
from svsm.storage.drivers.dma import HAS_FENCE, PAGE_BYTES, DmaMemory
from svsm.storage.drivers.virtio.blk_config import CONFIG_BYTES, Geometry, RangeLimits, parse_geometry
from svsm.storage.drivers.virtio.blk_lane import CHAIN, Lane, LaneShape, Piece
from svsm.storage.drivers.virtio.packed import PackedQueue
from svsm.storage.drivers.virtio.queue import QueueShape, VirtQueue
from svsm.storage.drivers.virtio.split import SplitQueue
from svsm.storage.drivers.virtio.transport import Transport

__all__ = ["BlkPolicy", "VirtioBlk", "memory_bytes"]

_ID_BYTES = 20
_SLOWEST_BYTES_PER_SECOND = 1 << 20
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


class VirtioBlk:
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
        fault: Why the device is dead, or None.
        resizes: How many times the capacity has changed.
    """

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
        self._policy = policy or BlkPolicy()
        self._clock = clock
        self._pause = pause
        self.features = 0
        self.fault: SvsmError | None = None
        self.resizes = 0
        self._closed = False
        self._unflushed = False
        self._lost_writes = False
        self._generation = 0
        self._fruitless = 0
        self._lanes: list[Lane] = []
        half = memory.size_bytes // 2 // PAGE_BYTES * PAGE_BYTES
        try:
            self._policy.check()
            if not half:
                raise StateError("the shared memory is too small for this driver", code="dma-memory")
            self._halves = (memory.part(0, half), memory.part(half, half))
            self._geometry = self._bring_up()
        except SvsmError:
            self._closed = True
            transport.close()
            raise

    # ---- bring-up ---------------------------------------------------------------------------------------------------

    def _bring_up(self) -> Geometry:
        transport, policy = self._transport, self._policy
        if transport.device_type != DeviceType.BLOCK:
            raise ProtocolError("the device is no disk", code="virtio-device-type", got=transport.device_type)
        transport.reset(deadline=self._clock() + policy.deadline_seconds)
        offered = transport.features()
        missing = transport.mandatory_features & ~offered
        if missing:
            raise ProtocolError(
                "the device does not offer what a confidential VM needs",
                code="virtio-features-missing",
                hint="QEMU: iommu_platform=on, and the modern interface",
                expected=transport.mandatory_features,
                got=offered,
            )
        self.features = offered & (transport.mandatory_features | self._wanted())
        transport.accept(self.features)
        geometry = parse_geometry(transport.configuration(0, CONFIG_BYTES), self.features)
        self._memory = self._halves[self._generation % 2]
        self._memory.release_all()
        self._shape = LaneShape(
            max(policy.small_bytes, geometry.block_size_bytes),
            max(policy.large_bytes, geometry.block_size_bytes),
            policy.large_slots,
        )
        self._piece_bytes = min(
            self._shape.large_bytes // geometry.block_size_bytes * geometry.block_size_bytes, geometry.transfer_bytes
        )
        self._lanes = [self._lane(index) for index in range(min(policy.queues, geometry.queues))]
        transport.start()
        return geometry

    def _wanted(self) -> int:
        wanted = BlkFeature.SIZE_MAX | BlkFeature.SEG_MAX | BlkFeature.RO | BlkFeature.BLK_SIZE | BlkFeature.FLUSH
        wanted |= BlkFeature.DISCARD | BlkFeature.WRITE_ZEROES
        bits = int(wanted) | int(Feature.VERSION_1 | Feature.ACCESS_PLATFORM)
        policy = self._policy
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
        lane = Lane(index, queue, self._memory, self._shape)
        self._transport.activate(index, size, queue.addresses)
        return lane

    def reconnect(self, transport: Transport | None = None) -> None:
        """Reset the device, or take a new transport to it, and start again; what was dead lives again.

        Raises:
            ProtocolError, BackendError: It cannot be used; it stays dead.
            StateError: ``block-closed``.
        """
        if self._closed:
            raise closed_error()
        if transport is not None:
            self._transport.close()
            self._transport = transport
        self._generation += 1
        self._lost_writes = self._lost_writes or self._unflushed
        before = self._geometry.size_bytes
        try:
            self._geometry = self._bring_up()
        except SvsmError as error:
            self.fault = error
            raise
        self.fault = None
        self.resizes += self._geometry.size_bytes != before

    # ---- time -------------------------------------------------------------------------------------------------------

    def _deadline(self, moved_bytes: int = 0) -> float:
        return self._clock() + self._policy.deadline_seconds + moved_bytes / _SLOWEST_BYTES_PER_SECOND

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
        if self._transport.take_events().configuration:
            self._read_geometry()

    def _read_geometry(self) -> None:
        """Capacity may change while the device runs; nothing else is taken over."""
        fresh = parse_geometry(self._transport.configuration(0, CONFIG_BYTES), self.features)
        size = fresh.size_bytes // self._geometry.block_size_bytes * self._geometry.block_size_bytes
        if size != self._geometry.size_bytes:
            self.resizes += 1
            self._geometry = dataclasses.replace(self._geometry, size_bytes=size)

    # ---- requests ---------------------------------------------------------------------------------------------------

    def _die(self, operation: str, error: SvsmError) -> BackendError:
        self.fault = error
        return self._dead(operation, error)

    def _dead(self, operation: str, error: SvsmError) -> BackendError:
        failed = block_io_error(operation, error.message)
        failed.details["violation"] = error.code
        failed.hint = error.hint
        return failed

    def _check(self, operation: str, ranges: Sequence[Range], *, writing: bool) -> None:
        if self._closed:
            raise closed_error()
        check_ranges(ranges, size_bytes=self._geometry.size_bytes, block_size_bytes=self._geometry.block_size_bytes)
        if writing and self.read_only:
            raise read_only_error()
        if self.fault is not None:
            raise self._dead(operation, self.fault)

    def _transfer(self, kind: BlkType, pieces: Sequence[Piece], results: list[bytes] | None) -> None:
        """Run all pieces, as many at a time as the queues take."""
        operation = "read" if results is not None else "write"
        deadline = self._deadline(sum([piece[1] for piece in pieces]))
        at = done = worst = 0
        self._fruitless = 0
        self._kicked = self._clock()
        try:
            while done < len(pieces):
                progress = 0
                for lane in self._lanes:
                    if at < len(pieces):
                        at, kick = lane.fill(kind, pieces, at)
                        if kick:
                            self._kick(lane)
                    finished, status = lane.drain(results)
                    progress += finished
                    worst = max(worst, status)
                done += progress
                if not progress and done < len(pieces):
                    self._await(deadline)
        except (ProtocolError, BackendError) as error:
            raise self._die(operation, error) from error
        if worst:
            raise self._status_error(operation, worst)

    def _status_error(self, operation: str, status: int) -> BackendError:
        reason = "it does not know the request" if status == BlkStatus.UNSUPPORTED else "I/O error"
        return block_io_error(operation, reason)

    def _command(self, operation: str, kind: BlkType, data: bytes = b"", answer_bytes: int = 0) -> bytes:
        """One request that moves no blocks."""
        deadline = self._deadline()
        self._fruitless = 0
        self._kicked = self._clock()
        lane = self._lanes[0]
        try:
            started = lane.control(kind, data, answer_bytes)
            if started is None:
                raise ProtocolError("no request slot is free", code="virtio-no-slot")
            slot, kick = started
            if kick:
                self._kick(lane)
            while (finished := lane.finish_control(slot, answer_bytes)) is None:
                self._await(deadline)
        except (ProtocolError, BackendError) as error:
            raise self._die(operation, error) from error
        status, answer = finished
        if status:
            raise self._status_error(operation, status)
        return answer

    def _pieces(self, offset: int, length: int) -> Iterable[tuple[int, int, int]]:
        """(sector, offset into the range, bytes) of one range."""
        for at in range(0, length, self._piece_bytes):
            yield (offset + at) // SECTOR_BYTES, at, min(self._piece_bytes, length - at)

    # ---- BlockDevice ------------------------------------------------------------------------------------------------

    @property
    def size_bytes(self) -> int:
        """Capacity, as the device stated it last."""
        return self._geometry.size_bytes

    @property
    def block_size_bytes(self) -> int:
        """Granularity, as the device stated it at the start."""
        return self._geometry.block_size_bytes

    @property
    def read_only(self) -> bool:
        """Whether the device or the policy refuses writes."""
        return self._geometry.read_only or self._policy.read_only

    @property
    def geometry(self) -> Geometry:
        """Sizes and limits that are in force."""
        return self._geometry

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The contents of each range; all of them are in flight together."""
        self._check("read", ranges, writing=False)
        limit = self._piece_bytes
        if all(0 < length <= limit for _, length in ranges):
            pieces: list[Piece] = [(offset // SECTOR_BYTES, length, b"") for offset, length in ranges]
            results = [b""] * len(pieces)
            self._transfer(BlkType.IN, pieces, results)
            return results
        pieces = []
        counts = []
        for offset, length in ranges:
            cut = [(sector, size, b"") for sector, _, size in self._pieces(offset, length)]
            pieces += cut
            counts.append(len(cut))
        results = [b""] * len(pieces)
        self._transfer(BlkType.IN, pieces, results)
        contents, start = [], 0
        for count in counts:
            contents.append(b"".join(results[start : start + count]))
            start += count
        return contents

    def write(self, extents: Sequence[Extent]) -> None:
        """Write all extents; all of them are in flight together."""
        ranges = [(offset, len(data)) for offset, data in extents]
        self._check("write", ranges, writing=True)
        limit = self._piece_bytes
        if all(0 < length <= limit for _, length in ranges):
            self._unflushed = self._unflushed or bool(ranges)
            self._transfer(BlkType.OUT, [(offset // SECTOR_BYTES, len(data), data) for offset, data in extents], None)
            return
        pieces: list[Piece] = []
        for offset, data in extents:
            if len(data) <= self._piece_bytes:
                if len(data):
                    pieces.append((offset // SECTOR_BYTES, len(data), data))
                continue
            view = memoryview(data).cast("B")
            pieces += [(sector, size, view[at : at + size]) for sector, at, size in self._pieces(offset, len(view))]
        if pieces:
            self._unflushed = True
            self._transfer(BlkType.OUT, pieces, None)

    def flush(self) -> None:
        """A flush request. Fails where the device cannot flush: then nobody knows what is durable."""
        self._check("flush", [], writing=False)
        if not self._geometry.flush:
            raise block_io_error("flush", "it does not offer flushes, so nothing on it is known to be durable")
        if self._lost_writes:
            self._lost_writes = False
            raise block_io_error("flush", "it was reset, and earlier writes may be lost")
        if self.read_only:
            return
        self._command("flush", BlkType.FLUSH)
        self._unflushed = False

    def discard(self, ranges: Sequence[Range]) -> None:
        """Discard requests, or nothing where the device has none."""
        self._check("discard", ranges, writing=True)
        limits = self._geometry.discard
        if limits is not None:
            self._unflushed = True
            self._give_up("discard", BlkType.DISCARD, ranges, limits, 0)

    def write_zeroes(self, ranges: Sequence[Range]) -> None:
        """Make the ranges read as zeros; written out where the device has no request for it. Durable with a flush.

        Raises:
            BackendError, StateError: As `write`.
        """
        self._check("write zeroes", ranges, writing=True)
        limits = self._geometry.write_zeroes
        if limits is None:
            zeros = bytes(self._piece_bytes)
            for offset, length in ranges:
                self.write(
                    [
                        (sector * SECTOR_BYTES, memoryview(zeros)[:size])
                        for sector, _, size in self._pieces(offset, length)
                    ]
                )
            return
        self._unflushed = True
        flags = _SEGMENT_FLAG_UNMAP if limits.unmap else 0
        self._give_up("write zeroes", BlkType.WRITE_ZEROES, ranges, limits, flags)

    def _give_up(self, operation: str, kind: BlkType, ranges: Sequence[Range], limits: RangeLimits, flags: int) -> None:
        segments = []
        most = min(limits.segments, self._shape.small_bytes // BlkSegment.SIZE)
        for offset, length in ranges:
            sector, end = offset // SECTOR_BYTES, (offset + length) // SECTOR_BYTES
            while sector < end:
                # Cut at multiples of the limit, which is a multiple of the device's alignment.
                step = min(end - sector, limits.sectors - sector % limits.sectors)
                segments.append(BlkSegment(sector, step, flags).pack())
                sector += step
                if len(segments) == most:
                    self._command(operation, kind, b"".join(segments))
                    segments.clear()
        if segments:
            self._command(operation, kind, b"".join(segments))

    def get_id(self) -> bytes:
        """What the device calls itself: up to 20 bytes, up to the first zero. Not to be believed.

        Raises:
            BackendError, StateError: As `read`; also where the device does not know the request.
        """
        self._check("tell its name", [], writing=False)
        return self._command("tell its name", BlkType.GET_ID, b"", _ID_BYTES).split(b"\0", 1)[0]

    def poll(self) -> bool:
        """Look for a capacity change without doing anything else; returns whether there was one.

        Raises:
            BackendError, StateError: As `read`.
        """
        self._check("answer", [], writing=False)
        before = self.resizes
        try:
            self._look_at_events()
            self._transport.check()
        except (ProtocolError, BackendError) as error:
            raise self._die("answer", error) from error
        return self.resizes != before

    def close(self) -> None:
        """Reset the device, if it takes one, and close the transport."""
        if self._closed:
            return
        self._closed = True
        try:
            self._transport.reset(deadline=self._clock() + min(1.0, self._policy.deadline_seconds))
        except SvsmError:
            pass  # it keeps its memory, which is only ever shared memory
        finally:
            self._transport.close()
