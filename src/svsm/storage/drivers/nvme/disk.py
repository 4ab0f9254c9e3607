# SPDX-License-Identifier: MIT OR Apache-2.0
"""An NVMe namespace as a `BlockDevice`: bring-up and commands. Life and death are `lifecycle`'s.

A read that was reported done and never was gives zeros. A flush is always sent, whatever the controller says about its
cache. `NvmeDisk.reconnect` resets the controller, or takes new registers. Resizes are seen when `poll` asks;
asynchronous events are not asked for: a request that is always outstanding would be one more thing that a controller
can complete wrongly, for a notice that nothing here waits for.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from svsm.abi.block import Range
from svsm.formats.errors import ProtocolError, StateError, SvsmError
from svsm.formats.nvme import (
    PAGE_BYTES,
    DsmRange,
    IdentifyNamespace,
    NvmOpcode,
    status_name,
)
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.lifecycle import Confirm, QueuedDisk
from svsm.storage.drivers.nvme.controller import ADMIN_ENTRIES, Controller, Registers
from svsm.storage.drivers.nvme.identify import Geometry, parse_geometry, parse_size
from svsm.storage.drivers.nvme.queue import queue_bytes
from svsm.storage.drivers.nvme.slots import MOST_BUFFER_BYTES, Slots, slots_bytes

__all__ = ["NvmeDisk", "NvmePolicy", "memory_bytes"]

_DOORBELL_COMMANDS = 16
"""Commands for one doorbell: the controller begins with these while the next are prepared."""
_MOST_RANGES = PAGE_BYTES // DsmRange.SIZE
_MOST_RANGE_BLOCKS = (1 << 32) - 1
_MOST_ZEROED_BLOCKS = 1 << 16
_DSM_DEALLOCATE = 4


@dataclasses.dataclass(frozen=True, slots=True)
class NvmePolicy:
    """What the driver wants; what the controller does not offer is done without.

    Attributes:
        read_only: Refuse writes.
        namespace: Its number.
        depth: Commands in flight, at most.
        small_bytes, large_bytes: The two sizes of bounce buffers; whole pages of 4 KiB.
        large_slots: How many large ones there are.
        deadline_seconds: Without an answer for so long, plus a second for every MiB asked for, the device is dead.
        poll_seconds: Look at CSTS after so long without an interrupt.
        spins: How often to look before waiting.
    """

    read_only: bool = False
    namespace: int = 1
    depth: int = 128
    small_bytes: int = 4096
    large_bytes: int = 1 << 20
    large_slots: int = 4
    deadline_seconds: float = 30.0
    poll_seconds: float = 0.05
    spins: int = 100

    def check(self) -> None:
        """Demand that it makes sense.

        Raises:
            StateError: ``nvme-policy``.
        """
        sizes = (self.small_bytes, self.large_bytes)
        if any(not PAGE_BYTES <= size <= MOST_BUFFER_BYTES or size % PAGE_BYTES for size in sizes):
            raise StateError("bounce buffers are whole pages", code="nvme-policy")
        if self.small_bytes > self.large_bytes or self.large_slots < 1 or not 1 <= self.depth < 1 << 16:
            raise StateError("the numbers of commands and buffers are at least 1", code="nvme-policy")
        if not 0 < self.namespace < 0xFFFF_FFFF:
            raise StateError("namespaces count from 1", code="nvme-policy")
        if self.deadline_seconds <= 0 or self.poll_seconds <= 0 or self.spins < 1:
            raise StateError("times are positive", code="nvme-policy")


def memory_bytes(policy: NvmePolicy) -> int:
    """Shared memory that a driver with this policy needs at most, a whole number of pages (both halves)."""
    buffers = slots_bytes(
        policy.depth, small_bytes=policy.small_bytes, large_bytes=policy.large_bytes, large_slots=policy.large_slots
    )
    half = queue_bytes(ADMIN_ENTRIES) + queue_bytes(policy.depth + 1) + buffers + 2 * PAGE_BYTES
    return 2 * ((half + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES)


class NvmeDisk(QueuedDisk[Geometry]):
    """One namespace.

    Args:
        registers: Owned: closed with this, also where this raises.
        memory: Shared memory for this device alone; `memory_bytes` says how much is enough.
        policy: What to use.
        clock: Monotonic seconds.
        pause: Sleeps for seconds.

    Raises:
        ProtocolError: The controller cannot be used: ``nvme-…``.
        BackendError: The registers' transport failed.
        StateError: ``nvme-policy``, ``dma-memory``.
    """

    _ahead = _DOORBELL_COMMANDS

    def __init__(
        self,
        registers: Registers,
        memory: DmaMemory,
        *,
        policy: NvmePolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._policy = policy = policy or NvmePolicy()
        self._registers = registers
        self._pause = pause
        try:
            policy.check()
        except SvsmError:
            registers.close()
            raise
        super().__init__(memory, read_only=policy.read_only, deadline_seconds=policy.deadline_seconds, clock=clock)

    # ---- life -------------------------------------------------------------------------------------------------------

    def _bring_up(self, memory: DmaMemory) -> Geometry:
        policy = self._policy
        self._controller = controller = Controller(
            self._registers,
            clock=self._clock,
            pause=self._pause,
            spins=policy.spins,
            poll_seconds=policy.poll_seconds,
        )
        deadline = self._deadline()
        controller.reset(deadline=deadline)
        self._memory = memory
        controller.start(memory, deadline=deadline)
        host = controller.identify_controller(deadline=deadline)
        disk = controller.identify_namespace(policy.namespace, deadline=deadline)
        geometry = parse_geometry(host, disk, number=policy.namespace)
        depth = min(policy.depth, geometry.depth, controller.capabilities.queue_entries - 1)
        self._pair = controller.create_queue(memory, entries=depth + 1, deadline=deadline)
        self._slots = Slots(
            memory,
            depth,
            small_bytes=policy.small_bytes,
            large_bytes=max(policy.large_bytes, geometry.block_size_bytes),
            large_slots=policy.large_slots,
        )
        self._owners = [0] * depth
        largest = max(policy.large_bytes // geometry.block_size_bytes, 1) * geometry.block_size_bytes
        self._piece_bytes = min(largest, geometry.transfer_bytes)
        return geometry

    def reconnect(self, registers: Registers | None = None) -> None:
        """Reset the controller, or take new registers of it, and start again; what was dead lives again.

        Raises:
            ProtocolError, BackendError: It cannot be used; it stays dead.
            StateError: ``block-closed``.
        """
        self._demand_open()
        if registers is not None:
            self._registers.close()
            self._registers = registers
        self._restart()

    def _ask_size(self, deadline: float) -> int:
        page = self._controller.identify_namespace(self._policy.namespace, deadline=deadline)
        size, block = parse_size(IdentifyNamespace.parse(page))
        if block != self._shape.block_size_bytes:
            raise ProtocolError("the disk has changed its block size", code="nvme-identify", field="LBADS", got=block)
        return size

    def _stop(self, *, deadline: float) -> None:
        if self.fault is None:
            self._controller.shut_down(deadline=deadline)
        else:
            self._controller.reset(deadline=deadline)

    def _release(self) -> None:
        self._registers.close()

    # ---- commands ---------------------------------------------------------------------------------------------------

    def _transfer(
        self, pieces: Sequence[Any], results: list[bytes] | None, deadline: float, confirm: Confirm | None = None
    ) -> int:
        """Run all pieces, as many at a time as the queue takes."""
        controller, pair = self._controller, self._pair
        controller.begin()
        at = done = failure = 0
        total = len(pieces)
        while done < total:
            filled = at
            if at < total:
                at = self._fill(pieces, at, reading=results is not None)
            if filled != at:
                controller.ring(pair)
            if confirm is not None:
                if not confirm():
                    total = at
                confirm = None
            finished = pair.collect()
            if finished:
                controller.acknowledge(pair)
                failure = self._take(finished, pieces, results) or failure
                done += len(finished)
            elif filled == at:
                controller.wait(pair, deadline)
        return failure

    def _fill(self, pieces: Sequence[Any], at: int, *, reading: bool) -> int:
        """Put a few commands into flight from ``pieces[at]`` on; returns where it ended."""
        slots, pair, shared, zeros = self._slots, self._pair, self._memory.bytes, self._slots.zeros
        word = (NvmOpcode.READ if reading else NvmOpcode.WRITE) | self._policy.namespace << 32
        shift = self._shape.block_size_bytes.bit_length() - 1
        total = min(len(pieces), at + _DOORBELL_COMMANDS)
        while at < total:
            offset, data = pieces[at]
            length = data if reading else len(data)
            slot = slots.take(length)
            if slot < 0:
                break
            start = slots.offsets[slot]
            shared[start : start + length] = zeros[:length] if reading else data
            prp1, prp2 = slots.prps(slot, length)
            pair.submit(slot, (word, prp1, prp2, offset >> shift, (length >> shift) - 1, 0))
            self._owners[slot] = at
            at += 1
        return at

    def _take(self, finished: Sequence[tuple[int, int]], pieces: Sequence[Any], results: list[bytes] | None) -> int:
        """Give slots back, contents of reads to their place; a status among them that is no success, or 0."""
        shared, slots, failure = self._memory.bytes, self._slots, 0
        for slot, status in finished:
            if status & 0x7FF:
                failure = status
            elif results is not None:
                owner = self._owners[slot]
                start = slots.offsets[slot]
                results[owner] = shared[start : start + pieces[owner][1]].tobytes()
            slots.give_back(slot)
        return failure

    def _command(self, opcode: NvmOpcode, deadline: float, *, cdw10: int = 0, cdw12: int = 0, data: bytes = b"") -> int:
        """One command that moves no blocks: a status that is no success, or 0. `cdw10` is 64 bits, dwords 10 and 11."""
        controller, pair, slots = self._controller, self._pair, self._slots
        controller.begin()
        slot = slots.take(0)
        if slot < 0:
            slot = slots.take(slots.small_bytes + 1)
        start = slots.offsets[slot]
        self._memory.bytes[start : start + len(data)] = data
        prp = slots.prps(slot, len(data))[0] if data else 0
        pair.submit(slot, (opcode | self._policy.namespace << 32, prp, 0, cdw10, cdw12, 0))
        controller.ring(pair)
        while not (finished := pair.collect()):
            controller.wait(pair, deadline)
        controller.acknowledge(pair)
        slots.give_back(slot)
        status = finished[0][1]
        return status if status & 0x7FF else 0

    def _meaning(self, status: int) -> str:
        return status_name(status)

    def _flush(self, deadline: float) -> int:
        return self._command(NvmOpcode.FLUSH, deadline)

    @property
    def _discards(self) -> bool:
        return self._shape.discard

    def _discard(self, ranges: Sequence[Range], deadline: float) -> int:
        """Deallocate with Dataset Management (§6.7); each command has the time of a call."""
        block = self._shape.block_size_bytes
        entries = [
            DsmRange(0, min(_MOST_RANGE_BLOCKS, (offset + length) // block - first), first).pack()
            for offset, length in ranges
            for first in range(offset // block, (offset + length) // block, _MOST_RANGE_BLOCKS)
        ]
        for at in range(0, len(entries), _MOST_RANGES):
            part = entries[at : at + _MOST_RANGES]
            cdw10 = len(part) - 1 | _DSM_DEALLOCATE << 32
            status = self._command(NvmOpcode.DATASET_MANAGEMENT, deadline, cdw10=cdw10, data=b"".join(part))
            if status:
                return status
            deadline = self._deadline()
        return 0

    @property
    def _zeroes(self) -> bool:
        return self._shape.write_zeroes

    def _write_zeroes(self, ranges: Sequence[Range], deadline: float) -> int:
        """Write Zeroes (§6.17), the space stays allocated; each command has the time of a call."""
        block = self._shape.block_size_bytes
        for offset, length in ranges:
            end = (offset + length) // block
            for first in range(offset // block, end, _MOST_ZEROED_BLOCKS):
                count = min(_MOST_ZEROED_BLOCKS, end - first)
                status = self._command(NvmOpcode.WRITE_ZEROES, deadline, cdw10=first, cdw12=count - 1)
                if status:
                    return status
                deadline = self._deadline()
        return 0
