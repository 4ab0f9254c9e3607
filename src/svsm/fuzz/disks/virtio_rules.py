# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the registers of a virtio disk said, and what the driver must have made of it (VIRTIO 1.2 §3.1, §4.2, §5.2).

`MmioRules` follows the conversation register by register, in the order in which it happened, and keeps the first thing
that cannot be: the code with which the driver has to end. It knows nothing of the driver but what it wrote.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from svsm.formats.virtio import (
    MMIO_MAGIC,
    MMIO_VERSION,
    QUEUE_SIZE_LIMIT,
    SECTOR_BYTES,
    BlkConfig,
    BlkFeature,
    DeviceStatus,
    DeviceType,
    Feature,
    MmioRegister,
)
from svsm.fuzz.disks.virtio_device import OFFERED
from svsm.fuzz.target import expect

__all__ = ["MmioRules", "Size", "VirtioRules", "judge_configuration"]

_WORD: Final = 0xFFFF_FFFF
_CHAIN: Final = 3
_MANDATORY: Final = int(Feature.VERSION_1 | Feature.ACCESS_PLATFORM)
_KNOWN: Final = OFFERED | int(BlkFeature.RO)
_MOST_SECTORS: Final = 1 << 47
_BLOCKS: Final = frozenset(1 << shift for shift in range(9, 21))
_TRIES: Final = 8
_PACKED: Final = int(Feature.RING_PACKED)
_FEATURES_OK, _DRIVER_OK = int(DeviceStatus.FEATURES_OK), int(DeviceStatus.DRIVER_OK)
_BLK_SIZE, _SIZE_MAX = int(BlkFeature.BLK_SIZE), int(BlkFeature.SIZE_MAX)
_MQ, _DISCARD = int(BlkFeature.MQ), int(BlkFeature.DISCARD)
_CONFIG, _GENERATION, _STATUS = int(MmioRegister.CONFIG), int(MmioRegister.CONFIG_GENERATION), int(MmioRegister.STATUS)
_SELECT, _QUEUE_SIZE_MAX = int(MmioRegister.QUEUE_SELECT), int(MmioRegister.QUEUE_SIZE_MAX)
_QUEUE_READY, _FEATURES = int(MmioRegister.QUEUE_READY), int(MmioRegister.DEVICE_FEATURES)
_FEATURES_SELECT, _DRIVER_FEATURES = int(MmioRegister.DEVICE_FEATURES_SELECT), int(MmioRegister.DRIVER_FEATURES)
_DRIVER_SELECT, _NOTIFY = int(MmioRegister.DRIVER_FEATURES_SELECT), int(MmioRegister.QUEUE_NOTIFY)


@dataclasses.dataclass(frozen=True, slots=True)
class Size:
    """What a configuration says, where it can be believed."""

    capacity_bytes: int
    block_bytes: int
    discards: bool


def judge_configuration(data: bytes, features: int) -> Size | None:
    """What the configuration space means with these features, or None where the disk must be refused."""
    config = BlkConfig.parse(data.ljust(BlkConfig.SIZE, b"\0"))
    block = config.blk_size if features & _BLK_SIZE else SECTOR_BYTES
    if block not in _BLOCKS or config.capacity > _MOST_SECTORS:
        return None
    if features & _SIZE_MAX and 0 < config.size_max < block:
        return None
    if features & _MQ and not config.num_queues:
        return None
    discards = bool(features & _DISCARD) and config.max_discard_sectors * SECTOR_BYTES >= block
    return Size(config.capacity * SECTOR_BYTES, block, discards)


class VirtioRules:
    """What rules of any transport have.

    Attributes:
        code: Of the first thing that cannot be, or "".
        size: What the last whole configuration said.
    """

    def __init__(self) -> None:
        self.code = ""
        self.size: Size | None = None

    def cannot_be(self, code: str) -> None:
        """Something was said that ends the disk with this code."""
        self.code = self.code or code

    def end(self) -> None:
        """The call is over."""


class MmioRules(VirtioRules):
    """Follows one driver's registers.

    Args:
        queue_limit: The largest queue that the driver wants.
    """

    def __init__(self, *, queue_limit: int) -> None:
        super().__init__()
        self._queue_limit = queue_limit
        self.new_life()

    def new_life(self) -> None:
        """A reset begins, or the device is new."""
        self.size = None
        self._resetting = False
        self._status = 0
        self._select = self._driver_select = 0
        self._offered: dict[int, int] = {}
        self._accepted: dict[int, int] = {}
        self._ready = False
        self._queue = 0
        self._looked: set[int] = set()
        self._generation: int | None = None
        self._words: list[int] = []
        self._moved = 0

    def hear(self, write: bool, offset: int, value: int) -> None:
        """One access."""
        if write:
            self._written(offset, value)
            return
        if not 0 <= value <= _WORD:
            self.cannot_be("virtio-register")
        elif offset >= _CONFIG:
            self._words.append(value)
        elif offset == _STATUS:
            self._read_status(value)
        elif offset == _GENERATION:
            self._read_generation(value)
        elif offset == _FEATURES:
            self._offered[self._select] = value
            if len(self._offered) > 1 and _MANDATORY & ~(self._offered[0] | self._offered[1] << 32):
                self.cannot_be("virtio-features-missing")
        elif offset == MmioRegister.MAGIC and value != MMIO_MAGIC:
            self.cannot_be("virtio-magic")
        elif offset == MmioRegister.VERSION and value != MMIO_VERSION:
            self.cannot_be("virtio-legacy")
        elif offset == MmioRegister.DEVICE_ID and value != DeviceType.BLOCK:
            self.cannot_be("virtio-no-device" if value == DeviceType.NONE else "virtio-device-type")
        elif offset == _QUEUE_READY:
            self._looked.add(self._queue)
            if value != int(self._ready):
                self.cannot_be("virtio-queue-refused" if self._ready else "virtio-queue-busy")
        elif offset == _QUEUE_SIZE_MAX:
            self._read_queue_size(value)

    def _written(self, offset: int, value: int) -> None:
        if self._resetting and (offset != _STATUS or value):
            self.cannot_be("virtio-reset-stuck")
        if offset == _STATUS:
            if not value:
                self.new_life()
                self._resetting = True
            self._status = value
        elif offset == _FEATURES_SELECT:
            self._select = value
        elif offset == _DRIVER_SELECT:
            self._driver_select = value
        elif offset == _DRIVER_FEATURES:
            self._accept(value)
        elif offset == _SELECT:
            self._ready, self._queue = False, value
            self.end_of_configuration()
        elif offset == _QUEUE_READY:
            expect(self._queue in self._looked, "a queue is set up that may still be in use")
            self._ready = bool(value)

    def _accept(self, value: int) -> None:
        self._accepted[self._driver_select] = value
        offered = self._offered.get(0, 0) | self._offered.get(1, 0) << 32
        expect(not self.features & ~(offered & _KNOWN), "features are accepted that were not offered, or are unknown")

    @property
    def features(self) -> int:
        """As accepted."""
        return self._accepted.get(0, 0) | self._accepted.get(1, 0) << 32

    def _read_status(self, value: int) -> None:
        if self._resetting:
            self._resetting = bool(value)
        elif value != self._status and self._status & _DRIVER_OK:
            self.cannot_be("virtio-needs-reset")
        elif value != self._status and self._status & _FEATURES_OK:
            self.cannot_be("virtio-features-refused")

    def _read_queue_size(self, value: int) -> None:
        if not value:
            self.cannot_be("virtio-queue-missing")
        size = min(value, self._queue_limit)
        if not self.features & _PACKED:
            size = 1 << max(0, size.bit_length() - 1)
        if value > QUEUE_SIZE_LIMIT or size < _CHAIN:
            self.cannot_be("virtio-queue-size")

    def _read_generation(self, value: int) -> None:
        if self._generation is None or not self._words:
            self._generation = value
            return
        data = b"".join(word.to_bytes(4, "little") for word in self._words)
        self._words = []
        if value == self._generation:
            self._generation, self._moved = None, 0
            self.size = judge_configuration(data, self.features)
            if self.size is None:
                self.cannot_be("virtio-blk-geometry")
            return
        self._generation = None
        self._moved += 1
        if self._moved >= _TRIES:
            self.cannot_be("virtio-config-unstable")

    def end_of_configuration(self) -> None:
        """Whoever reads it no more must have read it whole."""
        if self._moved or self._words:
            self.cannot_be("virtio-config-unstable")
        self._moved, self._words, self._generation = 0, [], None

    def end(self) -> None:
        """The call is over."""
        if self._resetting:
            self.cannot_be("virtio-reset-stuck")
        self.end_of_configuration()
