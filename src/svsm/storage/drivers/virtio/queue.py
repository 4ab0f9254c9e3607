# SPDX-License-Identifier: MIT OR Apache-2.0
"""What split and packed rings have in common: slots, their private shadow, and the end of trust.

Theory. The driver divides a queue into *slots* once, at the start. A slot is one request that can be in flight: a
fixed identifier in the ring and a chain of up to `chain` segments, prepared before and changed only while the slot is
the driver's. There is no free list in shared memory and no chain to follow: what the device returns is one number,
and everything about it (is it a slot, is it in flight, how much may the device have written) is looked up here, in
private memory. The ring's memory is write-only for the driver except for the device's own fields: the used index
and elements, the used flags of a packed descriptor, and the device's event suppression.

The first thing that cannot be true breaks the queue: `ProtocolError`, the same one again on every later call. A broken
queue is only good for a device reset. Nothing here waits; time is the caller's.

What a device may legally do, and this must therefore bear: complete in any order, complete late or never, lie about
whether it wants to be notified (a lost kick is cured by the caller's repeated kick), and write anything at all into
buffers that it was given.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import NoReturn

from svsm.formats.errors import ProtocolError, StateError
from svsm.formats.virtio import QUEUE_SIZE_LIMIT, QueueAddresses
from svsm.storage.drivers.dma import DmaMemory

__all__ = ["QueueShape", "Segment", "VirtQueue", "split_tail", "store_split_chain"]

_LENGTH_LIMIT = 1 << 32


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """A piece of shared memory in a request."""

    address: int
    """As the device addresses it."""
    length: int
    """Bytes; at least 1."""
    device_writes: bool


@dataclasses.dataclass(frozen=True, slots=True)
class QueueShape:
    """How a queue is divided.

    Attributes:
        size: Ring entries.
        slots: Requests that can be in flight.
        chain: Most segments of one request.
        indirect: A request takes one ring entry, which points to a table.
        event_idx: VIRTIO_F_EVENT_IDX was negotiated.
    """

    size: int
    slots: int
    chain: int
    indirect: bool
    event_idx: bool

    @classmethod
    def fit(cls, size: int, *, chain: int, indirect: bool, event_idx: bool, limit: int) -> QueueShape:
        """The shape with the most slots, at most `limit`, that a queue of `size` entries has room for; maybe none.

        No chain is longer than the queue, not even in an indirect table (§2.7.5.3.1).
        """
        slots = min(limit, size if indirect else size // chain) if size >= chain else 0
        return cls(size=size, slots=slots, chain=chain, indirect=indirect, event_idx=event_idx)

    def check(self) -> None:
        """Demand that the slots fit.

        Raises:
            StateError: ``virtio-shape``.
        """
        entries = self.slots * (1 if self.indirect else self.chain)
        if not 0 < entries <= self.size <= QUEUE_SIZE_LIMIT or not 0 < self.chain <= self.size:
            raise StateError("the queue is too small for one request", code="virtio-shape", got=self.size)


class VirtQueue(abc.ABC):
    """One queue, driver side. Not for several threads.

    Attributes:
        shape: How it is divided.
        addresses: For the transport.
        in_flight: Slots that the device has.
        written: By slot: what the device says that it wrote, valid after `collect` returned the slot.
        broken: The violation that ended this queue.
    """

    addresses: QueueAddresses

    def __init__(self, memory: DmaMemory, shape: QueueShape) -> None:
        shape.check()
        self.shape = shape
        self.in_flight = 0
        self.written = [0] * shape.slots
        self.broken: ProtocolError | None = None
        self._memory = memory
        self._flying = bytearray(shape.slots)
        self._writable = [0] * shape.slots
        self._lengths = [[0] * shape.chain for _ in range(shape.slots)]
        self._writes = [[False] * shape.chain for _ in range(shape.slots)]
        self._used_chain = [0] * shape.slots

    # ---- the driver's side -----------------------------------------------------------------------------------------

    def prepare(self, slot: int, segments: Sequence[Segment]) -> None:
        """Give a slot its chain: what the device reads first, then what it writes (VIRTIO 1.2 §2.7.4.2).

        Raises:
            StateError: ``virtio-slot`` for a slot that is in flight or does not exist, or a chain that cannot be.
        """
        if not 0 <= slot < self.shape.slots or self._flying[slot]:
            self._refuse_slot(slot)
        lengths = [segment.length for segment in segments]
        writes = [segment.device_writes for segment in segments]
        if not 0 < len(segments) <= self.shape.chain or writes != sorted(writes):
            raise StateError("this is no chain", code="virtio-slot", got=len(segments))
        if min(lengths) < 1 or sum(lengths) >= _LENGTH_LIMIT:
            raise StateError("a segment is empty or too long", code="virtio-slot", got=min(lengths))
        self._lengths[slot][: len(segments)] = lengths
        self._writes[slot][: len(segments)] = writes
        self._used_chain[slot] = len(segments)
        self._writable[slot] = sum(s.length for s in segments if s.device_writes)
        self._store_chain(slot, segments)

    def resize(self, slot: int, position: int, length: int, device_writes: bool) -> None:
        """Change one segment of a prepared slot; its address stays. For the inner loop: the caller owns the slot."""
        lengths, writes = self._lengths[slot], self._writes[slot]
        if writes[position]:
            self._writable[slot] -= lengths[position]
        if device_writes:
            self._writable[slot] += length
        lengths[position] = length
        writes[position] = device_writes
        self._store_tail(slot, position)

    @abc.abstractmethod
    def publish(self, slots: Sequence[int]) -> bool:
        """Hand prepared slots to the device; returns whether it asks to be notified.

        Raises:
            StateError: ``virtio-slot`` for a slot that is in flight; the others before it are published.
            ProtocolError: The queue is broken.
        """

    @abc.abstractmethod
    def collect(self) -> list[int]:
        """The slots that the device has finished with, which are the driver's again. Never waits.

        Raises:
            ProtocolError: ``virtio-used-index``, ``virtio-used-id``, ``virtio-used-unexpected``,
                ``virtio-used-length``: the queue is broken from now on, and what is in flight stays lent.
        """

    @abc.abstractmethod
    def pending(self) -> bool:
        """Whether `collect` would find something (or a violation)."""

    @abc.abstractmethod
    def arm(self) -> bool:
        """Ask for an interrupt at the next completion; returns whether there is one already."""

    @abc.abstractmethod
    def disarm(self) -> None:
        """Ask for no interrupts."""

    # ---- what rings implement ---------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _store_chain(self, slot: int, segments: Sequence[Segment]) -> None: ...

    @abc.abstractmethod
    def _store_tail(self, slot: int, position: int) -> None: ...

    # ---- shared by rings --------------------------------------------------------------------------------------------

    def _refuse_slot(self, slot: int) -> NoReturn:
        raise StateError("the slot is in flight or does not exist", code="virtio-slot", got=slot)

    def _check_alive(self) -> None:
        if self.broken is not None:
            raise self.broken

    def _check_idle(self) -> None:
        """A device that has nothing cannot have finished anything; without this, its answer would fit the next one."""
        if not self.in_flight and self.pending():
            raise self._violation("completes a request before it gets one", code="virtio-used-unexpected")

    def _judge(self, slot: int, identifier: int, length: int) -> NoReturn:
        """Say what is wrong with a completion (private copies of what the device wrote) that cannot be true."""
        if slot < 0:
            raise self._violation("completes a request that cannot exist", code="virtio-used-id", got=identifier)
        if not self._flying[slot]:
            raise self._violation("completes what it was not given", code="virtio-used-unexpected", got=identifier)
        raise self._violation(
            "wrote more than its buffer holds", code="virtio-used-length", expected=self._writable[slot], got=length
        )

    def _violation(self, what: str, *, code: str, **details: int) -> ProtocolError:
        self.broken = ProtocolError(
            f"the device {what}", code=code, hint="the device or its host is broken or hostile; reset it", **details
        )
        return self.broken


def store_split_chain(memory: DmaMemory, offset: int, first: int, segments: Sequence[Segment]) -> None:
    """Write descriptors of the split format, whose `next` counts from `first`, at `offset`."""
    last = len(segments) - 1
    for position, segment in enumerate(segments):
        at = (offset >> 3) + 2 * position
        memory.u64[at] = segment.address
        memory.u64[at + 1] = split_tail(segment.length, segment.device_writes, position < last, first + position + 1)


def split_tail(length: int, device_writes: bool, more: bool, following: int) -> int:
    """The second word of a descriptor of the split format (`SplitDescriptor.tail`), without building a record."""
    tail = length | (0x2_0000_0000 if device_writes else 0)
    return tail | 0x1_0000_0000 | following << 48 if more else tail
