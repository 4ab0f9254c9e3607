# SPDX-License-Identifier: MIT OR Apache-2.0
"""Every driver against the published conformance suite."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from svsm.abi.block import BlockDevice
from svsm.formats.errors import StateError
from svsm.formats.virtio import BlkFeature
from svsm.host.devices.virtio_blk import ALL_FEATURES, BlkOptions
from svsm.storage.drivers.file import FileDevice
from svsm.storage.drivers.memory import MemoryDevice
from svsm.storage.drivers.virtio.blk import BlkPolicy
from svsm.testing.block_conformance import CHECKS, SIZE_BYTES, Check, Subject, initial_content
from svsm.testing.diskprocess import DiskProcess
from svsm.testing.virtio_harness import SMALL_POLICY, disk_file, virtio_disk


def _memory(_folder: Path) -> Subject:
    devices: list[MemoryDevice] = []

    def create() -> BlockDevice:
        devices.append(MemoryDevice(initial_content()))
        return devices[-1]

    return Subject(
        create=create,
        reopen=lambda: MemoryDevice(devices[-1].data),
        create_read_only=lambda: MemoryDevice(initial_content(), read_only=True),
    )


def _file(folder: Path) -> Subject:
    path = folder / "disk"

    def fresh() -> None:
        path.write_bytes(initial_content())

    def opened(read_only: bool = False) -> BlockDevice:
        flags = os.O_RDONLY if read_only else os.O_RDWR
        return FileDevice(os.open(path, flags | os.O_CLOEXEC), read_only=read_only)

    def create(read_only: bool = False) -> BlockDevice:
        fresh()
        return opened(read_only)

    return Subject(create=create, reopen=opened, create_read_only=lambda: create(read_only=True))


def _remote(folder: Path) -> Subject:
    path = folder / "disk"

    def create() -> BlockDevice:
        path.write_bytes(initial_content())
        return DiskProcess(path).connect()

    return Subject(create=create, reopen=lambda: DiskProcess(path).connect())


def _virtio(policy: BlkPolicy, options: BlkOptions) -> Subject:
    files: list[int] = []

    def create(features: int = 0) -> BlockDevice:
        files.append(disk_file(SIZE_BYTES, initial_content()))
        offered = dataclasses.replace(options, features=options.features | features)
        return virtio_disk(files[-1], options=offered, policy=policy).driver

    return Subject(
        create=create,
        reopen=lambda: virtio_disk(files[-1], options=options, policy=policy).driver,
        create_read_only=lambda: create(BlkFeature.RO),
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
SUBJECTS: dict[str, Callable[[Path], Subject]] = {"memory": _memory, "file": _file, "remote": _remote}
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
    check(SUBJECTS[subject](tmp_path))


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
        elif self._fault == "elsewhere":
            super().write(extents)
            self.data[-1] = 0
        else:
            super().write(extents)

    def discard(self, ranges):  # type: ignore[no-untyped-def]
        super().discard(ranges)
        if self._fault == "discard-too-much":
            for offset, length in ranges:
                self.data[offset : offset + length + 512] = bytes(length + 512)

    def close(self) -> None:
        if self._fault != "open-after-close":
            super().close()


@pytest.mark.parametrize(
    "fault", ["order", "short", "halves", "lost", "elsewhere", "discard-too-much", "open-after-close", "not-durable"]
)
def test_the_suite_finds_faults(fault: str) -> None:
    subject = Subject(create=lambda: _Broken(fault), reopen=lambda: MemoryDevice(initial_content()))

    def verdict(check: Check) -> bool:
        try:
            check(subject)
        except StateError as error:
            return error.code == "block-conformance"
        return False

    assert any(verdict(check) for check in CHECKS)
