# SPDX-License-Identifier: MIT OR Apache-2.0
"""One request queue of a virtio disk with its bounce buffers: the inner loop.

A slot has a header, a status byte and a data buffer in shared memory, at addresses that never change; a few slots have
a large buffer. A request costs one store for the header's sector, one for the status, one copy, and stores for kind and
descriptor only where direction or length differ from the slot's last request. Nothing private enters shared memory but
the data of a write, which overwrites all that its descriptor exposes; what a read exposes is zeroed before, every time.

A completion counts as success when the status byte, read once, is 0 and the device claims to have written exactly
what the request has to write. Less with status 0 is an I/O error: the rest of the buffer is ours (zeros), not the
disk's. A status that VIRTIO does not know ends the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from svsm.abi.block import Extent, Range
from svsm.formats.errors import ProtocolError
from svsm.formats.virtio import SECTOR_BYTES, BlkHeader, BlkStatus, BlkType
from svsm.storage.drivers.dma import PAGE_BYTES, DmaMemory
from svsm.storage.drivers.virtio.queue import Segment, VirtQueue

__all__ = ["BATCH", "CHAIN", "Lane", "LaneShape"]

BATCH = 16
"""Requests that are published together: the device begins with these while the next are prepared."""

CHAIN = 3
"""Header, data, status: the bounce buffer is one piece, so one data segment is enough whatever seg_max is."""

_CONTROL_BYTES = 64
_STATUS_OFFSET = 16
_STATUS_SENTINEL = 0xFF
_DATA = 1
_REFILL_SHARE = 8
_SECTOR_SHIFT = SECTOR_BYTES.bit_length() - 1


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
        self._enough = slots // _REFILL_SHARE
        control = memory.allocate(slots * _CONTROL_BYTES)
        self._headers = [(control + slot * _CONTROL_BYTES) // 8 for slot in range(slots)]
        self._sectors = [header + 1 for header in self._headers]
        self._statuses = [control + slot * _CONTROL_BYTES + _STATUS_OFFSET for slot in range(slots)]
        self._data = [
            self._buffer(memory, shape.large_bytes if slot < large else shape.small_bytes) for slot in range(slots)
        ]
        self._owners = [0] * slots
        self._forms = [0] * slots  # length of the prepared data segment, negative where the device writes it
        self._expected = [0] * slots  # what a read or write of this form has to write
        self._pieces = [slice(0)] * slots  # where its data is
        self._contents = [memoryview(b"")] * slots  # … and a view of it
        self._small_zeros = bytes(self._small_bytes)
        self._zeros = memoryview(bytes(shape.large_bytes))
        self._hot = (  # what the loops use for each request, at hand in one step
            memory.u64,
            memory.bytes,
            self._sectors,
            self._statuses,
            self._pieces,
            self._forms,
            self._small,
            self._large,
            self._small_bytes,
        )
        for slot in range(slots):
            self._prepare(slot)

    @staticmethod
    def _buffer(memory: DmaMemory, length: int) -> int:
        """On a page where that costs nothing: a device that does direct I/O would copy what is not."""
        return memory.allocate(length, align=PAGE_BYTES if length % PAGE_BYTES == 0 else 512)

    def _prepare(self, slot: int) -> None:
        address = self._memory.device_address
        self._memory.u64[self._headers[slot]] = int(BlkType.IN)
        self.queue.prepare(
            slot,
            [
                Segment(address(self._headers[slot] * 8), BlkHeader.SIZE, device_writes=False),
                Segment(address(self._data[slot]), 512, device_writes=True),
                Segment(address(self._statuses[slot]), 1, device_writes=True),
            ],
        )
        self._form(slot, 512, reading=True)

    def wants_more(self) -> bool:
        """Whether enough slots are free to be worth a kick, which costs the device a turn of its loop."""
        return len(self._small) + len(self._large) >= self._enough or not self.queue.in_flight

    # ---- reads and writes ------------------------------------------------------------------------------------------

    def fill_reads(self, pieces: Sequence[Range], at: int) -> tuple[int, bool]:
        """Put reads into flight, from ``pieces[at]`` on: a few, for as long as there are free slots.

        Args:
            pieces: Each fits a large buffer.
            at: Where to begin.

        Returns:
            Where it ended, and whether the device wants to be notified.
        """
        u64, shared, sectors, statuses, places, forms, small, large, small_bytes = self._hot
        owners, small_zeros, zeros = self._owners, self._small_zeros, self._zeros
        total = min(len(pieces), at + BATCH)
        batch: list[int] = []
        while at < total:
            offset, length = pieces[at]
            free = small if length <= small_bytes else large
            if not free:
                break
            slot = free.pop()
            if forms[slot] != -length:
                self._reform(slot, length, reading=True)
            shared[places[slot]] = small_zeros if length == small_bytes else zeros[:length]
            u64[sectors[slot]] = offset >> _SECTOR_SHIFT
            shared[statuses[slot]] = _STATUS_SENTINEL
            owners[slot] = at
            batch.append(slot)
            at += 1
        return at, bool(batch) and self.queue.publish(batch)

    def fill_writes(self, pieces: Sequence[Extent], at: int) -> tuple[int, bool]:
        """Put writes into flight, from ``pieces[at]`` on, for as long as there are free slots: as `fill_reads`."""
        u64, shared, sectors, statuses, places, forms, small, large, small_bytes = self._hot
        total = min(len(pieces), at + BATCH)
        batch: list[int] = []
        while at < total:
            offset, data = pieces[at]
            length = len(data)
            free = small if length <= small_bytes else large
            if not free:
                break
            slot = free.pop()
            if forms[slot] != length:
                self._reform(slot, length, reading=False)
            shared[places[slot]] = data
            u64[sectors[slot]] = offset >> _SECTOR_SHIFT
            shared[statuses[slot]] = _STATUS_SENTINEL
            batch.append(slot)
            at += 1
        return at, bool(batch) and self.queue.publish(batch)

    def _reform(self, slot: int, length: int, *, reading: bool) -> None:
        """Kind and length of the slot's next request, where they are not those of its last one."""
        self._form(slot, length, reading=reading)
        self._memory.u64[self._headers[slot]] = int(BlkType.IN if reading else BlkType.OUT)
        self.queue.resize(slot, _DATA, length, reading)

    def _form(self, slot: int, length: int, *, reading: bool) -> None:
        start = self._data[slot]
        self._forms[slot] = -length if reading else length
        self._expected[slot] = length + 1 if reading else 1
        self._pieces[slot] = slice(start, start + length)
        self._contents[slot] = self._memory.bytes[start : start + length]

    def drain(self, results: list[bytes] | None) -> tuple[int, int]:
        """Take back what the device has finished; contents of reads go to their place in `results`.

        Returns:
            How many, and the worst status among them: 0, or what `_judge` says.

        Raises:
            ProtocolError: The queue's violations, ``virtio-blk-status``.
        """
        done = self.queue.collect()
        if not done:
            return 0, 0
        worst = 0
        shared, statuses, written, expected = self._memory.bytes, self._statuses, self.queue.written, self._expected
        owners, contents = self._owners, self._contents
        for slot in done:
            status = shared[statuses[slot]]  # read once
            if status or written[slot] != expected[slot]:
                worst = max(worst, self._judge(status, written[slot]))
            elif results is not None:
                results[owners[slot]] = contents[slot].tobytes()
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
