# SPDX-License-Identifier: MIT OR Apache-2.0
"""Auxiliary metadata: the records, their storage, changes with and without the key, power cuts, and tampering."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.formats.errors import FormatError, IntegrityError, StateError, SvsmError
from svsm.storage.cocoonfs import AuxMetadata, Decision, FoundJournal, Volume, integrity
from svsm.storage.cocoonfs.aux import MAX_AUX_BYTES, NO_METADATA
from svsm.storage.cocoonfs.auxarea import NO_AUX, group_lengths
from svsm.storage.cocoonfs.layout import DEFAULT_LAYOUT, ImageLayout
from svsm.storage.cocoonfs.offline import read_aux, write_aux
from svsm.storage.drivers.memory import MemoryDevice
from svsm.testing.powercut import PowerCutDisk, crash_images
from tests.cocoonfs_support import content
from tests.unit.storage.cocoonfs.fsck import check, image_of

KEY = b"aux key"
A, B, C, D = (uuid.UUID(int=n << 96 | 7) for n in (1, 2, 3, 4))
FILE = hashlib.shake_128(b"a file").digest(3000)


def _code(call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(SvsmError) as caught:
        call(*arguments)
    return caught.value.code


def _volume(
    aux: AuxMetadata, *, size: int = 64 << 10, block_size: int = 512, layout: ImageLayout = DEFAULT_LAYOUT
) -> tuple[MemoryDevice, Volume]:
    device = MemoryDevice(size, block_size_bytes=block_size)
    volume = Volume.create(device, KEY, salt=b"salt", aux=aux, layout=layout)
    with volume.transaction() as transaction:
        transaction.write(16, FILE)
    return device, volume


def _set(volume: Volume, aux: AuxMetadata) -> None:
    with volume.transaction() as transaction:
        transaction.set_aux(aux)


# -- records ---------------------------------------------------------------------------------------------------


def test_records() -> None:
    aux = NO_METADATA.add(C, b"c").add(A, b"a0").add(B, b"").add(A, b"a1")
    assert [(entry.kind, entry.data) for entry in aux.entries] == [(A, b"a0"), (A, b"a1"), (B, b""), (C, b"c")]
    assert aux.of(A) == (b"a0", b"a1")
    assert aux.read(A, 1) == b"a1"
    changed = aux.replace(A, b"new", 1).remove(C).with_reserve(5)
    assert changed.of(A) == (b"a0", b"new")
    assert changed.of(C) == ()
    assert AuxMetadata.parse(changed.pack() + bytes(100)) == changed
    assert _code(aux.read, A, 2) == _code(aux.remove, D) == _code(aux.replace, D, b"") == "cocoonfs-no-such-aux"
    assert _code(aux.add, uuid.UUID(int=0), b"") == "cocoonfs-aux-kind"
    assert _code(aux.add, D, bytes(MAX_AUX_BYTES)) == _code(aux.with_reserve, -1) == "cocoonfs-aux-full"
    assert AuxMetadata.parse(b"") == AuxMetadata.parse(bytes(20)) == NO_METADATA
    assert "a0" not in repr(aux)


def test_records_out_of_order_are_read() -> None:
    """What version 0.1.2 of the reference program writes, and refuses, when it adds a record in front of two."""
    parts = [kind.bytes + (1).to_bytes(4, "little") + b"x" for kind in (B, A, C)]
    assert AuxMetadata.parse(b"".join(parts) + bytes(20)) == NO_METADATA.add(A, b"x").add(B, b"x").add(C, b"x")


@given(st.binary(max_size=80))
def test_hostile_records(payload: bytes) -> None:
    whole = NO_METADATA.add(A, b"some").with_reserve(9).pack()
    for data in (payload, whole + payload, whole[: len(payload)] + payload):
        try:
            found = AuxMetadata.parse(data)
        except FormatError:
            continue
        assert AuxMetadata.parse(found.pack()) == found


def test_default_reserve_is_two_groups_of_twelve_blocks() -> None:
    _, volume = _volume(AuxMetadata(reserve_bytes=1024))
    assert [length for _, length in image_of(volume).aux.extents] == [12, 12]
    assert group_lengths(DEFAULT_LAYOUT, 20_000) == [64, 64, 32]


# -- with the key ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reserve", [None, 0, 1024, 9000])
def test_online(reserve: int | None) -> None:
    start = AuxMetadata(reserve_bytes=reserve)
    device, volume = _volume(start, size=256 << 10)
    assert volume.aux == (start if reserve else NO_METADATA)
    wanted = start.add(B, content("b", 300)).add(A, content("a", 9000))
    _set(volume, wanted)
    for opened in (volume, Volume.open(device, KEY)):
        assert opened.aux == wanted
        assert opened.read(16) == FILE
        check(opened)
    assert read_aux(device) == wanted
    with volume.transaction() as transaction:
        transaction.set_aux(transaction.aux.remove(A))
        assert transaction.aux == wanted.remove(A)
        transaction.write(17, b"together")
    assert (Volume.open(device, KEY).aux, Volume.open(device, KEY).read(17)) == (wanted.remove(A), b"together")
    free = volume.free_bytes
    _set(volume, NO_METADATA)
    assert volume.free_bytes > free
    assert image_of(volume).header.aux_pointers == NO_AUX
    check(Volume.open(device, KEY))


def _always(answer: Decision) -> Callable[[FoundJournal], Decision]:
    return lambda found: answer


def test_a_refused_commit_leaves_it() -> None:
    device, volume = _volume(AuxMetadata(reserve_bytes=64))
    transaction = volume.transaction()
    transaction.set_aux(transaction.aux.add(A, b"x"))
    transaction.prepare()
    pending = bytes(device.data)
    for answer, expected in ((Decision.YES, (b"x",)), (Decision.NO, ())):
        disk = MemoryDevice(pending)
        opened = Volume.open(disk, KEY, decide=_always(answer))
        assert opened.aux.of(A) == read_aux(disk).of(A) == expected
        check(opened)


def test_full() -> None:
    device, volume = _volume(AuxMetadata(reserve_bytes=0))
    before = bytes(device.data)
    assert _code(_set, volume, NO_METADATA.add(A, bytes(60_000))) == "cocoonfs-full"
    assert bytes(device.data) == before


# -- without the key -------------------------------------------------------------------------------------------


def test_offline() -> None:
    device, _ = _volume(AuxMetadata(reserve_bytes=1024))
    root = Volume.open(device, KEY).root_digest
    wanted = AuxMetadata(reserve_bytes=1024).add(A, content("a", 500))
    write_aux(device, wanted)
    assert read_aux(device) == wanted
    assert _code(write_aux, device, wanted.add(B, bytes(1000))) == "cocoonfs-aux-full"
    opened = Volume.open(device, KEY)
    assert (opened.aux, opened.root_digest, opened.read(16)) == (wanted, root, FILE)
    check(opened)
    # The next commit lays the storage out anew, with the whole reserve.
    with opened.transaction() as transaction:
        transaction.write(17, b"")
    assert sum(length for _, length in image_of(opened).aux.extents) > 24
    assert Volume.open(device, KEY).aux == wanted
    write_aux(device, wanted.add(B, bytes(1000)))
    check(Volume.open(device, KEY))


def test_offline_without_a_second_group() -> None:
    device, _ = _volume(NO_METADATA.add(A, b"x"))
    assert read_aux(device).of(A) == (b"x",)
    assert _code(write_aux, device, NO_METADATA) == "cocoonfs-aux-full"
    device, _ = _volume(NO_METADATA)
    assert _code(write_aux, device, NO_METADATA.add(A, b"x")) == "cocoonfs-aux-full"


def _crash_offline(changes: Iterable[AuxMetadata], start: AuxMetadata, block_size: int, samples: int) -> int:
    device, _ = _volume(start, block_size=block_size)
    root = Volume.open(device, KEY).root_digest
    initial = bytes(device.data)
    disk = PowerCutDisk(initial, block_size=block_size)
    states = [start]
    for number, aux in enumerate(changes):
        disk.mark(f"started {number}")
        write_aux(disk, aux)
        disk.mark(f"acknowledged {number}")
        states.append(aux)
    count = 0
    for image in crash_images(initial, disk.events, samples=samples):
        started = sum(label.startswith("started") for label in image.marks)
        acknowledged = sum(label.startswith("acknowledged") for label in image.marks)
        found = MemoryDevice(image.content, block_size_bytes=block_size)
        assert read_aux(found) in states[acknowledged : started + 1], image.how
        opened = Volume.open(found, KEY)
        aux = opened.aux
        assert aux in states[acknowledged : started + 1], image.how
        assert opened.read(16) == FILE
        assert opened.root_digest == root
        # The open has mended it; another change goes on from there.
        assert image_of(opened).aux.is_settled()
        write_aux(found, aux.remove(aux.entries[0].kind) if aux.entries else aux.add(D, b"d"))
        assert Volume.open(found, KEY).read(16) == FILE
        count += 1
    return count


def test_crash_offline(record_property: Callable[[str, object], None]) -> None:
    start = AuxMetadata(reserve_bytes=1024)
    one = start.add(A, content("a", 400))
    count = _crash_offline([one, one.add(B, content("b", 300))], start, 512, 1)
    record_property("crash cases", count)
    assert count > 40


@pytest.mark.long
@pytest.mark.parametrize("block_size", [128, 512])
@pytest.mark.parametrize("reserve", [1024, 12_000])
def test_crash_offline_at_length(block_size: int, reserve: int, record_property: Callable[[str, object], None]) -> None:
    start = AuxMetadata(reserve_bytes=reserve).add(A, content("a", 200))
    one = start.add(B, content("b", reserve // 3))
    changes = [one, one.remove(A), one.replace(B, content("c", reserve // 2)), start]
    count = _crash_offline(changes, start, block_size, 100)
    record_property("crash cases", count)
    assert count > (200 if reserve == 1024 else 900)


def _crash_online(block_size: int, samples: int) -> int:
    start = AuxMetadata(reserve_bytes=512).add(A, content("a", 200))
    device, _ = _volume(start, block_size=block_size)
    initial = bytes(device.data)
    disk = PowerCutDisk(initial, block_size=block_size)
    volume = Volume.open(disk, KEY)
    states = [start, start.add(B, content("b", 1500)), start.add(B, b"b").remove(A)]
    for number, aux in enumerate(states[1:]):
        disk.mark(f"started {number}")
        _set(volume, aux)
        disk.mark(f"acknowledged {number}")
    count = 0
    for image in crash_images(initial, disk.events, samples=samples):
        started = sum(label.startswith("started") for label in image.marks)
        acknowledged = sum(label.startswith("acknowledged") for label in image.marks)
        found = MemoryDevice(image.content, block_size_bytes=block_size)
        opened = Volume.open(found, KEY)
        assert opened.aux in states[acknowledged : started + 1], image.how
        assert opened.read(16) == FILE
        count += 1
    return count


def test_crash_online(record_property: Callable[[str, object], None]) -> None:
    count = _crash_online(512, 1)
    record_property("crash cases", count)
    assert count > 40


@pytest.mark.long
def test_crash_online_at_length(record_property: Callable[[str, object], None]) -> None:
    count = _crash_online(128, 150) + _crash_online(512, 150)
    record_property("crash cases", count)
    assert count > 1000


# -- hostile ---------------------------------------------------------------------------------------------------


def test_tampered_storage_costs_nothing_but_itself() -> None:
    """Each byte of the storage and of the pointers to it changed: the files are unharmed, or the volume is refused."""
    device, volume = _volume(AuxMetadata(reserve_bytes=200).add(A, b"a record"))
    image = image_of(volume)
    places = [image.volume.places.header_begin_ab * 128 + at for at in range(16)]
    places += [begin * 128 + at for begin, length in image.aux.extents for at in range(0, length * 128, 19)]
    outcomes = set()
    content = bytes(device.data)
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 + place % 255
        disk = MemoryDevice(changed)
        try:
            opened = Volume.open(disk, KEY)
        except (FormatError, IntegrityError) as error:
            outcomes.add(error.code)
            assert bytes(disk.data) == bytes(changed)
            continue
        assert opened.read(16) == FILE
        with opened.transaction() as transaction:
            transaction.write(17, b"more")
        again = Volume.open(disk, KEY)
        assert (again.read(16), again.read(17)) == (FILE, b"more")
        outcomes.add("unharmed")
    assert "unharmed" in outcomes
    assert len(outcomes) > 1


def test_pointers_to_a_file_are_refused() -> None:
    """A list that claims somebody's blocks: freeing them would hand them out while the file still points there."""
    device, volume = _volume(AuxMetadata(reserve_bytes=200), size=128 << 10)
    image = image_of(volume)
    entry = image.find(16)
    assert entry is not None
    begin = next(
        at for at in range(0, image.image_ab, 4) if image.used.all_used((at, 4)) and image.counted.all_counted((at, 4))
    )
    pointer = (begin << 7 | 3 << 1).to_bytes(8, "little")
    section = bytearray(device.data)
    plain = (pointer * 2 + b"\1" + bytes(25)).ljust(512, b"\0")
    section[begin * 128 : begin * 128 + 512] = integrity.protect(plain, section=17, head_skip=0, io_block_bytes=512)
    at = image.volume.places.header_begin_ab * 128
    section[at : at + 16] = pointer + b"\xff" * 8
    with pytest.raises(IntegrityError):
        Volume.open(MemoryDevice(section), KEY)


def test_damage_of_both_copies() -> None:
    """The records are lost and say so; the files are there, and new records can be written with the key."""
    device, volume = _volume(AuxMetadata(reserve_bytes=200).add(A, b"a record"))
    for begin, length in image_of(volume).aux.extents:
        device.data[(begin + length) * 128 - 200] ^= 1
    opened = Volume.open(device, KEY)
    assert opened.read(16) == FILE
    assert _code(lambda: opened.aux) == _code(read_aux, device) == "cocoonfs-aux"
    _set(opened, NO_METADATA.add(B, b"new"))
    assert Volume.open(device, KEY).aux.of(B) == (b"new",)


def test_state_errors_leave_the_transaction() -> None:
    _, volume = _volume(NO_METADATA)
    transaction = volume.transaction()
    transaction.abandon()
    with pytest.raises(StateError) as caught:
        transaction.set_aux(NO_METADATA)
    assert caught.value.code == "cocoonfs-transaction-ended"
