# SPDX-License-Identifier: MIT OR Apache-2.0
"""One request queue of a virtio disk with its bounce buffers: the inner loop.

A slot has a header, a status byte and a data buffer in shared memory, at addresses that never change; a few slots have
a large buffer. A request costs two stores for the header, one for the status, one copy, and a descriptor store only
where length or direction differ from the slot's last request. Nothing private enters shared memory but the data of
a write, which overwrites all that its descriptor exposes; what a read exposes is zeroed before, every time.

A completion counts as success when the status byte, read once, is 0 and the device claims to have written exactly
what the request has to write. Less with status 0 is an I/O error: the rest of the buffer is ours (zeros), not the
disk's. A status that VIRTIO does not know ends the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from svsm.formats.errors import ProtocolError
from svsm.formats.record import Buffer
from svsm.formats.virtio import BlkHeader, BlkStatus, BlkType
from svsm.storage.drivers.dma import PAGE_BYTES, DmaMemory
from svsm.storage.drivers.virtio.queue import Segment, VirtQueue

__all__ = ["CHAIN", "Lane", "LaneShape", "Piece"]

CHAIN = 3
"""Header, data, status: the bounce buffer is one piece, so one data segment is enough whatever seg_max is."""

Piece = tuple[int, int, Buffer]
"""(sector of 512 bytes, length_bytes, data of a write)."""

_CONTROL_BYTES = 64
_STATUS_OFFSET = 16
_STATUS_SENTINEL = 0xFF
_HEADER, _DATA = 0, 1


@dataclasses.dataclass(frozen=True, slots=True)
class LaneShape:
    """Buffers of one lane."""

    small_bytes: int
    large_bytes: int
    large_slots: int

    def total_bytes(self, slots: int) -> int:
        """Shared memory that `slots` slots take."""
        large = min(self.large_slots, slots)
        return slots * _CONTROL_BYTES + large * self.large_bytes + (slots - large) * self.small_bytes + 2 * PAGE_BYTES


class Lane:
    """A queue and its buffers.

    Args:
        index: The queue's number.
        queue: With at least one slot and chains of `CHAIN`.
        memory: Where the buffers go.
        shape: How large they are; multiples of 512.

    Attributes:
        kicked: Whether the last `fill` wants the device to be notified.
    """

    def __init__(self, index: int, queue: VirtQueue, memory: DmaMemory, shape: LaneShape) -> None:
        self.index = index
        self.queue = queue
        self._memory = memory
        slots = queue.shape.slots
        large = min(shape.large_slots, slots)
        self._small_bytes = shape.small_bytes if slots > large else 0
        self._large = list(range(large))
        self._small = list(range(slots - 1, large - 1, -1))
        self._boundary = large
        control = memory.allocate(slots * _CONTROL_BYTES)
        self._headers = [(control + slot * _CONTROL_BYTES) // 8 for slot in range(slots)]
        self._statuses = [control + slot * _CONTROL_BYTES + _STATUS_OFFSET for slot in range(slots)]
        self._data = [
            self._buffer(memory, shape.large_bytes if slot < large else shape.small_bytes) for slot in range(slots)
        ]
        self._owners = [0] * slots
        self._expected = [0] * slots
        self._forms = [0] * slots  # length of the prepared data segment, negative where the device writes it
        self._zeros = memoryview(bytes(shape.large_bytes))
        for slot in range(slots):
            self._prepare(slot)

    @staticmethod
    def _buffer(memory: DmaMemory, length: int) -> int:
        """On a page where that costs nothing: a device that does direct I/O would copy what is not."""
        return memory.allocate(length, align=PAGE_BYTES if length % PAGE_BYTES == 0 else 512)

    def _prepare(self, slot: int) -> None:
        address = self._memory.device_address
        self.queue.prepare(
            slot,
            [
                Segment(address(self._headers[slot] * 8), BlkHeader.SIZE, device_writes=False),
                Segment(address(self._data[slot]), 512, device_writes=True),
                Segment(address(self._statuses[slot]), 1, device_writes=True),
            ],
        )
        self._forms[slot] = -512

    @property
    def free(self) -> int:
        """Slots that are not in flight."""
        return len(self._small) + len(self._large)

    # ---- reads and writes ------------------------------------------------------------------------------------------

    def fill(self, kind: int, pieces: Sequence[Piece], at: int) -> tuple[int, bool]:
        """Put requests into flight, from ``pieces[at]`` on, for as long as there are free slots.

        Args:
            kind: `BlkType.IN` or `BlkType.OUT`.
            pieces: Each fits a large buffer.
            at: Where to begin.

        Returns:
            Where it ended, and whether the device wants to be notified.
        """
        u64, shared, headers, statuses = self._memory.u64, self._memory.bytes, self._headers, self._statuses
        buffers, owners, forms, zeros = self._data, self._owners, self._forms, self._zeros
        expected = self._expected
        small, large, small_bytes, total = self._small, self._large, self._small_bytes, len(pieces)
        reading = kind == BlkType.IN
        word = int(kind)
        batch: list[int] = []
        while at < total:
            sector, length, data = pieces[at]
            free = small if length <= small_bytes else large
            if not free:
                break
            slot = free.pop()
            header = headers[slot]
            u64[header] = word
            u64[header + 1] = sector
            shared[statuses[slot]] = _STATUS_SENTINEL
            start = buffers[slot]
            if reading:
                shared[start : start + length] = zeros[:length]
                form = -length
            else:
                shared[start : start + length] = data
                form = length
            if forms[slot] != form:
                forms[slot] = form
                self.queue.resize(slot, _DATA, length, reading)
            expected[slot] = length + 1 if reading else 1
            owners[slot] = at
            batch.append(slot)
            at += 1
        return at, bool(batch) and self.queue.publish(batch)

    def drain(self, results: list[bytes] | None) -> tuple[int, int]:
        """Take back what the device has finished; contents of reads go to their place in `results`.

        Returns:
            How many, and the worst status among them: 0, or what `_judge` says.

        Raises:
            ProtocolError: The queue's violations, ``virtio-blk-status``.
        """
        done = self.queue.collect()
        worst = 0
        shared, statuses, written, expected = self._memory.bytes, self._statuses, self.queue.written, self._expected
        for slot in done:
            status = shared[statuses[slot]]  # read once
            if status or written[slot] != expected[slot]:
                worst = max(worst, self._judge(status, written[slot]))
            elif results is not None:
                start = self._data[slot]
                results[self._owners[slot]] = shared[start : start + expected[slot] - 1].tobytes()
            (self._large if slot < self._boundary else self._small).append(slot)
        return len(done), worst

    def _judge(self, status: int, written: int) -> int:
        """The `BlkStatus` that a request which did not succeed ends with."""
        if status not in (BlkStatus.OK, BlkStatus.IO_ERROR, BlkStatus.UNSUPPORTED):
            self.queue.broken = ProtocolError(
                "the device ends a request with a status that does not exist",
                code="virtio-blk-status",
                got=status,
                written=written,
            )
            raise self.queue.broken
        return status or BlkStatus.IO_ERROR

    # ---- other requests ---------------------------------------------------------------------------------------------

    def control(self, kind: int, data: bytes, answer_bytes: int) -> tuple[int, bool] | None:
        """Put one flush, discard, write-zeroes or get-id request into flight; None where no slot is free.

        Args:
            kind: A `BlkType`.
            data: What the device reads.
            answer_bytes: What it writes, beside the status.

        Returns:
            The slot, and whether the device wants to be notified. `finish_control` must follow.
        """
        free = self._small or self._large
        if not free:
            return None
        slot = free.pop()
        header, start = self._headers[slot], self._data[slot]
        self._memory.u64[header] = int(kind)
        self._memory.u64[header + 1] = 0
        self._memory.bytes[self._statuses[slot]] = _STATUS_SENTINEL
        self._memory.bytes[start : start + len(data)] = data
        self._memory.zero(start + len(data), answer_bytes)
        address = self._memory.device_address
        segments = [Segment(address(header * 8), BlkHeader.SIZE, device_writes=False)]
        if data:
            segments.append(Segment(address(start), len(data), device_writes=False))
        if answer_bytes:
            segments.append(Segment(address(start + len(data)), answer_bytes, device_writes=True))
        segments.append(Segment(address(self._statuses[slot]), 1, device_writes=True))
        self.queue.prepare(slot, segments)
        return slot, self.queue.publish([slot])

    def finish_control(self, slot: int, answer_bytes: int) -> tuple[int, bytes] | None:
        """Status and answer of a control request, once the device has finished it; it must be the only one in flight.

        Raises:
            ProtocolError: The queue's violations, ``virtio-blk-status``.
        """
        if not self.queue.collect():
            return None
        status = self._memory.bytes[self._statuses[slot]]
        start, written = self._data[slot], self.queue.written[slot]
        answer = self._memory.bytes[start : start + answer_bytes].tobytes()
        if status or not written:
            status = self._judge(status, written)
        self._prepare(slot)
        (self._large if slot < self._boundary else self._small).append(slot)
        return int(status), answer
