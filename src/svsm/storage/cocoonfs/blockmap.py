# SPDX-License-Identifier: MIT OR Apache-2.0
"""Which allocation blocks are in use, in memory: quick to copy, to look at, and to search for free runs.

A state is one byte per block, 0 or 1, because slices of it are what data block digests take and because the
regular-expression engine finds runs in it at memory speed. The bytes are cut into chunks: a copy shares them with its
origin until one of the two changes them, and all wholly free (and all wholly used) chunks are one object. So a
transaction costs what it touches and not what the volume holds.

For the search each chunk has a summary, made when first asked for: which lengths of short runs it has (a bit for each
length from 1 to 7, and one for everything longer), the length class of its longest run, and how many wholly free IO
blocks. The summaries lie end to end, so finding the next chunk that may have what is wanted is one search for a byte.
What one map learnt about a chunk that it shares, its copies know too.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cache

from svsm.storage.cocoonfs.encoding import Extent, merge_ranges
from svsm.storage.cocoonfs.layout import ImageLayout, align_up

__all__ = ["BlockMap", "Counted", "pack_states", "parse_states", "with_ranges"]

_CHUNK = 4096
_ALL_FREE, _ALL_USED = bytes(_CHUNK), b"\1" * _CHUNK
_TO_BYTES = bytes.maketrans(b"01", b"\0\1")
_TO_TEXT = bytes.maketrans(b"\0\1", b"01")
_FREE = re.compile(rb"\0+")
_SHORT = 8  # runs of less than this many blocks are told apart by their exact length
_UNKNOWN_KINDS, _UNKNOWN_CLASS, _UNKNOWN_UNITS = 0xFF, 0xFF, 0xFFFF


@cache
def _having(kind: int) -> re.Pattern[bytes]:
    """Finds a chunk whose kinds include this one."""
    return re.compile(b"[" + b"".join(re.escape(bytes([n])) for n in range(256) if n >> kind & 1) + b"]")


@cache
def _from_class(least: int) -> re.Pattern[bytes]:
    """Finds a chunk whose longest run is of this class or a higher one."""
    return re.compile(b"[" + re.escape(bytes([least])) + b"-\xff]")


@cache
def _runs_of(kind: int) -> re.Pattern[bytes]:
    """Finds free runs of this kind."""
    return re.compile(rb"(?<!\0)\0{%d}(?!\0)" % (kind + 1) if kind < _SHORT - 1 else rb"\0{%d,}" % _SHORT)


def parse_states(words: bytes) -> bytearray:
    """One byte per block from little-endian bits."""
    if not words:
        return bytearray()
    text = format(int.from_bytes(words, "little"), f"0{8 * len(words)}b")
    return bytearray(text[::-1].encode().translate(_TO_BYTES))


def pack_states(states: bytes | bytearray) -> bytes:
    """Little-endian bits from one byte per block; a multiple of eight blocks."""
    if not states:
        return b""
    return int(states[::-1].translate(_TO_TEXT), 2).to_bytes(len(states) // 8, "little")


def with_ranges(states: bytearray, ranges: Iterable[Extent], state: int) -> bytearray:
    """`states` itself with ranges set to 0 or 1."""
    fill = b"\1" if state else b"\0"
    for begin, length in ranges:
        states[begin : begin + length] = fill * length
    return states


class BlockMap:
    """States of the blocks of an image; all free at first.

    Args:
        layout: The configuration; free space is counted in its IO blocks.
        size_ab: The image's size.
    """

    __slots__ = ("_chunks", "_classes", "_io_ab", "_kinds", "_learnt", "_owned", "_units", "free_ab", "size_ab")

    def __init__(self, layout: ImageLayout, size_ab: int) -> None:
        count = -(-size_ab // _CHUNK)
        self._io_ab = layout.io_ab
        self.size_ab = size_ab
        self.free_ab = size_ab
        self._chunks: list[bytes | bytearray] = [_ALL_FREE] * count
        if size_ab % _CHUNK:
            self._chunks[-1] = bytes(size_ab % _CHUNK)
        self._owned: set[int] = set()
        self._kinds = bytearray([_UNKNOWN_KINDS]) * count
        self._classes = bytearray([_UNKNOWN_CLASS]) * count
        self._units = array("H", [_UNKNOWN_UNITS]) * count
        self._learnt: dict[int, tuple[bytes | bytearray, int, int, int]] = {}

    @classmethod
    def parse(cls, layout: ImageLayout, size_ab: int, words: bytes) -> BlockMap | None:
        """From little-endian bits, a whole number of 64-bit words; None where a bit beyond the end is set."""
        found = cls(layout, size_ab)
        step = _CHUNK // 8
        nothing = bytes(step)
        for number, at in enumerate(range(0, len(words), step)):
            piece = words[at : at + step]
            if piece == nothing[: len(piece)]:
                continue
            room = max(0, min(_CHUNK, size_ab - number * _CHUNK))
            states = parse_states(piece)
            if 1 in states[room:]:
                return None
            used = states.count(1)
            found.free_ab -= used
            found._chunks[number] = bytes(states[:room])
            found._settle(number)
        return found

    def copy(self) -> BlockMap:
        """A map of its own with the same states."""
        other = object.__new__(BlockMap)
        other._io_ab, other.size_ab, other.free_ab = self._io_ab, self.size_ab, self.free_ab
        other._chunks = self._chunks.copy()
        other._kinds, other._classes, other._units = self._kinds.copy(), self._classes.copy(), self._units[:]
        # What both hold now belongs to neither: whoever changes it copies it first.
        self._owned.clear()
        other._owned = set()
        other._learnt = self._learnt
        return other

    # -- looking -----------------------------------------------------------------------------------------------

    def states(self, begin: int, end: int) -> bytes:
        """One byte for each block in ``[begin, end)``; 0 beyond the image's end."""
        first, last = begin // _CHUNK, (end - 1) // _CHUNK
        if first == last and first < len(self._chunks):
            base = first * _CHUNK
            found = bytes(self._chunks[first][begin - base : end - base])
        else:
            joined = b"".join(self._chunks[first : last + 1])
            found = joined[begin - first * _CHUNK : end - first * _CHUNK]
        return found.ljust(end - begin, b"\0")

    def words(self, begin: int, end: int) -> bytes:
        """``[begin, end)`` as little-endian bits, both multiples of eight; zero beyond the image's end."""
        parts: list[bytes] = []
        for number in range(begin // _CHUNK, min(-(-end // _CHUNK), len(self._chunks))):
            chunk, base = self._chunks[number], number * _CHUNK
            low, high = max(begin - base, 0), min(end - base, _CHUNK)
            if chunk is _ALL_FREE or chunk is _ALL_USED:
                parts.append((b"\xff" if chunk[0] else b"\0") * ((high - low) // 8))
            else:
                parts.append(pack_states(chunk[low:high].ljust(high - low, b"\0")))
        return b"".join(parts).ljust((end - begin) // 8, b"\0")

    def all_used(self, extent: Extent) -> bool:
        """Whether every block of an extent is in use (and within the image)."""
        begin, length = extent
        return begin + length <= self.size_ab and 0 not in self.states(begin, begin + length)

    def any_used(self, begin: int, end: int) -> bool:
        """Whether some block in ``[begin, end)`` is in use."""
        return 1 in self.states(begin, end)

    def differing(self, other: BlockMap, step: int) -> list[int]:
        """Numbers of the pieces of `step` blocks in which two maps of one size differ, ascending."""
        found: list[int] = []
        seen = -1
        for number, (mine, its) in enumerate(zip(self._chunks, other._chunks, strict=True)):
            if mine is its or mine == its:
                continue
            first = number * _CHUNK // step
            last = min((number + 1) * _CHUNK, self.size_ab) - 1
            for piece in range(max(first, seen + 1), last // step + 1):
                begin, end = piece * step, (piece + 1) * step
                if self.states(begin, end) != other.states(begin, end):
                    found.append(piece)
                seen = piece
        return found

    # -- changing ----------------------------------------------------------------------------------------------

    def set(self, ranges: Iterable[Extent], state: int) -> None:
        """Mark ranges as in use (1) or free (0)."""
        for begin, length in ranges:
            at, end = begin, begin + length
            while at < end:
                number = at // _CHUNK
                stop = min(end, (number + 1) * _CHUNK)
                self._set(number, at - number * _CHUNK, stop - number * _CHUNK, state)
                at = stop

    def _set(self, number: int, low: int, high: int, state: int) -> None:
        chunk = self._chunks[number]
        changed = chunk.count(1 - state, low, high)
        if not changed:
            return
        self.free_ab += changed if state == 0 else -changed
        self._kinds[number], self._units[number] = _UNKNOWN_KINDS, _UNKNOWN_UNITS
        if state == 0:
            self._classes[number] = _UNKNOWN_CLASS  # taking makes no run longer: the class stays as an upper bound
        if high - low == _CHUNK:
            self._chunks[number] = _ALL_USED if state else _ALL_FREE
            self._settle(number)
            return
        if number not in self._owned:
            chunk = self._chunks[number] = bytearray(chunk)
            self._owned.add(number)
        chunk[low:high] = (b"\1" if state else b"\0") * (high - low)  # type: ignore[index]  # an owned chunk is a bytearray
        self._settle(number)

    def _settle(self, number: int) -> None:
        """Take the shared object for a chunk that is uniform, where it has one."""
        chunk = self._chunks[number]
        if len(chunk) == _CHUNK and not (0 in chunk and 1 in chunk):
            self._chunks[number] = _ALL_USED if chunk[0] else _ALL_FREE
            self._owned.discard(number)
            self._look(number)

    # -- searching ---------------------------------------------------------------------------------------------

    def _look(self, number: int) -> None:
        """Make a chunk's summary."""
        chunk, unit = self._chunks[number], self._io_ab
        if chunk is _ALL_USED:
            self._kinds[number] = self._classes[number] = self._units[number] = 0
            return
        known = self._learnt.get(number)
        if known is not None and known[0] is chunk and number not in self._owned:
            _, self._kinds[number], self._classes[number], self._units[number] = known
            return
        lengths = set(map(len, _FREE.findall(chunk)))
        kinds, longest = 0, max(lengths, default=0)
        for length in lengths:
            kinds |= 1 << min(length, _SHORT) - 1
        used = 0
        for index in range(unit):  # every IO block's first block, every one's second, …: a 1 stays where one is used
            used |= int.from_bytes(chunk[index::unit], "little")
        units = len(chunk) // unit - used.bit_count()
        self._kinds[number], self._classes[number], self._units[number] = kinds, longest.bit_length(), units
        if number not in self._owned:  # nobody changes it any more: an owner would
            self._learnt[number] = chunk, kinds, longest.bit_length(), units

    def _known(self, number: int) -> None:
        if self._units[number] == _UNKNOWN_UNITS:
            self._look(number)

    def free_units(self, *, at_most: int | None = None) -> int:
        """How many wholly free IO blocks there are; `at_most` says where counting may stop."""
        total = 0
        for number in range(len(self._chunks) - 1, -1, -1):
            self._known(number)
            total += self._units[number]
            if at_most is not None and total >= at_most:
                break
        return total

    def first_run(self, length: int, unit: int) -> int | None:
        """Begin of the first free run of `length` blocks that starts on a multiple of `unit`, or None."""
        if length <= _CHUNK:
            classes, at = _from_class(length.bit_length()), 0
            runs = re.compile(rb"\0{%d,}" % length)
            while (found := classes.search(self._classes, at)) is not None:
                number, at = found.start(), found.end()
                base = number * _CHUNK
                for match in runs.finditer(self._chunks[number]):
                    begin = align_up(base + match.start(), unit)
                    if begin + length <= base + match.end():
                        return begin
                self._known(number)
        for start, run in self.runs():
            begin = align_up(start, unit)
            if begin + length <= start + run:
                return begin
        return None

    def _of_kind(self, kind: int) -> Iterator[int]:
        """Chunks that have a run of this kind."""
        at = 0
        while (match := _having(kind).search(self._kinds, at)) is not None:
            number, at = match.start(), match.end()
            self._known(number)
            if self._kinds[number] >> kind & 1:
                yield number

    def smallest_run(self, length: int, unit: int) -> int | None:
        """The same in a hole that is as small as possible; of the longer ones the smallest of the first chunk."""
        for kind in range(min(length, _SHORT) - 1, _SHORT):
            for number in self._of_kind(kind):
                base = number * _CHUNK
                best: tuple[int, int] | None = None
                for match in _runs_of(kind).finditer(self._chunks[number]):
                    room = match.end() - match.start()
                    if best is not None and room >= best[0]:
                        continue
                    begin = align_up(base + match.start(), unit)
                    if begin + length <= base + match.end():
                        best = (room, begin)
                if best is not None:
                    return best[1]
        return self.first_run(length, unit)

    def runs(self) -> Iterator[Extent]:
        """All free runs, in order."""
        begin = end = -1
        for number, chunk in enumerate(self._chunks):
            base = number * _CHUNK
            if chunk is _ALL_USED or self._classes[number] == 0:
                continue
            spans = [(0, _CHUNK)] if chunk is _ALL_FREE else [match.span() for match in _FREE.finditer(chunk)]
            for low, high in spans:
                if base + low == end:
                    end = base + high
                    continue
                if end > begin:
                    yield begin, end - begin
                begin, end = base + low, base + high
        if end > begin:
            yield begin, end - begin


class Counted:
    """What counts for digests: the blocks in use, except what the format leaves out (headers, journal, tree).

    Args:
        used: The blocks in use.
        left_out: Extents that never count.
    """

    __slots__ = ("_begins", "_left_out", "_used")

    def __init__(self, used: BlockMap, left_out: Sequence[Extent]) -> None:
        self._used = used
        self._left_out = merge_ranges(left_out)
        self._begins = [begin for begin, _ in self._left_out]

    def states(self, begin: int, end: int) -> bytes:
        """One byte for each block in ``[begin, end)``: 1 where it counts."""
        found = self._used.states(begin, end)
        at = max(0, bisect_right(self._begins, begin) - 1)
        mixed: bytearray | None = None
        for first, length in self._left_out[at:]:
            if first >= end:
                break
            low, high = max(first, begin) - begin, min(first + length, end) - begin
            if low < high:
                mixed = bytearray(found) if mixed is None else mixed
                mixed[low:high] = bytes(high - low)
        return found if mixed is None else bytes(mixed)

    def all_counted(self, extent: Extent) -> bool:
        """Whether every block of an extent counts."""
        begin, length = extent
        return begin + length <= self._used.size_ab and 0 not in self.states(begin, begin + length)
