# SPDX-License-Identifier: MIT OR Apache-2.0
"""All drivers keep the contract of `abi/block.py`; the file driver survives a confined process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from svsm.abi.block import BlockDevice
from svsm.formats.errors import BackendError, StateError, SvsmError
from svsm.storage.cocoonfs import Volume
from svsm.storage.drivers.file import FileDevice
from svsm.storage.drivers.memory import MemoryDevice
from svsm.testing.diskprocess import DiskProcess
from svsm.testing.overlay import OverlayDevice
from svsm.testing.powercut import PowerCutDisk

SIZE = 64 << 10
Make = Callable[[Path], BlockDevice]


def _blank(folder: Path) -> Path:
    path = folder / "disk"
    path.write_bytes(bytes(SIZE))
    return path


def _memory(folder: Path) -> BlockDevice:
    return MemoryDevice(SIZE)


def _file(folder: Path) -> BlockDevice:
    return FileDevice(os.open(_blank(folder), os.O_RDWR))


def _remote(folder: Path) -> BlockDevice:
    return DiskProcess(_blank(folder)).connect()


def _powercut(folder: Path) -> BlockDevice:
    return PowerCutDisk(bytes(SIZE))


def _overlay(folder: Path) -> BlockDevice:
    return OverlayDevice(MemoryDevice(SIZE, read_only=True))


@pytest.fixture(params=[_memory, _file, _remote, _powercut, _overlay])
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlockDevice]:
    made: BlockDevice = request.param(tmp_path)
    yield made
    made.close()


def test_contract(device: BlockDevice) -> None:
    assert (device.size_bytes, device.block_size_bytes, device.read_only) == (SIZE, 512, False)
    device.write([(512, b"a" * 1024), (8192, memoryview(b"b" * 512))])
    device.write([(1024, b"c" * 512)])
    assert device.read([(8192, 512), (0, 2048), (0, 0)]) == [
        b"b" * 512,
        bytes(512) + b"a" * 512 + b"c" * 512 + bytes(512),
        b"",
    ]
    device.flush()
    device.discard([(8192, 512)])
    assert device.read([(512, 512)]) == [b"a" * 512]
    for offset, length, code in [
        (1, 512, "block-alignment"),
        (0, 100, "block-alignment"),
        (SIZE, 512, "block-range"),
        (-512, 512, "block-range"),
        (0, SIZE + 512, "block-range"),
    ]:
        with pytest.raises(StateError) as caught:
            device.read([(0, 512), (offset, length)])
        assert caught.value.code == code
        with pytest.raises(StateError) as caught:
            device.write([(0, b"x" * 512), (offset, bytes(length))])
        assert caught.value.code == code
    assert device.read([(0, 512)]) == [bytes(512)]  # nothing by halves


def test_a_volume_on_each(device: BlockDevice) -> None:
    volume = Volume.create(device, b"key", salt=b"")
    with volume.transaction() as transaction:
        transaction.write(16, b"contents" * 500)
    assert Volume.open(device, b"key").read(16) == b"contents" * 500


@pytest.mark.parametrize("make", [_memory, _file, _remote])
def test_closed(make: Make, tmp_path: Path) -> None:
    device = make(tmp_path)
    device.close()
    device.close()
    for call in (lambda: device.read([(0, 512)]), lambda: device.write([(0, bytes(512))]), device.flush):
        with pytest.raises(StateError) as caught:
            call()
        assert caught.value.code == "block-closed"


@pytest.mark.parametrize("block_size", [0, 64, 100, 384, 1 << 21])
def test_block_sizes(block_size: int, tmp_path: Path) -> None:
    with pytest.raises(StateError) as caught:
        MemoryDevice(0, block_size_bytes=block_size)
    assert caught.value.code == "block-size"


def test_file_lock(tmp_path: Path) -> None:
    path = _blank(tmp_path)
    first = FileDevice(os.open(path, os.O_RDWR))
    with pytest.raises(StateError) as caught:
        FileDevice(os.open(path, os.O_RDWR))
    assert caught.value.code == "block-in-use"
    first.close()
    device = FileDevice(os.open(path, os.O_RDWR))
    device.close()
    readers = [FileDevice(os.open(path, os.O_RDONLY), read_only=True) for _ in range(2)]
    with pytest.raises(StateError) as caught:
        readers[0].write([(0, bytes(512))])
    assert caught.value.code == "block-read-only"
    for reader in readers:
        reader.close()


def test_file_errors(tmp_path: Path) -> None:
    path = _blank(tmp_path)
    device = FileDevice(os.open(path, os.O_RDWR))
    os.truncate(path, 1024)
    with pytest.raises(BackendError) as caught:
        device.read([(0, 4096)])
    assert caught.value.code == "block-io"
    device.close()
    reader, writer = os.pipe()
    for descriptor in (reader, writer):
        with pytest.raises(BackendError):
            FileDevice(descriptor)
    read_only = os.open(path, os.O_RDONLY)
    device = FileDevice(read_only)
    with pytest.raises(BackendError) as caught:
        device.write([(0, bytes(512))])
    assert caught.value.code == "block-io"
    device.close()


def test_full_host_disk(tmp_path: Path) -> None:
    """/dev/full is a character device: not taken for a disk."""
    descriptor = os.open("/dev/full", os.O_RDWR)
    with pytest.raises(BackendError):
        FileDevice(descriptor)


def test_overlay_leaves_the_device_alone() -> None:
    below = MemoryDevice(SIZE)
    volume = Volume.create(below, b"key", salt=b"")
    with volume.transaction() as transaction:
        transaction.write(16, b"old")
    before = bytes(below.data)
    above = OverlayDevice(MemoryDevice(before, read_only=True))
    volume = Volume.open(above, b"key")
    with volume.transaction() as transaction:
        transaction.write(16, b"new" * 1000)
    assert Volume.open(above, b"key").read(16) == b"new" * 1000
    assert Volume.open(MemoryDevice(before), b"key").read(16) == b"old"


def test_read_only_volume() -> None:
    device = MemoryDevice(SIZE)
    volume = Volume.create(device, b"key", salt=b"")
    with volume.transaction() as transaction:
        transaction.write(16, b"x")
    reader = Volume.open(MemoryDevice(device.data, read_only=True), b"key")
    assert reader.read(16) == b"x"
    with pytest.raises(SvsmError) as caught, reader.transaction() as transaction:
        transaction.write(16, b"y")
    assert caught.value.code == "block-read-only"
    transaction = volume.transaction()
    transaction.write(16, b"z")
    transaction.prepare()
    with pytest.raises(StateError) as refused:
        Volume.open(MemoryDevice(device.data, read_only=True), b"key")
    assert refused.value.code == "cocoonfs-journal-pending"
