# SPDX-License-Identifier: MIT OR Apache-2.0
"""Another key, size and configuration by way of a copy that replaces the image in one step."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from svsm.abi.block import BlockDevice
from svsm.formats.errors import BackendError, SvsmError
from svsm.storage.cocoonfs import DEFAULT_LAYOUT, Volume
from svsm.storage.cocoonfs.aux import AuxMetadata
from svsm.storage.cocoonfs.copy import NewVolume, copy_volume, rebuild_image
from svsm.storage.drivers.file import FileDevice
from svsm.storage.drivers.memory import MemoryDevice
from svsm.testing.powercut import PowerCutDisk

OLD, NEW = b"old key", b"new key"
FILES = {16 + n: hashlib.shake_128(b"copy %d" % n).digest(700 * n) for n in range(12)}


def _volume(size: int = 128 << 10) -> MemoryDevice:
    device = MemoryDevice(size)
    volume = Volume.create(device, OLD, salt=b"salt", aux=AuxMetadata((), 100))
    with volume.transaction() as transaction:
        for inode, data in FILES.items():
            transaction.write(inode, data, inode)
    return device


def _same(device: BlockDevice, key: bytes) -> bool:
    volume = Volume.open(device, key, read_only=True)
    return {info.inode: volume.read(info.inode) for info in volume.list()} == FILES


def _file_device(descriptor: int) -> FileDevice:
    return FileDevice(descriptor)


def _image(tmp_path: Path) -> Path:
    image = tmp_path / "volume.img"
    image.write_bytes(_volume().data)
    image.chmod(0o640)
    return image


def test_configuration() -> None:
    source = Volume.open(_volume(), OLD)
    device = MemoryDevice(300 << 10)
    layout = DEFAULT_LAYOUT.replace(allocation_block_size_128b_log2=1, cipher_key_bits=256)
    stages: set[str] = set()
    copy_volume(
        source, device, NewVolume(NEW, salt=b"", layout=layout), progress=lambda stage, _done, _all: stages.add(stage)
    )
    copy = Volume.open(device, NEW)
    assert (copy.layout, copy.salt, copy.aux) == (layout, b"", source.aux)
    assert copy.list() == source.list()
    assert _same(device, NEW)
    assert stages == {"copying", "data blocks", "files", "comparing"}


def test_key_stays_out_of_the_repr() -> None:
    assert "new key" not in repr(NewVolume(NEW))


@pytest.mark.parametrize("size", [None, 96 << 10, 400 << 10])
def test_rebuild(tmp_path: Path, size: int | None) -> None:
    image = _image(tmp_path)
    rebuild_image(image, OLD, NewVolume(NEW), _file_device, image_bytes=size)
    assert [path.name for path in tmp_path.iterdir()] == ["volume.img"]
    assert image.stat().st_size == (size or 128 << 10)
    assert image.stat().st_mode & 0o777 == 0o640
    device = MemoryDevice(image.read_bytes())
    assert _same(device, NEW)
    with pytest.raises(SvsmError):
        Volume.open(device, OLD)


def test_pending_commit_goes_along(tmp_path: Path) -> None:
    image = _image(tmp_path)
    device = FileDevice(os.open(image, os.O_RDWR))
    transaction = Volume.open(device, OLD).transaction()
    transaction.write(16, b"pending")
    transaction.prepare()
    device.close()
    rebuild_image(image, OLD, NewVolume(NEW), _file_device)
    assert Volume.open(MemoryDevice(image.read_bytes()), NEW).read(16) == b"pending"


def test_nothing_happens_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too small, a wrong key, a disk that fails at some write, a copy that differs: the image is as it was."""
    image = _image(tmp_path)
    before = image.read_bytes()

    def refused(wanted: NewVolume, key: bytes = OLD, size: int | None = None) -> str:
        with pytest.raises(SvsmError) as caught:
            rebuild_image(image, key, wanted, _file_device, image_bytes=size)
        assert image.read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["volume.img"]
        return caught.value.code

    assert refused(NewVolume(NEW), size=40 << 10) == "cocoonfs-full"
    assert refused(NewVolume(NEW), key=NEW) == "cocoonfs-authentication"
    original = Volume.create

    def other_contents(*arguments: object, **options: object) -> Volume:
        volume = original(*arguments, **options)  # type: ignore[arg-type]
        with volume.transaction() as transaction:
            transaction.write(99, b"not in the original")
        return volume

    monkeypatch.setattr(Volume, "create", other_contents)
    assert refused(NewVolume(NEW)) == "cocoonfs-copy"


def test_failing_disk() -> None:
    source = Volume.open(_volume(), OLD)
    disk = PowerCutDisk(bytes(128 << 10), fail_writes=[5])
    with pytest.raises(BackendError):
        copy_volume(source, disk, NewVolume(NEW))


def test_not_a_plain_file(tmp_path: Path) -> None:
    with pytest.raises(SvsmError) as caught:
        rebuild_image(tmp_path, OLD, NewVolume(NEW), _file_device)
    assert caught.value.code == "cocoonfs-exists"
