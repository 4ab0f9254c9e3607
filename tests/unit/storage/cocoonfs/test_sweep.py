# SPDX-License-Identifier: MIT OR Apache-2.0
"""Every bit of small volumes flipped, blocks swapped, old blocks put back: refused, or nothing of it shows.

What does not show must lie where the format authenticates nothing (`regions`), and everything there must not show; the
numbers per kind are those of `docs/volume.md`. Media that agree in all that is read of them are opened once (`cuts`).
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from svsm.formats.errors import FormatError, IntegrityError
from svsm.storage.cocoonfs import AuxMetadata, ImageLayout, Volume
from svsm.storage.cocoonfs.check import Severity, check
from svsm.storage.cocoonfs.layout import DEFAULT_LAYOUT
from svsm.storage.cocoonfs.presets import layout_of
from svsm.storage.drivers.memory import MemoryDevice
from tests.cocoonfs_support import content
from tests.unit.storage.cocoonfs.cuts import Judgements, Outcome, WatchedDevice
from tests.unit.storage.cocoonfs.regions import unauthenticated

KEY = b"sweep"
AUX = AuxMetadata(reserve_bytes=64).add(uuid.UUID(int=9), b"a record")
_PAGE = Path(__file__).parents[4] / "docs" / "volume.md"


@dataclass(frozen=True, slots=True)
class Small:
    """A configuration whose volume is swept."""

    name: str
    layout: ImageLayout
    size: int
    aux: AuxMetadata


_BLOCKS_OF_128 = layout_of(
    "sha3", "camellia", 256, io_block_bytes=128, data_block_bytes=128, tree_node_bytes=256, bitmap_block_bytes=128
)
_IO_1024 = layout_of("sm3", "sm4", 128, io_block_bytes=1024, data_block_bytes=512)
VOLUMES = (
    Small("default", DEFAULT_LAYOUT, 10 << 10, AUX),
    Small("all blocks 128 bytes, sha3, camellia-256", _BLOCKS_OF_128, 9 << 10, AUX),
    Small("IO blocks 1024 bytes, sm3, sm4", _IO_1024, 14 << 10, AuxMetadata()),
)


def _random() -> Iterable[bytes]:
    return (content(f"random {number}", 1 << 16) for number in itertools.count())


def _volume(small: Small) -> list[bytes]:
    """The medium when it was made, then with each of three commits pending, and after it."""
    device = MemoryDevice(small.size, block_size_bytes=128)
    draws = iter(_random())
    volume = Volume.create(
        device,
        KEY,
        salt=b"\xdd\xee\xff",
        layout=small.layout,
        aux=small.aux,
        random=lambda length: next(draws)[:length],
    )
    media = [bytes(device.data)]
    for turn in range(3):
        transaction = volume.transaction()
        transaction.write(16, content(f"sixteen {turn}", 300), turn)
        transaction.write(17, content(f"seventeen {turn}", 10 * turn))
        if turn == 1:
            transaction.write(18, b"eighteen")
        if turn == 2:
            transaction.unlink(18)
        prepared = transaction.prepare()
        media.append(bytes(device.data))
        prepared.apply()
        media.append(bytes(device.data))
    return media


def _files(volume: Volume) -> str:
    files = [(info.inode, info.flags, volume.read(info.inode)) for info in volume.list()]
    return hashlib.sha256(repr((volume.counter, files)).encode()).hexdigest()


def _look(device: WatchedDevice) -> Outcome:
    """(digest of the files, that of the records or None), or "refused"."""
    try:
        volume = Volume.open(device, KEY, read_only=True)
        files = _files(volume)
    except (FormatError, IntegrityError):
        return "refused"
    try:
        return (files, hashlib.sha256(volume.aux.pack()).hexdigest())
    except FormatError:
        return (files, None)


def _judged(judgements: Judgements, content: bytes, *, inside: bool) -> Outcome:
    """What looking shows; what lies inside authentication, and no file needed, a check has to find."""
    outcome = judgements.of(content)
    if inside and isinstance(outcome, tuple):
        report = check(MemoryDevice(content, block_size_bytes=128), KEY)
        if any(one.severity is Severity.ERROR and one.kind != "aux-damaged" for one in report.findings):
            return "found by a check"
    return outcome


def _bits(small: Small, bits: Iterable[int]) -> Counter[str]:
    """Flip each of these bits; how many were refused, and how many of each kind did not show."""
    content = _volume(small)[-1]
    kinds = unauthenticated(content, KEY)
    kind_of = {byte: kind for kind, places in kinds.items() for byte in places}
    judgements = Judgements(_look, 128)
    good = judgements.of(content)
    assert isinstance(good, tuple)
    counted: Counter[str] = Counter()
    changed = bytearray(content)
    for bit in bits:
        byte = bit >> 3
        changed[byte] ^= 1 << (bit & 7)
        kind = kind_of.get(byte)
        outcome = _judged(judgements, bytes(changed), inside=kind is None)
        changed[byte] ^= 1 << (bit & 7)
        if isinstance(outcome, str):
            assert kind is None or "auxiliary" in kind, f"bit {bit:#x}, {kind}: {outcome}"
            counted[outcome if kind is None else f"{kind}: {outcome}"] += 1
        elif outcome == good:
            assert kind is not None, f"bit {bit:#x} can be flipped unnoticed"
            counted[kind] += 1
        else:
            assert outcome == (good[0], None), f"bit {bit:#x}: other files, or other records"
            assert kind is not None, f"bit {bit:#x}: records lost"
            assert "auxiliary" in kind
            counted[f"{kind}: records lost"] += 1
    assert changed == content
    return counted


@pytest.mark.parametrize("small", VOLUMES, ids=lambda small: small.name)
def test_sample_of_bits(small: Small, record_property: Callable[[str, object], None]) -> None:
    counted = _bits(small, range(3, 8 * small.size, 419))
    record_property("tampered volumes", counted.total())
    assert counted["refused"] > 30
    assert counted["unallocated block"] > 10


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("small", VOLUMES, ids=lambda small: small.name)
def test_every_bit(small: Small, record_property: Callable[[str, object], None]) -> None:
    counted = _bits(small, range(8 * small.size))
    record_property("tampered volumes", counted.total())
    assert counted.total() == 8 * small.size
    # And the other way round: every bit outside of the regions was refused, every bit inside came to one of these.
    kinds = unauthenticated(_volume(small)[-1], KEY)
    for kind, places in kinds.items():
        found = sum(count for name, count in counted.items() if name.split(":")[0] == kind)
        assert found == 8 * len(places)
    for name, count in counted.items():
        assert re.search(rf"\| {re.escape(small.name)} \| {re.escape(name)} \| {count:,} \|", _PAGE.read_text()), name


def _blocks(content: bytes, size: int) -> list[bytes]:
    return [content[at : at + size] for at in range(0, len(content), size)]


def _swap(small: Small, size: int) -> Counter[str]:
    content = _volume(small)[-1]
    outside = set().union(*unauthenticated(content, KEY).values())
    judgements = Judgements(_look, 128)
    good = judgements.of(content)
    assert isinstance(good, tuple)
    blocks = _blocks(content, size)
    free = [outside.issuperset(range(at * size, (at + 1) * size)) for at in range(len(blocks))]
    counted: Counter[str] = Counter()
    for one, other in itertools.combinations(range(len(blocks)), 2):
        mixed = list(blocks)
        mixed[one], mixed[other] = mixed[other], mixed[one]
        same = all(
            mixed[at][place] == blocks[at][place]
            for at in (one, other)
            for place in range(size)
            if at * size + place not in outside
        )
        outcome = _judged(judgements, b"".join(mixed), inside=not same)
        if isinstance(outcome, str):
            counted[outcome] += 1
            continue
        assert isinstance(outcome, tuple)
        assert outcome[0] == good[0]
        assert outcome[1] in (None, good[1])
        assert same, f"blocks {one} and {other} of {size} bytes can be swapped unnoticed"
        counted["outside of authentication" if free[one] and free[other] else "the same bytes"] += 1
    return counted


@pytest.mark.parametrize("small", VOLUMES, ids=lambda small: small.name)
def test_blocks_swapped(small: Small, record_property: Callable[[str, object], None]) -> None:
    """Every two blocks of 512 bytes."""
    counted = _swap(small, 512)
    record_property("tampered volumes", counted.total())
    count = small.size // 512
    assert counted.total() == count * (count - 1) // 2
    assert counted["refused"] > counted["the same bytes"]


@pytest.mark.long
@pytest.mark.parametrize("small", VOLUMES, ids=lambda small: small.name)
def test_small_blocks_swapped(small: Small, record_property: Callable[[str, object], None]) -> None:
    """Every two blocks of 128 bytes."""
    counted = _swap(small, 128)
    record_property("tampered volumes", counted.total())
    count = small.size // 128
    assert counted.total() == count * (count - 1) // 2


def _open(device: WatchedDevice) -> Outcome:
    """The files after opening for writing: a journal that was put back is carried out."""
    try:
        return _files(Volume.open(device, KEY))
    except (FormatError, IntegrityError):
        return "refused"


def _put_back(small: Small, sets: int) -> Counter[str]:
    """Blocks from earlier media put into the last one: alone, in pairs, in random sets, all."""
    *older, content = _volume(small)
    whole = {_open(WatchedDevice(medium, 128)) for medium in older}
    judgements = Judgements(_open, 128)
    good = judgements.of(content)
    rng = random.Random(small.size)
    counted: Counter[str] = Counter()
    now = _blocks(content, 128)
    for medium in older:
        old = _blocks(medium, 128)
        different = [at for at, block in enumerate(now) if old[at] != block]
        chosen = [*itertools.combinations(different, 1), *itertools.combinations(different, 2)]
        chosen = chosen[:: max(1, len(chosen) // sets)]
        for _ in range(sets):
            share = rng.choice((0.1, 0.5, 0.9, 0.98))
            chosen.append(tuple(at for at in different if rng.random() < share))
        chosen.append(tuple(different))
        for places in chosen:
            mixed = list(now)
            for at in places:
                mixed[at] = old[at]
            outcome = judgements.of(b"".join(mixed))
            if outcome == "refused":
                counted["refused"] += 1
            elif outcome == good:
                counted["nothing of it shows"] += 1
            else:
                assert outcome in whole, "a mixture of two states"
                counted["an older state, wholly"] += 1
    return counted


@pytest.mark.parametrize("small", VOLUMES, ids=lambda small: small.name)
def test_old_blocks_put_back(small: Small, record_property: Callable[[str, object], None]) -> None:
    counted = _put_back(small, 40)
    record_property("tampered volumes", counted.total())
    assert counted["refused"] > 100
    assert counted["an older state, wholly"] >= 5


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("small", VOLUMES, ids=lambda small: small.name)
def test_old_blocks_put_back_at_length(small: Small, record_property: Callable[[str, object], None]) -> None:
    counted = _put_back(small, 3000)
    record_property("tampered volumes", counted.total())
    assert counted.total() > 15000
