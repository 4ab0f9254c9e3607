# SPDX-License-Identifier: MIT OR Apache-2.0
"""A disk that loses power, and all the disks that a power cut may leave behind.

`PowerCutDisk` is a `BlockDevice` in memory with a volatile cache. It records what happens to it and can fail on
demand: an error at the n-th read, write or flush, or power gone at the n-th write. `crash_images` turns a recording
into possible media: for each point in time, everything up to the last barrier plus a subset of the 128-byte pieces
written since (dropped, torn, reordered). A barrier can be left out of the recording to see whether anything notices.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from svsm.abi.block import Extent, Range
from svsm.formats.errors import BackendError
from svsm.formats.record import Buffer
from svsm.storage.drivers.checks import check_extents, check_ranges
from svsm.storage.drivers.memory import MemoryDevice

__all__ = ["PIECE_BYTES", "CrashImage", "Event", "Mark", "PowerCutDisk", "crash_images"]

PIECE_BYTES = 128


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that the test wants to remember about this moment."""

    label: str


Event = tuple[int, bytes] | None | Mark
"""A write (offset, data), a barrier (None), or a mark."""


def _failure(what: str) -> BackendError:
    return BackendError(f"the device failed to {what}: as ordered", code="block-io", operation=what)


@dataclass(slots=True)
class PowerCutDisk:
    """A disk with a volatile cache and orders to fail.

    Attributes:
        initial: Contents at the beginning.
        block_size: Granularity in bytes.
        cut_at_write: Number of the write (counted from 0) at which the power goes; that one is not taken.
        fail_reads: Numbers of reads that fail.
        fail_writes: Numbers of writes that fail; nothing of such a write reaches the disk.
        fail_flushes: Numbers of flushes that fail.
        events: What happened, in order.
    """

    initial: bytes
    block_size: int = 512
    cut_at_write: int | None = None
    fail_reads: Collection[int] = ()
    fail_writes: Collection[int] = ()
    fail_flushes: Collection[int] = ()
    events: list[Event] = field(default_factory=list)
    reads: int = 0
    writes: int = 0
    flushes: int = 0
    dead: bool = False
    _device: MemoryDevice = field(init=False)

    def __post_init__(self) -> None:
        self._device = MemoryDevice(self.initial, block_size_bytes=self.block_size)

    @property
    def content(self) -> bytes:
        """What a reader sees now, cached or not."""
        return bytes(self._device.data)

    @property
    def size_bytes(self) -> int:
        """Capacity."""
        return self._device.size_bytes

    @property
    def block_size_bytes(self) -> int:
        """Granularity."""
        return self.block_size

    @property
    def read_only(self) -> bool:
        """Never."""
        return False

    def mark(self, label: str) -> None:
        """Put a mark into the recording."""
        self.events.append(Mark(label))

    def _power(self, what: str) -> None:
        if self.dead:
            raise _failure(what)

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The contents of each range."""
        self._power("read")
        number, self.reads = self.reads, self.reads + 1
        if number in self.fail_reads:
            raise _failure("read")
        return self._device.read(ranges)

    def write(self, extents: Sequence[Extent]) -> None:
        """Write all extents; each counts as one write."""
        self._power("write")
        self._device.write([])  # refuses where it has been closed
        check_extents(extents, size_bytes=self.size_bytes, block_size_bytes=self.block_size)
        for offset, data in extents:
            number, self.writes = self.writes, self.writes + 1
            if number == self.cut_at_write:
                self.dead = True
            self._power("write")
            if number in self.fail_writes:
                raise _failure("write")
            self._device.write([(offset, data)])
            self.events.append((offset, bytes(data)))

    def flush(self) -> None:
        """A barrier."""
        self._power("flush")
        number, self.flushes = self.flushes, self.flushes + 1
        if number in self.fail_flushes:
            raise _failure("flush")
        self._device.flush()
        self.events.append(None)

    def write_zeroes(self, ranges: Sequence[Range]) -> None:
        """A write of zeros."""
        check_ranges(ranges, size_bytes=self.size_bytes, block_size_bytes=self.block_size)
        self.write([(offset, bytes(length)) for offset, length in ranges])

    def discard(self, ranges: Sequence[Range]) -> None:
        """Zeros, as a write that may be lost."""
        self.write_zeroes(ranges)

    def poll(self) -> bool:
        """It stays as it is."""
        self._power("answer")
        return self._device.poll()

    def close(self) -> None:
        """Refuse further calls."""
        self._device.close()


@dataclass(frozen=True, slots=True)
class CrashImage:
    """A medium that a power cut may leave, and which marks had passed."""

    content: bytes
    marks: tuple[str, ...]
    how: str


def _pieces(offset: int, data: Buffer) -> Iterator[tuple[int, bytes]]:
    view = memoryview(data)
    for at in range(0, len(view), PIECE_BYTES):
        yield offset + at, bytes(view[at : at + PIECE_BYTES])


def _apply(base: bytes, pieces: Sequence[tuple[int, bytes]]) -> bytes:
    image = bytearray(base)
    for offset, data in pieces:
        image[offset : offset + len(data)] = data
    return bytes(image)


def _subsets(
    volatile: Sequence[tuple[int, bytes]], rng: random.Random, samples: int
) -> Iterator[tuple[str, list[tuple[int, bytes]]]]:
    """Subsets of what a cache held when the power went: systematic ones, then random ones."""
    pieces = [piece for offset, data in volatile for piece in _pieces(offset, data)]
    yield "all", pieces
    if not pieces:
        return
    yield "none", []
    whole_last = list(_pieces(*volatile[-1]))
    yield "only the last write", whole_last
    yield "half of the last write", pieces[: len(pieces) - len(whole_last)] + whole_last[: len(whole_last) // 2]
    yield "only the last piece", pieces[-1:]
    yield "all but the first piece", pieces[1:]
    yield "every other piece", pieces[::2]
    for index in range(len(volatile)) if samples else ():
        kept = [piece for at, write in enumerate(volatile) if at != index for piece in _pieces(*write)]
        yield f"without write {index}", kept
    for index in range(samples):
        share = rng.random()
        yield f"random subset {index}", [piece for piece in pieces if rng.random() < share]


def crash_images(
    initial: bytes,
    events: Sequence[Event],
    *,
    seed: int = 0,
    samples: int = 2,
    without_barriers: Collection[int] = (),
) -> Iterator[CrashImage]:
    """Media that power cuts at every moment of a recording may leave, each distinct (content, marks) once.

    Args:
        initial: Contents before the recording.
        events: Of a `PowerCutDisk`.
        seed: For the random subsets.
        samples: Random subsets per moment; 0 also leaves out dropping each write alone.
        without_barriers: Numbers of barriers (counted from 0) that did not take place.
    """
    rng = random.Random(seed)
    durable = initial
    volatile: list[tuple[int, bytes]] = []
    marks: list[str] = []
    seen: set[tuple[bytes, int]] = set()
    barriers = 0
    for moment, event in enumerate([*events, Mark("end")]):
        for how, pieces in _subsets(volatile, rng, samples):
            content = _apply(durable, pieces)
            if (content, len(marks)) not in seen:
                seen.add((content, len(marks)))
                yield CrashImage(content, tuple(marks), f"at event {moment}, {how}")
        if isinstance(event, Mark):
            marks.append(event.label)
        elif event is None:
            if barriers not in without_barriers:
                durable, volatile = _apply(durable, [p for w in volatile for p in _pieces(*w)]), []
            barriers += 1
        else:
            volatile.append(event)
