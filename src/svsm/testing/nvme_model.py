# SPDX-License-Identifier: MIT OR Apache-2.0
"""An NVMe controller in memory, honest unless told otherwise, and the NVMe driver over it: no machine, no QEMU.

The model runs on the driver's thread, inside its doorbell writes; the clock moves only while the driver waits. What an
attack needs is a hook: `registers` replaces what a register reads as, `pages` what Identify says, `answer` gets every
completion before it is posted and says what is posted instead, `stalled` takes commands and does nothing.
"""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Callable, Sequence

from svsm.formats.nvme import (
    COMPLETION_BYTES,
    PAGE_BYTES,
    SUBMISSION_BYTES,
    AdminOpcode,
    Capabilities,
    Completion,
    ControllerStatus,
    DsmRange,
    NvmeRegister,
    NvmOpcode,
    Submission,
)
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.nvme.disk import NvmeDisk, NvmePolicy, memory_bytes
from svsm.testing.virtio_harness import Clock

__all__ = ["GPA", "SMALL_NVME", "NvmeBench", "NvmeModel", "nvme_bench"]

GPA = 0x6000_0000_0000
"""Where the shared memory is for the controller: not where it is for the driver, so that a mix-up fails."""

SMALL_NVME = NvmePolicy(depth=8, large_bytes=16384, large_slots=2, spins=2, deadline_seconds=5.0, poll_seconds=0.25)
"""Little memory, so that slots and buffers run out soon."""

_WINDOW_BYTES = 0x2000
_INVALID_OPCODE, _INVALID_FIELD, _LBA_RANGE, _BAD_NAMESPACE = 0x001, 0x002, 0x080, 0x00B
_MOST_TURNS = 100_000

Answer = Callable[["NvmeModel", int, Completion], Sequence[tuple[int, Completion]]]
"""(model, queue, completion) to what is posted: (queue, completion) each."""


@dataclasses.dataclass(slots=True)
class _Queue:
    submissions: int = 0
    completions: int = 0
    entries: int = 0
    head: int = 0
    posted: int = 0
    phase: int = 1


class NvmeModel:
    """The controller and its disk; also the driver's `Registers`.

    Args:
        view: The shared memory.
        content: Of the disk.
        clock: Moved when the driver waits for an interrupt.
        block_shift: Block size as a power of two.

    Attributes:
        capabilities: CAP.
        registers: Instead of a register's value: by offset, called each time.
        pages: Identify pages by CNS: bytes to put at offsets.
        answer: Says what is posted for each completion.
        stalled: Fetch nothing.
        spurious: Waiting for an interrupt takes no time.
        commands: Every command that was fetched, with its queue.
        flushes: How many flushes were done.
        delayed: Completions kept back: post them with `release`.
        resets: How often it was switched off.
    """

    size_bytes = _WINDOW_BYTES

    def __init__(self, view: memoryview, content: bytearray, clock: Clock, *, block_shift: int = 9) -> None:
        self.view = view
        self.content = content
        self.clock = clock
        self.block_shift = block_shift
        self.capabilities = Capabilities(
            queue_entries=64, ready_seconds=2.0, doorbell_stride_bytes=4, nvm_command_set=True, smallest_page_bytes=4096
        ).pack()
        self.registers: dict[int, Callable[[], int]] = {}
        self.pages: dict[int, dict[int, bytes]] = {0: {}, 1: {}}
        self.answer: Answer = lambda _model, queue, completion: [(queue, completion)]
        self.stalled = False
        self.spurious = False
        self.commands: list[tuple[int, Submission]] = []
        self.flushes = 0
        self.resets = 0
        self.closed = False
        self._values: dict[int, int] = {NvmeRegister.VS: 0x0001_0400, NvmeRegister.CC: 0, NvmeRegister.AQA: 0}
        self._ready = self._shut_down = False
        self._queues: dict[int, _Queue] = {}

    # ---- registers --------------------------------------------------------------------------------------------------

    def read32(self, offset: int) -> int:
        """A trapped load."""
        if offset in self.registers:
            return self.registers[offset]()
        if offset == NvmeRegister.CAP:
            return self.capabilities & 0xFFFF_FFFF
        if offset == NvmeRegister.CAP + 4:
            return self.capabilities >> 32
        if offset == NvmeRegister.CSTS:
            return self.status()
        return self._values.get(offset, 0)

    def status(self) -> int:
        """CSTS as it honestly is."""
        done = ControllerStatus.SHUTDOWN_COMPLETE if self._shut_down else 0
        return int(self._ready) | int(done)

    def write32(self, offset: int, value: int) -> None:
        """A trapped store."""
        if offset >= NvmeRegister.DOORBELLS:
            self._doorbell((offset - NvmeRegister.DOORBELLS) // 4, value)
            return
        self._values[offset] = value
        if offset == NvmeRegister.CC:
            self._configure(value)

    def wait_interrupt(self, seconds: float) -> bool:
        """All the time passes, or none."""
        if self.spurious:
            return True
        self.clock.pause(seconds)
        return False

    def close(self) -> None:
        """Noted."""
        self.closed = True

    def _configure(self, value: int) -> None:
        enabled = bool(value & 1)
        if self._ready and not enabled:
            self.resets += 1
        if enabled and not self._ready:
            entries = self._values[NvmeRegister.AQA]
            admin = _Queue(self._wide(NvmeRegister.ASQ), self._wide(NvmeRegister.ACQ), (entries & 0xFFF) + 1)
            self._queues = {0: admin}
        self._ready = enabled
        self._shut_down = enabled and bool(value >> 14 & 3)

    def _wide(self, offset: int) -> int:
        return self._values.get(offset, 0) | self._values.get(offset + 4, 0) << 32

    # ---- queues -----------------------------------------------------------------------------------------------------

    def memory(self, address: int, length: int) -> memoryview:
        """Shared memory at a device address."""
        start = address - GPA
        if start < 0 or start + length > self.view.nbytes:
            raise AssertionError(f"the driver hands out {address:#x}, which is not its shared memory")
        return self.view[start : start + length]

    def _doorbell(self, number: int, value: int) -> None:
        queue = self._queues.get(number // 2)
        if queue is None or number % 2 or self.stalled or not self._ready:
            return
        if value >= queue.entries:
            raise AssertionError("the driver rings beyond its queue")
        while queue.head != value:
            data = self.memory(queue.submissions + queue.head * SUBMISSION_BYTES, SUBMISSION_BYTES)
            command = Submission.parse(bytes(data))
            queue.head = (queue.head + 1) % queue.entries
            self.commands.append((number // 2, command))
            status, result = self._admin(command) if number < 2 else (self.run(command), 0)
            completion = Completion(result, 0, queue.head, number // 2, command.command_id, status << 1)
            for target, entry in self.answer(self, number // 2, completion):
                self.post(target, entry)

    def post(self, number: int, completion: Completion, *, flip: bool = True) -> None:
        """Put a completion into a queue, with the phase that is due (or, without `flip`, the other one)."""
        queue = self._queues[number]
        phase = queue.phase if flip else 1 - queue.phase
        data = completion.replace(status=completion.status & ~1 | phase).pack()
        self.memory(queue.completions + queue.posted * COMPLETION_BYTES, COMPLETION_BYTES)[:] = data
        if flip:
            queue.posted += 1
            if queue.posted == queue.entries:
                queue.posted, queue.phase = 0, 1 - queue.phase

    # ---- commands ---------------------------------------------------------------------------------------------------

    def identify(self, structure: int) -> bytes:
        """An Identify page."""
        page = bytearray(PAGE_BYTES)
        if structure == 1:
            parts = {77: b"\x05", 111: b"\x01", 512: b"\x66\x44", 516: b"\x01\0\0\0", 520: b"\x0c\0", 525: b"\x01"}
        else:
            blocks = (len(self.content) >> self.block_shift).to_bytes(8, "little")
            parts = {0: blocks * 3, 128: bytes([0, 0, self.block_shift, 0])}
        for offset, data in {**parts, **self.pages[structure]}.items():
            page[offset : offset + len(data)] = data
        return bytes(page)

    def _admin(self, command: Submission) -> tuple[int, int]:
        if command.opcode == AdminOpcode.IDENTIFY and command.cdw10 in (0, 1):
            if command.cdw10 == 0 and command.namespace != 1:
                return _BAD_NAMESPACE, 0
            self.memory(command.prp1, PAGE_BYTES)[:] = self.identify(command.cdw10)
            return 0, 0
        if command.opcode == AdminOpcode.SET_FEATURES and command.cdw10 == 7:
            return 0, 0
        number, entries = command.cdw10 & 0xFFFF, (command.cdw10 >> 16) + 1
        if command.opcode == AdminOpcode.CREATE_CQ and command.cdw11 & 1:
            self._queues[number] = _Queue(completions=command.prp1, entries=entries)
            return 0, 0
        if command.opcode == AdminOpcode.CREATE_SQ and command.cdw11 & 1 and number in self._queues:
            self._queues[number].submissions = command.prp1
            return 0, 0
        return _INVALID_OPCODE, 0

    def _pages(self, command: Submission, length: int) -> list[memoryview]:
        """The memory of a transfer, page by page."""
        count = (length + PAGE_BYTES - 1) // PAGE_BYTES
        addresses = [command.prp1]
        if count == 2:
            addresses.append(command.prp2)
        elif count > 2:
            table = self.memory(command.prp2, 8 * (count - 1)).cast("Q")
            addresses += list(table)
        if any(address % PAGE_BYTES for address in addresses):
            raise AssertionError("a page that is not aligned")
        return [
            self.memory(address, min(PAGE_BYTES, length - index * PAGE_BYTES))
            for index, address in enumerate(addresses)
        ]

    def run(self, command: Submission) -> int:
        """One I/O command; its status."""
        if command.namespace != 1:
            return _BAD_NAMESPACE
        if command.opcode == NvmOpcode.FLUSH:
            self.flushes += 1
            return 0
        if command.opcode == NvmOpcode.DATASET_MANAGEMENT:
            return self._dataset(command)
        if command.opcode not in (NvmOpcode.READ, NvmOpcode.WRITE, NvmOpcode.WRITE_ZEROES):
            return _INVALID_OPCODE
        start = (command.cdw10 | command.cdw11 << 32) << self.block_shift
        length = ((command.cdw12 & 0xFFFF) + 1) << self.block_shift
        if start + length > len(self.content):
            return _LBA_RANGE
        if command.opcode == NvmOpcode.WRITE_ZEROES:
            self.content[start : start + length] = bytes(length)
            return 0
        for part in self._pages(command, length):
            if command.opcode == NvmOpcode.READ:
                part[:] = self.content[start : start + len(part)]
            else:
                self.content[start : start + len(part)] = part
            start += len(part)
        return 0

    def _dataset(self, command: Submission) -> int:
        if not command.cdw11 & 4:
            return _INVALID_FIELD
        table = bytes(self.memory(command.prp1, ((command.cdw10 & 0xFF) + 1) * DsmRange.SIZE))
        for entry in DsmRange.iter_parse(table):
            start, length = entry.first_block << self.block_shift, entry.blocks << self.block_shift
            if start + length > len(self.content):
                return _LBA_RANGE
            self.content[start : start + length] = bytes(length)
        return 0


@dataclasses.dataclass(slots=True)
class NvmeBench:
    """Both sides, before the driver starts.

    Attributes:
        model: The controller.
        memory: What they share, as the driver sees it.
        clock: Moves when the driver waits.
        policy: Of the driver.
    """

    model: NvmeModel
    memory: DmaMemory
    clock: Clock
    policy: NvmePolicy

    def start(self) -> NvmeDisk:
        """The driver."""
        return NvmeDisk(self.model, self.memory, policy=self.policy, clock=self.clock, pause=self.clock.pause)


def nvme_bench(
    content: bytearray,
    *,
    policy: NvmePolicy = SMALL_NVME,
    block_shift: int = 9,
    memory_type: type[DmaMemory] = DmaMemory,
) -> NvmeBench:
    """A controller with this disk, and memory for its driver."""
    view = memoryview(mmap.mmap(-1, memory_bytes(policy)))
    clock = Clock()
    return NvmeBench(
        NvmeModel(view, content, clock, block_shift=block_shift), memory_type(view, address=GPA), clock, policy
    )
