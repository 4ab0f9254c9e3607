# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the virtio disk driver costs by itself: submit, every check, and the copy of 4 KiB, in microseconds a request.

The device is a few stores into the ring, and its time does not count. A figure is the best of the rounds: everything
else that the machine does can only add to it.
"""

from __future__ import annotations

import mmap
import os
import time

from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.virtio.blk_lane import CHAIN, Lane, LaneShape
from svsm.storage.drivers.virtio.packed import PackedQueue
from svsm.storage.drivers.virtio.queue import QueueShape, VirtQueue
from svsm.storage.drivers.virtio.split import SplitQueue
from tests.bench.report import Result, Row

__all__ = ["bench"]

_QUEUE_SIZE = 512
_BLOCK_BYTES = 4096
_ROUNDS = 100
_BATCHES = (1, 32, 128)
_READ, _WRITE = 0, 1
_USED_MARKS = 0x8080 << 48


class _Device:
    """Completes everything that is in flight, with the fewest stores."""

    def __init__(self, lane: Lane, memory: DmaMemory) -> None:
        self._lane = lane
        self._memory = memory
        self._position = 0
        self._wrap = True

    def complete(self) -> None:
        """All slots that are in flight."""
        queue, u64, shared = self._lane.queue, self._memory.u64, self._memory.bytes
        for slot, flying in enumerate(queue._flying):
            if not flying:
                continue
            shared[self._lane._statuses[slot]] = 0
            written = self._lane._expected[slot]
            if isinstance(queue, SplitQueue):
                element = queue._used_ring + self._position % _QUEUE_SIZE
                u64[element] = queue._heads[slot] | written << 32
                self._position = (self._position + 1) & 0xFFFF
            elif isinstance(queue, PackedQueue):
                marks = _USED_MARKS if self._wrap else 0
                u64[queue._ring + 2 * self._position + 1] = written | slot << 32 | marks
                self._position += queue._entries[slot]
                if self._position >= _QUEUE_SIZE:
                    self._position -= _QUEUE_SIZE
                    self._wrap = not self._wrap
        if isinstance(queue, SplitQueue):
            self._memory.u16[queue._used_index] = self._position


def _measure(*, packed: bool, indirect: bool, kind: int, batch: int) -> float:
    memory = DmaMemory(memoryview(mmap.mmap(-1, 1 << 24)), address=1 << 32)
    shape = QueueShape.fit(_QUEUE_SIZE, chain=CHAIN, indirect=indirect, event_idx=True, limit=_QUEUE_SIZE)
    queue: VirtQueue = PackedQueue(memory, shape) if packed else SplitQueue(memory, shape)
    lane = Lane(0, queue, memory, LaneShape(_BLOCK_BYTES, 1 << 16, 1))
    device = _Device(lane, memory)
    data = os.urandom(_BLOCK_BYTES) if kind == _WRITE else b""
    offsets = [_BLOCK_BYTES * index for index in range(batch)]
    reads, writes = [(offset, _BLOCK_BYTES) for offset in offsets], [(offset, data) for offset in offsets]
    best = float("inf")
    for _ in range(_ROUNDS):
        results = [b""] * batch if kind == _READ else None
        begun = time.perf_counter_ns()
        filled = 0
        while filled < batch:
            filled, _ = lane.fill_writes(writes, filled) if kind == _WRITE else lane.fill_reads(reads, filled)
        spent = time.perf_counter_ns() - begun
        device.complete()
        begun = time.perf_counter_ns()
        done, status = lane.drain(results)
        spent += time.perf_counter_ns() - begun
        if (filled, done, status) != (batch, batch, 0):
            raise RuntimeError("the driver did not do its work")
        best = min(best, spent / batch / 1000)
    return best


def bench() -> Result:
    """Split and packed, direct and indirect, reads and writes, in batches."""
    rows = []
    for packed in (False, True):
        for indirect in (False, True):
            for kind in (_READ, _WRITE):
                for batch in _BATCHES:
                    name = (
                        f"{'packed' if packed else 'split'}{', indirect' if indirect else ''}: "
                        f"{'write' if kind == _WRITE else 'read'}, {batch} together"
                    )
                    rows.append(Row(name, _measure(packed=packed, indirect=indirect, kind=kind, batch=batch), "us"))
    return Result(rows, details={"request_bytes": _BLOCK_BYTES, "queue_entries": _QUEUE_SIZE})
