# SPDX-License-Identifier: MIT OR Apache-2.0
"""The map of used blocks against a plain bytearray, and what its searches promise."""

from __future__ import annotations

import random
import re

import pytest

from svsm.storage.cocoonfs.blockmap import BlockMap, Counted, pack_states
from svsm.storage.cocoonfs.layout import DEFAULT_LAYOUT

IO_AB = DEFAULT_LAYOUT.io_ab


def _runs(plain: bytearray) -> list[tuple[int, int]]:
    return [(match.start(), match.end() - match.start()) for match in re.finditer(rb"\0+", plain)]


def _agree(found: BlockMap, plain: bytearray) -> None:
    assert found.states(0, len(plain)) == plain
    assert found.free_ab == plain.count(0)
    assert list(found.runs()) == _runs(plain)
    units = sum(not any(plain[at : at + IO_AB]) for at in range(0, len(plain) // IO_AB * IO_AB, IO_AB))
    assert found.free_units() == units


@pytest.mark.parametrize("size", [4, 4092, 4096, 4100, 20000])
def test_like_a_bytearray(size: int) -> None:
    rng = random.Random(size)
    found, plain = BlockMap(DEFAULT_LAYOUT, size), bytearray(size)
    kept: list[tuple[BlockMap, bytes]] = []
    for turn in range(200):
        begin = rng.randrange(size)
        length = rng.randrange(1, min(size - begin, rng.choice([3, 40, 9000])) + 1)
        state = rng.randrange(2)
        found.set([(begin, length)], state)
        plain[begin : begin + length] = bytes([state]) * length
        if turn % 20 == 0:
            _agree(found, plain)
            kept.append((found, bytes(plain)))
            found = found.copy()
        low, high = sorted(rng.sample(range(size + 50), 2))
        assert found.states(low, high) == bytes(plain[low:high]).ljust(high - low, b"\0")
        assert found.any_used(low, high) == (1 in plain[low:high])
        low, high = low // 8 * 8, -(-high // 8) * 8
        assert found.words(low, high) == pack_states(bytes(plain[low:high]).ljust(high - low, b"\0"))
        assert found.all_used((low, high - low)) == (high <= size and 0 not in plain[low:high])
    for older, states in kept:
        assert older.states(0, size) == states
    older, states = kept[-1]
    step = 3968
    pieces = range(-(-size // step))
    wanted = [n for n in pieces if plain[n * step : (n + 1) * step] != states[n * step : (n + 1) * step]]
    assert found.differing(older, step) == wanted


def test_search() -> None:
    rng = random.Random(5)
    for _ in range(60):
        size = rng.choice([300, 4096, 9000])
        found, plain = BlockMap(DEFAULT_LAYOUT, size), bytearray(size)
        for _ in range(rng.randrange(120)):
            begin, length = rng.randrange(size), rng.randrange(1, 90)
            length = min(length, size - begin)
            found.set([(begin, length)], 1)
            plain[begin : begin + length] = b"\1" * length
        for length, unit in ((1, 1), (3, 1), (4, 4), (33, 4), (64, 64), (500, 1), (5000, 4)):
            fits = [
                (run, begin)
                for start, run in _runs(plain)
                for begin in (-(-start // unit) * unit,)
                if begin + length <= start + run
            ]
            first, small = found.first_run(length, unit), found.smallest_run(length, unit)
            assert (first is None) == (small is None) == (not fits)
            for found_at in (first, small):
                if found_at is not None:
                    assert found_at % unit == 0
                    assert not any(plain[found_at : found_at + length])
            if small is not None and size <= 4096:
                assert min(fits)[0] == next(run for start, run in _runs(plain) if start <= small < start + run)


def test_parse() -> None:
    plain = bytearray(random.Random(1).choices(b"\0\1", k=8192 + 640))
    plain[4096:8192] = b"\1" * 4096
    found = BlockMap.parse(DEFAULT_LAYOUT, len(plain), pack_states(plain) + bytes(64))
    assert found is not None
    _agree(found, plain)
    assert BlockMap.parse(DEFAULT_LAYOUT, len(plain) - 4, pack_states(plain[:-1] + b"\1")) is None


def test_counted() -> None:
    used = BlockMap(DEFAULT_LAYOUT, 10000)
    used.set([(0, 6000)], 1)
    counted = Counted(used, [(8, 4), (0, 5), (4000, 200), (9000, 10)])
    plain = bytearray(b"\1" * 6000 + bytes(4000))
    for begin, length in ((8, 4), (0, 5), (4000, 200)):
        plain[begin : begin + length] = bytes(length)
    for begin, end in ((0, 10000), (3, 9), (5, 8), (4100, 4101), (4199, 4201), (5990, 10010)):
        assert counted.states(begin, end) == bytes(plain[begin:end]).ljust(end - begin, b"\0")
    assert counted.all_counted((5, 3))
    assert not counted.all_counted((5, 4))
    assert not counted.all_counted((5999, 2))
