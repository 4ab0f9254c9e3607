# SPDX-License-Identifier: MIT OR Apache-2.0
"""Volumes that are announced without the key and made at first open: both copies, power cuts, downgrades."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svsm.formats.errors import FormatError, SvsmError
from svsm.storage.cocoonfs import (
    DEFAULT_LAYOUT,
    AuxMetadata,
    CreationInfo,
    Expected,
    Probe,
    Volume,
    probe,
    provision,
    read_creation_info,
)
from svsm.storage.cocoonfs.creation import CreationHeader, backup_offset
from svsm.storage.cocoonfs.headers import find_header
from svsm.storage.cocoonfs.offline import read_aux, write_aux
from svsm.storage.cocoonfs.presets import CIPHERS, HASH_FAMILIES, STRENGTHS, layout_of
from svsm.storage.drivers.memory import MemoryDevice
from svsm.testing.powercut import PowerCutDisk, crash_images
from tests.unit.storage.cocoonfs.fsck import check

KEY = b"provisioning key"
A = uuid.UUID(int=5 << 64)
AUX = AuxMetadata(reserve_bytes=64).add(A, b"where the broker is")
SIZE = 64 << 10


def _code(call: Callable[..., object], *arguments: object, **named: object) -> str:
    with pytest.raises(SvsmError) as caught:
        call(*arguments, **named)
    return caught.value.code


def _announced(
    size: int = SIZE, *, salt: bytes = b"salt", block_size: int = 512, aux: AuxMetadata = AUX
) -> MemoryDevice:
    device = MemoryDevice(size, block_size_bytes=block_size)
    provision(device, salt=salt, aux=aux)
    return device


def test_announce_and_use() -> None:
    device = _announced()
    info = read_creation_info(device)
    assert (info.layout, info.salt, info.size_bytes, info.aux) == (DEFAULT_LAYOUT, b"salt", SIZE, AUX)
    assert not info.is_backup
    assert probe(device) is Probe.CREATION_INFO
    before = bytes(device.data)
    assert _code(Volume.open, device, KEY) == "cocoonfs-creation-info"
    assert bytes(device.data) == before
    volume = Volume.open(device, KEY, first_use=True)
    assert (volume.list(), volume.aux, volume.salt, volume.size_bytes) == ([], AUX, b"salt", SIZE)
    check(volume)
    with volume.transaction() as transaction:
        transaction.write(16, b"x")
    assert Volume.open(device, KEY, first_use=True).read(16) == b"x"
    assert _code(read_creation_info, device) == "cocoonfs-no-creation-info"
    place = backup_offset(SIZE)
    assert place is not None
    assert device.data[place : place + 8] != b"CCFSMKFS"


@pytest.mark.parametrize("salt", [b"", bytes(72), bytes(range(255)), b"\0" * 255])
@pytest.mark.parametrize("block_size", [128, 512])
def test_salts(salt: bytes, block_size: int) -> None:
    device = _announced(salt=salt, block_size=block_size)
    assert read_creation_info(device).salt == salt
    assert Volume.open(device, KEY, first_use=True).salt == salt
    header = CreationHeader(DEFAULT_LAYOUT, salt, 512, 0)
    assert CreationHeader.measure(header.pack()[:128]).parse_contents(header.pack()) == header


def test_refusals() -> None:
    device = MemoryDevice(SIZE)
    weak = layout_of("sha1")
    assert _code(provision, device, salt=bytes(256)) == "cocoonfs-salt"
    assert _code(provision, device, salt=b"", layout=weak) == "cocoonfs-weak"
    assert _code(provision, device, salt=b"", size_bytes=2 * SIZE) == "cocoonfs-too-small"
    assert _code(provision, MemoryDevice(4096), salt=b"") == "cocoonfs-too-small"
    assert _code(provision, device, salt=b"", aux=AUX.with_reserve(30_000)) == "cocoonfs-too-small"
    assert not any(device.data)
    provision(device, salt=b"", layout=weak, allow_weak=True)
    before = bytes(device.data)
    assert _code(Volume.open, device, KEY, first_use=True) == "cocoonfs-weak"
    assert bytes(device.data) == before
    made = Volume.open(device, KEY, first_use=True, allow_weak=True)
    check(made)
    assert _code(Volume.open, device, KEY) == "cocoonfs-weak"
    assert Volume.open(device, KEY, allow_weak=True).list() == []
    assert _code(Volume.create, device, KEY, salt=b"", layout=weak) == "cocoonfs-weak"


@pytest.mark.parametrize(
    "expected",
    [
        Expected(layout=layout_of("sha2", "aes", 256)),
        Expected(salt=b"other"),
        Expected(min_size_bytes=SIZE + 1),
        Expected(max_size_bytes=SIZE - 1),
        Expected(aux=AUX.remove(A)),
    ],
)
def test_not_what_is_expected(expected: Expected) -> None:
    """An announcement, or a volume, that somebody talked down: refused before anything is written."""
    device = _announced()
    before = bytes(device.data)
    assert _code(Volume.open, device, KEY, first_use=True, expected=expected) == "cocoonfs-unexpected"
    assert bytes(device.data) == before
    good = Expected(DEFAULT_LAYOUT, b"salt", SIZE, SIZE, AUX)
    Volume.open(device, KEY, first_use=True, expected=good)
    before = bytes(device.data)
    if expected.aux is None:
        assert _code(Volume.open, device, KEY, expected=expected) == "cocoonfs-unexpected"
    assert bytes(device.data) == before
    Volume.open(device, KEY, expected=good)


def test_either_copy_damaged() -> None:
    whole = _announced()
    disk = PowerCutDisk(bytes(whole.data))
    Volume.open(disk, KEY, first_use=True)
    both = next(
        image.content
        for image in crash_images(bytes(whole.data), disk.events, samples=0)
        if find_magic(image.content) == (True, True)
    )
    place = backup_offset(SIZE)
    assert place is not None
    for at in (0, place):
        for damage in range(0, 512, 64):
            content = bytearray(both)
            content[at + damage] ^= 0x55
            info = find_header(MemoryDevice(content))
            assert isinstance(info, CreationInfo)
            assert info.is_backup == (at == 0)
            assert info.aux == AUX
    content = bytearray(both)
    content[100] ^= 1
    content[place + 100] ^= 1
    assert _code(find_header, MemoryDevice(content)) == "cocoonfs-creation-damaged"


def find_magic(content: bytes) -> tuple[bool, bool]:
    """Whether each place has an intact header."""
    found = find_header(MemoryDevice(content))
    place = backup_offset(len(content)) or 0
    first = isinstance(found, CreationInfo) and not found.is_backup
    return first, content[place : place + 8] == b"CCFSMKFS" and any(content[place + 384 : place + 512])


def _announcement_or_blank(device: MemoryDevice) -> str:
    try:
        info = find_header(device)
    except FormatError:
        return "nothing"
    if not isinstance(info, CreationInfo):
        return "old volume"
    return "old" if info.salt == b"older" else "new"


@pytest.mark.parametrize("block_size", [128, 512])
def test_crash_while_announcing(block_size: int) -> None:
    """Over a blank disk, over another announcement (interrupted, so with a backup), over a volume."""
    older = _announced(salt=b"older", block_size=block_size)
    disk = PowerCutDisk(bytes(older.data), block_size=block_size, cut_at_write=6)
    with pytest.raises(SvsmError):
        Volume.open(disk, KEY, first_use=True)
    volume = MemoryDevice(SIZE, block_size_bytes=block_size)
    Volume.create(volume, KEY, salt=b"")
    seen = set()
    for initial in (bytes(SIZE), disk.content, bytes(volume.data)):
        recorded = PowerCutDisk(initial, block_size=block_size)
        provision(recorded, salt=b"new", aux=AUX)
        recorded.mark("done")
        for image in crash_images(initial, recorded.events, samples=10):
            state = _announcement_or_blank(MemoryDevice(image.content, block_size_bytes=block_size))
            assert state == "new" or not image.marks
            seen.add(state)
    assert seen == {"nothing", "old", "old volume", "new"}


def _crash_first_use(initial: bytes, block_size: int, samples: int, salt: bytes) -> int:
    disk = PowerCutDisk(initial, block_size=block_size)
    Volume.open(disk, KEY, first_use=True)
    disk.mark("made")
    count = 0
    states = set()
    for image in crash_images(initial, disk.events, samples=samples):
        device = MemoryDevice(image.content, block_size_bytes=block_size)
        state = probe(device)
        assert state is not Probe.BLANK
        found = find_header(device)
        states.add((type(found).__name__, isinstance(found, CreationInfo) and found.is_backup))
        if image.marks:
            assert not isinstance(found, CreationInfo)
        opened = Volume.open(device, KEY, first_use=True, expected=Expected(salt=salt))
        assert (opened.list(), opened.aux, opened.salt) == ([], AUX, salt)
        assert Volume.open(device, KEY).root_digest == opened.root_digest
        count += 1
    assert states >= {("CreationInfo", True), ("StaticHeader", False)}
    return count


@pytest.mark.parametrize(("block_size", "salt"), [(512, b"salt"), (512, bytes(range(1, 256)))])
def test_crash_at_first_use(block_size: int, salt: bytes, record_property: Callable[[str, object], None]) -> None:
    """At every moment of a first format the disk is still announced, or holds the finished volume."""
    device = _announced(16 << 10, salt=salt, block_size=block_size)
    count = _crash_first_use(bytes(device.data), block_size, 0, salt)
    record_property("crash cases", count)
    assert count > 15


@pytest.mark.long
@pytest.mark.parametrize("salt", [b"", bytes(range(255))])
@pytest.mark.parametrize("block_size", [128, 512])
def test_crash_at_first_use_at_length(
    block_size: int, salt: bytes, record_property: Callable[[str, object], None]
) -> None:
    device = _announced(24 << 10, salt=salt, block_size=block_size)
    initial = bytes(device.data)
    count = _crash_first_use(initial, block_size, 40, salt)
    # And a creation that begins from the backup alone.
    disk = PowerCutDisk(initial, block_size=block_size, cut_at_write=5 if block_size == 128 else 4)
    with pytest.raises(SvsmError):
        Volume.open(disk, KEY, first_use=True)
    count += _crash_first_use(disk.content, block_size, 40, salt)
    record_property("crash cases", count)
    assert count > 200


@pytest.mark.parametrize("block_size", [128, 512])
def test_crash_while_changing_its_records(block_size: int) -> None:
    device = _announced(block_size=block_size)
    initial = bytes(device.data)
    disk = PowerCutDisk(initial, block_size=block_size)
    changed = AUX.add(A, bytes(3000))
    write_aux(disk, changed)
    disk.mark("done")
    seen = set()
    for image in crash_images(initial, disk.events, samples=20):
        found = read_aux(MemoryDevice(image.content, block_size_bytes=block_size))
        assert found == changed or (found == AUX and not image.marks)
        seen.add(found)
    assert len(seen) == 2
    assert Volume.open(disk, KEY, first_use=True).aux == changed


@pytest.mark.parametrize("salt", [bytes(73), bytes(200), bytes(range(1, 256))])
def test_torn_creation_with_a_long_salt_is_blank(salt: bytes) -> None:
    """Whatever arrived of the last write, the disk is blank or holds the volume."""
    initial = bytes(16 << 10)
    disk = PowerCutDisk(initial)
    Volume.create(disk, KEY, salt=salt)
    outcomes = set()
    for image in crash_images(initial, disk.events, samples=30):
        device = MemoryDevice(image.content)
        if probe(device) is Probe.COCOONFS:
            assert Volume.open(device, KEY).salt == salt
        outcomes.add(probe(device))
    assert outcomes == {Probe.BLANK, Probe.COCOONFS}


def test_creation_over_an_announcement() -> None:
    """An explicit creation ends the announcement, and no backup of it comes to life."""
    announced = _announced(16 << 10)
    disk = PowerCutDisk(bytes(announced.data), cut_at_write=6)
    with pytest.raises(SvsmError):
        Volume.open(disk, KEY, first_use=True)
    initial = disk.content
    assert probe(MemoryDevice(initial)) is Probe.CREATION_INFO
    again = PowerCutDisk(initial)
    Volume.create(again, KEY, salt=b"explicit")
    for image in crash_images(initial, again.events, samples=6):
        device = MemoryDevice(image.content)
        if probe(device) is Probe.COCOONFS:
            assert Volume.open(device, KEY).salt == b"explicit"
        elif _announcement_or_blank(device) != "nothing":
            assert Volume.open(device, KEY, first_use=True).salt == b"salt"


@settings(deadline=None, max_examples=60)
@given(st.binary(min_size=128, max_size=700), st.integers(0, 2))
def test_hostile_announcements(data: bytes, where: int) -> None:
    content = bytearray(16 << 10)
    place = backup_offset(len(content)) or 0
    good = bytes(_announced(16 << 10).data[:2048])
    for at in ((0,), (place,), (0, place))[where]:
        content[at : at + 512] = good[:512]
        content[at + data[0] : at + data[0] + 16] = data[1:17]
    device = MemoryDevice(content[: 16 << 10])
    for call in (find_header, read_aux, lambda d: Volume.open(d, KEY, first_use=True)):
        try:
            call(device)
        except SvsmError:
            continue


def test_presets_are_the_reference_programs() -> None:
    assert layout_of() == DEFAULT_LAYOUT
    assert layout_of(strength=256).pack().hex() == "00020102020000" + "000d" * 2 + "000b" * 3 + "00060100"
    assert layout_of(io_block_bytes=4096).pack()[:7].hex() == "00050005050000"
    assert layout_of(allocation_block_bytes=4096).pack()[:7].hex() == "05000000000000"
    made = 0
    for family in HASH_FAMILIES:
        for cipher in CIPHERS:
            for strength in STRENGTHS:
                try:
                    layout_of(family, cipher, strength)
                    made += 1
                except FormatError as error:
                    assert error.code in ("cocoonfs-strength", "cocoonfs-unsupported-cipher")  # noqa: PT017
    assert made >= 20
    for wrong in (
        {"io_block_bytes": 16384},
        {"io_block_bytes": 64},
        {"data_block_bytes": 600},
        {"leaf_node_bytes": 64},
    ):
        assert _code(layout_of, **wrong) == "cocoonfs-layout"
    assert _code(layout_of, io_block_bytes=1 << 26, allocation_block_bytes=1 << 26, tree_node_bytes=1 << 27) == (
        "cocoonfs-unsupported-layout"
    )
