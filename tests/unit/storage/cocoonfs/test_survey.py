# SPDX-License-Identifier: MIT OR Apache-2.0
"""What every block is for: end to end, as the bitmap says; and lengths of files without reading them."""

from __future__ import annotations

import random

import pytest

from svsm.formats.errors import SvsmError
from svsm.storage.cocoonfs import AuxMetadata, Volume
from svsm.storage.cocoonfs.layout import ImageLayout
from svsm.storage.cocoonfs.presets import layout_of
from svsm.storage.cocoonfs.profiles import TUNED
from svsm.storage.cocoonfs.survey import Purpose, file_lengths, survey
from svsm.storage.drivers.memory import MemoryDevice

KEY = b"survey"


def _filled(layout: ImageLayout, size: int = 2 << 20) -> Volume:
    """A volume with holes, files in many extents, lists of extents and an index of several levels."""
    rng = random.Random(7)
    volume = Volume.create(
        MemoryDevice(size, block_size_bytes=128), KEY, salt=b"", layout=layout, aux=AuxMetadata(reserve_bytes=500)
    )
    with volume.transaction() as transaction:
        for inode in range(16, 216):
            transaction.write(inode, rng.randbytes(rng.choice([0, 1, 15, 16, 17, 100, 900, 3000])))
    with volume.transaction() as transaction:
        for inode in range(16, 216, 3):
            transaction.unlink(inode)
    with volume.transaction() as transaction:
        transaction.write(1000, bytes(150_000))
        transaction.write(1001, rng.randbytes(70_000) + bytes(70_000))
    return volume


@pytest.mark.parametrize(
    "layout", [layout_of(), layout_of("sha2", "aes", 128, **TUNED), layout_of("sm3", "sm4", io_block_bytes=4096)]
)
def test_areas_and_lengths(layout: ImageLayout) -> None:
    volume = _filled(layout)
    image = volume.image
    areas = survey(image)
    at = 0
    for area in areas:
        assert (area.begin, area.length > 0) == (at, True)
        at += area.length
        assert image.used.all_used((area.begin, area.length)) == (area.purpose is not Purpose.FREE)
        assert image.used.any_used(area.begin, area.begin + area.length) == (area.purpose is not Purpose.FREE)
    assert at * layout.ab_bytes == volume.size_bytes
    assert sum(area.length for area in areas if area.purpose is Purpose.FREE) * layout.ab_bytes == volume.free_bytes
    assert not [area for area in areas if area.purpose is Purpose.UNCLAIMED]
    assert {area.inode for area in areas if area.purpose is Purpose.FILE} == volume.inodes()
    assert {entry.inode: length for entry, length in file_lengths(image)} == {
        info.inode: len(volume.read(info.inode)) for info in volume.list()
    }


def test_lengths_read_only_the_end() -> None:
    volume = Volume.create(MemoryDevice(4 << 20), KEY, salt=b"")
    with volume.transaction() as transaction:
        transaction.write(16, bytes(3 << 20))
    device = volume.image.volume.io.device
    read = 0
    original = device.read

    def counting(ranges: list[tuple[int, int]]) -> list[bytes]:
        nonlocal read
        read += sum(length for _, length in ranges)
        return original(ranges)

    device.read = counting  # type: ignore[method-assign, assignment]
    assert [length for _, length in file_lengths(volume.image)] == [3 << 20]
    assert 0 < read < 100_000


def test_blocks_in_use_by_nothing_and_by_two() -> None:
    volume = _filled(layout_of())
    image = volume.image
    free = next(area for area in survey(image) if area.purpose is Purpose.FREE and area.length > 4)
    image.used.set([(free.begin + 1, 2)], 1)
    (leaked,) = (area for area in survey(image) if area.purpose is Purpose.UNCLAIMED)
    assert (leaked.begin, leaked.length) == (free.begin + 1, 2)
    file = next(area for area in survey(image) if area.purpose is Purpose.FILE)
    image.used.set([(file.begin, 1)], 0)
    with pytest.raises(SvsmError):
        survey(image)
    image.used.set([(file.begin, 1)], 1)
    image.bitmap_extents = (*image.bitmap_extents, (file.begin, 1))
    with pytest.raises(SvsmError) as caught:
        survey(image)
    assert (caught.value.code, caught.value.details["field"]) == ("cocoonfs-format", "areas")


def test_a_file_of_nothing_but_zeros_behind_no_padding_is_refused() -> None:
    volume = Volume.create(MemoryDevice(64 << 10), KEY, salt=b"")
    with volume.transaction() as transaction:
        transaction.write(16, b"x" * 300)
        transaction.write(17, b"y" * 300)
    image = volume.image
    entry, other = image.find(16), image.find(17)
    assert entry is not None
    assert other is not None
    # Another file's key: what it decrypts to is noise, whose padding is wrong.
    image.load(image.entry_leaf, 1).entries[-1] = other._replace(pointer=entry.pointer)  # type: ignore[union-attr]
    with pytest.raises(SvsmError) as caught:
        list(file_lengths(image))
    assert caught.value.code == "cocoonfs-format"
