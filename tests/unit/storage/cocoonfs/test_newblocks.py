# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the blocks of a commit will hold, against a disk in a bytearray."""

from __future__ import annotations

import random

import pytest

from svsm.storage.cocoonfs import Volume
from svsm.storage.cocoonfs.blockmap import Counted
from svsm.storage.cocoonfs.newblocks import NewBlocks
from svsm.storage.cocoonfs.presets import layout_of
from svsm.storage.drivers.memory import MemoryDevice

KEY, SIZE = bytes(range(32)), 512 << 10


@pytest.mark.parametrize("sizes", [{}, {"data_block_bytes": 2048}, {"io_block_bytes": 4096, "data_block_bytes": 512}])
def test_like_a_bytearray(sizes: dict[str, int]) -> None:
    rng = random.Random(3)
    device = MemoryDevice(SIZE)
    volume = Volume.create(device, KEY, salt=b"salt", layout=layout_of(**sizes))  # type: ignore[arg-type]
    with volume.transaction() as transaction:
        for inode in range(40, 60):
            transaction.write(inode, rng.randbytes(rng.choice((10, 700, 5000))))
    image, layout = volume.image, volume.layout
    size, unit, io_unit = layout.ab_bytes, layout.journal_ab, layout.io_ab
    free = [begin for begin, length in image.used.runs() if length > 40]
    for _ in range(20):
        begin = rng.choice(free) + rng.randrange(8)
        lengths = [rng.randrange(1, 30) for _ in range(3)]
        writes, plain = [], bytearray(device.data)
        for length in lengths:
            if not image.used.any_used(begin, begin + length):
                data = rng.randbytes(length * size)
                writes.append((begin, data))
                plain[begin * size : (begin + length) * size] = data
            begin += length + rng.randrange(3)
        blocks = NewBlocks(image, writes, rng.randbytes)
        whole = {number for first, data in blocks.straight for number in range(first, first + len(data) // size)}
        for first, content in blocks.straight:
            assert first % unit == len(content) // size % unit == 0
            assert content == plain[first * size : first * size + len(content)]
        in_place, staged = blocks.numbers()
        for number in [*in_place, *staged]:
            lo, hi = number * io_unit, (number + 1) * io_unit
            assert not whole.intersection(range(lo, hi))
            assert (number in staged) == image.used.any_used(lo // unit * unit, lo // unit * unit + unit)
            for ab in range(lo, hi):
                if image.used.any_used(ab, ab + 1) or any(at <= ab < at + len(data) // size for at, data in writes):
                    found = blocks.block(number)[(ab - lo) * size : (ab - lo + 1) * size]
                    assert found == plain[ab * size : (ab + 1) * size]
        covered = {ab for first, length in blocks.changed([]) for ab in range(first, first + length)}
        assert covered >= {ab for first, data in writes for ab in range(first, first + len(data) // size)}
        used = image.used.copy()
        used.set([(first, len(data) // size) for first, data in writes], 1)
        counted = Counted(used, image.uncounted())
        for block, digests in blocks.digests(blocks.changed([]), counted):
            place = image.tree.geometry.place_of(block)
            for number, digest in enumerate(digests):
                at = place + number * layout.data_ab
                states = counted.states(at, at + layout.data_ab)
                there = bytes(plain[at * size : (at + layout.data_ab) * size])
                assert image.tree.digester.digests(block + number, there, states) == [digest]


def test_nearly_all_of_a_large_file_is_straight() -> None:
    volume = Volume.create(MemoryDevice(SIZE), KEY, salt=b"salt")
    image, size = volume.image, volume.layout.ab_bytes
    begin = next(begin for begin, length in image.used.runs() if length > 2000) + 1
    blocks = NewBlocks(image, [(begin, bytes(1000 * size))], bytes)
    assert sum(len(data) for _, data in blocks.straight) >= 996 * size
    assert sum(map(len, blocks.numbers())) <= 2
