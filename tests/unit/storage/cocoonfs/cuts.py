# SPDX-License-Identifier: MIT OR Apache-2.0
"""Enumeration of power cuts: many cases, each decided by what opening the medium does.

A *case* is a moment of a recording and a subset of the 128-byte pieces that a cache held then. `cases` goes through
the classes of subsets that the barrier model allows, and counts each subset once per span between two barriers (and
once more where another outcome is allowed). Cases may give the same *medium*; media may be the same in everything that
is read of them. `Judgements` makes use of that: opening is a function of what it reads, so a medium that agrees with an
earlier one in every range that was read there, in order, comes to the same outcome and is not opened again. Ranges that
the opening itself has written before do not count, because what it wrote follows from what it had read.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from svsm.abi.block import Extent, Range
from svsm.storage.drivers.memory import MemoryDevice
from svsm.testing.powercut import PIECE_BYTES, Event, Mark

__all__ = ["Case", "Count", "Judge", "Judgements", "Outcome", "WatchedDevice", "Workload", "cases", "enumerate_cuts"]


class WatchedDevice(MemoryDevice):
    """Notes which of its first contents are read, call by call, until they have been overwritten."""

    def __init__(self, content: bytes, block_size_bytes: int) -> None:
        super().__init__(content, block_size_bytes=block_size_bytes)
        self.steps: list[tuple[Range, ...]] = []
        self._written: set[int] = set()

    @property
    def is_changed(self) -> bool:
        """Whether anything was written."""
        return bool(self._written)

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The contents of each range."""
        if not self._written:
            seen = tuple(ranges)
        else:
            pieces = (at for offset, length in ranges for at in range(offset, offset + length, PIECE_BYTES))
            seen = tuple((at, PIECE_BYTES) for at in pieces if at not in self._written)
        if seen:
            self.steps.append(seen)
        return super().read(ranges)

    def write(self, extents: Sequence[Extent]) -> None:
        """Write all extents."""
        super().write(extents)
        for offset, data in extents:
            self._written.update(range(offset, offset + len(data), PIECE_BYTES))

    def write_zeroes(self, ranges: Sequence[Range]) -> None:
        """Zero the ranges."""
        self.write([(offset, bytes(length)) for offset, length in ranges])


Outcome = Hashable
Judge = Callable[[WatchedDevice], Outcome]
"""Opens a medium and says what is there. Must depend on nothing but what it reads."""


@dataclass(slots=True)
class _Node:
    """What is read next, and where that leads to by what it holds."""

    ranges: tuple[Range, ...]
    next: dict[bytes, _Node | tuple[Outcome]] = field(default_factory=dict)

    def key(self, content: bytes) -> bytes:
        digest = hashlib.sha256()
        for offset, length in self.ranges:
            digest.update(content[offset : offset + length])
        return digest.digest()


class Judgements:
    """Outcomes of media, each sequence of contents read judged once."""

    def __init__(self, judge: Judge, block_size: int) -> None:
        self._judge = judge
        self._block_size = block_size
        self._root: _Node | None = None
        self.runs = 0

    def of(self, content: bytes) -> Outcome:
        """What is there."""
        node: _Node | tuple[Outcome] | None = self._root
        while isinstance(node, _Node):
            node = node.next.get(node.key(content))
        return self._run(content) if node is None else node[0]

    def _run(self, content: bytes) -> Outcome:
        self.runs += 1
        device = WatchedDevice(content, self._block_size)
        outcome = self._judge(device)
        self._root = node = self._root or _Node(device.steps[0])
        for ranges in device.steps[1:]:
            found = node.next.setdefault(node.key(content), _Node(ranges))
            assert isinstance(found, _Node)
            assert found.ranges == ranges
            node = found
        node.next[node.key(content)] = (outcome,)
        return outcome


@dataclass(frozen=True, slots=True)
class Case:
    """One power cut: the medium that it leaves, the label of the last mark before it, and how it came about."""

    content: bytes
    label: str
    how: str


def _torn(write: range, others: int, unit: int) -> Iterator[int]:
    """Subsets in which this write (a range of piece numbers) arrived up to, or from, a multiple of `unit` pieces, or
    without one such unit, or with only one, and all or none of the others."""
    whole = ((1 << len(write)) - 1) << write.start
    for at in range(write.start, write.stop, unit):
        front = ((1 << (at - write.start)) - 1) << write.start
        one = whole & (((1 << unit) - 1) << at)
        for part in (front, whole & ~front, one, whole & ~one):
            yield part
            yield part | others


def _subsets(writes: Sequence[range], rng: random.Random, samples: int) -> Iterator[tuple[str, int]]:
    """Subsets of the pieces of these writes, as bit masks, by class."""
    total = writes[-1].stop
    everything = (1 << total) - 1
    masks = [((1 << len(write)) - 1) << write.start for write in writes]
    yield "none", 0
    yield "all", everything
    for number, mask in enumerate(masks):
        yield f"without write {number}", everything & ~mask
        yield f"only write {number}", mask
        yield f"from write {number} on", everything >> writes[number].start << writes[number].start
        yield f"last overtook write {number}", (mask - 1) & everything | masks[-1]
        for unit in (1, 4):
            for subset in _torn(writes[number], everything & ~mask, unit):
                yield f"write {number} torn at {unit * PIECE_BYTES} bytes", subset
    for sample in range(samples):
        share, unit = rng.random(), rng.choice((1, 4))
        subset = 0
        for at in range(0, total, unit):
            if rng.random() < share:
                subset |= ((1 << unit) - 1) << at
        yield f"random pieces of {unit * PIECE_BYTES} bytes, {sample}", subset & everything


def cases(
    initial: bytes, events: Sequence[Event], *, samples: int, without: Collection[int] = (), every: int = 1
) -> Iterator[Case]:
    """Power cuts after every write and at every mark.

    Args:
        initial: Contents before the recording.
        events: Of a `PowerCutDisk`.
        samples: Random subsets per moment, beside the systematic ones.
        without: Numbers of barriers, from 0, that did not take place.
        every: Take only each n-th systematic subset of a moment (and all, none, random ones).
    """
    rng = random.Random(len(events))
    durable, pieces, writes = bytearray(initial), list[tuple[int, bytes]](), list[range]()
    label, barriers = "", 0
    seen: set[tuple[str, int]] = set()
    for moment, event in enumerate(events):
        if event is None:
            if barriers not in without:
                _arrive(durable, pieces, -1)
                pieces, writes, seen = [], [], set()
            barriers += 1
            continue
        if isinstance(event, Mark):
            label = event.label
        else:
            offset, data = event
            first = len(pieces)
            pieces += [(offset + at, data[at : at + PIECE_BYTES]) for at in range(0, len(data), PIECE_BYTES)]
            writes.append(range(first, len(pieces)))
        possible = _subsets(writes, rng, samples) if writes else iter([("all", 0)])
        for number, (how, subset) in enumerate(possible):
            if (label, subset) in seen or (every > 1 and number > 1 and how[0] != "r" and (number + moment) % every):
                continue
            seen.add((label, subset))
            content = bytearray(durable)
            _arrive(content, pieces, subset)
            yield Case(bytes(content), label, f"event {moment}: {how}")


def _arrive(content: bytearray, pieces: Sequence[tuple[int, bytes]], subset: int) -> None:
    for number, (offset, data) in enumerate(pieces):
        if subset >> number & 1:
            content[offset : offset + len(data)] = data


@dataclass(frozen=True, slots=True)
class Workload:
    """A recording, what its marks allow, and how media are judged.

    Attributes:
        name: For messages.
        initial: Contents before it.
        events: Of a `PowerCutDisk`; its first event is a mark.
        block_size: Of the device.
        allowed: Outcomes by label of a mark.
        judge: Opens a medium.
    """

    name: str
    initial: bytes
    events: Sequence[Event]
    block_size: int
    allowed: dict[str, frozenset[Outcome]]
    judge: Judge

    @property
    def barriers(self) -> int:
        """How many barriers were recorded."""
        return sum(event is None for event in self.events)


@dataclass(slots=True)
class Count:
    """What an enumeration went through.

    Attributes:
        cases: Moments and subsets.
        media: Different contents among them.
        opened: How many were different in what is read of them, and so were opened.
        seen: Outcomes met.
        faults: Cases whose outcome is not allowed.
    """

    cases: int = 0
    media: int = 0
    opened: int = 0
    seen: set[Outcome] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)

    def __iadd__(self, other: Count) -> Count:
        self.cases += other.cases
        self.media += other.media
        self.opened += other.opened
        self.faults += other.faults
        return self

    def __str__(self) -> str:
        return f"{self.cases} cases, {self.media} media, {self.opened} opened"


def enumerate_cuts(
    workload: Workload, *, samples: int, without: Collection[int] = (), every: int = 1, first_fault: bool = False
) -> Count:
    """Judge every case of a workload.

    Args:
        workload: The recording.
        samples: As for `cases`.
        without: As for `cases`.
        every: As for `cases`.
        first_fault: Stop at the first fault.
    """
    judgements = Judgements(workload.judge, workload.block_size)
    media: set[bytes] = set()
    count = Count()
    for case in cases(workload.initial, workload.events, samples=samples, without=without, every=every):
        count.cases += 1
        media.add(hashlib.sha256(case.content).digest())
        outcome = judgements.of(case.content)
        count.seen.add(outcome)
        if outcome not in workload.allowed[case.label]:
            count.faults.append(f"{workload.name}, {case.how}: {outcome}")
            if first_fault:
                break
    count.media, count.opened = len(media), judgements.runs
    return count
