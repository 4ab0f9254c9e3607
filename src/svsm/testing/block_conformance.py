# SPDX-License-Identifier: MIT OR Apache-2.0
"""What every `BlockDevice` must do, as checks that any driver can be put through: the text of `svsm.abi.block`, tried.

A `Subject` says how to get a fresh device of known content and what it promises. Each check opens its own, uses
nothing but the interface, and raises `StateError` (``block-conformance``) with what went wrong. In pytest:

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_conformance(check): check(Subject(create=..., reopen=...))

Power cuts are `svsm.testing.powercut`'s subject, not this one's: durability is checked here as "what was flushed is
there when the same medium is opened again".
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from typing import Final

from svsm.abi.block import BlockDevice, Extent
from svsm.formats.errors import BackendError, StateError, SvsmError

__all__ = ["CHECKS", "SIZE_BYTES", "Check", "Subject", "initial_content"]

SIZE_BYTES: Final = 1 << 20
"""Capacity of the devices that a `Subject` makes."""
_ROUNDS = 40
_ZERO_ROUNDS = 17
_MANY = 600
_PIECE_BYTES = 128


@functools.cache
def initial_content(size_bytes: int = SIZE_BYTES) -> bytes:
    """What is on the medium before each check: every 16 bytes are different."""
    return b"".join(b"initial %8d" % number for number in range(size_bytes // 16))


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """A driver under test.

    Attributes:
        create: A device over a fresh medium with `initial_content`.
        reopen: Another device over the medium of the last `create`, whose device has been closed.
        create_read_only: As `create`, read-only; None where the driver has no such thing.
        discards_to_undefined: After a discard, a read may return anything (else: only old data or zeros).
        most_bytes: The largest request worth trying.
        grow: Make the medium of the last `create` that many bytes longer; None where it cannot grow.
        create_failing: As `create`, but the first write or zeroing, or a part of it, fails; None where that cannot be
            arranged.
    """

    create: Callable[[], BlockDevice]
    reopen: Callable[[], BlockDevice]
    create_read_only: Callable[[], BlockDevice] | None = None
    discards_to_undefined: bool = False
    most_bytes: int = SIZE_BYTES
    grow: Callable[[int], None] | None = None
    create_failing: Callable[[], BlockDevice] | None = None


Check = Callable[[Subject], None]


def _fault(what: str) -> StateError:
    return StateError(f"the driver does not conform: {what}", code="block-conformance")


def _demand(condition: bool, what: str) -> None:
    if not condition:
        raise _fault(what)


def _refused(what: str, codes: Sequence[str], call: Callable[[], object]) -> None:
    try:
        call()
    except (StateError, BackendError) as error:
        _demand(error.code in codes, f"{what} raises {error.code}, not {' or '.join(codes)}")
        return
    except SvsmError as error:
        raise _fault(f"{what} raises {type(error).__name__}") from error
    raise _fault(f"{what} is accepted")


def describes_itself(subject: Subject) -> None:
    """Size and block size are sensible and agree."""
    device = subject.create()
    block = device.block_size_bytes
    _demand(block >= 128 and block & (block - 1) == 0, f"a block size of {block}")
    _demand(device.size_bytes == SIZE_BYTES, f"a size of {device.size_bytes}")
    _demand(device.size_bytes % block == 0, "a size that is not a multiple of the block size")
    _demand(not device.read_only, "it is read-only")
    device.close()


def reads_what_is_there(subject: Subject) -> None:
    """Single blocks, all of it, many ranges, overlapping ranges, empty ranges, no range; in the order asked."""
    device, content = subject.create(), initial_content()
    block = device.block_size_bytes
    _demand(device.read([]) == [], "no range gives something")
    _demand(device.read([(0, 0)]) == [b""], "an empty range gives something")
    for ranges in (
        [(0, block)],
        [(SIZE_BYTES - block, block)],
        [(0, min(SIZE_BYTES, subject.most_bytes))],
        [(at * block, block) for at in range(SIZE_BYTES // block - 1, -1, -7)],
        [(0, 4 * block), (block, 4 * block), (0, 0), (3 * block, block), (0, 4 * block)],
    ):
        got = device.read(ranges)
        _demand([len(part) for part in got] == [length for _, length in ranges], "a range has another length")
        _demand(got == [content[offset : offset + length] for offset, length in ranges], "contents differ")
        _demand(all(type(part) is bytes for part in got), "contents are not bytes")
    device.close()


def writes_are_read_back(subject: Subject) -> None:
    """Random vectors of extents against a model, flushed or not."""
    device, model = subject.create(), bytearray(initial_content())
    block, random_source = device.block_size_bytes, random.Random(1)
    device.write([])
    device.write([(0, b"")])
    for _ in range(_ROUNDS):
        extents: list[Extent] = []
        for slot in random_source.sample(range(16), random_source.randrange(1, 8)):
            # One extent in each sixteenth, so that extents of one call do not overlap.
            blocks = SIZE_BYTES // 16 // block
            first = random_source.randrange(blocks)
            count = random_source.randrange(1, blocks - first + 1)
            extents.append((slot * SIZE_BYTES // 16 + first * block, random_source.randbytes(count * block)))
        device.write(extents)
        for offset, data in extents:
            model[offset : offset + len(data)] = data
        if random_source.random() < 0.2:
            device.flush()
        ranges = [(offset, len(data)) for offset, data in extents]
        _demand(device.read(ranges) == [data for _, data in extents], "a write is not read back")
    for at in range(0, SIZE_BYTES, SIZE_BYTES // 4):
        part = device.read([(at, SIZE_BYTES // 4)])[0]
        _demand(part == model[at : at + SIZE_BYTES // 4], "a write went where it should not")
    device.close()


def takes_any_buffer(subject: Subject) -> None:
    """bytes, bytearray, memoryview, a view that is not of bytes; and keeps no hold of them."""
    device = subject.create()
    block = device.block_size_bytes
    pattern = bytes(range(256)) * (block // 128)
    size = len(pattern)
    mutable = bytearray(pattern)
    device.write([(0, pattern), (size, mutable), (2 * size, memoryview(pattern)), (3 * size, memoryview(mutable)[:])])
    mutable[:] = bytes(size)
    mutable.extend(b"still ours")
    _demand(device.read([(at * size, size) for at in range(4)]) == [pattern] * 4, "a buffer was not copied")
    device.close()


def many_ranges(subject: Subject) -> None:
    """More ranges in one call than any queue has room for."""
    device, content = subject.create(), bytearray(initial_content())
    block = device.block_size_bytes
    source = random.Random(4)
    blocks = source.choices(range(SIZE_BYTES // block), k=_MANY)
    got = device.read([(at * block, block) for at in blocks])
    expected = [bytes(content[at * block : (at + 1) * block]) for at in blocks]
    _demand(got == expected, "one of many ranges differs")
    for last in (2 * block, SIZE_BYTES // 2):
        got = device.read([*((at * block, block) for at in blocks), (block, last)])
        _demand(got == [*expected, content[block : block + last]], "many ranges and one of another length differ")
    chosen = sorted(set(blocks))
    source.shuffle(chosen)
    extents: list[Extent] = [(at * block, source.randbytes(block)) for at in chosen]
    device.write(extents)
    for offset, data in extents:
        content[offset : offset + block] = data
    _demand(device.read([(offset, block) for offset, _ in extents]) == [data for _, data in extents], "a write is lost")
    half = SIZE_BYTES // 2
    _demand(b"".join(device.read([(0, half), (half, half)])) == content, "one of many writes went elsewhere")
    device.close()


def overlapping_extents(subject: Subject) -> None:
    """Where extents of one write overlap, each piece is one of them, and the rest is as if they did not."""
    device, content = subject.create(), initial_content()
    block = device.block_size_bytes
    device.write([(block, b"a" * 4 * block), (3 * block, b"b" * 4 * block), (4 * block, b"c" * block)])
    _demand(device.read([(0, block)])[0] == content[:block], "an overlapping write reaches in front of itself")
    _demand(device.read([(7 * block, block)])[0] == content[7 * block : 8 * block], "… behind itself")
    _demand(device.read([(block, 2 * block)])[0] == b"a" * 2 * block, "the part of one extent alone differs")
    _demand(device.read([(5 * block, 2 * block)])[0] == b"b" * 2 * block, "the part of one extent alone differs")
    shared = device.read([(3 * block, 2 * block)])[0]
    for at in range(0, 2 * block, _PIECE_BYTES):
        candidates = "ab" if at < block else "abc"
        piece = shared[at : at + _PIECE_BYTES]
        _demand(piece in [letter.encode() * _PIECE_BYTES for letter in candidates], "a piece holds no extent's data")
    device.close()


def large_requests(subject: Subject) -> None:
    """The largest request comes back whole."""
    device = subject.create()
    size = min(SIZE_BYTES, subject.most_bytes)
    data = random.Random(2).randbytes(size)
    device.write([(0, data)])
    _demand(device.read([(0, size)])[0] == data, "a large write differs")
    device.close()


def refuses_what_cannot_be(subject: Subject) -> None:
    """Beyond the end, negative, huge and unaligned ranges; nothing of such a call is done."""
    device, content = subject.create(), initial_content()
    block = device.block_size_bytes
    zeros = bytes(block)
    for what, offset, length, code in (
        ("a read behind the end", SIZE_BYTES, block, "block-range"),
        ("a read across the end", SIZE_BYTES - block, 2 * block, "block-range"),
        ("a read far away", 1 << 70, block, "block-range"),
        ("a read before the start", -block, block, "block-range"),
        ("a read of negative length", 4 * block, -block, "block-range"),
        ("a read at half a block", block // 2, block, "block-alignment"),
        ("a read of half a block", 0, block // 2, "block-alignment"),
        ("nothing, behind the end", SIZE_BYTES + block, 0, "block-range"),
        ("nothing, at half a block", block // 2, 0, "block-alignment"),
    ):
        for call in (device.read, device.discard, device.write_zeroes):
            _refused(what, (code,), functools.partial(call, [(0, block), (offset, length)]))
        _refused(what, (code,), functools.partial(device.read, [(0, block)] * _MANY + [(offset, length)]))
    for what, offset, data, code in (
        ("a write behind the end", SIZE_BYTES, zeros, "block-range"),
        ("a write at half a block", block // 2, zeros, "block-alignment"),
        ("a write of half a block", 0, zeros[: block // 2], "block-alignment"),
    ):
        _refused(what, (code,), functools.partial(device.write, [(0, zeros), (offset, data)]))
    _demand(device.read([(0, block)])[0] == content[:block], "a refused call was done by halves")
    _demand(device.read([(SIZE_BYTES, 0)]) == [b""], "nothing, at the very end, gives something")
    device.close()


def flushed_is_durable(subject: Subject) -> None:
    """What was written and flushed is there when the medium is opened again."""
    device = subject.create()
    block = device.block_size_bytes
    data = random.Random(3).randbytes(block)
    device.write([(block, data), (SIZE_BYTES - block, data)])
    device.write_zeroes([(16 * block, 4 * block)])
    device.flush()
    device.flush()
    device.close()
    again = subject.reopen()
    _demand(again.read([(block, block), (SIZE_BYTES - block, block)]) == [data, data], "a flushed write is lost")
    _demand(again.read([(16 * block, 4 * block)])[0] == bytes(4 * block), "a flushed zeroing is lost")
    _demand(again.read([(0, block)])[0] == initial_content()[:block], "something else changed")
    again.close()


def zeroes(subject: Subject) -> None:
    """Ranges read as zeros at once, whatever was there; neighbours survive; a model agrees with any mixture."""
    device, model = subject.create(), bytearray(initial_content())
    block, source = device.block_size_bytes, random.Random(5)
    device.write_zeroes([])
    device.write_zeroes([(0, 0), (SIZE_BYTES, 0)])
    for turn in range(_ZERO_ROUNDS):
        ranges = []
        for _ in range(source.randrange(1, 6)):  # they may overlap
            first = source.randrange(SIZE_BYTES // block)
            ranges.append((first * block, min(source.choice((1, 2, 9, 700)), SIZE_BYTES // block - first) * block))
        device.write_zeroes(ranges)
        for offset, length in ranges:
            model[offset : offset + length] = bytes(length)
        _demand(device.read(ranges) == [bytes(length) for _, length in ranges], "a zeroed range does not read as zeros")
        offset = source.randrange(SIZE_BYTES // block) * block
        data = source.randbytes(block)
        device.write([(offset, data)])
        model[offset : offset + block] = data
        if turn % 8 == 0:
            part = device.read([(0, SIZE_BYTES // 2)])[0]
            _demand(part == model[: SIZE_BYTES // 2], "a zeroing reaches beyond its range")
    device.write_zeroes([(0, SIZE_BYTES)])
    _demand(not any(device.read([(0, SIZE_BYTES // 2)])[0]), "zeroing everything leaves something")
    _demand(not any(device.read([(SIZE_BYTES // 2, SIZE_BYTES // 2)])[0]), "zeroing everything leaves something")
    device.close()


def discards(subject: Subject) -> None:
    """Neighbours survive; the range itself can be written again."""
    device, content = subject.create(), initial_content()
    block = device.block_size_bytes
    device.discard([])
    device.discard([(4 * block, 4 * block), (16 * block, block)])
    around = device.read([(0, 4 * block), (8 * block, 8 * block), (17 * block, block)])
    expected = [content[: 4 * block], content[8 * block : 16 * block], content[17 * block : 18 * block]]
    _demand(around == expected, "a discard reaches beyond its range")
    if not subject.discards_to_undefined:
        inside = device.read([(4 * block, 4 * block)])[0]
        _demand(inside in (content[4 * block : 8 * block], bytes(4 * block)), "a discarded range has foreign contents")
    device.write([(4 * block, content[:block])])
    _demand(device.read([(4 * block, block)])[0] == content[:block], "a discarded range cannot be written again")
    device.flush()
    device.close()


def read_only_refuses(subject: Subject) -> None:
    """A read-only device reads, flushes, and refuses the rest."""
    if subject.create_read_only is None:
        return
    device = subject.create_read_only()
    block = device.block_size_bytes
    _demand(device.read_only, "it does not say that it is read-only")
    _demand(device.read([(0, block)])[0] == initial_content()[:block], "contents differ")
    _refused("a write to a read-only device", ("block-read-only",), lambda: device.write([(0, bytes(block))]))
    _refused("a discard on a read-only device", ("block-read-only",), lambda: device.discard([(0, block)]))
    _refused("a zeroing on a read-only device", ("block-read-only",), lambda: device.write_zeroes([(0, block)]))
    _refused("an empty write to a read-only device", ("block-read-only",), lambda: device.write([]))
    _demand(device.read([(0, block)])[0] == initial_content()[:block], "a refused change was made")
    device.flush()
    device.close()


def capacity_may_change(subject: Subject) -> None:
    """`poll` sees that the medium has grown, says so once, and the new part can be used."""
    device = subject.create()
    block = device.block_size_bytes
    _demand(not device.poll(), "a poll finds a change where there is none")
    if subject.grow is None:
        _demand(device.size_bytes == SIZE_BYTES, "a poll changes the size")
        device.close()
        return
    subject.grow(8 * block)
    _demand(device.poll(), "a poll does not see that the medium has grown")
    _demand(device.size_bytes == SIZE_BYTES + 8 * block, f"a size of {device.size_bytes} after the medium has grown")
    _demand(device.block_size_bytes == block, "another block size")
    _demand(not device.poll(), "a poll tells of the same change twice")
    device.write([(SIZE_BYTES + 7 * block, b"n" * block)])
    _demand(device.read([(SIZE_BYTES + 7 * block, block)])[0] == b"n" * block, "the new part does not keep data")
    _demand(device.read([(0, block)])[0] == initial_content()[:block], "contents changed with the size")
    device.close()


def failures_harm_nothing_else(subject: Subject) -> None:
    """After a failed write its own ranges are old or new, everything else is old, or the device says it is dead."""
    if subject.create_failing is None:
        return
    content = initial_content()
    for what in ("write", "write_zeroes"):
        device = subject.create_failing()
        block = device.block_size_bytes
        new = {"write": b"n" * block, "write_zeroes": bytes(block)}[what]
        offsets = [2 * block, 9 * block, 30 * block]
        calls: dict[str, Callable[[], None]] = {
            "write": functools.partial(device.write, [(at, new) for at in offsets]),
            "write_zeroes": functools.partial(device.write_zeroes, [(at, block) for at in offsets]),
        }
        _refused(f"a {what} that the device fails", ("block-io",), calls[what])
        try:
            after = device.read([(0, 40 * block)])[0]
        except BackendError:
            _refused("a write to a dead device", ("block-io",), calls["write"])
            device.close()
            continue
        for at in range(0, 40 * block, _PIECE_BYTES):
            allowed = [content[at : at + _PIECE_BYTES]]
            if at // block * block in offsets:
                allowed.append(new[:_PIECE_BYTES])
            _demand(after[at : at + _PIECE_BYTES] in allowed, f"a failed {what} changed something else")
        device.close()


def closed_is_closed(subject: Subject) -> None:
    """Everything after `close` is refused as such; closing twice is nothing."""
    device = subject.create()
    block = device.block_size_bytes
    device.close()
    device.close()
    for what, call in (
        ("a read", lambda: device.read([(0, block)])),
        ("a write", lambda: device.write([(0, bytes(block))])),
        ("a flush", lambda: device.flush()),
        ("a discard", lambda: device.discard([(0, block)])),
        ("a zeroing", lambda: device.write_zeroes([(0, block)])),
        ("a poll", lambda: device.poll()),
        ("an empty read", lambda: device.read([])),
        ("an empty write", lambda: device.write([])),
    ):
        _refused(f"{what} after close", ("block-closed",), call)
    _demand((device.size_bytes, device.block_size_bytes) == (SIZE_BYTES, block), "its sizes have changed")


CHECKS: Final[tuple[Check, ...]] = (
    describes_itself,
    reads_what_is_there,
    writes_are_read_back,
    takes_any_buffer,
    many_ranges,
    overlapping_extents,
    large_requests,
    refuses_what_cannot_be,
    flushed_is_durable,
    zeroes,
    discards,
    read_only_refuses,
    capacity_may_change,
    failures_harm_nothing_else,
    closed_is_closed,
)
