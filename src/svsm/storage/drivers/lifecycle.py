# SPDX-License-Identifier: MIT OR Apache-2.0
"""The life of a disk behind request queues in shared memory: what its driver does whatever the queues look like.

Theory. A call is checked whole (a long read: while its first pieces are on their way), cut into pieces that fit a
buffer, and returns when the last piece is done, in whatever order the device likes. Nothing is in flight between
calls. The first thing that the device cannot mean, a missed deadline or a bad status register kills the device: the
call ends with ``block-io`` (its `violation` names the code), so does every later one, and its memory stays lent.
Starting again resets the device and uses the other half of the memory, so that a device which is merely slow writes
into a half that nobody reads. If writes had been accepted since the last flush, the next flush fails once: nobody
knows whether they outlived the reset.

A request that the device refuses with a status is only that call's failure. A call's deadline grows with what it moves.

What no such driver can see: old contents replayed, sectors swapped, data corrupted. That is for whoever is above.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from svsm.abi.block import Extent, Range
from svsm.formats.errors import BackendError, ProtocolError, StateError, SvsmError
from svsm.formats.record import Buffer
from svsm.storage.drivers.checks import (
    CheckedDevice,
    block_io_error,
    closed_error,
    uniform_extents,
    uniform_ranges,
)
from svsm.storage.drivers.dma import PAGE_BYTES, DmaMemory

__all__ = ["Confirm", "DiskShape", "QueuedDisk"]

Confirm = Callable[[], bool]
"""Whether a transfer that has begun may go on."""

_SLOWEST_BYTES_PER_SECOND = 1 << 20
_ZEROS_AT_ONCE = 256


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DiskShape:
    """What a driver believes of its device; drivers add to it."""

    size_bytes: int
    block_size_bytes: int
    transfer_bytes: int
    """Most bytes of one read or write; a multiple of the block size."""
    read_only: bool


Shape = TypeVar("Shape", bound=DiskShape)


class QueuedDisk(CheckedDevice, Generic[Shape]):
    """A driver's `BlockDevice` part.

    Args:
        memory: Shared memory for this device alone.
        read_only: Refuse writes, whatever the device says.
        deadline_seconds: Without an answer for so long, plus a second for every MiB asked for, the device is dead.
        clock: Monotonic seconds.

    Raises:
        ProtocolError, BackendError, StateError: The device cannot be used; it has been let go.

    Attributes:
        fault: Why the device is dead, or None.
    """

    def __init__(
        self, memory: DmaMemory, *, read_only: bool, deadline_seconds: float, clock: Callable[[], float]
    ) -> None:
        self._clock = clock
        self._deadline_seconds = deadline_seconds
        self._writes_refused = read_only
        self._unflushed = self._lost_writes = False
        self._generation = 0
        self._piece_bytes = 0
        self._closed = True  # until it has started
        self.fault: SvsmError | None = None
        half = memory.size_bytes // 2 // PAGE_BYTES * PAGE_BYTES
        try:
            if not half:
                raise StateError("the shared memory is too small for this driver", code="dma-memory")
            self._halves = (memory.part(0, half), memory.part(half, half))
            shape = self._start()
            super().__init__(
                size_bytes=shape.size_bytes,
                block_size_bytes=shape.block_size_bytes,
                read_only=shape.read_only or read_only,
            )
        except SvsmError:
            self._release()
            raise

    _ahead: int | None = None
    """How many pieces of a read may be in flight before the whole call is checked; None: it is checked first."""

    # ---- what drivers add -------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _bring_up(self, memory: DmaMemory) -> Shape:
        """Reset the device, then set it up with this memory; sets `_piece_bytes`."""

    @abc.abstractmethod
    def _stop(self, *, deadline: float) -> None:
        """Have the device stop; its last act."""

    @abc.abstractmethod
    def _release(self) -> None:
        """Let go of what leads to the device. Does not raise."""

    @abc.abstractmethod
    def _transfer(
        self, pieces: Sequence[Any], results: list[bytes] | None, deadline: float, confirm: Confirm | None = None
    ) -> int:
        """Move all pieces, each at most `_piece_bytes`; the worst status, 0 for success.

        Args:
            pieces: A `Range` each, whose contents go to their place in `results`; an `Extent` each, without.
            results: As long as `pieces`, or None to write.
            deadline: For all of it.
            confirm: Called once, when at most `_ahead` pieces are in flight: where it says no, there will be no more.
        """

    @abc.abstractmethod
    def _flush(self, deadline: float) -> int:
        """Have written data made durable; a status."""

    @abc.abstractmethod
    def _discard(self, ranges: Sequence[Range], deadline: float) -> int:
        """Give ranges up; a status."""

    @abc.abstractmethod
    def _write_zeroes(self, ranges: Sequence[Range], deadline: float) -> int:
        """Make ranges zero; a status."""

    @abc.abstractmethod
    def _ask_size(self, deadline: float) -> int:
        """The capacity in bytes, asked for now."""

    @abc.abstractmethod
    def _meaning(self, status: int) -> str:
        """What a status that is not 0 says."""

    def _check_flush(self) -> None:
        """Refuse flushes where the device has none."""

    @property
    @abc.abstractmethod
    def _discards(self) -> bool:
        """Whether the device has a request for it."""

    @property
    @abc.abstractmethod
    def _zeroes(self) -> bool:
        """Whether the device has a request for it."""

    # ---- life and death ---------------------------------------------------------------------------------------------

    def _start(self) -> Shape:
        memory = self._halves[self._generation % 2]
        memory.release_all()
        self._shape = self._bring_up(memory)
        return self._shape

    def _restart(self) -> None:
        """Start again; what was dead lives again.

        Raises:
            ProtocolError, BackendError: It cannot be used; it stays dead.
        """
        self._generation += 1
        self._lost_writes = self._lost_writes or self._unflushed
        try:
            shape = self._start()
        except SvsmError as error:
            self.fault = error
            raise
        self.fault = None
        self._block_size = shape.block_size_bytes
        self._resized(shape.size_bytes)
        self._read_only = shape.read_only or self._writes_refused

    def _demand_open(self) -> None:
        if self._closed:
            raise closed_error()

    def _die(self, operation: str, error: SvsmError) -> BackendError:
        self.fault = error
        return self._dead(operation, error)

    def _dead(self, operation: str, error: SvsmError) -> BackendError:
        failed = block_io_error(operation, error.message)
        failed.details["violation"] = error.code
        failed.hint = error.hint
        return failed

    def _demand_alive(self, operation: str) -> None:
        if self.fault is not None:
            raise self._dead(operation, self.fault)

    def _deadline(self, moved_bytes: int = 0) -> float:
        return self._clock() + self._deadline_seconds + moved_bytes / _SLOWEST_BYTES_PER_SECOND

    def _judge(self, operation: str, status: int) -> None:
        if status:
            failed = block_io_error(operation, self._meaning(status))
            failed.details["status"] = status
            raise failed

    # ---- BlockDevice ------------------------------------------------------------------------------------------------

    @property
    def geometry(self) -> Shape:
        """Sizes and limits that are in force."""
        return dataclasses.replace(self._shape, size_bytes=self._size)

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The contents of each range; all of them are in flight together."""
        if len(ranges) == 1:
            self._expect_one("read")
        length = self._uniform(ranges[: self._ahead])
        if 0 < length <= self._piece_bytes and self.fault is None and not self._closed:
            if len(ranges) == 1:
                return [self._move_one("read", ranges[0][0], length, None)]
            if (results := self._read_uniform(ranges, length)) is not None:
                return results
        self._admit_reading(ranges)
        self._demand_alive("read")
        lengths, limit = [length for _, length in ranges], self._piece_bytes
        if lengths and 0 < min(lengths) <= max(lengths) <= limit:
            return self._read_all(ranges, sum(lengths))
        pieces = [(offset + at, min(limit, length - at)) for offset, length in ranges for at in range(0, length, limit)]
        parts = iter(self._read_all(pieces, sum(lengths)))
        return [b"".join(itertools.islice(parts, -(-length // limit))) for length in lengths]

    def _expect_one(self, operation: str) -> None:
        """Before anything else about a lone request, because what the device needs to wake up goes on meanwhile."""
        if self.fault is None and not self._closed:
            try:
                self._announce()
            except BackendError as error:
                raise self._die(operation, error) from error

    def _announce(self) -> None:
        """Wake the device up for a lone request that is coming, where that helps."""

    def _move_one(self, operation: str, offset: int, length: int, data: Buffer | None) -> bytes:
        try:
            status, contents = self._single(offset, length, data)
        except (ProtocolError, BackendError) as error:
            raise self._die(operation, error) from error
        if status:
            self._judge(operation, status)
        return contents

    def _single(self, offset: int, length: int, data: Buffer | None) -> tuple[int, bytes]:
        """One piece, read or written; its status and contents. Drivers may have a shorter way than `_transfer`."""
        results = [b""]
        if data is None:
            return self._transfer([(offset, length)], results, self._deadline(length)), results[0]
        return self._transfer([(offset, data)], None, self._deadline(length)), b""

    def _uniform(self, ranges: Sequence[Range]) -> int:
        return uniform_ranges(ranges, size_bytes=self._size, block_size_bytes=self._block_size)

    def _read_uniform(self, ranges: Sequence[Range], length: int) -> list[bytes] | None:
        """A read whose first ranges are known to be in order; the others are looked at while those are on their way.

        A device waits while a thousand ranges are checked, and to have read what nobody gets harms nobody.

        Returns:
            None where the others are not all like the first: what began has ended, and the call is still to be done.
        """
        if self._ahead is None or len(ranges) <= self._ahead:
            return self._read_all(ranges, length * len(ranges))
        others, in_order = ranges[self._ahead :], True

        def confirm() -> bool:
            nonlocal in_order
            in_order = self._uniform(others) == length
            return in_order

        results = self._read_all(ranges, length * len(ranges), confirm)
        return results if in_order else None

    def _read_all(self, pieces: Sequence[Range], moved_bytes: int, confirm: Confirm | None = None) -> list[bytes]:
        results = [b""] * len(pieces)
        try:
            status = self._transfer(pieces, results, self._deadline(moved_bytes), confirm)
        except (ProtocolError, BackendError) as error:
            raise self._die("read", error) from error
        if status:
            self._judge("read", status)
        return results

    def write(self, extents: Sequence[Extent]) -> None:
        """Write all extents; all of them are in flight together."""
        if len(extents) == 1:
            self._expect_one("write")
        length = uniform_extents(extents, size_bytes=self._size, block_size_bytes=self._block_size)
        if 0 < length <= self._piece_bytes and self.fault is None and not (self._closed or self._read_only):
            if len(extents) == 1:
                self._unflushed = True
                self._move_one("write", extents[0][0], length, extents[0][1])
                return
            self._write_all("write", extents, length * len(extents))
            return
        self._admit_writing(extents)
        self._demand_alive("write")
        limit = self._piece_bytes
        pieces = [
            (offset + at, view[at : at + limit])
            for offset, data in extents
            for view in (memoryview(data),)
            for at in range(0, len(view), limit)
        ]
        if pieces:
            self._write_all("write", pieces, sum([len(data) for _, data in pieces]))

    def _write_all(self, operation: str, pieces: Sequence[Extent], moved_bytes: int) -> None:
        self._unflushed = True
        try:
            status = self._transfer(pieces, None, self._deadline(moved_bytes))
        except (ProtocolError, BackendError) as error:
            raise self._die(operation, error) from error
        if status:
            self._judge(operation, status)

    def _request(self, operation: str, send: Callable[[float], int]) -> None:
        """A request that moves no blocks: `send` takes a deadline and gives a status."""
        try:
            status = send(self._deadline())
        except (ProtocolError, BackendError) as error:
            raise self._die(operation, error) from error
        self._judge(operation, status)

    def flush(self) -> None:
        """Have the device flush. Fails once after a reset that may have lost writes."""
        self._admit()
        self._demand_alive("flush")
        self._check_flush()
        if self._lost_writes:
            self._lost_writes = False
            raise block_io_error("flush", "it was reset, and earlier writes may be lost")
        if self._read_only:
            return
        self._request("flush", self._flush)
        self._unflushed = False

    def discard(self, ranges: Sequence[Range]) -> None:
        """Discard requests, or nothing where the device has none."""
        self._admit_changing(ranges)
        self._demand_alive("discard")
        if self._discards and ranges:
            self._unflushed = True
            self._request("discard", lambda deadline: self._discard(ranges, deadline))

    def write_zeroes(self, ranges: Sequence[Range]) -> None:
        """Write-zeroes requests; written out where the device has none."""
        self._admit_changing(ranges)
        self._demand_alive("write zeroes")
        if not ranges:
            return
        if self._zeroes:
            self._unflushed = True
            self._request("write zeroes", lambda deadline: self._write_zeroes(ranges, deadline))
            return
        pieces = self._zero_pieces(ranges)
        while some := list(itertools.islice(pieces, _ZEROS_AT_ONCE)):
            self._write_all("write zeroes", some, sum([len(data) for _, data in some]))

    def _zero_pieces(self, ranges: Sequence[Range]) -> Iterator[Extent]:
        limit = self._piece_bytes
        zeros = memoryview(bytes(limit))
        for offset, length in ranges:
            for at in range(0, length, limit):
                yield offset + at, zeros[: length - at]

    def _measure(self) -> int:
        self._demand_alive("answer")
        try:
            return self._ask_size(self._deadline())
        except (ProtocolError, BackendError) as error:
            raise self._die("answer", error) from error

    def close(self) -> None:
        """Stop the device, if it does stop, and let go."""
        if self._closed:
            return
        self._closed = True
        try:
            self._stop(deadline=self._clock() + min(1.0, self._deadline_seconds))
        except SvsmError:
            pass  # it keeps its memory, which is only ever shared memory
        finally:
            self._release()
