# SPDX-License-Identifier: MIT OR Apache-2.0
"""The virtio disk driver on QEMU's device (microvm, virtio-mmio), register by register over qtest."""

from __future__ import annotations

import dataclasses
import os
import random
from pathlib import Path

import pytest

from svsm.abi.block import BlockDevice
from svsm.formats.errors import BackendError, ProtocolError
from svsm.formats.virtio import Feature
from svsm.host.qemu import DiskOptions, Machine, MachineKind, MachineOptions
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.virtio.blk import BlkPolicy, VirtioBlk, memory_bytes
from svsm.storage.drivers.virtio.mmio import MmioTransport
from svsm.storage.drivers.virtio.packed import PackedQueue
from svsm.testing.block_conformance import CHECKS, SIZE_BYTES, Check, Subject, initial_content
from tests.support import peer

pytestmark = pytest.mark.interop

_SHARED_GPA = 16 << 20
_POLICY = BlkPolicy(queue_size=64, large_bytes=65536, large_slots=2, deadline_seconds=10.0)
_RINGS = [
    pytest.param(packed, indirect, event_idx, id=f"{'packed' if packed else 'split'}-{indirect=}-{event_idx=}")
    for packed in (False, True)
    for indirect in (False, True)
    for event_idx in (False, True)
]


class Disk:
    """A QEMU with a disk, and our driver on it; the machine ends with the device."""

    def __init__(self, path: Path, policy: BlkPolicy, *, timeout_seconds: float = 10.0, **disk: bool | int) -> None:
        options = dataclasses.replace(DiskOptions(path), packed=policy.packed, **disk)  # type: ignore[arg-type]
        self.machine = Machine(
            MachineOptions(
                MachineKind.MICROVM, disk=options, program=peer("qemu-system-x86_64"), timeout_seconds=timeout_seconds
            )
        )
        try:
            self.driver = self.connect(policy)
        except BaseException:
            self.machine.close()
            raise
        close = self.driver.close

        def close_both() -> None:
            close()
            self.machine.close()

        self.driver.close = close_both  # type: ignore[method-assign]

    def connect(self, policy: BlkPolicy) -> VirtioBlk:
        """The driver, over memory that is somewhere in the machine's."""
        size = memory_bytes(policy)
        memory = memoryview(self.machine.memory)[_SHARED_GPA : _SHARED_GPA + size]
        transport = MmioTransport(self.machine.virtio_registers())
        return VirtioBlk(transport, DmaMemory(memory, address=_SHARED_GPA), policy=policy)


def _subject(path: Path, policy: BlkPolicy) -> Subject:
    def create(*, read_only: bool = False) -> BlockDevice:
        path.write_bytes(initial_content())
        return Disk(path, policy, read_only=read_only).driver

    return Subject(
        create=create,
        reopen=lambda: Disk(path, policy).driver,
        create_read_only=lambda: create(read_only=True),
    )


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_conformance(check: Check, packed: bool, tmp_path: Path) -> None:
    check(_subject(tmp_path / "disk.raw", dataclasses.replace(_POLICY, packed=packed)))


@pytest.mark.parametrize(("packed", "indirect", "event_idx"), _RINGS)
def test_contents_on_every_ring(packed: bool, indirect: bool, event_idx: bool, tmp_path: Path) -> None:
    """Random vectors of any size against the file; the features that were asked for are in force."""
    path, source = tmp_path / "disk.raw", random.Random(7)
    model = bytearray(source.randbytes(8 << 20))
    path.write_bytes(model)
    policy = dataclasses.replace(_POLICY, packed=packed, indirect=indirect, event_idx=event_idx)
    driver = Disk(path, policy).driver
    for wanted, bit in (
        (packed, Feature.RING_PACKED),
        (indirect, Feature.INDIRECT_DESC),
        (event_idx, Feature.EVENT_IDX),
    ):
        assert bool(driver.features & bit) == wanted
    for _ in range(12):
        extents = []
        for slot in source.sample(range(32), 12):
            blocks = source.randrange(1, 300)
            offset = (slot << 18) + 512 * source.randrange(512 - blocks) if blocks < 512 else slot << 18
            extents.append((offset, source.randbytes(512 * blocks)))
        driver.write(extents)
        for offset, data in extents:
            model[offset : offset + len(data)] = data
        assert driver.read([(offset, len(data)) for offset, data in extents]) == [data for _, data in extents]
    driver.discard([(1 << 20, 1 << 18)])
    driver.write_zeroes([(2 << 20, (1 << 18) + 512)])
    model[2 << 20 : (2 << 20) + (1 << 18) + 512] = bytes((1 << 18) + 512)
    driver.flush()
    outside = driver.read([(0, 1 << 20), (0x140000, len(model) - 0x140000)])
    assert outside == [bytes(model[: 1 << 20]), bytes(model[0x140000:])]
    driver.close()
    written = path.read_bytes()
    assert written[: 1 << 20] == model[: 1 << 20]
    assert written[0x140000:] == model[0x140000:]


def test_four_kilobyte_blocks(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(initial_content())
    driver = Disk(path, _POLICY, logical_block_bytes=4096).driver
    assert driver.block_size_bytes == 4096
    driver.write([(4096, b"x" * 8192)])
    assert driver.read([(0, SIZE_BYTES)])[0][4096:12288] == b"x" * 8192
    driver.close()


@pytest.mark.parametrize("indirect", [False, True])
def test_the_device_asks_for_a_reset_and_gets_it(indirect: bool, tmp_path: Path) -> None:
    """Descriptors that no device can follow: QEMU sets NEEDS_RESET, the driver sees it, and starts again.

    On a split ring: what QEMU 7.2 does with a packed one is the next test.
    """
    path = tmp_path / "disk.raw"
    path.write_bytes(initial_content())
    driver = Disk(path, dataclasses.replace(_POLICY, packed=False, indirect=indirect)).driver
    driver.write([(0, b"y" * 512)])
    queue = driver._lanes[0].queue
    table = (queue.addresses.descriptors - _SHARED_GPA) // 8
    for entry in range(queue.shape.size):
        queue._memory.u64[table + 2 * entry] = 1 << 60
    with pytest.raises(BackendError) as caught:
        driver.read([(0, 512)])
    assert caught.value.details["violation"] == "virtio-needs-reset"
    driver.reconnect()
    assert driver.read([(0, 512)]) == [b"y" * 512]
    driver.close()


def test_an_endless_loop_in_qemu_ends_here(tmp_path: Path) -> None:
    """The same on a packed ring: QEMU 7.2 looks for the next request for ever and answers nothing more.

    The driver's deadlines must hold. A QEMU that has been mended asks for a reset.
    """
    path = tmp_path / "disk.raw"
    path.write_bytes(initial_content())
    disk = Disk(
        path, dataclasses.replace(_POLICY, packed=True, indirect=False, deadline_seconds=1.0), timeout_seconds=1.0
    )
    queue = disk.driver._lanes[0].queue
    assert isinstance(queue, PackedQueue)
    queue._addresses = [[1 << 60] * len(chain) for chain in queue._addresses]
    with pytest.raises(BackendError) as caught:
        disk.driver.read([(0, 512)])
    assert caught.value.details["violation"] in ("qemu-timeout", "virtio-needs-reset")
    disk.machine.kill()
    disk.driver.close()


def test_killed_in_flight(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(initial_content())
    disk = Disk(path, _POLICY)
    disk.driver.write([(0, b"z" * 512)])
    disk.driver.flush()
    disk.machine.kill()
    with pytest.raises(BackendError):
        disk.driver.read([(0, 512)] * 20)
    with pytest.raises(BackendError):
        disk.driver.flush()
    disk.driver.close()
    again = Disk(path, _POLICY).driver
    assert again.read([(0, 512)]) == [b"z" * 512]
    again.close()


def test_an_empty_slot_is_no_disk(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(initial_content())
    disk = Disk(path, _POLICY)
    with pytest.raises(ProtocolError) as caught:
        MmioTransport(disk.machine.virtio_registers(1))
    # QEMU's empty slots are of version 1 and have no device; either is enough.
    assert caught.value.code in ("virtio-no-device", "virtio-legacy")
    disk.driver.close()


@pytest.mark.long
def test_a_gibibyte(tmp_path: Path) -> None:
    """Random reads, writes and discards of a GiB in all, compared with the file at the end."""
    size = 256 << 20
    path, source = tmp_path / "disk.raw", random.Random(8)
    pattern = source.randbytes(4 << 20)
    with path.open("wb") as file:
        os.truncate(file.fileno(), size)
    model = bytearray(size)
    driver = Disk(path, dataclasses.replace(_POLICY, queue_size=256, large_bytes=1 << 20)).driver
    moved = 0
    while moved < 1 << 30:
        extents = []
        for slot in source.sample(range(64), 8):
            length = 512 * source.randrange(1, 2048)
            offset = (slot << 22) + 512 * source.randrange(0, ((4 << 20) - length) // 512)
            at = source.randrange(0, len(pattern) - length)
            extents.append((offset, pattern[at : at + length]))
        driver.write(extents)
        for offset, data in extents:
            model[offset : offset + len(data)] = data
        start = 512 * source.randrange(0, size // 512 - 4096)
        assert driver.read([(start, 2 << 20)])[0] == model[start : start + (2 << 20)]
        zeroed = 512 * source.randrange(0, size // 512 - 128)
        driver.write_zeroes([(zeroed, 65536)])
        model[zeroed : zeroed + 65536] = bytes(65536)
        moved += sum(len(data) for _, data in extents) + (2 << 20)
    driver.flush()
    driver.close()
    assert path.read_bytes() == model
