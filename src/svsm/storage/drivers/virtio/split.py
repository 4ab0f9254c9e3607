# SPDX-License-Identifier: MIT OR Apache-2.0
"""The split ring (VIRTIO 1.2 §2.7), driver side.

Slot s owns descriptors ``s * chain`` to ``s * chain + chain - 1`` and its identifier is the first of them; with
indirect descriptors it owns descriptor s, which points to its table. Both are written when the slot is prepared;
publishing stores an identifier in the available ring and moves the index. The driver reads four device fields: the
used index, used elements (one 64-bit load each), `used.flags` and `avail_event`.
"""

from __future__ import annotations

from collections.abc import Sequence

from svsm.formats.errors import StateError
from svsm.formats.virtio import DescriptorFlag, QueueAddresses, SplitDescriptor, SplitLayout
from svsm.storage.drivers.dma import HAS_FENCE, DmaMemory, fence
from svsm.storage.drivers.virtio.queue import QueueShape, Segment, VirtQueue, split_tail, store_split_chain

__all__ = ["SplitQueue"]

_NO_INTERRUPT = 1
_NO_NOTIFY = 1
_INDEX_MASK = 0xFFFF
_FAR_AWAY = 0x8000


class SplitQueue(VirtQueue):
    """A split ring in shared memory.

    Args:
        memory: Where the ring and the indirect tables go.
        shape: `size` is a power of two.

    Raises:
        StateError: ``virtio-shape``, ``dma-memory``.
    """

    def __init__(self, memory: DmaMemory, shape: QueueShape) -> None:
        super().__init__(memory, shape)
        if shape.size & (shape.size - 1):
            raise StateError("a split ring's size is a power of two", code="virtio-shape", got=shape.size)
        layout = SplitLayout(shape.size)
        base = memory.allocate(layout.total_bytes)
        self.addresses = QueueAddresses(
            descriptors=memory.device_address(base),
            driver=memory.device_address(base + layout.available),
            device=memory.device_address(base + layout.used),
        )
        self._mask = shape.size - 1
        self._available_flags = (base + layout.available) // 2
        self._available_index = self._available_flags + 1
        self._available_ring = (base + layout.available_ring) // 2
        self._used_event = (base + layout.used_event) // 2
        self._used_flags = (base + layout.used) // 2
        self._used_index = self._used_flags + 1
        self._used_ring = (base + layout.used_ring) // 8
        self._available_event = (base + layout.available_event) // 2
        self._next = 0
        self._seen = 0
        self._heads = [slot * (1 if shape.indirect else shape.chain) for slot in range(shape.slots)]
        self._slot_of = [-1] * shape.size
        for slot, head in enumerate(self._heads):
            self._slot_of[head] = slot
        self._tables = [base + head * SplitDescriptor.SIZE for head in self._heads]
        if shape.indirect:
            self._tables = [memory.allocate(shape.chain * SplitDescriptor.SIZE) for _ in range(shape.slots)]
        self._ring_base = base
        self.disarm()

    def _store_chain(self, slot: int, segments: Sequence[Segment]) -> None:
        table = self._tables[slot]
        if not self.shape.indirect:
            store_split_chain(self._memory, table, self._heads[slot], segments)
            return
        store_split_chain(self._memory, table, 0, segments)
        at = (self._ring_base + slot * SplitDescriptor.SIZE) // 8
        self._memory.u64[at] = self._memory.device_address(table)
        self._memory.u64[at + 1] = len(segments) * SplitDescriptor.SIZE | int(DescriptorFlag.INDIRECT) << 32

    def _store_tail(self, slot: int, position: int) -> None:
        following = position + 1
        more = following < self._used_chain[slot]
        if not self.shape.indirect:
            following += self._heads[slot]
        self._memory.u64[self._tables[slot] // 8 + 2 * position + 1] = split_tail(
            self._lengths[slot][position], self._writes[slot][position], more, following
        )

    def publish(self, slots: Sequence[int]) -> bool:
        """Hand prepared slots to the device."""
        self._check_alive()
        self._check_idle()
        u16, ring, mask, flying, heads = self._memory.u16, self._available_ring, self._mask, self._flying, self._heads
        old = available = self._next
        count = self.shape.slots
        for slot in slots:
            if not 0 <= slot < count or flying[slot]:
                self._refuse_slot(slot)
            flying[slot] = 1
            u16[ring + (available & mask)] = heads[slot]
            available += 1
        self.in_flight += available - old
        available &= _INDEX_MASK
        self._next = available
        u16[self._available_index] = available
        if not HAS_FENCE:
            return True
        fence()
        if self.shape.event_idx:
            # A device that lies here only delays itself: the caller repeats its kick.
            event = u16[self._available_event]
            return (available - event - 1) & _INDEX_MASK < (available - old) & _INDEX_MASK
        return not u16[self._used_flags] & _NO_NOTIFY

    def collect(self) -> list[int]:
        """The slots that the device has finished with."""
        self._check_alive()
        seen = self._seen
        fresh = (self._memory.u16[self._used_index] - seen) & _INDEX_MASK
        if not fresh:
            return []
        if fresh > self.in_flight:
            raise self._violation(
                "returns more requests than it has", code="virtio-used-index", expected=self.in_flight, got=fresh
            )
        u64, ring, mask, slot_of, size = self._memory.u64, self._used_ring, self._mask, self._slot_of, self.shape.size
        flying, writable, written = self._flying, self._writable, self.written
        done: list[int] = []
        for position in range(seen, seen + fresh):
            element = u64[ring + (position & mask)]  # the only read: identifier and length belong together
            identifier, length = element & 0xFFFF_FFFF, element >> 32
            slot = slot_of[identifier] if identifier < size else -1
            if slot < 0 or not flying[slot] or length > writable[slot]:
                self._judge(slot, identifier, length)
            flying[slot] = 0
            written[slot] = length
            done.append(slot)
        self.in_flight -= fresh
        self._seen = (seen + fresh) & _INDEX_MASK
        return done

    def pending(self) -> bool:
        """Whether the used index has moved."""
        return self._memory.u16[self._used_index] != self._seen

    def arm(self) -> bool:
        """Ask for an interrupt at the next completion."""
        if self.shape.event_idx:
            self._memory.u16[self._used_event] = self._seen
        else:
            self._memory.u16[self._available_flags] = 0
        fence()
        return self.pending()

    def disarm(self) -> None:
        """Ask for no interrupts."""
        if self.shape.event_idx:
            self._memory.u16[self._used_event] = (self._seen + _FAR_AWAY) & _INDEX_MASK
        else:
            self._memory.u16[self._available_flags] = _NO_INTERRUPT
