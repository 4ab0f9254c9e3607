# SPDX-License-Identifier: MIT OR Apache-2.0
"""Errors of the device, power cuts of a creation, and the order of writes around a commit.

Power cuts of everything that writes are enumerated in `test_cuts`; here is what that does not see: what a volume does
whose device fails, what is discarded, and that a torn head is cleared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import pytest

from svsm.formats.errors import SvsmError
from svsm.storage.cocoonfs import Probe, Volume, probe
from svsm.storage.drivers.memory import MemoryDevice
from svsm.testing.powercut import CrashImage, PowerCutDisk, crash_images
from tests.cocoonfs_support import content, fixed_random

KEY = b"crash key"
Files = dict[int, tuple[int, bytes]]


def _files(volume: Volume) -> Files:
    return {info.inode: (info.flags, volume.read(info.inode)) for info in volume.list()}


def _base(block_size: int = 512) -> bytes:
    device = MemoryDevice(64 << 10, block_size_bytes=block_size)
    volume = Volume.create(device, KEY, salt=b"salt", random=fixed_random())
    with volume.transaction() as transaction:
        transaction.write(16, content("sixteen", 1500), 1)
        transaction.write(17, content("seventeen", 900), 2)
        transaction.write(18, content("eighteen", 60), 3)
    return bytes(device.data)


Changes = dict[int, bytes | None]
TRANSACTIONS: list[Changes] = [
    {16: content("new sixteen", 1800), 18: None, 19: content("nineteen", 100)},
    {16: content("newer sixteen", 1500), 17: content("new seventeen", 1000)},
]


def _carry_out(volume: Volume, transactions: Iterable[Changes]) -> None:
    for changes in transactions:
        with volume.transaction() as transaction:
            for inode, data in changes.items():
                if data is None:
                    transaction.unlink(inode)
                else:
                    transaction.write(inode, data)


class Recording:
    """Transactions on a disk of this block size, and the states between them."""

    def __init__(
        self,
        block_size: int,
        transactions: Iterable[Changes] = TRANSACTIONS,
        base: bytes | None = None,
        *,
        trim: bool = False,
    ) -> None:
        self.initial = _base(block_size) if base is None else base
        disk = PowerCutDisk(self.initial, block_size=block_size)
        volume = Volume.open(disk, KEY, random=fixed_random(), trim=trim)
        self.states = [_files(volume)]
        for number, changes in enumerate(transactions):
            disk.mark(f"started {number}")
            _carry_out(volume, [changes])
            disk.mark(f"acknowledged {number}")
            self.states.append(_files(volume))
        self.disk = disk

    @property
    def barriers(self) -> int:
        return self.disk.flushes

    def images(self, *, samples: int, without: Collection[int] = ()) -> Iterable[CrashImage]:
        return crash_images(self.initial, self.disk.events, samples=samples, without_barriers=without)

    def fault(self, image: CrashImage, block_size: int) -> str | None:
        """What is wrong with a crash image; None where nothing is."""
        started = sum(label.startswith("started") for label in image.marks)
        acknowledged = sum(label.startswith("acknowledged") for label in image.marks)
        device = MemoryDevice(image.content, block_size_bytes=block_size)
        try:
            found = _files(Volume.open(device, KEY))
        except SvsmError as error:
            return f"{image.how}: {error.code} {error}"
        if found not in self.states[acknowledged : started + 1]:
            return f"{image.how}: neither old nor new"
        again = MemoryDevice(device.data, block_size_bytes=block_size)
        if _files(Volume.open(again, KEY)) != found or bytes(again.data) != bytes(device.data):
            return f"{image.how}: not settled by the first open"
        return None


def test_replay_discards_what_is_free_only() -> None:
    """A journal with trims, carried out at open: the discarded blocks are free, and a power cut at any time is well."""
    disk = PowerCutDisk(_base())
    volume = Volume.open(disk, KEY, random=fixed_random(), trim=True)
    old_used = volume.image.used
    transaction = volume.transaction()
    for inode, data in TRANSACTIONS[0].items():
        transaction.unlink(inode) if data is None else transaction.write(inode, data)
    transaction.prepare()
    pending = disk.content
    disk = PowerCutDisk(pending)
    volume = Volume.open(disk, KEY)
    new = _files(volume)
    discarded = [event for event in disk.events[disk.events.index(None) + 3 :] if isinstance(event, tuple)]
    assert discarded
    for offset, data in discarded:
        assert not any(data)
        assert not volume.image.used.any_used(offset // 128, (offset + len(data)) // 128)
    assert any(old_used.any_used(offset // 128, (offset + len(data)) // 128) for offset, data in discarded)
    for image in crash_images(pending, disk.events, samples=6):
        assert _files(Volume.open(MemoryDevice(image.content), KEY)) == new


def test_torn_head_is_cleared_first() -> None:
    """A head that an earlier crash tore is zeroed, durably, before the next journal is laid."""
    recording = Recording(128, TRANSACTIONS[:1])
    head_offset = 1024
    torn = bytearray(recording.initial)
    torn[head_offset : head_offset + 64] = b"CCFSJRNL" + content("torn", 56)
    again = Recording(128, TRANSACTIONS[:1], bytes(torn))
    assert again.barriers == recording.barriers + 1
    assert again.disk.events[1] == (head_offset, bytes(128))
    for image in again.images(samples=4):
        assert again.fault(image, 128) is None


def test_crash_while_creating() -> None:
    """A creation that was cut off leaves no magic, on a blank disk and over an older volume alike."""
    for initial in (bytes(64 << 10), _base()):
        disk = PowerCutDisk(initial)
        Volume.create(disk, KEY, salt=b"salt", random=fixed_random())
        old = _files(Volume.open(MemoryDevice(initial), KEY)) if any(initial) else None
        outcomes = set()
        for image in crash_images(initial, disk.events, samples=6):
            device = MemoryDevice(image.content)
            if probe(device) is Probe.BLANK:
                outcomes.add("blank")
                continue
            assert _files(Volume.open(device, KEY)) in ({}, old)
            outcomes.add("volume")
        assert outcomes == {"blank", "volume"}


def test_barriers_of_creation_are_needed() -> None:
    initial = _base()
    disk = PowerCutDisk(initial, block_size=128)
    Volume.create(disk, KEY, salt=b"salt", random=fixed_random())
    assert disk.flushes == 3
    old = _files(Volume.open(MemoryDevice(initial, block_size_bytes=128), KEY))

    def good(image: CrashImage) -> bool:
        device = MemoryDevice(image.content, block_size_bytes=128)
        if probe(device) is Probe.BLANK:
            return True
        try:
            return _files(Volume.open(device, KEY)) in ({}, old)
        except SvsmError:
            return False

    assert all(good(image) for image in crash_images(initial, disk.events, samples=6))
    for barrier in (0, 1):
        assert not all(
            good(image) for image in crash_images(initial, disk.events, samples=6, without_barriers=[barrier])
        )
    # The third makes the creation durable before it is reported; only a mark behind it can show that.
    disk.mark("created")
    behind = [image for image in crash_images(initial, disk.events) if "created" in image.marks]
    assert all(probe(MemoryDevice(image.content)) is Probe.COCOONFS for image in behind)
    behind = [image for image in crash_images(initial, disk.events, without_barriers=[2]) if "created" in image.marks]
    assert not all(probe(MemoryDevice(image.content)) is Probe.COCOONFS for image in behind)


@pytest.mark.parametrize("kind", ["read", "write", "flush"])
def test_errors_of_the_device(kind: str) -> None:
    """An error at any operation of a commit: the old state and a usable volume before the journal's head, a failed
    volume from there on, and old or new after opening again in any case."""
    calm = Recording(512, TRANSACTIONS[:1])
    old, new = calm.states
    total = {"read": calm.disk.reads, "write": calm.disk.writes, "flush": calm.disk.flushes}[kind]
    outcomes = set()
    for number in range(total):
        disk = PowerCutDisk(calm.initial)
        volume = Volume.open(disk, KEY, random=fixed_random())
        reads = disk.reads
        orders = {"read": "fail_reads", "write": "fail_writes", "flush": "fail_flushes"}
        setattr(disk, orders[kind], [number + (reads if kind == "read" else 0)])
        code = None
        try:
            _carry_out(volume, TRANSACTIONS[:1])
        except SvsmError as error:
            code = error.code
        assert code in ("block-io", None)
        assert code or kind == "read"
        setattr(disk, orders[kind], [])
        if volume.failed:
            with pytest.raises(SvsmError) as caught:
                volume.list()
            assert caught.value.code == "cocoonfs-failed"
            with pytest.raises(SvsmError) as caught:
                volume.transaction()
            assert caught.value.code == "cocoonfs-failed"
        else:
            assert _files(volume) in (old, new)
        outcomes.add(volume.failed)
        assert _files(Volume.open(MemoryDevice(disk.content), KEY)) in (old, new)
    assert outcomes == {"read": {False}, "write": {False, True}, "flush": {True}}[kind]


def test_power_cut_at_each_write() -> None:
    calm = Recording(512)
    for number in range(calm.disk.writes):
        disk = PowerCutDisk(calm.initial, cut_at_write=number)
        volume = Volume.open(disk, KEY, random=fixed_random())
        with pytest.raises(SvsmError):
            _carry_out(volume, TRANSACTIONS)
        assert disk.dead
        assert _files(Volume.open(MemoryDevice(disk.content), KEY)) in calm.states
