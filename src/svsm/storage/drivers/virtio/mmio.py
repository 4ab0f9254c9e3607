# SPDX-License-Identifier: MIT OR Apache-2.0
"""virtio-mmio, modern (VIRTIO 1.2 §4.2), over any way to read and write 32-bit registers.

The registers are behind `Registers`: guest MMIO in a real VM, a message channel to a device process, QEMU's qtest
socket. Each answer comes from the host. Rules: what identifies the device is read once; feature words are read once;
everything the driver sets and the specification lets it read back is read back; every loop counts its turns; an
answer outside 32 bits is refused as such. A legacy device (version 1) is not spoken to at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from svsm.formats.errors import ProtocolError
from svsm.formats.virtio import (
    MMIO_MAGIC,
    MMIO_VERSION,
    MMIO_WINDOW_BYTES,
    QUEUE_SIZE_LIMIT,
    DeviceStatus,
    DeviceType,
    Interrupt,
    MmioRegister,
    QueueAddresses,
)
from svsm.storage.drivers.virtio.transport import PROTECTED, Events

__all__ = ["MmioTransport", "Registers"]

_WORD = 0xFFFF_FFFF
_CONFIG_TRIES = 8
_RESET_TRIES = 10_000
_RESET_PAUSE_SECONDS = 0.001


class Registers(Protocol):
    """The device's register window."""

    def read32(self, offset: int) -> int:
        """The register at a byte offset; hostile."""

    def write32(self, offset: int, value: int) -> None:
        """Set a register."""

    def wait_interrupt(self, seconds: float) -> bool:
        """Until an interrupt arrives, at most so long; whether one did. It may be spurious."""

    def close(self) -> None:
        """Let go."""


class MmioTransport:
    """A `Transport` over registers.

    Args:
        registers: Owned.
        clock: What deadlines are measured with.
        pause: Called with seconds between two looks at a device that is busy resetting.

    Raises:
        ProtocolError: ``virtio-magic``, ``virtio-legacy``, ``virtio-no-device``, ``virtio-register``.
        BackendError: What `registers` raises.
    """

    mandatory_features = PROTECTED

    def __init__(
        self,
        registers: Registers,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._registers = registers
        self._clock = clock
        self._pause = pause
        self._status = 0
        magic = self._read(MmioRegister.MAGIC)
        if magic != MMIO_MAGIC:
            raise ProtocolError(
                "there is no virtio device at these registers", code="virtio-magic", expected=MMIO_MAGIC, got=magic
            )
        version = self._read(MmioRegister.VERSION)
        if version != MMIO_VERSION:
            raise ProtocolError(
                "the device speaks the legacy interface, or one that does not exist",
                code="virtio-legacy",
                hint="QEMU: -global virtio-mmio.force-legacy=false",
                expected=MMIO_VERSION,
                got=version,
            )
        self._device_type = self._read(MmioRegister.DEVICE_ID)
        if self._device_type == DeviceType.NONE:
            raise ProtocolError("the slot has no device", code="virtio-no-device")

    # ---- registers --------------------------------------------------------------------------------------------------

    def _read(self, offset: int) -> int:
        value = self._registers.read32(offset)
        if not 0 <= value <= _WORD:
            raise ProtocolError("a register has an impossible value", code="virtio-register", offset=offset)
        return value

    def _write(self, offset: int, value: int) -> None:
        self._registers.write32(offset, value)

    def _set_status(self, status: int) -> None:
        self._status = status
        self._write(MmioRegister.STATUS, status)

    def _fail(self) -> None:
        self._set_status(self._status | DeviceStatus.FAILED)

    # ---- start ------------------------------------------------------------------------------------------------------

    @property
    def device_type(self) -> int:
        """What the device said that it is."""
        return self._device_type

    def reset(self, *, deadline: float) -> None:
        """Write status 0 and wait until it reads as 0."""
        self._set_status(0)
        for _ in range(_RESET_TRIES):
            if not self._read(MmioRegister.STATUS):
                self._read(MmioRegister.INTERRUPT_STATUS)
                self._set_status(DeviceStatus.ACKNOWLEDGE)
                self._set_status(DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER)
                return
            if self._clock() >= deadline:
                break
            self._pause(_RESET_PAUSE_SECONDS)
        raise ProtocolError(
            "the device does not take a reset", code="virtio-reset-stuck", hint="only its host can help: restart it"
        )

    def features(self) -> int:
        """Both words that have features."""
        words = []
        for select in (0, 1):
            self._write(MmioRegister.DEVICE_FEATURES_SELECT, select)
            words.append(self._read(MmioRegister.DEVICE_FEATURES))
        return words[0] | words[1] << 32

    def accept(self, features: int) -> None:
        """Write both words, set FEATURES_OK, and see whether it stays."""
        for select in (0, 1):
            self._write(MmioRegister.DRIVER_FEATURES_SELECT, select)
            self._write(MmioRegister.DRIVER_FEATURES, features >> 32 * select & _WORD)
        self._set_status(self._status | DeviceStatus.FEATURES_OK)
        status = self._read(MmioRegister.STATUS)
        if status != self._status:
            self._fail()
            raise ProtocolError(
                "the device does not accept what it offered",
                code="virtio-features-refused",
                expected=self._status,
                got=status,
            )

    # ---- queues -----------------------------------------------------------------------------------------------------

    def queue_size(self, index: int) -> int:
        """Select a queue that is not in use and read its largest size, once."""
        self._write(MmioRegister.QUEUE_SELECT, index)
        if self._read(MmioRegister.QUEUE_READY):
            raise ProtocolError("the queue is in use after a reset", code="virtio-queue-busy", queue=index)
        size = self._read(MmioRegister.QUEUE_SIZE_MAX)
        if not size:
            raise ProtocolError("the device has no such queue", code="virtio-queue-missing", queue=index)
        if size > QUEUE_SIZE_LIMIT:
            raise ProtocolError(
                "the queue is larger than queues can be", code="virtio-queue-size", expected=QUEUE_SIZE_LIMIT, got=size
            )
        return size

    def activate(self, index: int, size: int, addresses: QueueAddresses) -> None:
        """Size, three addresses, ready; then see whether it is."""
        self._write(MmioRegister.QUEUE_SELECT, index)
        self._write(MmioRegister.QUEUE_SIZE, size)
        for low, address in (
            (MmioRegister.QUEUE_DESCRIPTORS_LOW, addresses.descriptors),
            (MmioRegister.QUEUE_DRIVER_LOW, addresses.driver),
            (MmioRegister.QUEUE_DEVICE_LOW, addresses.device),
        ):
            self._write(low, address & _WORD)
            self._write(low + 4, address >> 32)
        self._write(MmioRegister.QUEUE_READY, 1)
        ready = self._read(MmioRegister.QUEUE_READY)
        if ready != 1:
            raise ProtocolError("the device does not take the queue", code="virtio-queue-refused", queue=index)

    def start(self) -> None:
        """DRIVER_OK, and the device must not have given up meanwhile."""
        self._set_status(self._status | DeviceStatus.DRIVER_OK)
        self.check()

    # ---- running ----------------------------------------------------------------------------------------------------

    def notify(self, index: int) -> None:
        """QueueNotify."""
        self._write(MmioRegister.QUEUE_NOTIFY, index)

    def wait(self, deadline: float) -> None:
        """An interrupt, or the time."""
        self._registers.wait_interrupt(max(0.0, deadline - self._clock()))

    def take_events(self) -> Events:
        """Read and acknowledge the interrupt status; bits that mean nothing are neither believed nor acknowledged."""
        status = self._read(MmioRegister.INTERRUPT_STATUS)
        known = status & (Interrupt.USED_BUFFER | Interrupt.CONFIGURATION)
        if known:
            self._write(MmioRegister.INTERRUPT_ACK, known)
        return Events(used=bool(known & Interrupt.USED_BUFFER), configuration=bool(known & Interrupt.CONFIGURATION))

    def check(self) -> None:
        """Exactly the bits that the driver set, and no other."""
        status = self._read(MmioRegister.STATUS)
        if status != self._status:
            raise ProtocolError(
                "the device has failed and asks for a reset",
                code="virtio-needs-reset",
                expected=self._status,
                got=status,
            )

    def configuration(self, offset: int, length: int) -> bytes:
        """Words between two equal readings of the generation; gives up after a few tries."""
        if offset % 4 or length % 4 or not 0 <= offset <= offset + length <= MMIO_WINDOW_BYTES - MmioRegister.CONFIG:
            raise ProtocolError("no such part of the configuration", code="virtio-config-range", offset=offset)
        for _ in range(_CONFIG_TRIES):
            before = self._read(MmioRegister.CONFIG_GENERATION)
            words = [self._read(MmioRegister.CONFIG + at) for at in range(offset, offset + length, 4)]
            if self._read(MmioRegister.CONFIG_GENERATION) == before:
                return b"".join(word.to_bytes(4, "little") for word in words)
        raise ProtocolError("the device's configuration never stands still", code="virtio-config-unstable")

    def close(self) -> None:
        """Close the registers."""
        self._registers.close()
