# SPDX-License-Identifier: MIT OR Apache-2.0
"""Programs against the virtio driver: see `program`. `VirtioRun` is what its transports share."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Final

from svsm.formats.errors import SvsmError
from svsm.formats.virtio import BlkConfig, BlkFeature, DeviceStatus, Feature, MmioRegister
from svsm.fuzz.choices import Choices
from svsm.fuzz.disks.program import DEADLINE, DiskRun, edge, shared_memory
from svsm.fuzz.disks.verdict import DISK_BYTES, Debt
from svsm.fuzz.disks.virtio_device import GPA, OFFERED, Disk, MmioDisk, Offer
from svsm.fuzz.disks.virtio_lies import RingLies
from svsm.fuzz.disks.virtio_rules import MmioRules, VirtioRules
from svsm.fuzz.target import expect
from svsm.host.devices.virtio_ring import DeviceRing, Window
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.virtio.blk import BlkPolicy, VirtioBlk, memory_bytes
from svsm.storage.drivers.virtio.mmio import MmioTransport
from svsm.storage.drivers.virtio.queue import VirtQueue
from svsm.testing.hostile.flicker import FlickerMemory

__all__ = ["MmioRun", "VirtioRun"]

_RO, _FLUSH = int(BlkFeature.RO), int(BlkFeature.FLUSH)
_CONFIG: Final = int(MmioRegister.CONFIG)
_LIARS: Final = tuple(
    int(register)
    for register in (
        *(MmioRegister.STATUS, MmioRegister.QUEUE_SIZE_MAX, MmioRegister.QUEUE_READY, MmioRegister.DEVICE_FEATURES),
        *(MmioRegister.MAGIC, MmioRegister.VERSION, MmioRegister.DEVICE_ID, MmioRegister.INTERRUPT_STATUS),
        MmioRegister.CONFIG_GENERATION,
    )
) + tuple(_CONFIG + at for at in (0, 4, 8, 12, 20, 24, 32, 36, 40, 44, 48, 52, 56))
"""Registers that lie; the configuration's fields by word."""
_STOPPED: Final = (int(DeviceStatus.NEEDS_RESET) | 0xF, int(DeviceStatus.FAILED) | 0xF, 0)


class VirtioRun(DiskRun):
    """One program against the virtio driver, over any transport.

    Args:
        data: The program. Its first two bytes are the ring's form and what the disk offers.
        packed: Which ring.
    """

    driver: VirtioBlk
    rules: VirtioRules
    disk: Disk

    def __init__(self, data: bytes, *, packed: bool) -> None:
        super().__init__(data)
        form, offer = self.choices.unsigned(1), self.choices.unsigned(1)
        self.policy = BlkPolicy(
            packed=packed,
            indirect=not form & 1,
            event_idx=not form & 2,
            queues=2 if form & 4 else 1,
            queue_size=(4, 8, 3, 16)[form >> 3 & 3],
            small_bytes=512,
            large_bytes=1024,
            large_slots=1,
            deadline_seconds=DEADLINE,
            rekick_seconds=DEADLINE / 25,
            spins=1,
        )
        self.flickers = form >> 5 == 7
        self.block = 4096 if offer & 7 == 1 else 512
        self.offer = _offer(offer, self.block)
        room = dataclasses.replace(self.policy, small_bytes=max(512, self.block), large_bytes=max(1024, self.block))
        self.room_bytes = memory_bytes(room)
        self.lies = RingLies(self._queue_of)
        self.lies.storm = self.storm
        self.lies.halt = self.halt

    def _queue_of(self, ring: DeviceRing) -> VirtQueue:
        return self.driver._lanes[self.disk.rings.index(ring)].queue

    @abc.abstractmethod
    def storm(self) -> None:
        """Waiting takes no time from now on."""

    @abc.abstractmethod
    def halt(self, kind: int) -> str:
        """The device stops, in one of three ways; returns what it must be called."""

    @abc.abstractmethod
    def again(self) -> None:
        """Reset the driver, or connect it again."""

    @abc.abstractmethod
    def notice(self) -> bool:
        """Tell the driver that the configuration has changed; returns whether it must hear of it."""

    # ---- life and death ---------------------------------------------------------------------------------------------

    def up(self, start: Callable[[], None]) -> None:
        """Start or restart the driver, and compare with what the device said.

        Raises:
            SvsmError: The disk is refused, as it must be.
        """
        self.rules.code = ""
        self.clock.begin()
        self.lies.new_life()
        self.lies.begin(Debt(), Choices(b""))
        self.tainted = False
        try:
            start()
        except SvsmError as error:
            self.rules.end()
            size = self.rules.size
            if error.code != "dma-memory" or size is None or size.block_bytes <= self.block:
                expect(bool(self.rules.code), "an honest disk is not started")
                expect(error.code == self.rules.code, f"not refused for {self.rules.code}")
            self.in_time()
            raise
        self.rules.end()
        expect(not self.rules.code, f"started in spite of {self.rules.code}")
        expect(self.driver.fault is None, "a new life begins without a fault")
        self._sizes()
        self.in_time()

    def restart(self) -> None:
        """A reset."""
        self.up(self.again)

    def _sizes(self) -> None:
        size, driver = self.rules.size, self.driver
        if size is not None:
            block = driver.block_size_bytes
            expect(driver.size_bytes == size.capacity_bytes - size.capacity_bytes % block, "the size is another")
            expect(driver.size_bytes % block == 0, "a disk is whole blocks")

    def be_honest(self) -> None:
        """Forget all lies."""
        self.disk.config = self.offer.config.pack()
        self.lies.events = None
        self.lies.late = False

    # ---- calls ------------------------------------------------------------------------------------------------------

    def plan(self, debt: Debt, choices: Choices) -> None:
        """What the rings will do."""
        self.lies.begin(debt, choices)

    def taken(self) -> int:
        """Requests that were in a ring."""
        return self.disk.taken

    def flushes(self) -> int:
        """Of the device."""
        return self.disk.flushes

    def can_flush(self) -> bool:
        """The feature."""
        return bool(self.disk.features & _FLUSH)

    def discards(self) -> bool:
        """The feature, with limits that allow one."""
        return self.rules.size is not None and self.rules.size.discards

    def settled(self, what: str) -> None:
        """Every lane is as empty as before."""
        for lane in self.driver._lanes:
            expect(not lane.queue.in_flight, f"{what}: something stays in flight")
            expect(len(lane._small) + len(lane._large) == lane.queue.shape.slots, f"{what}: slots are lost, or found")
        self._sizes()

    def special(self, kind: int) -> None:
        """Get-id, a resize, a reconnect, a completion of nothing."""
        if kind == 0:
            self._get_id()
        elif kind in (1, 2):
            self._resize()
        elif kind == 3:
            self._reconnect()
        else:
            self._idle()

    def _get_id(self) -> None:
        got: list[bytes] = []
        if self.call("get id", lambda: got.append(self.driver.get_id()), Debt()):
            expect(type(got[0]) is bytes and len(got[0]) <= 20, "a name is 20 bytes of the caller's own")

    def _resize(self) -> None:
        """The disk shrinks or grows, perhaps with another block size, and says so."""
        choice, config = self.choices.unsigned(1), BlkConfig.parse(self.disk.config)
        capacity = (8, 64, DISK_BYTES // 512, 63, 1 << 40, 0)[choice % 6]
        block = (config.blk_size, config.blk_size, 512, 4096)[choice >> 6]
        self.disk.config = config.replace(capacity=capacity, blk_size=block).pack()
        noticed, live = self.notice(), self.driver.fault is None
        if choice & 0x20:
            return  # it is heard of in a call that waits
        if self.call("poll", self.driver.poll, Debt(), lies=False) and live and noticed:
            size, whole = self.driver.block_size_bytes, capacity * 512
            expect(self.driver.size_bytes == whole - whole % size, "a change of the capacity is missed")

    def _reconnect(self) -> None:
        choice = self.choices.unsigned(1)
        self.be_honest()
        if choice & 3 == 3:
            self.lie()
        self.lost |= self.unflushed
        try:
            self.restart()
        except SvsmError as error:
            self.fault = self.fault or error
            expect(self.driver.fault is not None, "a disk that is refused is dead")
            return
        self.lies.late = bool(choice & 0x80)

    def _idle(self) -> None:
        """Something is completed before it is asked for; then a read."""
        place, ring = self.place(0, 1), self.disk.rings[0]
        if place is None or ring is None or self.driver.fault is not None or self.flickers:
            return
        debt = Debt()
        self.lies.begin(debt, Choices(b""))
        self.lies.idle(ring)
        self.call("read", lambda: self.driver.read([place]), debt, lies=False)


class MmioRun(VirtioRun):
    """Over virtio-mmio.

    Args:
        data: The program.
        packed: Which ring.
    """

    disk: MmioDisk
    rules: MmioRules

    def __init__(self, data: bytes, *, packed: bool) -> None:
        super().__init__(data, packed=packed)
        self.memory = shared_memory(self.room_bytes)
        view = memoryview(self.memory)
        self.rules = MmioRules(queue_limit=self.policy.queue_size)
        self.disk = MmioDisk(
            Window(view, address=GPA),
            self.content,
            self.lies,
            self.offer,
            heard=self.rules.hear,
            pause=self.clock.pause,
        )
        self.lies.disk = self.disk
        self._dma = (FlickerMemory if self.flickers else DmaMemory)(view, address=GPA)

    def start(self) -> None:
        """A transport and a driver."""
        self.up(self._make)

    def _make(self) -> None:
        transport = MmioTransport(self.disk, clock=self.clock, pause=self.clock.pause)
        self.driver = VirtioBlk(transport, self._dma, policy=self.policy, clock=self.clock, pause=self.clock.pause)

    def again(self) -> None:
        """Through the same registers."""
        self.driver.reconnect()

    def lie(self) -> None:
        """A register."""
        register = self.choices.pick(_LIARS)
        self.disk.register_lies[register] = edge(self.choices)
        self.disk.notice()

    def be_honest(self) -> None:
        """Registers too."""
        super().be_honest()
        self.disk.register_lies.clear()
        self.disk.spurious = False

    def storm(self) -> None:
        """Interrupts without end."""
        self.disk.spurious = True

    def halt(self, kind: int) -> str:
        """NEEDS_RESET, FAILED, or a reset of its own."""
        self.disk.status = _STOPPED[kind]
        self.disk.broken = True
        if MmioRegister.STATUS in self.disk.register_lies:  # which may say that all is well
            self.lies.debt.whatever()
        return "virtio-needs-reset"

    def notice(self) -> bool:
        """The interrupt status says it, unless registers lie."""
        self.disk.notice()
        return not self.disk.register_lies


def _offer(choice: int, block: int) -> Offer:
    features = OFFERED
    if choice & 0x38 == 0x08:
        features |= _RO
    if choice & 0x38 == 0x10:
        features &= ~_FLUSH
    if choice & 0x38 == 0x18:
        features &= ~int(BlkFeature.DISCARD | BlkFeature.WRITE_ZEROES)
    if choice & 0x38 == 0x20:
        features |= 1 << 50 | int(Feature.IN_ORDER)  # what no driver here knows
    config = BlkConfig(
        capacity=DISK_BYTES // 512,
        size_max=0 if choice & 0x40 else 4096,
        seg_max=126,
        blk_size=block,
        num_queues=2,
        max_discard_sectors=64 if choice & 0x38 != 0x28 else 0,
        max_discard_seg=1,
        discard_sector_alignment=1 << 20 if choice & 0x38 == 0x30 else 1,
        max_write_zeroes_sectors=64,
        max_write_zeroes_seg=1,
        write_zeroes_may_unmap=1,
    )
    return Offer(features, 1024 if choice & 0x80 else 16, config)
