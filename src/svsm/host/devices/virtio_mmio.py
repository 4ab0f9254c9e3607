# SPDX-License-Identifier: MIT OR Apache-2.0
"""The register window of a modern virtio-mmio device (VIRTIO 1.2 §4.2), device side.

`MmioDevice` is a state machine: `read32` and `write32` are what a trapped access does, `service` works through the
queues. Who calls `service` decides how it runs: inside a write to QueueNotify (deterministic, for tests), from a
`ServiceThread`, or from a process of its own (`virtio_process`). The device asks for a reset (DEVICE_NEEDS_RESET,
configuration interrupt) when a ring makes no sense, and does nothing more until it gets it. What its queues are for
is a subclass's matter: `MmioBlk` here, `virtio_stream.MmioStream` for devices that carry bytes.
"""

from __future__ import annotations

import abc
import threading
from collections.abc import Callable
from typing import Protocol

from svsm.formats.errors import FormatError
from svsm.formats.virtio import (
    MMIO_MAGIC,
    MMIO_VERSION,
    DeviceStatus,
    DeviceType,
    Feature,
    Interrupt,
    MmioRegister,
    QueueAddresses,
)
from svsm.host.devices.virtio_blk import BlkBackend
from svsm.host.devices.virtio_ring import Chain, DevicePackedRing, DeviceRing, DeviceSplitRing, Window

__all__ = ["Backend", "MmioBlk", "MmioDevice", "Offer", "QueueState", "ServiceThread"]

_WORD = 0xFFFF_FFFF
_VENDOR = int.from_bytes(b"svsm", "little")
_ADDRESS_PARTS = {
    MmioRegister.QUEUE_DESCRIPTORS_LOW: (0, 0),
    MmioRegister.QUEUE_DESCRIPTORS_HIGH: (0, 32),
    MmioRegister.QUEUE_DRIVER_LOW: (1, 0),
    MmioRegister.QUEUE_DRIVER_HIGH: (1, 32),
    MmioRegister.QUEUE_DEVICE_LOW: (2, 0),
    MmioRegister.QUEUE_DEVICE_HIGH: (2, 32),
}


class Offer(Protocol):
    """What a device offers."""

    @property
    def features(self) -> int:
        """Feature bits."""

    @property
    def queue_size(self) -> int:
        """Largest size of each queue."""

    @property
    def queues(self) -> int:
        """How many."""


class Backend(Protocol):
    """What is behind the registers.

    Attributes:
        features: What the driver has accepted.
    """

    features: int

    @property
    def device_type(self) -> DeviceType:
        """What it is."""

    @property
    def options(self) -> Offer:
        """What it offers."""

    def configuration(self) -> bytes:
        """The configuration space."""


class QueueState:
    """Registers of one queue."""

    def __init__(self) -> None:
        self.size = 0
        self.ready = 0
        self.addresses = [0, 0, 0]
        self.ring: DeviceRing | None = None


class MmioDevice(abc.ABC):
    """A virtio device behind registers.

    Args:
        backend: What it is.
        window: Guest memory that it can reach.
        interrupt: Raises the interrupt line.
        kicked: What a write to QueueNotify does; None works through the queues at once.
    """

    def __init__(
        self,
        backend: Backend,
        window: Window,
        *,
        interrupt: Callable[[], None] = lambda: None,
        kicked: Callable[[], None] | None = None,
    ) -> None:
        self._offer = backend
        self.window = window
        self.status = 0
        self.generation = 0
        self.interrupt_status = 0
        self.driver_features = 0
        self._interrupt = interrupt
        self._kicked = kicked
        self._feature_select = [0, 0]
        self._queue_select = 0
        self.queues: list[QueueState] = []
        self._lock = threading.RLock()
        self._reset()

    # ---- registers --------------------------------------------------------------------------------------------------

    def read32(self, offset: int) -> int:
        """The register at a byte offset; 0 where there is none."""
        with self._lock:
            return self._read(offset)

    def write32(self, offset: int, value: int) -> None:
        """Set a register; one that does not exist stays so."""
        with self._lock:
            self._write(offset, value & _WORD)

    def _read(self, offset: int) -> int:
        if offset >= MmioRegister.CONFIG:
            at = offset - MmioRegister.CONFIG
            return int.from_bytes(self._offer.configuration()[at : at + 4], "little")
        fixed = {
            MmioRegister.MAGIC: MMIO_MAGIC,
            MmioRegister.VERSION: MMIO_VERSION,
            MmioRegister.DEVICE_ID: self._offer.device_type,
            MmioRegister.VENDOR_ID: _VENDOR,
            MmioRegister.INTERRUPT_STATUS: self.interrupt_status,
            MmioRegister.STATUS: self.status,
            MmioRegister.CONFIG_GENERATION: self.generation & _WORD,
        }
        if offset in fixed:
            return int(fixed[MmioRegister(offset)])
        if offset == MmioRegister.DEVICE_FEATURES:
            return self._word(self._offer.options.features, self._feature_select[0])
        queue = self._queue()
        if offset == MmioRegister.QUEUE_SIZE_MAX:
            return self._offer.options.queue_size if queue is not None else 0
        if offset == MmioRegister.QUEUE_READY:
            return queue.ready if queue is not None else 0
        return 0

    @staticmethod
    def _word(features: int, select: int) -> int:
        return features >> 32 * select & _WORD if select < 2 else 0

    def _queue(self) -> QueueState | None:
        return self.queues[self._queue_select] if self._queue_select < len(self.queues) else None

    def _write(self, offset: int, value: int) -> None:
        if offset == MmioRegister.STATUS:
            self._set_status(value)
        elif offset == MmioRegister.QUEUE_NOTIFY:
            if self._kicked is not None:
                self._kicked()
            else:
                self.service()
        elif offset == MmioRegister.INTERRUPT_ACK:
            self.interrupt_status &= ~value
        elif offset == MmioRegister.DEVICE_FEATURES_SELECT:
            self._feature_select[0] = value
        elif offset == MmioRegister.DRIVER_FEATURES_SELECT:
            self._feature_select[1] = value
        elif offset == MmioRegister.DRIVER_FEATURES:
            self._set_features(value)
        elif offset == MmioRegister.QUEUE_SELECT:
            self._queue_select = value
        else:
            self._write_queue(offset, value)

    def _set_features(self, value: int) -> None:
        select = self._feature_select[1]
        if select < 2 and not self.status & DeviceStatus.FEATURES_OK:
            shift = 32 * select
            self.driver_features = self.driver_features & ~(_WORD << shift) | value << shift

    def _write_queue(self, offset: int, value: int) -> None:
        queue = self._queue()
        if queue is None or self.status & DeviceStatus.DRIVER_OK:
            return
        if offset == MmioRegister.QUEUE_SIZE:
            queue.size = value
        elif offset == MmioRegister.QUEUE_READY:
            self._set_ready(queue, value & 1)
        elif offset in _ADDRESS_PARTS:
            part, shift = _ADDRESS_PARTS[MmioRegister(offset)]
            queue.addresses[part] = queue.addresses[part] & ~(_WORD << shift) | value << shift

    # ---- state ------------------------------------------------------------------------------------------------------

    def _reset(self) -> None:
        self.status = 0
        self.interrupt_status = 0
        self.driver_features = 0
        self.queues = [QueueState() for _ in range(self._offer.options.queues)]

    def _set_status(self, value: int) -> None:
        if not value:
            self._reset()
            return
        if value & DeviceStatus.FEATURES_OK and not self.status & DeviceStatus.FEATURES_OK:
            offered = self._offer.options.features
            if self.driver_features & ~offered or not self.driver_features & Feature.VERSION_1:
                value &= ~DeviceStatus.FEATURES_OK
            self._offer.features = self.driver_features
        self.status = value | self.status & DeviceStatus.NEEDS_RESET

    def _set_ready(self, queue: QueueState, value: int) -> None:
        if not value:
            queue.ready, queue.ring = 0, None
            return
        if not 0 < queue.size <= self._offer.options.queue_size:
            return
        kind = DevicePackedRing if self.driver_features & Feature.RING_PACKED else DeviceSplitRing
        try:
            queue.ring = kind(
                self.window,
                queue.size,
                QueueAddresses(*queue.addresses),
                event_idx=bool(self.driver_features & Feature.EVENT_IDX),
            )
        except FormatError:
            return
        queue.ready = 1

    def needs_reset(self) -> None:
        """Give up until the driver resets."""
        self.status |= DeviceStatus.NEEDS_RESET
        self._raise(Interrupt.CONFIGURATION)

    def _raise(self, bits: int) -> None:
        self.interrupt_status |= bits
        self._interrupt()

    # ---- work -------------------------------------------------------------------------------------------------------

    def service(self) -> int:
        """Work through all queues until there is nothing to do; how many requests there were."""
        with self._lock:
            if not self.status & DeviceStatus.DRIVER_OK or self.status & DeviceStatus.NEEDS_RESET:
                return 0
            count = 0
            try:
                for index, queue in enumerate(self.queues):
                    if queue.ring is not None:
                        count += self._serve_queue(index, queue.ring)
            except FormatError:
                self.needs_reset()
            return count

    @abc.abstractmethod
    def _serve_queue(self, index: int, ring: DeviceRing) -> int:
        """Work through one queue; how many requests there were.

        Raises:
            FormatError: ``virtio-device-ring`` over a ring that makes no sense.
        """

    def complete(self, ring: DeviceRing, chain: Chain, written: int) -> None:
        """Return one request. A hostile device does it its own way."""
        ring.push(chain, written)

    def finished(self, ring: DeviceRing) -> None:
        """After a batch: the interrupt, if the driver wants it."""
        if ring.wants_interrupt():
            self._raise(Interrupt.USED_BUFFER)


class MmioBlk(MmioDevice):
    """A virtio-blk device behind registers.

    Args:
        backend: The disk.
        window, interrupt, kicked: As `MmioDevice` has them.
    """

    def __init__(
        self,
        backend: BlkBackend,
        window: Window,
        *,
        interrupt: Callable[[], None] = lambda: None,
        kicked: Callable[[], None] | None = None,
    ) -> None:
        self.backend = backend
        super().__init__(backend, window, interrupt=interrupt, kicked=kicked)

    def resize(self, sectors: int) -> None:
        """Another capacity, with a notice to the driver."""
        with self._lock:
            self.backend.resize(sectors)
            self.generation += 1
            self._raise(Interrupt.CONFIGURATION)

    def _serve_queue(self, index: int, ring: DeviceRing) -> int:
        del index  # all queues of a disk are alike
        return self._service(ring)

    def _service(self, ring: DeviceRing) -> int:
        count = 0
        while True:
            ring.disable_kicks()
            while (chain := ring.pop()) is not None:
                self.complete(ring, chain, self.backend.handle(self.window, chain))
                count += 1
            if not ring.enable_kicks():
                break
        if count:
            self.finished(ring)
        return count


class ServiceThread(threading.Thread):
    """Serves a device from a thread of its own, as another processor would.

    Args:
        device: Made with ``kicked=thread.kick``; set with `serve` before the start.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._wake = threading.Event()
        self._stopped = False
        self._device: MmioDevice | None = None

    def serve(self, device: MmioDevice) -> None:
        """Start with this device."""
        self._device = device
        self.start()

    def kick(self) -> None:
        """There is work."""
        self._wake.set()

    def run(self) -> None:
        """Until `stop`."""
        while True:
            self._wake.wait()
            self._wake.clear()
            if self._stopped:
                return
            if self._device is not None:
                self._device.service()

    def stop(self) -> None:
        """End it and wait."""
        self._stopped = True
        self._wake.set()
        self.join()
