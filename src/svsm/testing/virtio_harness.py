# SPDX-License-Identifier: MIT OR Apache-2.0
"""The virtio driver on one side, a device model on the other, nothing else: no machine, no QEMU.

`InlineRegisters` calls the device as a trapped register access would, on the driver's own thread, and its clock
moves only while the driver waits: a deadline of 30 seconds passes at once, and every run is the same. With a
`ServiceThread` the device runs beside the driver in real time.
"""

from __future__ import annotations

import dataclasses
import fcntl
import mmap
import os
import threading
import time
from collections.abc import Callable

from svsm.host.devices.virtio_blk import BlkBackend, BlkOptions
from svsm.host.devices.virtio_mmio import MmioBlk, ServiceThread
from svsm.host.devices.virtio_ring import Window
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.virtio.blk import BlkPolicy, VirtioBlk, memory_bytes
from svsm.storage.drivers.virtio.mmio import MmioTransport

__all__ = [
    "GPA",
    "SMALL_POLICY",
    "Clock",
    "InlineRegisters",
    "Machine",
    "ThreadRegisters",
    "disk_file",
    "threaded_disk",
    "virtio_disk",
]

GPA = 0x5000_0000_0000
"""Where the shared memory is for the device: not where it is for the driver, so that a mix-up fails."""

SMALL_POLICY = BlkPolicy(
    queue_size=32, large_bytes=16384, large_slots=2, spins=2, deadline_seconds=5.0, rekick_seconds=0.25
)
"""Little memory, so that queues and buffers run out soon."""


_MOST_LOOKS = 200_000


class Clock:
    """Time that passes when somebody waits. A driver that looks at it for ever is stopped with an `AssertionError`.

    Attributes:
        now: Seconds.
        looks: How often it was asked.
    """

    def __init__(self) -> None:
        self.now = 1000.0
        self.looks = 0

    def __call__(self) -> float:
        self.looks += 1
        if self.looks > _MOST_LOOKS:
            raise AssertionError("the driver never gives up")
        return self.now

    def pause(self, seconds: float) -> None:
        """Wait."""
        self.now += max(seconds, 1e-6)


class InlineRegisters:
    """`Registers` that call a device model directly.

    Args:
        device: Anything with ``read32`` and ``write32``.
        clock: Moved by waiting.

    Attributes:
        spurious: Wake up without a reason, and without time passing.
        accesses: Register accesses so far.
    """

    def __init__(self, device: MmioBlk, clock: Clock) -> None:
        self._device = device
        self._clock = clock
        self.spurious = False
        self.accesses = 0

    def read32(self, offset: int) -> int:
        """A trapped load."""
        self.accesses += 1
        return self._device.read32(offset)

    def write32(self, offset: int, value: int) -> None:
        """A trapped store."""
        self.accesses += 1
        self._device.write32(offset, value)

    def wait_interrupt(self, seconds: float) -> bool:
        """All the time passes."""
        if self.spurious:
            return True
        self._clock.pause(seconds)
        return False

    def close(self) -> None:
        """Nothing."""


class ThreadRegisters(InlineRegisters):
    """`Registers` of a device that runs in a thread: real time, a real wait."""

    def __init__(self, device: MmioBlk, line: threading.Event) -> None:
        super().__init__(device, Clock())
        self._line = line

    def wait_interrupt(self, seconds: float) -> bool:
        """The line, or the time."""
        raised = self._line.wait(seconds)
        self._line.clear()
        return raised


@dataclasses.dataclass(slots=True)
class Machine:
    """Both sides of a disk.

    Attributes:
        driver: The `BlockDevice`.
        device: The device model.
        memory: What they share, as the driver sees it.
        clock: Moves when the driver waits.
        registers: Between them.
        descriptor: The disk's file.
    """

    driver: VirtioBlk
    device: MmioBlk
    memory: DmaMemory
    clock: Clock
    registers: InlineRegisters
    descriptor: int

    def content(self, offset: int, length: int) -> bytes:
        """What is in the file."""
        return os.pread(self.descriptor, length, offset)

    def close(self) -> None:
        """Driver and file."""
        self.driver.close()
        os.close(self.descriptor)


def disk_file(size_bytes: int, content: bytes = b"", *, seals: int = 0) -> int:
    """A descriptor of a memory file of this size, sealed afterwards (F_SEAL_WRITE: every write fails)."""
    descriptor = os.memfd_create("disk", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size_bytes)
    os.pwrite(descriptor, content, 0)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def shared_memory(size_bytes: int) -> memoryview:
    """Fresh zeroed pages that two sides may hold."""
    return memoryview(mmap.mmap(-1, size_bytes))


def virtio_disk(
    descriptor: int,
    *,
    options: BlkOptions | None = None,
    policy: BlkPolicy = SMALL_POLICY,
    make: Callable[..., MmioBlk] = MmioBlk,
    memory_type: type[DmaMemory] = DmaMemory,
) -> Machine:
    """A driver over an inline device.

    Args:
        descriptor: The disk's file; owned by the `Machine`.
        options: What the device offers.
        policy: What the driver wants.
        make: The device's class or factory, called as `MmioBlk` is.
        memory_type: How the driver sees the shared memory.

    Raises:
        SvsmError: The driver refuses the device.
    """
    view = shared_memory(memory_bytes(policy))
    clock = Clock()
    device = make(BlkBackend(descriptor, options or BlkOptions()), Window(view, address=GPA))
    registers = InlineRegisters(device, clock)
    memory = memory_type(view, address=GPA)
    transport = MmioTransport(registers, clock=clock, pause=clock.pause)
    driver = VirtioBlk(transport, memory, policy=policy, clock=clock, pause=clock.pause)
    return Machine(driver, device, memory, clock, registers, descriptor)


def threaded_disk(
    descriptor: int, *, options: BlkOptions | None = None, policy: BlkPolicy | None = None
) -> tuple[Machine, ServiceThread]:
    """A driver over a device that runs in a thread; stop the thread after closing the machine."""
    policy = policy or BlkPolicy()
    view = shared_memory(memory_bytes(policy))
    line, thread = threading.Event(), ServiceThread()
    device = MmioBlk(
        BlkBackend(descriptor, options or BlkOptions()),
        Window(view, address=GPA),
        interrupt=line.set,
        kicked=thread.kick,
    )
    thread.serve(device)
    registers = ThreadRegisters(device, line)
    memory = DmaMemory(view, address=GPA)
    driver = VirtioBlk(MmioTransport(registers), memory, policy=policy, clock=time.monotonic)
    return Machine(driver, device, memory, Clock(), registers, descriptor), thread
