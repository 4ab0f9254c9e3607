# SPDX-License-Identifier: MIT OR Apache-2.0
"""A disk that asks for a reset: used again where nothing is lost by it, an honest failure where something may be."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence

import pytest

from svsm.abi.block import BlockDevice
from svsm.abi.errors import BackendError
from svsm.formats.nvme import Completion, ControllerStatus, NvmeRegister, NvmOpcode
from svsm.formats.virtio import BlkFeature, DeviceStatus, MmioRegister
from svsm.host.devices.virtio_blk import ALL_FEATURES, BlkOptions
from svsm.kernel.resettable import MAX_RESETS, ResettableDisk
from svsm.storage.drivers.nvme.disk import NvmePolicy
from svsm.storage.volume import Volume
from svsm.testing.block_conformance import CHECKS, SIZE_BYTES, Check, Subject, initial_content
from svsm.testing.nvme_model import SMALL_NVME, NvmeBench, NvmeModel, nvme_bench
from svsm.testing.virtio_harness import Machine, disk_file, virtio_disk

DISK_BYTES = 1 << 20
_WRITE_FAULT = 0x280
"""An NVMe status: generic to media (type 2), the write was not done."""


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


def _virtio(stack: contextlib.ExitStack, *, reset: bool) -> Subject:
    """Over the virtio driver; with `reset`, each disk has asked for a reset before it is tried."""
    made: list[Machine] = []

    def disk(descriptor: int, features: int = 0) -> BlockDevice:
        machine = virtio_disk(os.dup(descriptor), options=BlkOptions(features=ALL_FEATURES | features))
        stack.callback(machine.close)
        made.append(machine)
        resets: list[str] = []
        found = ResettableDisk(machine.driver, on_reset=resets.append)
        if reset:
            machine.device.needs_reset()
            found.read([(512, 512)])
            assert resets == ["virtio-needs-reset"]
        return found

    def create(features: int = 0, *, seals: int = 0) -> BlockDevice:
        descriptor = disk_file(SIZE_BYTES, initial_content(), seals=seals)
        stack.callback(os.close, descriptor)
        return disk(descriptor, features)

    return Subject(
        create=create,
        reopen=lambda: disk(made[-1].descriptor),
        create_read_only=lambda: create(BlkFeature.RO),
        grow=lambda more: made[-1].device.resize((SIZE_BYTES + more) // 512),
        create_failing=lambda: create(seals=fcntl.F_SEAL_WRITE),
    )


def _fails_once(model: NvmeModel) -> None:
    """The controller says that it has failed, until it is reset."""
    before, model.stalled = model.resets, True

    def status() -> int:
        if model.resets == before:
            return model.status() | ControllerStatus.CFS
        model.stalled = False
        return model.status()

    model.registers[NvmeRegister.CSTS] = status


def _writes_fail(model: NvmeModel, queue: int, completion: Completion) -> Sequence[tuple[int, Completion]]:
    changes = queue and model.commands[-1][1].opcode in (NvmOpcode.WRITE, NvmOpcode.WRITE_ZEROES)
    return [(queue, completion.replace(status=_WRITE_FAULT << 1) if changes else completion)]


def _nvme(_stack: contextlib.ExitStack, *, reset: bool) -> Subject:
    """Over the NVMe driver, likewise."""
    made: list[NvmeBench] = []

    def disk(content: bytearray, policy: NvmePolicy = SMALL_NVME) -> ResettableDisk:
        made.append(nvme_bench(content, policy=policy))
        resets: list[str] = []
        found = ResettableDisk(made[-1].start(), on_reset=resets.append)
        if reset:
            _fails_once(made[-1].model)
            assert found.read([(512, 512)]) == [bytes(content[512:1024])]
            assert resets == ["nvme-failed"]
        return found

    def create(policy: NvmePolicy = SMALL_NVME) -> ResettableDisk:
        return disk(bytearray(initial_content()), policy)

    def create_failing() -> ResettableDisk:
        found = create()
        made[-1].model.answer = _writes_fail
        return found

    return Subject(
        create=create,
        reopen=lambda: disk(made[-1].model.content),
        create_read_only=lambda: create(dataclasses.replace(SMALL_NVME, read_only=True)),
        grow=lambda more: made[-1].model.content.extend(bytes(more)),
        create_failing=create_failing,
    )


@pytest.mark.parametrize("reset", [False, True], ids=["as-it-is", "after-a-reset"])
@pytest.mark.parametrize("subject", [_virtio, _nvme])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: str(check.__name__))
def test_conformance(check: Check, subject: Callable[..., Subject], reset: bool) -> None:
    with contextlib.ExitStack() as stack:
        check(subject(stack, reset=reset))
