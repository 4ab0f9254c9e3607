# SPDX-License-Identifier: MIT OR Apache-2.0
"""An NVMe namespace as a `BlockDevice`: bring-up, many commands in flight, time, death and a second life.

Theory. A call cuts its ranges into pieces that fit a buffer, keeps the queue filled with them, and returns when the
last one is done, in whatever order the controller likes. Nothing is in flight between calls. The first thing that the
controller cannot mean, a missed deadline or a bad CSTS kills the device: the call ends with ``block-io`` (its
`violation` names the code), so does every later one, and its memory stays lent. `reconnect` resets the controller and
starts again in the other half of the memory, so that one which is merely slow writes into a half that nobody reads. If
writes had been accepted since the last flush, the next flush fails once: nobody knows whether they outlived the reset.

A command that the controller refuses with a status is only that command's failure.

What NVMe cannot see: old contents replayed, sectors swapped, data corrupted, and a read that was reported done and
never was (it gives zeros). That is for whoever is above. A flush is always sent, whatever the controller says about
its cache. Resizes are seen when `poll` asks; asynchronous events are not asked for.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from svsm.abi.block import Extent, Range
from svsm.formats.errors import BackendError, ProtocolError, StateError, SvsmError
from svsm.formats.nvme import (
    PAGE_BYTES,
    DsmRange,
    IdentifyNamespace,
    NvmOpcode,
    status_name,
)
from svsm.formats.record import Buffer
from svsm.storage.drivers.checks import block_io_error, check_ranges, closed_error, read_only_error
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.nvme.controller import ADMIN_ENTRIES, Controller, Registers
from svsm.storage.drivers.nvme.identify import Geometry, parse_geometry, parse_size
from svsm.storage.drivers.nvme.queue import queue_bytes
from svsm.storage.drivers.nvme.slots import MOST_BUFFER_BYTES, Slots, slots_bytes

__all__ = ["NvmeDisk", "NvmePolicy", "memory_bytes"]

_SLOWEST_BYTES_PER_SECOND = 1 << 20
_DOORBELL_COMMANDS = 16
"""Commands for one doorbell: the controller begins with these while the next are prepared."""
_MOST_RANGES = PAGE_BYTES // DsmRange.SIZE
_MOST_RANGE_BLOCKS = (1 << 32) - 1
_MOST_ZEROED_BLOCKS = 1 << 16
_DSM_DEALLOCATE = 4

_Piece = tuple[int, int, Buffer]
"""(first block, length in bytes, data of a write)."""


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


class NvmeDisk:
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

    Attributes:
        fault: Why the device is dead, or None.
        resizes: How many times the capacity has changed.
    """

    def __init__(
        self,
        registers: Registers,
        memory: DmaMemory,
        *,
        policy: NvmePolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._policy = policy or NvmePolicy()
        self._registers = registers
        self._clock = clock
        self._pause = pause
        self.fault: SvsmError | None = None
        self.resizes = 0
        self._closed = False
        self._unflushed = False
        self._lost_writes = False
        self._generation = 0
        half = memory.size_bytes // 2 // PAGE_BYTES * PAGE_BYTES
        try:
            self._policy.check()
            if not half:
                raise StateError("the shared memory is too small for this driver", code="dma-memory")
            self._halves = (memory.part(0, half), memory.part(half, half))
            self._geometry = self._bring_up()
        except SvsmError:
            self._closed = True
            registers.close()
            raise

    # ---- bring-up ---------------------------------------------------------------------------------------------------

    def _bring_up(self) -> Geometry:
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
        self._memory = memory = self._halves[self._generation % 2]
        memory.release_all()
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
        if self._closed:
            raise closed_error()
        if registers is not None:
            self._registers.close()
            self._registers = registers
        self._generation += 1
        self._lost_writes = self._lost_writes or self._unflushed
        before = self._geometry.size_bytes
        try:
            self._geometry = self._bring_up()
        except SvsmError as error:
            self.fault = error
            raise
        self.fault = None
        self.resizes += self._geometry.size_bytes != before

    # ---- commands ---------------------------------------------------------------------------------------------------

    def _deadline(self, moved_bytes: int = 0) -> float:
        return self._clock() + self._policy.deadline_seconds + moved_bytes / _SLOWEST_BYTES_PER_SECOND

    def _die(self, operation: str, error: SvsmError) -> BackendError:
        self.fault = error
        return self._dead(operation, error)

    def _dead(self, operation: str, error: SvsmError) -> BackendError:
        failed = block_io_error(operation, error.message)
        failed.details["violation"] = error.code
        failed.hint = error.hint
        return failed

    def _check(self, operation: str, ranges: Sequence[Range], *, writing: bool) -> None:
        if self._closed:
            raise closed_error()
        check_ranges(ranges, size_bytes=self._geometry.size_bytes, block_size_bytes=self._geometry.block_size_bytes)
        if writing and self.read_only:
            raise read_only_error()
        if self.fault is not None:
            raise self._dead(operation, self.fault)

    def _refused(self, operation: str, status: int) -> BackendError:
        failed = block_io_error(operation, status_name(status))
        failed.details["status"] = status
        return failed

    def _transfer(self, opcode: NvmOpcode, pieces: Sequence[_Piece], results: list[bytes] | None) -> None:
        """Run all pieces, as many at a time as the queue takes."""
        operation = "read" if results is not None else "write"
        controller, pair = self._controller, self._pair
        deadline = self._deadline(sum([piece[1] for piece in pieces]))
        controller.begin()
        at = done = failure = 0
        try:
            while done < len(pieces):
                filled, at = at, self._fill(opcode, pieces, at)
                if filled != at:
                    controller.ring(pair)
                finished = pair.collect()
                if finished:
                    controller.acknowledge(pair)
                    failure = self._take(finished, pieces, results) or failure
                    done += len(finished)
                elif filled == at:
                    controller.wait(pair, deadline)
        except (ProtocolError, BackendError) as error:
            raise self._die(operation, error) from error
        if failure:
            raise self._refused(operation, failure)

    def _fill(self, opcode: NvmOpcode, pieces: Sequence[_Piece], at: int) -> int:
        """Put a few commands into flight from ``pieces[at]`` on; returns where it ended."""
        slots, pair, shared, zeros = self._slots, self._pair, self._memory.bytes, self._slots.zeros
        reading = opcode == NvmOpcode.READ
        word = opcode | self._policy.namespace << 32
        shift = self._geometry.block_size_bytes.bit_length() - 1
        total = min(len(pieces), at + _DOORBELL_COMMANDS)
        while at < total:
            block, length, data = pieces[at]
            slot = slots.take(length)
            if slot < 0:
                break
            start = slots.offsets[slot]
            if reading:
                shared[start : start + length] = zeros[:length]
            else:
                shared[start : start + length] = data
            prp1, prp2 = slots.prps(slot, length)
            pair.submit(slot, (word, prp1, prp2, block, (length >> shift) - 1, 0))
            self._owners[slot] = at
            at += 1
        return at

    def _take(self, finished: Sequence[tuple[int, int]], pieces: Sequence[_Piece], results: list[bytes] | None) -> int:
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

    def _command(self, operation: str, opcode: NvmOpcode, *, cdw10: int = 0, cdw12: int = 0, data: bytes = b"") -> None:
        """One command that moves no blocks; `cdw10` is 64 bits, dwords 10 and 11."""
        controller, pair, slots = self._controller, self._pair, self._slots
        controller.begin()
        deadline = self._deadline()
        slot = slots.take(0)
        if slot < 0:
            slot = slots.take(slots.small_bytes + 1)
        start = slots.offsets[slot]
        self._memory.bytes[start : start + len(data)] = data
        prp = slots.prps(slot, len(data))[0] if data else 0
        try:
            pair.submit(slot, (opcode | self._policy.namespace << 32, prp, 0, cdw10, cdw12, 0))
            controller.ring(pair)
            while not (finished := pair.collect()):
                controller.wait(pair, deadline)
            controller.acknowledge(pair)
        except (ProtocolError, BackendError) as error:
            raise self._die(operation, error) from error
        slots.give_back(slot)
        status = finished[0][1]
        if status & 0x7FF:
            raise self._refused(operation, status)

    def _pieces(self, offset: int, data_or_length: Buffer | int) -> list[_Piece]:
        block, limit = self._geometry.block_size_bytes, self._piece_bytes
        if isinstance(data_or_length, int):
            return [
                ((offset + at) // block, min(limit, data_or_length - at), b"") for at in range(0, data_or_length, limit)
            ]
        view = memoryview(data_or_length).cast("B")
        return [
            ((offset + at) // block, min(limit, len(view) - at), view[at : at + limit])
            for at in range(0, len(view), limit)
        ]

    # ---- BlockDevice ------------------------------------------------------------------------------------------------

    @property
    def size_bytes(self) -> int:
        """Capacity, as the controller stated it last."""
        return self._geometry.size_bytes

    @property
    def block_size_bytes(self) -> int:
        """Granularity, as the controller stated it at the start."""
        return self._geometry.block_size_bytes

    @property
    def read_only(self) -> bool:
        """Whether the namespace or the policy refuses writes."""
        return self._geometry.read_only or self._policy.read_only

    @property
    def geometry(self) -> Geometry:
        """Sizes and limits that are in force."""
        return self._geometry

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The contents of each range; all of them are in flight together."""
        self._check("read", ranges, writing=False)
        pieces: list[_Piece] = []
        counts = []
        for offset, length in ranges:
            cut = self._pieces(offset, length)
            pieces += cut
            counts.append(len(cut))
        results = [b""] * len(pieces)
        self._transfer(NvmOpcode.READ, pieces, results)
        if len(pieces) == len(ranges) and 0 not in counts:
            return results
        contents, start = [], 0
        for count in counts:
            contents.append(b"".join(results[start : start + count]))
            start += count
        return contents

    def write(self, extents: Sequence[Extent]) -> None:
        """Write all extents; all of them are in flight together."""
        self._check("write", [(offset, len(data)) for offset, data in extents], writing=True)
        pieces = [piece for offset, data in extents for piece in self._pieces(offset, data)]
        if pieces:
            self._unflushed = True
            self._transfer(NvmOpcode.WRITE, pieces, None)

    def flush(self) -> None:
        """A Flush command. Fails once after a reset that may have lost writes."""
        self._check("flush", [], writing=False)
        if self._lost_writes:
            self._lost_writes = False
            raise block_io_error("flush", "it was reset, and earlier writes may be lost")
        if self.read_only:
            return
        self._command("flush", NvmOpcode.FLUSH)
        self._unflushed = False

    def discard(self, ranges: Sequence[Range]) -> None:
        """Deallocate with Dataset Management, or nothing where the controller has no such command."""
        self._check("discard", ranges, writing=True)
        if not self._geometry.discard:
            return
        block = self._geometry.block_size_bytes
        entries = [
            DsmRange(0, min(_MOST_RANGE_BLOCKS, (offset + length) // block - first), first).pack()
            for offset, length in ranges
            for first in range(offset // block, (offset + length) // block, _MOST_RANGE_BLOCKS)
        ]
        for at in range(0, len(entries), _MOST_RANGES):
            part = entries[at : at + _MOST_RANGES]
            self._unflushed = True
            self._command(
                "discard",
                NvmOpcode.DATASET_MANAGEMENT,
                cdw10=len(part) - 1 | _DSM_DEALLOCATE << 32,
                data=b"".join(part),
            )

    def write_zeroes(self, ranges: Sequence[Range]) -> None:
        """Make the ranges read as zeros; written out where the controller has no command for it. Durable with a flush.

        Raises:
            BackendError, StateError: As `write`.
        """
        self._check("write zeroes", ranges, writing=True)
        if not self._geometry.write_zeroes:
            zeros = memoryview(bytes(self._piece_bytes))
            for offset, length in ranges:
                for at in range(0, length, self._piece_bytes):
                    self.write([(offset + at, zeros[: min(self._piece_bytes, length - at)])])
            return
        block = self._geometry.block_size_bytes
        for offset, length in ranges:
            end = (offset + length) // block
            for first in range(offset // block, end, _MOST_ZEROED_BLOCKS):
                self._unflushed = True
                count = min(_MOST_ZEROED_BLOCKS, end - first)
                self._command("write zeroes", NvmOpcode.WRITE_ZEROES, cdw10=first, cdw12=count - 1)

    def poll(self) -> bool:
        """Ask for the namespace's size again; returns whether it has changed. A changed block size ends the device.

        Raises:
            BackendError, StateError: As `read`.
        """
        self._check("answer", [], writing=False)
        try:
            page = self._controller.identify_namespace(self._policy.namespace, deadline=self._deadline())
            size, block = parse_size(IdentifyNamespace.parse(page))
            if block != self._geometry.block_size_bytes:
                raise ProtocolError(
                    "the disk has changed its block size", code="nvme-identify", field="LBADS", got=block
                )
        except (ProtocolError, BackendError) as error:
            raise self._die("answer", error) from error
        changed = size != self._geometry.size_bytes
        if changed:
            self.resizes += 1
            self._geometry = dataclasses.replace(self._geometry, size_bytes=size)
        return changed

    def close(self) -> None:
        """Shut the controller down, if it takes that, and let its registers go."""
        if self._closed:
            return
        self._closed = True
        deadline = self._clock() + min(1.0, self._policy.deadline_seconds)
        try:
            if self.fault is None:
                self._controller.shut_down(deadline=deadline)
            else:
                self._controller.reset(deadline=deadline)
        except SvsmError:
            pass  # it keeps its memory, which is only ever shared memory
        finally:
            self._registers.close()
