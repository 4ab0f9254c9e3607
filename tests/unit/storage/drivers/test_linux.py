# SPDX-License-Identifier: MIT OR Apache-2.0
"""The driver for block special files, on real ones: loop devices over files."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from svsm.abi.block import BlockDevice
from svsm.formats.errors import BackendError, StateError
from svsm.storage.cocoonfs import Volume
from svsm.storage.drivers.file import FileDevice
from svsm.storage.drivers.linux import LinuxDevice, open_linux
from svsm.testing.block_conformance import CHECKS, SIZE_BYTES, Check, Subject, initial_content
from tests.support import absent

Attach = Callable[..., str]


@pytest.fixture
def attach(tmp_path: Path) -> Iterator[Attach]:
    """Makes a block device of a file: ``attach(path, option…)``; all are taken down afterwards."""
    if os.geteuid():
        pytest.skip("making a loop device needs root")
    made: list[str] = []

    def make(path: Path, *options: str) -> str:
        command = ["losetup", "--find", "--show", *options, str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except OSError as error:
            raise absent(f"losetup does not run: {error}") from error
        if done.returncode:
            raise absent(f"this machine makes no loop device: {done.stderr.strip()}")
        made.append(done.stdout.strip())
        return made[-1]

    yield make
    for device in made:
        subprocess.run(["losetup", "--detach", device], timeout=60, check=True)


@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check: Check, direct: bool, attach: Attach, tmp_path: Path) -> None:
    path, devices = tmp_path / "disk", []

    def fresh(*options: str) -> str:
        path.write_bytes(initial_content())
        devices.append(attach(path, *options))
        return devices[-1]

    def grow(more: int) -> None:
        os.truncate(path, SIZE_BYTES + more)
        subprocess.run(["losetup", "--set-capacity", devices[-1]], timeout=60, check=True)

    def create_failing() -> BlockDevice:
        return LinuxDevice(os.open(fresh(), os.O_RDONLY | (os.O_DIRECT if direct else 0)))

    check(
        Subject(
            create=lambda: open_linux(fresh(), direct=direct),
            reopen=lambda: open_linux(devices[-1], direct=direct),
            create_read_only=lambda: open_linux(fresh("--read-only"), read_only=True, direct=direct),
            grow=grow,
            create_failing=create_failing,
        )
    )


def test_what_it_says_of_itself(attach: Attach, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE_BYTES))
    device = open_linux(attach(path, "--sector-size", "4096"), direct=True)
    assert (device.size_bytes, device.block_size_bytes, device.read_only) == (SIZE_BYTES, 4096, False)
    assert device.physical_block_bytes >= 4096
    assert device.direct
    with pytest.raises(StateError) as caught:
        device.read([(512, 512)])
    assert caught.value.code == "block-alignment"
    device.write([(4096, memoryview(b"odd buffer" * 4096)[5 : 5 + 8192])])  # at no page of ours
    device.flush()
    assert path.read_bytes()[4096 : 4096 + 8192] == (b"odd buffer" * 4096)[5 : 5 + 8192]
    device.close()


def test_a_device_that_is_read_only_says_so(attach: Attach, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(initial_content())
    device = LinuxDevice(os.open(attach(path, "--read-only"), os.O_RDONLY))
    assert device.read_only
    with pytest.raises(StateError) as caught:
        device.write_zeroes([(0, 512)])
    assert caught.value.code == "block-read-only"
    device.close()
    assert path.read_bytes() == initial_content()


def test_claimed_for_one(attach: Attach, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE_BYTES))
    name = attach(path)
    device = open_linux(name)
    with pytest.raises(StateError) as caught:
        open_linux(name)
    assert caught.value.code == "block-in-use"
    with pytest.raises(StateError) as caught:
        LinuxDevice(os.open(name, os.O_RDWR))  # not claimed, but locked
    assert caught.value.code == "block-in-use"
    device.close()
    open_linux(name).close()


def test_discard_and_zeroes_reach_the_device(attach: Attach, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(initial_content())
    device = open_linux(attach(path))
    device.discard([(0, SIZE_BYTES // 2)])
    device.write_zeroes([(SIZE_BYTES // 2, SIZE_BYTES // 4)])
    device.flush()
    assert path.read_bytes() == bytes(SIZE_BYTES * 3 // 4) + initial_content()[SIZE_BYTES * 3 // 4 :]
    assert path.stat().st_blocks * 512 < SIZE_BYTES  # a loop device punches holes into its file
    device.close()


def test_a_volume(attach: Attach, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE_BYTES))
    name = attach(path)
    volume = Volume.create(open_linux(name, direct=True), b"key", salt=b"")
    with volume.transaction() as transaction:
        transaction.write(16, b"contents" * 500)
    volume.close()
    device = open_linux(name, read_only=True)
    assert Volume.open(device, b"key").read(16) == b"contents" * 500
    device.close()


def test_what_is_no_block_device(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE_BYTES))
    for name in (str(path), "/dev/null", str(tmp_path / "nothing")):
        with pytest.raises(BackendError) as caught:
            open_linux(name)
        assert caught.value.code == "block-io"
    with pytest.raises(BackendError):
        LinuxDevice(os.open(path, os.O_RDWR))
    reader, writer = os.pipe()
    os.close(writer)
    with pytest.raises(BackendError):
        LinuxDevice(reader)


def test_a_block_device_is_no_file(attach: Attach, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE_BYTES))
    with pytest.raises(BackendError) as caught:
        FileDevice(os.open(attach(path), os.O_RDWR))
    assert caught.value.code == "block-io"
