# SPDX-License-Identifier: MIT OR Apache-2.0
"""A program against a disk's driver: what all drivers have in common. Which disk, which lies, which calls.

Invariants, after each call:

* what the device said and did is answered as `Debt` and the rules of its kind have it, with no error of another kind;
* what was read is what the disk holds, as the caller's own bytes; what was written is there;
* no private byte is in shared memory (canaries lie around all that is written, and in what is refused);
* nothing is in flight, and every slot is free again; a dead disk gets no request and says why it died;
* time is bounded; after a reset an honest disk works, and says once that unflushed writes may be lost.
"""

from __future__ import annotations

import abc
import functools
import mmap
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from svsm.abi.block import Extent, Range
from svsm.formats.errors import StateError, SvsmError
from svsm.fuzz.choices import Choices
from svsm.fuzz.disks.verdict import CANARY, CONTENT, DISK_BYTES, Clock, Debt
from svsm.fuzz.target import expect

__all__ = ["DEADLINE", "DiskRun", "edge", "shared_memory"]

DEADLINE: Final = 0.05
"""Seconds, of the clock that only waiting moves, after which the drivers give up."""
_MOST_CALLS: Final = 12
_WORD: Final = 0xFFFF_FFFF

_EDGES: Final[tuple[Callable[[int, int], int], ...]] = (
    lambda _count, _honest: 0,
    lambda _count, _honest: 1,
    lambda _count, honest: honest + 1,
    lambda _count, honest: honest - 1,
    lambda _count, _honest: _WORD,
    lambda _count, honest: honest | 1 << 32,
    lambda _count, honest: honest | 1 << 40,
    lambda count, honest: honest + count,
    lambda _count, _honest: 2,
    lambda _count, honest: honest | 0x8000_0000,
    lambda _count, honest: honest + 0x8001,
    lambda _count, honest: honest << 16 & _WORD,
    lambda _count, _honest: 4096,
    lambda _count, _honest: 513,
)


class Driver(Protocol):
    """What every driver here has: a `BlockDevice` that may die and come back."""

    fault: SvsmError | None

    @property
    def size_bytes(self) -> int: ...

    @property
    def block_size_bytes(self) -> int: ...

    @property
    def read_only(self) -> bool: ...

    def read(self, ranges: Sequence[Range]) -> list[bytes]: ...

    def write(self, extents: Sequence[Extent]) -> None: ...

    def flush(self) -> None: ...

    def discard(self, ranges: Sequence[Range]) -> None: ...

    def write_zeroes(self, ranges: Sequence[Range]) -> None: ...

    def poll(self) -> bool: ...

    def close(self) -> None: ...


class Rules(Protocol):
    """What follows the conversation with a device."""

    code: str

    def end(self) -> None:
        """The call is over."""


@functools.cache
def _pages(size: int) -> tuple[mmap.mmap, bytes]:
    return mmap.mmap(-1, size), bytes(size)


def shared_memory(size: int) -> mmap.mmap:
    """Zeroed memory that all runs of this size use, one after the other."""
    memory, zeros = _pages(size)
    memory[:] = zeros
    return memory


def edge(choices: Choices) -> Callable[[int, int], int]:
    """How a register lies, given how often it was read before and the honest value: always, or at one reading."""
    kind, when = choices.unsigned(1), choices.unsigned(1) % 5
    if kind < 14 * 12:
        lie = _EDGES[kind % 14]
    elif kind < 0xE0:
        lie = functools.partial(_flipped, choices.unsigned(1) % 32)
    else:
        lie = functools.partial(_replaced, choices.unsigned(4))
    return lambda count, honest: lie(count, honest) if when in (0, count + 1) else honest


def _flipped(bit: int, _count: int, honest: int) -> int:
    return honest ^ 1 << bit


def _replaced(value: int, _count: int, _honest: int) -> int:
    return value


class DiskRun(abc.ABC):
    """One program.

    Args:
        data: The program.

    Attributes:
        driver: Under test; there once it has started.
        rules: Of the conversation with its device.
        content: What the disk holds.
        memory: What both sides share.
        fault: Why the driver died, the first time.
        flickers: Shared memory changes behind each reading; there are no other lies then.
    """

    driver: Driver
    rules: Rules
    memory: mmap.mmap

    def __init__(self, data: bytes) -> None:
        self.choices = Choices(data)
        self.clock = Clock()
        self.content = bytearray(CONTENT)
        self.fault: SvsmError | None = None
        self.flickers = False
        self.unflushed = self.lost = self.tainted = False

    # ---- what a kind of device adds ---------------------------------------------------------------------------------

    @abc.abstractmethod
    def start(self) -> None:
        """Make the driver. Raises what refuses the disk, as it must."""

    @abc.abstractmethod
    def restart(self) -> None:
        """Reset, once or with lies. Raises as `start`."""

    @abc.abstractmethod
    def be_honest(self) -> None:
        """Forget all lies."""

    @abc.abstractmethod
    def lie(self) -> None:
        """Draw one that is there from now on."""

    @abc.abstractmethod
    def special(self, kind: int) -> None:
        """An operation of this kind of disk, below 5."""

    @abc.abstractmethod
    def plan(self, debt: Debt, choices: Choices) -> None:
        """What will be done to the requests of the next call, booked in `debt`."""

    @abc.abstractmethod
    def taken(self) -> int:
        """Requests that the device has had."""

    @abc.abstractmethod
    def flushes(self) -> int:
        """Flushes that the device has done."""

    @abc.abstractmethod
    def discards(self) -> bool:
        """Whether the device can discard."""

    @abc.abstractmethod
    def settled(self, what: str) -> None:
        """After a call that left the disk alive: nothing in flight, no slot lost, sizes as stated."""

    def can_flush(self) -> bool:
        """Whether it offers flushes."""
        return True

    # ---- the whole program ------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Start, call, revive. Raises what refused the disk, or what killed it first."""
        choices = self.choices
        for _ in range((0, 0, 0, 1, 1, 1, 2, 3)[choices.unsigned(1) & 7]):
            self.lie()
        self.start()
        calls = 0
        while choices.more and calls < _MOST_CALLS:
            calls += 1
            self._operation(choices.unsigned(1) & 15)
        if self.fault is not None:
            self.be_honest()
            self.lost |= self.unflushed
            self.restart()
            for _ in range(2):
                self.write(1, 1, lies=False)
                self.read(1, 1, lies=False)
                self.flush(lies=False)
        self.driver.close()
        if self.fault is not None:
            raise self.fault

    def _operation(self, kind: int) -> None:
        choices = self.choices
        if kind < 5:
            self.special(kind)
        elif kind == 5:
            self.beyond()
        elif kind == 6:
            self.flush()
        elif kind == 7:
            self.give_up()
        elif kind == 8:
            self.lie()
        elif kind & 1:
            self.write(choices.unsigned(1), 1 + (kind >> 1 & 1))
        else:
            self.read(choices.unsigned(1), 1 + (kind >> 1 & 3))

    # ---- one call ---------------------------------------------------------------------------------------------------

    def call(self, what: str, action: Callable[[], object], debt: Debt, *, lies: bool = True, moved: int = 0) -> bool:
        """Make a call, and hold it against what it owes; returns whether it worked."""
        driver, dead, taken = self.driver, self.driver.fault, self.taken()
        self.rules.code = ""
        self.clock.begin()
        if dead is not None:
            debt = Debt(frozenset([dead.code]), lies=1)
        if self.tainted:
            debt.whatever()
        quiet = not lies or dead is not None or self.flickers
        self.plan(debt, Choices(b"") if quiet else self.choices)
        error: SvsmError | None = None
        try:
            action()
        except SvsmError as raised:
            error = raised
        self.rules.end()
        if self.rules.code and self.rules.code not in debt.codes:
            debt.die(self.rules.code)
        debt.settle(error, driver.fault, what)
        if dead is not None:
            expect(self.taken() == taken, "a dead disk gets a request")
        elif driver.fault is None:
            self.settled(what)
        else:
            self.fault = self.fault or driver.fault
        self.tainted |= debt.anything or debt.lies > 1
        self.in_time(moved)
        return error is None

    def in_time(self, moved: int = 0) -> None:
        """The clock has not gone far."""
        expect(self.clock.spent < 2 * DEADLINE + moved / (1 << 20), "time is bounded")

    def refused(self, code: str, action: Callable[[], object]) -> None:
        """A call that must be refused before the device hears of it."""
        taken = self.taken()
        try:
            action()
        except StateError as error:
            expect(error.code == code, f"not refused for {code}")
        else:
            expect(False, f"not refused for {code}")
        expect(self.taken() == taken, "what is refused reaches the device")

    def private_stays_private(self) -> None:
        """No canary in shared memory."""
        expect(self.memory.find(CANARY, 0) < 0, "a private byte is in shared memory")

    def place(self, where: int, blocks: int) -> tuple[int, int] | None:
        """A range that is there, or None on a disk that is too small."""
        block = self.driver.block_size_bytes
        count = min(self.driver.size_bytes, DISK_BYTES) // block - blocks
        return (where % count * block, blocks * block) if count > 0 else None

    # ---- operations -------------------------------------------------------------------------------------------------

    def read(self, where: int, blocks: int, *, lies: bool = True) -> None:
        """One to five times the same range."""
        place = self.place(where, blocks)
        if place is None:
            return
        offset, length = place
        count = 1 + where % 5
        got: list[bytes] = []
        ranges = [(offset, length)] * count
        if self.call("read", lambda: got.extend(self.driver.read(ranges)), Debt(), lies=lies, moved=length * count):
            expect(all(type(part) is bytes for part in got), "what is read is the caller's own")
            expect(got == [bytes(self.content[offset : offset + length])] * count, "what is read is on the disk")

    def write(self, where: int, blocks: int, *, lies: bool = True) -> None:
        """From between two canaries."""
        place = self.place(where, blocks)
        if place is None:
            return
        offset, length = place
        private = bytearray(CANARY + bytes([where ^ 0x5A]) * length + CANARY)
        data = memoryview(private)[len(CANARY) : len(CANARY) + length]
        if self.driver.read_only:
            self.refused("block-read-only", lambda: self.driver.write([(offset, data)]))
            return
        self.unflushed |= self.driver.fault is None
        if self.call("write", lambda: self.driver.write([(offset, data)]), Debt(), lies=lies, moved=length):
            expect(self.content[offset : offset + length] == data, "what is written is on the disk")
        self.private_stays_private()

    def flush(self, *, lies: bool = True) -> None:
        """Refused where it cannot be, and once where writes may be lost."""
        debt, before, read_only = Debt(), self.flushes(), self.driver.read_only
        if self.driver.fault is None and (not self.can_flush() or self.lost):
            self.lost &= not self.can_flush()
            debt.fail()
        if self.call("flush", self.driver.flush, debt, lies=lies and not debt.fails and not read_only):
            expect(self.flushes() > before or read_only, "a flush that was no flush")
            self.unflushed &= read_only

    def give_up(self) -> None:
        """Discard or zero."""
        where = self.choices.unsigned(1)
        place = self.place(where, 2)
        if place is None:
            return
        offset, length = place
        zeroes = bool(where & 0x80)
        call = self.driver.write_zeroes if zeroes else self.driver.discard
        if self.driver.read_only:
            self.refused("block-read-only", lambda: call([(offset, length)]))
            return
        can = zeroes or self.discards()
        self.unflushed |= self.driver.fault is None and can
        if self.call("discard", lambda: call([(offset, length)]), Debt(), moved=length) and not self.tainted:
            expect(not can or not any(self.content[offset : offset + length]), "a discard is left out")

    def beyond(self) -> None:
        """Behind the end, and what a dead or a read-only disk must not see."""
        block, size = self.driver.block_size_bytes, self.driver.size_bytes
        poison = (CANARY * (block // len(CANARY) + 1))[:block]
        self.refused("block-range", lambda: self.driver.read([(size, block)]))
        self.refused("block-range", lambda: self.driver.write([(0, bytes(block)), (size, poison)]))
        if size and self.driver.read_only:
            self.refused("block-read-only", lambda: self.driver.write([(0, poison)]))
        elif size and self.driver.fault is not None:
            self.call("write", lambda: self.driver.write([(0, poison)]), Debt())
        self.private_stays_private()
