# SPDX-License-Identifier: MIT OR Apache-2.0
"""Split and packed queues against the device's side of the rings, without a transport."""

from __future__ import annotations

import mmap
import random

import pytest

from svsm.formats.errors import FormatError, ProtocolError, StateError
from svsm.formats.virtio import QueueAddresses
from svsm.host.devices.virtio_ring import DevicePackedRing, DeviceRing, DeviceSplitRing, Window
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.virtio.packed import PackedQueue
from svsm.storage.drivers.virtio.queue import QueueShape, Segment, VirtQueue
from svsm.storage.drivers.virtio.split import SplitQueue

_GPA = 0x7000_0000_0000
_NEARLY = 65_000
_SHAPES = [
    (packed, indirect, event_idx)
    for packed in ("split", "packed")
    for indirect in ("direct", "indirect")
    for event_idx in ("flags", "event")
]


class Pair:
    """Both sides of one queue."""

    def __init__(self, ring: str, indirect: str, events: str, *, size: int = 16, chain: int = 3) -> None:
        view = memoryview(mmap.mmap(-1, 1 << 18))
        self.memory = DmaMemory(view, address=_GPA)
        event_idx = events == "event"
        shape = QueueShape.fit(size, chain=chain, indirect=indirect == "indirect", event_idx=event_idx, limit=size)
        kind, device = (SplitQueue, DeviceSplitRing) if ring == "split" else (PackedQueue, DevicePackedRing)
        self.queue: VirtQueue = kind(self.memory, shape)
        self.device: DeviceRing = device(Window(view, address=_GPA), size, self.queue.addresses, event_idx=event_idx)
        self.buffer = self.memory.allocate(64 * shape.slots)

    def stand_before_the_wrap(self) -> None:
        """As after 65 thousand requests, without making them."""
        queue, device = self.queue, self.device
        if isinstance(queue, SplitQueue) and isinstance(device, DeviceSplitRing):
            queue._next = queue._seen = device.next_available = device._signalled = _NEARLY
            queue.disarm()
            device.set_used_index(_NEARLY)
            device._available[1] = _NEARLY

    def prepare(self, slot: int, *, length: int = 16, answer: int = 8) -> None:
        """A chain of a readable and two writable parts."""
        at = self.memory.device_address(self.buffer + 64 * slot)
        self.queue.prepare(
            slot,
            [
                Segment(at, length, device_writes=False),
                Segment(at + 32, answer, device_writes=True),
                Segment(at + 63, 1, device_writes=True),
            ],
        )


@pytest.mark.parametrize("requests", [2_000, pytest.param(70_000, marks=pytest.mark.long)])
@pytest.mark.parametrize(("ring", "indirect", "events"), _SHAPES)
def test_requests_go_round_and_round(ring: str, indirect: str, events: str, requests: int) -> None:
    """Across every wrap of every index; in any order; with the right lengths."""
    pair, source = Pair(ring, indirect, events), random.Random(1)
    pair.stand_before_the_wrap()
    queue, device = pair.queue, pair.device
    for slot in range(queue.shape.slots):
        pair.prepare(slot)
    free = list(range(queue.shape.slots))
    total = 0
    while total < requests:
        slots = [free.pop() for _ in range(source.randrange(1, len(free) + 1))]
        queue.publish(slots)
        chains = []
        while (chain := device.pop()) is not None:
            chains.append(chain)
        assert len(chains) == len(slots)
        assert [part.device_writes for part in chains[0].parts] == [False, True, True]
        assert [part.length for part in chains[0].parts] == [16, 8, 1]
        if source.random() < 0.5:
            source.shuffle(chains)
        for number, chain in enumerate(chains):
            device.push(chain, number % 10)
        done = queue.collect()
        assert sorted(done) == sorted(slots)
        assert sorted(queue.written[slot] for slot in done) == sorted(n % 10 for n in range(len(slots)))
        assert queue.in_flight == 0
        assert queue.collect() == []
        free += done
        total += len(done)


@pytest.mark.parametrize("turns", [300, pytest.param(12_000, marks=pytest.mark.long)])
@pytest.mark.parametrize(("ring", "indirect", "events"), _SHAPES)
def test_kicks_and_interrupts_are_not_lost(ring: str, indirect: str, events: str, turns: int) -> None:
    """Driver and device both sleep whenever they may; nobody sleeps for ever, across every wrap."""
    pair, source = Pair(ring, indirect, events, size=12 if ring == "packed" else 16), random.Random(2)
    queue, device = pair.queue, pair.device
    for slot in range(queue.shape.slots):
        pair.prepare(slot)
    free, kicks, interrupts = list(range(queue.shape.slots)), 0, 0
    pair.stand_before_the_wrap()
    assert not device.enable_kicks()
    for _ in range(turns):
        slots = [free.pop() for _ in range(source.randrange(1, len(free) + 1))]
        if source.random() < 0.5:
            device.disable_kicks()
            if not device.enable_kicks():
                pass
        wanted = queue.publish(slots)
        assert wanted, "the device sleeps and is not woken"
        kicks += 1
        queue.disarm()
        if source.random() < 0.5:
            assert not queue.arm()
            armed = True
        else:
            armed = False
        device.disable_kicks()
        while (chain := device.pop()) is not None:
            device.push(chain, 1)
        assert not device.enable_kicks()
        raised = device.wants_interrupt()
        assert raised or not armed, "the driver sleeps and is not woken"
        interrupts += raised
        free += queue.collect()
        assert len(free) == queue.shape.slots
    assert interrupts < kicks


@pytest.mark.parametrize(("ring", "indirect", "events"), _SHAPES)
def test_a_busy_device_is_not_kicked(ring: str, indirect: str, events: str) -> None:
    pair = Pair(ring, indirect, events)
    queue, device = pair.queue, pair.device
    for slot in range(queue.shape.slots):
        pair.prepare(slot)
    device.disable_kicks()
    # With EVENT_IDX a split device that has not moved its event still wants the first kick.
    first = queue.publish([0])
    assert first == (ring == "split" and events == "event")
    assert not queue.publish([1])


@pytest.mark.parametrize(("ring", "indirect", "events"), _SHAPES)
def test_resized_segments_reach_the_device_and_the_shadow(ring: str, indirect: str, events: str) -> None:
    pair = Pair(ring, indirect, events)
    queue, device = pair.queue, pair.device
    pair.prepare(0)
    queue.resize(0, 1, 20, device_writes=False)
    queue.publish([0])
    chain = device.pop()
    assert chain is not None
    assert [(part.length, part.device_writes) for part in chain.parts] == [(16, False), (20, False), (1, True)]
    device.push(chain, 2)
    with pytest.raises(ProtocolError) as caught:
        queue.collect()
    assert caught.value.code == "virtio-used-length"


@pytest.mark.parametrize(("ring", "indirect", "events"), _SHAPES)
def test_a_broken_queue_stays_broken(ring: str, indirect: str, events: str) -> None:
    pair = Pair(ring, indirect, events)
    queue, device = pair.queue, pair.device
    pair.prepare(0)
    pair.prepare(1)
    queue.publish([0])
    chain = device.pop()
    assert chain is not None
    device.push(chain, 10_000)
    for _ in range(3):
        with pytest.raises(ProtocolError) as caught:
            queue.collect()
        assert caught.value is queue.broken
    with pytest.raises(ProtocolError):
        queue.publish([1])


@pytest.mark.parametrize(("ring", "indirect", "events"), _SHAPES)
def test_what_the_driver_must_not_do(ring: str, indirect: str, events: str) -> None:
    pair = Pair(ring, indirect, events)
    queue = pair.queue
    at = pair.memory.device_address(pair.buffer)
    good = Segment(at, 8, device_writes=False)
    for segments in (
        [],
        [good] * 4,
        [Segment(at, 8, device_writes=True), good],
        [Segment(at, 0, device_writes=False)],
        [Segment(at, 1 << 32, device_writes=True)],
    ):
        with pytest.raises(StateError) as caught:
            queue.prepare(0, segments)
        assert caught.value.code == "virtio-slot"
    pair.prepare(0)
    queue.publish([0])
    for call in (lambda: queue.publish([0]), lambda: pair.prepare(0), lambda: pair.prepare(-1)):
        with pytest.raises(StateError):
            call()


@pytest.mark.parametrize("size", [0, 2, 65536])
def test_shapes_that_cannot_be(size: int) -> None:
    memory = DmaMemory(memoryview(bytearray(1 << 21)), address=0)
    for kind in (SplitQueue, PackedQueue):
        for indirect in (True, False):
            with pytest.raises(StateError) as caught:
                kind(memory, QueueShape(size=size, slots=1, chain=3, indirect=indirect, event_idx=False))
            assert caught.value.code == "virtio-shape"
    with pytest.raises(StateError):
        SplitQueue(memory, QueueShape(size=12, slots=1, chain=3, indirect=False, event_idx=False))


def test_the_device_refuses_chains_that_cannot_be() -> None:
    """The other side of the trust: a guest's ring must not take the host's device down."""
    pair = Pair("split", "direct", "flags")
    device, window = pair.device, pair.device.window
    assert isinstance(device, DeviceSplitRing)
    base = pair.queue.addresses

    def offer(head: int, tail: int, address: int = _GPA) -> None:
        fresh = DeviceSplitRing(window, 16, base, event_idx=False)
        window.put(base.descriptors, address.to_bytes(8, "little") + tail.to_bytes(8, "little"))
        window.put(base.driver + 2, (1).to_bytes(2, "little") + head.to_bytes(2, "little"))
        with pytest.raises(FormatError) as caught:
            fresh.pop()
        assert caught.value.code == "virtio-device-ring"

    offer(16, 16)
    offer(0xFFFF, 16)
    offer(0, 16, address=0)
    offer(0, 16, address=(1 << 64) - 8)
    offer(0, 0)
    offer(0, 16 | 1 << 32)  # a loop to itself
    offer(0, 16 | 1 << 32 | 99 << 48)
    offer(0, 15 | 4 << 32)  # a table of half an entry
    offer(0, 1 << 20 | 4 << 32)
    window.put(base.driver + 2, (1000).to_bytes(2, "little"))
    with pytest.raises(FormatError):
        DeviceSplitRing(window, 16, base, event_idx=False).pop()
    for addresses in (QueueAddresses(0, base.driver, base.device), QueueAddresses(base.descriptors, 1, base.device)):
        with pytest.raises(FormatError):
            DeviceSplitRing(window, 16, addresses, event_idx=False)
