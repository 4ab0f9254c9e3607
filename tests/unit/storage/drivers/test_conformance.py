# SPDX-License-Identifier: MIT OR Apache-2.0
"""Every driver against the published conformance suite."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from svsm.abi.block import BlockDevice, Extent, Range
from svsm.cli.volume.meter import Meter, Watched
from svsm.formats.errors import StateError
from svsm.formats.virtio import BlkFeature
from svsm.host.devices.virtio_blk import ALL_FEATURES, BlkOptions
from svsm.storage.drivers import file as file_driver
from svsm.storage.drivers.checks import block_io_error
from svsm.storage.drivers.file import FileDevice
from svsm.storage.drivers.memory import MemoryDevice
from svsm.storage.drivers.remote import RemoteDevice
from svsm.storage.drivers.virtio.blk import BlkPolicy
from svsm.testing.block_conformance import (
    CHECKS,
    SIZE_BYTES,
    Check,
    Subject,
    discards,
    flushed_is_durable,
    initial_content,
    zeroes,
)
from svsm.testing.diskprocess import DiskProcess
from svsm.testing.overlay import OverlayDevice
from svsm.testing.powercut import PowerCutDisk
from svsm.testing.virtio_harness import SMALL_POLICY, Machine, disk_file, virtio_disk


class _FailingMemory(MemoryDevice):
    """Takes the first extent of a call and then fails."""

    def write(self, extents: Sequence[Extent]) -> None:
        super().write(extents[:1])
        raise block_io_error("write", "as ordered")

    def write_zeroes(self, ranges: Sequence[Range]) -> None:
        super().write_zeroes(ranges[:1])
        raise block_io_error("write zeroes", "as ordered")


def _memory(_folder: Path) -> Subject:
    devices: list[MemoryDevice] = []

    def create() -> BlockDevice:
        devices.append(MemoryDevice(initial_content()))
        return devices[-1]

    return Subject(
        create=create,
        reopen=lambda: MemoryDevice(devices[-1].data),
        create_read_only=lambda: MemoryDevice(initial_content(), read_only=True),
        grow=lambda more: devices[-1].data.extend(bytes(more)),
        create_failing=lambda: _FailingMemory(initial_content()),
    )


def _watched(folder: Path) -> Subject:
    """What `svsm volume create` writes through."""
    below = _memory(folder)

    def over(make: Callable[[], BlockDevice] | None) -> Callable[[], BlockDevice]:
        assert make is not None
        return lambda: Watched(make(), Meter(None))

    return dataclasses.replace(
        below,
        create=over(below.create),
        reopen=over(below.reopen),
        create_read_only=over(below.create_read_only),
        create_failing=over(below.create_failing),
    )


def _powercut(_folder: Path) -> Subject:
    disks: list[PowerCutDisk] = []

    def create() -> BlockDevice:
        disks.append(PowerCutDisk(initial_content()))
        return disks[-1]

    return Subject(
        create=create,
        reopen=lambda: PowerCutDisk(disks[-1].content),
        create_failing=lambda: PowerCutDisk(initial_content(), fail_writes=[1]),
    )


def _overlay(_folder: Path) -> Subject:
    below: list[MemoryDevice] = []

    def create() -> BlockDevice:
        below.append(MemoryDevice(initial_content(), read_only=True))
        return OverlayDevice(below[-1])

    return Subject(create=create, reopen=create, grow=lambda more: below[-1].data.extend(bytes(more)))


def _file(folder: Path) -> Subject:
    path = folder / "disk"

    def opened(read_only: bool = False) -> BlockDevice:
        flags = os.O_RDONLY if read_only else os.O_RDWR
        return FileDevice(os.open(path, flags | os.O_CLOEXEC), read_only=read_only)

    def create(read_only: bool = False) -> BlockDevice:
        path.write_bytes(initial_content())
        return opened(read_only)

    def create_failing() -> BlockDevice:
        path.write_bytes(initial_content())
        return FileDevice(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    return Subject(
        create=create,
        reopen=opened,
        create_read_only=lambda: create(read_only=True),
        grow=lambda more: os.truncate(path, path.stat().st_size + more),
        create_failing=create_failing,
    )


def _remote(folder: Path) -> Subject:
    path = folder / "disk"

    def create(read_only: bool = False) -> BlockDevice:
        path.write_bytes(initial_content())
        return RemoteDevice(DiskProcess(path).socket(), read_only=read_only)

    return Subject(
        create=create,
        reopen=lambda: DiskProcess(path).connect(),
        create_read_only=lambda: create(read_only=True),
    )


def _virtio(policy: BlkPolicy, options: BlkOptions) -> Subject:
    machines: list[Machine] = []

    def create(features: int = 0, seals: int = 0) -> BlockDevice:
        file = disk_file(SIZE_BYTES, initial_content(), seals=seals)
        offered = dataclasses.replace(options, features=options.features | features)
        machines.append(virtio_disk(file, options=offered, policy=policy))
        return machines[-1].driver

    def grow(more: int) -> None:
        machines[-1].device.resize((SIZE_BYTES + more) // 512)

    return Subject(
        create=create,
        reopen=lambda: virtio_disk(machines[-1].descriptor, options=options, policy=policy).driver,
        create_read_only=lambda: create(BlkFeature.RO),
        grow=grow,
        create_failing=lambda: create(seals=fcntl.F_SEAL_WRITE),
    )


_OPTIONS = {
    "plain": BlkOptions(queue_size=16),
    "no-discard": BlkOptions(features=ALL_FEATURES & ~int(BlkFeature.DISCARD | BlkFeature.WRITE_ZEROES)),
    "4k-blocks": BlkOptions(block_bytes=4096, queue_size=8),
    "two-kilobytes-at-a-time": BlkOptions(size_max=2048, discard_sectors=4, discard_segments=3),
    "odd-queue": BlkOptions(queue_size=100),
    "smallest-queue": BlkOptions(queue_size=4),
    "four-queues": BlkOptions(queues=4, queue_size=8),
}
SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "memory": _memory,
    "watched": _watched,
    "powercut": _powercut,
    "overlay": _overlay,
    "file": _file,
    "remote": _remote,
}
for ring in ("split", "packed"):
    for indirect in (True, False):
        for event_idx in (True, False):
            name = f"virtio-{ring}{'-indirect' if indirect else ''}{'-event' if event_idx else ''}"
            policy = dataclasses.replace(SMALL_POLICY, packed=ring == "packed", indirect=indirect, event_idx=event_idx)
            SUBJECTS[name] = lambda _folder, policy=policy: _virtio(policy, BlkOptions(queue_size=16))  # type: ignore[misc]
    for variant, options in _OPTIONS.items():
        policy = dataclasses.replace(SMALL_POLICY, packed=ring == "packed", queues=4, queue_size=100, indirect=False)
        SUBJECTS[f"virtio-{ring}-{variant}"] = lambda _folder, policy=policy, options=options: _virtio(policy, options)  # type: ignore[misc]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_conformance(check: Check, subject: str, tmp_path: Path) -> None:
    if subject == "overlay" and check is flushed_is_durable:
        return  # it keeps everything in memory: that is what it is for
    check(SUBJECTS[subject](tmp_path))


@pytest.mark.parametrize("failure", [errno.EOPNOTSUPP, errno.EINVAL])
@pytest.mark.parametrize("check", [zeroes, discards, flushed_is_durable], ids=lambda check: check.__name__)
def test_a_file_system_without_holes(
    check: Check, failure: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []

    def fallocate(_descriptor: int, mode: int, _offset: int, _length: int) -> int:
        modes.append(mode)
        return failure

    monkeypatch.setattr(file_driver, "_fallocate", lambda: fallocate)
    check(_file(tmp_path))
    assert modes.count(0x11) <= 2  # once for each device, then it is known


def test_a_file_system_with_holes_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = file_driver._fallocate()

    def fallocate(descriptor: int, mode: int, offset: int, length: int) -> int:
        if mode & 0x10:
            return errno.EOPNOTSUPP
        return genuine(descriptor, mode, offset, length)

    monkeypatch.setattr(file_driver, "_fallocate", lambda: fallocate)
    zeroes(_file(tmp_path))
    path = tmp_path / "disk"
    device = _file(tmp_path).create()
    device.discard([(0, SIZE_BYTES)])
    device.close()
    assert path.stat().st_size == SIZE_BYTES
    assert path.stat().st_blocks < SIZE_BYTES // 512 // 4  # the space has really been given back


class _Broken(MemoryDevice):
    """A device with one fault."""

    def __init__(self, fault: str) -> None:
        super().__init__(initial_content())
        self._fault = fault

    def read(self, ranges):  # type: ignore[no-untyped-def]
        contents = super().read(ranges)
        if self._fault == "order":
            contents.reverse()
        if self._fault == "short":
            contents = [part[:-1] for part in contents]
        return contents

    def write(self, extents):  # type: ignore[no-untyped-def]
        if self._fault == "halves":
            for extent in extents:
                super().write([extent])
        elif self._fault == "lost":
            super().write(extents[1:])
        elif self._fault == "lost-beyond-256":
            super().write(extents[:256])
        elif self._fault == "elsewhere":
            super().write(extents)
            self.data[-1] = 0
        elif self._fault == "overlap-cut-short":
            super().write([(at, data) for n, (at, data) in enumerate(extents) if at != 3 * 512 or n != 1])
        else:
            super().write(extents)

    def write_zeroes(self, ranges):  # type: ignore[no-untyped-def]
        if self._fault == "zeroes-do-nothing":
            return
        super().write_zeroes(ranges[:1] if self._fault == "zeroes-first-only" else ranges)
        if self._fault == "zeroes-too-much":
            self._spill(ranges)

    def discard(self, ranges):  # type: ignore[no-untyped-def]
        super().discard(ranges)
        if self._fault == "discard-too-much":
            self._spill(ranges)

    def _spill(self, ranges: Sequence[Range]) -> None:
        for offset, length in ranges:
            end = min(offset + length + 512, len(self.data))
            self.data[offset + length : end] = bytes(end - offset - length)

    def poll(self) -> bool:
        if self._fault == "deaf":
            return False
        return super().poll() or self._fault == "always-new"

    def close(self) -> None:
        if self._fault != "open-after-close":
            super().close()


_FAULTS = ["order", "short", "halves", "lost", "lost-beyond-256", "elsewhere", "overlap-cut-short"]
_FAULTS += ["zeroes-do-nothing", "zeroes-first-only", "zeroes-too-much", "discard-too-much", "deaf", "always-new"]
_FAULTS += ["open-after-close", "not-durable", "failure-elsewhere"]


class _FailingElsewhere(_FailingMemory):
    """A failed write damages what it was not asked for."""

    def write(self, extents: Sequence[Extent]) -> None:
        self.data[0] ^= 1
        super().write(extents)


@pytest.mark.parametrize("fault", _FAULTS)
def test_the_suite_finds_faults(fault: str) -> None:
    made: list[_Broken] = []

    def create() -> BlockDevice:
        made.append(_Broken(fault))
        return made[-1]

    subject = Subject(
        create=create,
        reopen=lambda: MemoryDevice(initial_content()) if fault == "not-durable" else MemoryDevice(made[-1].data),
        grow=lambda more: made[-1].data.extend(bytes(more)),
        create_failing=lambda: (_FailingElsewhere if fault == "failure-elsewhere" else _FailingMemory)(
            initial_content()
        ),
    )

    def verdict(check: Check) -> bool:
        try:
            check(subject)
        except StateError as error:
            return error.code == "block-conformance"
        return False

    assert any(verdict(check) for check in CHECKS)
