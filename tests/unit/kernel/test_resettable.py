# SPDX-License-Identifier: MIT OR Apache-2.0
"""A disk that asks for a reset: used again where nothing is lost by it, an honest failure where something may be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from svsm.abi.errors import BackendError
from svsm.formats.virtio import DeviceStatus, MmioRegister
from svsm.kernel.resettable import MAX_RESETS, ResettableDisk
from svsm.storage.volume import Volume
from svsm.testing.virtio_harness import Machine, disk_file, virtio_disk

DISK_BYTES = 1 << 20


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = virtio_disk(disk_file(DISK_BYTES))
    yield made
    made.close()


@pytest.fixture
def resets() -> list[str]:
    return []


@pytest.fixture
def disk(machine: Machine, resets: list[str]) -> ResettableDisk:
    return ResettableDisk(machine.driver, on_reset=resets.append)


def test_what_follows_a_flush_goes_on(machine: Machine, disk: ResettableDisk, resets: list[str]) -> None:
    disk.write([(0, b"a" * 512)])
    disk.flush()
    machine.device.needs_reset()
    assert disk.read([(0, 512)]) == [b"a" * 512]
    machine.device.needs_reset()
    disk.flush()
    assert resets == ["virtio-needs-reset"] * 2
    assert (disk.size_bytes, disk.block_size_bytes, disk.read_only) == (DISK_BYTES, 512, False)
    assert not disk.poll()


@pytest.mark.parametrize(
    "change",
    [
        lambda disk: disk.write([(512, b"b" * 512)]),
        lambda disk: disk.discard([(512, 512)]),
        lambda disk: disk.write_zeroes([(512, 512)]),
    ],
)
def test_a_change_that_meets_a_reset_is_made_but_the_driver_does_not_answer_for_it(
    machine: Machine, disk: ResettableDisk, resets: list[str], change: Callable[[ResettableDisk], None]
) -> None:
    machine.device.needs_reset()
    change(disk)
    assert len(resets) == 1
    with pytest.raises(BackendError) as failed:
        disk.flush()
    assert failed.value.code == "block-io"


def test_a_flush_after_a_write_and_a_reset_fails_once(machine: Machine, disk: ResettableDisk) -> None:
    disk.write([(0, b"a" * 512)])
    machine.device.needs_reset()
    disk.write([(512, b"b" * 512)])
    with pytest.raises(BackendError) as failed:
        disk.flush()
    assert failed.value.code == "block-io"
    disk.flush()


def test_a_commit_that_a_reset_interrupts_fails_and_the_volume_opens_again(
    machine: Machine, disk: ResettableDisk
) -> None:
    volume = Volume.create(disk, b"key", salt=bytes(16))
    with volume.transaction() as transaction:
        transaction.write(16, b"old")

    writes = 0
    real = disk.driver.write

    def write(extents: object) -> None:
        nonlocal writes
        real(extents)  # type: ignore[arg-type]
        writes += 1
        if writes == 1:
            machine.device.needs_reset()

    disk.driver.write = write  # type: ignore[method-assign]
    with pytest.raises(BackendError), volume.transaction() as transaction:
        transaction.write(16, b"new")
    disk.driver.write = real  # type: ignore[method-assign]
    assert volume.failed
    assert Volume.open(disk, b"key").read(16) in (b"old", b"new")


def test_between_two_commits_a_reset_costs_nothing(machine: Machine, disk: ResettableDisk, resets: list[str]) -> None:
    volume = Volume.create(disk, b"key", salt=bytes(16))
    for number in range(4):
        machine.device.needs_reset()
        with volume.transaction() as transaction:
            transaction.write(16, bytes([number]))
    assert Volume.open(disk, b"key").read(16) == b"\x03"
    assert len(resets) == 4


def test_only_so_many_times(machine: Machine, disk: ResettableDisk, resets: list[str]) -> None:
    for _ in range(MAX_RESETS):
        machine.device.needs_reset()
        disk.read([(0, 512)])
    machine.device.needs_reset()
    for _ in range(2):
        with pytest.raises(BackendError) as failed:
            disk.read([(0, 512)])
        assert failed.value.details["violation"] == "virtio-needs-reset"
    assert len(resets) == MAX_RESETS


def test_a_device_that_asks_again_at_once(machine: Machine, disk: ResettableDisk, resets: list[str]) -> None:
    """The call is made twice, not for ever."""
    start = machine.device.write32

    def write32(offset: int, value: int) -> None:
        if offset == MmioRegister.QUEUE_NOTIFY:
            machine.device.needs_reset()
        start(offset, value)

    machine.device.write32 = write32  # type: ignore[method-assign]
    machine.device.needs_reset()
    with pytest.raises(BackendError):
        disk.read([(0, 512)])
    assert len(resets) == 1


def test_a_reset_that_does_not_take(machine: Machine, disk: ResettableDisk, resets: list[str]) -> None:
    real = machine.device.read32
    machine.device.needs_reset()
    machine.device.read32 = lambda offset: (  # type: ignore[method-assign]
        int(DeviceStatus.NEEDS_RESET) if offset == MmioRegister.STATUS else real(offset)
    )
    with pytest.raises(BackendError) as failed:
        disk.read([(0, 512)])
    assert failed.value.code == "block-io"
    assert not resets


def test_another_fault_is_final_at_once(machine: Machine, disk: ResettableDisk, resets: list[str]) -> None:
    machine.device.service = lambda: 0  # type: ignore[method-assign]
    before = machine.clock()
    with pytest.raises(BackendError) as failed:
        disk.read([(0, 512)])
    waited = machine.clock() - before
    assert failed.value.details["violation"] == "virtio-timeout"
    with pytest.raises(BackendError):
        disk.flush()
    assert machine.clock() - before < waited + 1
    assert not resets


def test_a_disk_that_is_another_after_the_reset(machine: Machine, disk: ResettableDisk, resets: list[str]) -> None:
    machine.device.needs_reset()
    real = machine.driver.reconnect

    def reconnect() -> None:
        real()
        machine.driver._read_only = True

    machine.driver.reconnect = reconnect  # type: ignore[method-assign, assignment]
    with pytest.raises(BackendError):
        disk.read([(0, 512)])
    assert not resets


def test_a_reset_is_made_within_its_limit(machine: Machine) -> None:
    seen: list[str] = []

    @contextlib.contextmanager
    def limit() -> Iterator[None]:
        seen.append("begun")
        yield
        seen.append("ended")

    disk = ResettableDisk(machine.driver, on_reset=seen.append, limit=limit)
    disk.read([(0, 512)])
    assert not seen
    machine.device.needs_reset()
    disk.read([(0, 512)])
    assert seen == ["begun", "ended", "virtio-needs-reset"]
